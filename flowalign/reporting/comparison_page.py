"""Write a page that shows several runs side by side, as the report of each shows one."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from flowalign.evaluation.comparison import Comparison
from flowalign.files import write_file
from flowalign.reporting.cards import make_cards
from flowalign.reporting.comparison import COLUMNS, describe, rows, UNTRAINED
from flowalign.reporting.page import (
    curves_of,
    gallery_of,
    Page,
    render,
    sections_of,
    votes_of,
)
from flowalign.reporting.record import Cell, mood_of, RunRecord, Side, Table
from flowalign.reporting.tags import tag_tables
from flowalign.reporting.verdict import comparison_verdict


def write_comparison(
    file: Path,
    comparison: Comparison,
    records: Sequence[RunRecord],
    settings: Mapping[str, Sequence[str]],
) -> None:
    """Write a page with the scores, pictures, curves and settings of every run side by side.

    Args:
        file: The page.
        comparison: The comparison.
        records: What the folders of the runs hold, in the order of the comparison.
        settings: The value of every run, by configuration key.
    """
    write_file(file, render(comparison_page(comparison, records, settings)))


def comparison_page(
    comparison: Comparison, records: Sequence[RunRecord], settings: Mapping[str, Sequence[str]]
) -> Page:
    """Return the page of a comparison. Arguments are those of `write_comparison`."""
    first, *others = comparison.runs
    sides = _sides(records)
    # The sides of the runs are the last ones.
    start = len(sides) - len(records)
    galleries = [gallery_of(record) for record in records]
    keys = [[Cell(key), *map(Cell, values)] for key, values in settings.items()]
    prompts = records[0].prompts
    return Page(
        title=f"{', '.join(others)} compared with {first}",
        subtitle="",
        verdict=[comparison_verdict(first, run, comparison.difference[run]) for run in others],
        scores=Table("", COLUMNS, list(_score_rows(comparison)), names=2),
        notes=[describe(comparison)],
        remarks=[],
        sides=[side.label for side in sides],
        left=start,
        rewards=list(sides[-1].result.rewards) if sides else [],
        cards=make_cards(sides, prompts),
        tags=tag_tables(sides, [(start + n, start) for n in range(1, len(records))], prompts),
        votes=votes_of(records),
        groups=curves_of(records),
        galleries=[gallery for gallery in galleries if gallery],
        differing=Table("", ["key", *comparison.runs], keys) if keys else None,
        runs=[sections_of(record) for record in records],
    )


def _sides(records: Sequence[RunRecord]) -> list[Side]:
    """Return the untouched model, the guided one if the first run has it, and every run."""
    first = records[0]
    results = [(UNTRAINED, first.before), (f"{UNTRAINED}, guided", first.guided)]
    results += [(record.name, record.after) for record in records]
    return [Side(label, result) for label, result in results if result]


def _score_rows(comparison: Comparison) -> Iterator[list[Cell]]:
    """Yield the rows of the table on the console, with the mood of each difference."""
    score = ""
    for name, run, mean, difference in rows(comparison):
        score = name or score
        mood = mood_of(comparison.difference[run][score], score) if difference else ""
        yield [Cell(name), Cell(run), Cell(mean), Cell(difference, mood)]
