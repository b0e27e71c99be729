"""Write `report.html`: what a run changed, with pictures, curves, settings and its adapter."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from flowalign.files import write_file
from flowalign.reporting.cards import make_cards
from flowalign.reporting.console import format_mean, interval_note
from flowalign.reporting.page import (
    curves_of,
    gallery_of,
    Page,
    render,
    sections_of,
    votes_of,
)
from flowalign.reporting.record import (
    Cell,
    difference_cell,
    LESS_IS_BETTER,
    RunRecord,
    Side,
    Table,
)
from flowalign.reporting.summary import baselines, guidance_note, result_notes, Summary
from flowalign.reporting.tags import tag_tables
from flowalign.reporting.verdict import verdict

TRAINED = "trained"
RUNNING = "running"
"""The value of `stopped` in a summary while a run trains."""


def write_report(
    run: Path, record: RunRecord, summary: Summary, target: tuple[str, int] | None = None
) -> None:
    """Write `report.html` into a run folder.

    Args:
        run: The run folder.
        record: What the folder holds.
        summary: The content of its `summary.json`, or of a run that is not finished.
        target: The score that the run is about, and 1 if more of it is better or -1 if less is.
    """
    write_file(run / "report.html", render(report_page(run, record, summary, target)))


def report_page(
    run: Path, record: RunRecord, summary: Summary, target: tuple[str, int] | None = None
) -> Page:
    """Return the page of one run. Arguments are those of `write_report`."""
    name, sign = target or ("", 1)
    less_is_better = LESS_IS_BETTER | ({name} if sign < 0 else set())
    sides = sides_of(record)
    gallery = gallery_of(record)
    return Page(
        title=record.name,
        subtitle=_progress(record.metrics, summary),
        verdict=[*verdict(summary, name, less_is_better), *_diversity(record)],
        scores=score_table(summary, less_is_better),
        notes=_notes(summary),
        remarks=result_notes(run, summary),
        sides=[side.label for side in sides],
        left=0,
        rewards=list(sides[-1].result.rewards) if sides else [],
        cards=make_cards(sides, record.prompts),
        tags=tag_tables(sides, _contrasts(sides), record.prompts),
        votes=votes_of([record]),
        groups=curves_of([record]),
        galleries=[gallery] if gallery else [],
        differing=None,
        runs=[sections_of(record)],
    )


def sides_of(record: RunRecord) -> list[Side]:
    """Return what the cards of a run compare."""
    results = {"base": record.before, "guided": record.guided, TRAINED: record.after}
    return [Side(label, result) for label, result in results.items() if result]


def score_table(summary: Summary, less_is_better: frozenset[str]) -> Table:
    """Return the mean of each score, and what training adds to each baseline."""
    columns, minus = baselines(summary), "\N{MINUS SIGN}"
    names = summary["difference"] or summary["before"]
    if not summary["difference"]:
        rows = [[Cell(name), Cell(format_mean(summary["before"], name))] for name in names]
        return Table("", ["score", "base"], rows)
    head = ["score", *(column.label for column in columns), TRAINED]
    head += [f"{TRAINED} {minus} {column.label}" for column in columns]
    rows = [
        [
            Cell(name),
            *(Cell(format_mean(column.means, name)) for column in columns),
            Cell(format_mean(summary["after"], name)),
            *(difference_cell(column.difference, name, less_is_better) for column in columns),
        ]
        for name in names
    ]
    return Table("", head, rows)


def _contrasts(sides: Sequence[Side]) -> list[tuple[int, int]]:
    """Return the trained side minus each other one, if there is a trained side."""
    last = len(sides) - 1
    is_trained = bool(sides) and sides[-1].label == TRAINED
    return [(last, other) for other in range(last)] if is_trained else []


def _progress(metrics: Sequence[Mapping[str, float]], summary: Summary) -> str:
    """Say how far the run came: images, or steps if it learns from given pictures."""
    steps = max((entry["step"] for entry in metrics), default=0)
    amount = f"{summary['images']:,} images" if summary["images"] else f"{steps:,} steps"
    stopped = summary["stopped"]
    minutes = f"{summary['seconds'] / 60:.1f} minutes"
    if stopped == RUNNING:
        figures = f"The figures are of step {summary['step']}."
        return f"Still training: {amount} in {minutes} so far. {figures}"
    return f"{stopped[:1].upper()}{stopped[1:]} after {amount} in {minutes}."


def _notes(summary: Summary) -> list[str]:
    guided = summary["baseline_guided"]
    return [
        "Base is the model without the adapter.",
        *([guidance_note(guided)] if guided else []),
        "± is half the 95 % interval of the paired difference.",
        interval_note(summary["prompts"], summary["held_out"]),
    ]


def _diversity(record: RunRecord) -> list[str]:
    """Say how the diversity of a prompt's pictures changed, if it was measured."""
    results = [record.before, record.after]
    figures = [result.figures.get("diversity") for result in results if result]
    if len(figures) < 2 or None in figures:
        return []
    before, after = figures
    return [f"Diversity of the pictures of a prompt: {before:.3f} before, {after:.3f} now."]
