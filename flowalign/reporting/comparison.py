"""Show a comparison of runs: a table on the console, and a self-contained page with plots."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Column, Table

from flowalign.evaluation.comparison import Comparison
from flowalign.files import write_file
from flowalign.reporting.console import (
    format_difference,
    format_mean,
    interval_note,
    make_console,
)
from flowalign.reporting.html import base64_text, embedded, render
from flowalign.reporting.trackers import read_metrics

TEMPLATE = "comparison.html.jinja"
UNTRAINED = "no adapter"
COLUMNS = ("score", "run", "mean", "difference")
COLORS = ("#2d52d6", "#c8501e", "#1a7f4b", "#8a3ab9", "#b08900", "#5a6270")
"""Colours of the runs, in their order; they repeat beyond the last."""

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


def write_comparison(
    file: Path,
    comparison: Comparison,
    folders: Sequence[Path],
    settings: Mapping[str, Sequence[str]],
) -> None:
    """Write a page with the table, plots, the pictures of every run, and settings that differ.

    Args:
        file: The page.
        comparison: The comparison.
        folders: The run folders, in the order of the comparison.
        settings: The value of every run, by configuration key.
    """
    runs = dict(zip(comparison.runs, folders, strict=True))
    sheets = {name: folder / "pictures" / "before-after.png" for name, folder in runs.items()}
    page = render(
        TEMPLATE,
        runs=comparison.runs,
        columns=COLUMNS,
        rows=list(rows(comparison)),
        note=describe(comparison),
        differences=[(score, draw_differences(comparison, score)) for score in comparison.scores],
        curves=[(score, draw_curves(score, runs)) for score in comparison.scores],
        sheets=[
            (name, base64_text(sheet.read_bytes()))
            for name, sheet in sheets.items()
            if sheet.is_file()
        ],
        settings=settings,
    )
    write_file(file, page.encode())


def draw_differences(comparison: Comparison, score: str) -> str:
    """Draw the difference of every run to the first, with its interval, as PNG in base64."""
    others = comparison.runs[1:]
    figure = Figure(figsize=(4.2, 0.9 + 0.5 * len(others)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color="#888", linewidth=0.8)
    for place, run in enumerate(others):
        low, mean, high = comparison.difference[run][score]
        color = _color(comparison.runs, run)
        axes.plot(mean, place, "o", color=color, markersize=5)
        _label(axes, run, place)
        # matplotlib draws nothing that is not finite.
        axes.plot([low, high], [place, place], color=color, linewidth=2)
    axes.set_yticks([])
    axes.set_ylim(len(others) - 0.5, -0.7)
    axes.set_title(f"{score}: difference to {comparison.runs[0]}", fontsize=10, parse_math=False)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return embedded(figure)


def _label(axes: Axes, run: str, place: int) -> None:
    """Write the name of a run above its interval, at the left end."""
    # A name may hold a dollar sign, which matplotlib would read as the start of a formula. The plot
    # keeps its size, however long the name is.
    text = axes.annotate(
        run, (0, place), (0, 6), xycoords=("axes fraction", "data"), textcoords="offset points"
    )
    text.set(fontsize=8, parse_math=False, in_layout=False, clip_on=True)


def draw_curves(score: str, runs: Mapping[str, Path]) -> str:
    """Draw an evaluation score of all runs over training images, as PNG in base64."""
    figure = Figure(figsize=(4.2, 2.8), layout="constrained")
    axes = figure.add_subplot()
    metrics = {name: read_metrics(folder) for name, folder in runs.items()}
    # Runs that learn from given pictures make no images, so their steps are the horizontal axis.
    made = all(entries and entries[-1].get("images") for entries in metrics.values())
    axis = "images" if made else "step"
    for name, entries in metrics.items():
        points = [(entry[axis], entry[f"eval/{score}"]) for entry in entries if _has(entry, score)]
        color = _color(list(runs), name)
        axes.plot(*zip(*points, strict=True) if points else ([], []), "o-", color=color, label=name)
    legend = axes.legend(fontsize=8, frameon=False)
    # The plot keeps its size, however long the names of the runs are.
    legend.set_in_layout(False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    axes.set_title(score, fontsize=10, parse_math=False)
    axes.set_xlabel(axis, fontsize=9)
    axes.set_xlim(left=0)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return embedded(figure)


def _has(entry: Mapping[str, float], score: str) -> bool:
    return entry.get(f"eval/{score}") is not None


def _color(runs: Sequence[str], run: str) -> str:
    return COLORS[runs.index(run) % len(COLORS)]
