"""The table of a comparison of runs, and its form on the console."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Column, Table

from flowalign.evaluation.comparison import Comparison
from flowalign.reporting.console import (
    format_difference,
    format_mean,
    interval_note,
    make_console,
)

UNTRAINED = "no adapter"
COLUMNS = ("score", "run", "mean", "difference")

Row = tuple[str, ...]


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print each score of every run, and its difference to the first run."""
    console = console or make_console()
    table = Table(
        *(Column(name, overflow="fold") for name in COLUMNS[:2]),
        *(Column(name, justify="right", no_wrap=True) for name in COLUMNS[2:]),
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="bold",
    )
    for row in rows(comparison):
        table.add_row(*row)
    console.print(table)
    console.print(describe(comparison), style="dim", soft_wrap=True)


def rows(comparison: Comparison) -> Iterator[Row]:
    """Yield the rows of the table: score, run, mean, and difference to the first run."""
    for score in comparison.scores:
        yield score, UNTRAINED, format_mean(comparison.untrained, score), ""
        if score in comparison.guided:
            yield "", f"{UNTRAINED}, guided", format_mean(comparison.guided, score), ""
        for number, run in enumerate(comparison.runs):
            mean = format_mean(comparison.means[run], score)
            difference = format_difference(comparison.difference[run], score) if number else ""
            yield "", run, mean, difference


def describe(comparison: Comparison) -> str:
    """Say what the differences are between, and what the intervals and the guided row mean."""
    notes = [
        f"Differences are to {comparison.runs[0]}, on the same prompts and noise.",
        interval_note(comparison.prompts, comparison.held_out),
    ]
    if comparison.guided:
        notes.append(f"Guided is the model at its best guidance, {comparison.guidance:g}.")
    return " ".join(notes)
