"""Write `report.html`: one self-contained page with figures, curves, pictures and settings."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure

from flowalign.files import write_file
from flowalign.reporting.console import format_difference, format_mean, interval_note
from flowalign.reporting.summary import baselines, guidance_note, result_notes, Summary
from flowalign.reporting.trackers import read_metrics

TEMPLATE = "report.html.jinja"
FURTHER_CURVES = ("ratio/clipped", "kl", "loss", "grad_norm")
"""Metrics that get a curve besides rewards and evaluations, in this order."""
NOT_DRAWN = {"reward/groups_without_spread"}
FEW_POINTS = 20
"""Curves with fewer points than this mark each point."""

Points = list[tuple[float, float]]


def write_report(run: Path, summary: Summary, captions: Sequence[str] = ()) -> None:
    """Write `report.html` from the files of a run folder.

    Args:
        run: The run folder.
        summary: The content of its `summary.json`.
        captions: The prompts of the sheet of pictures, in their order.
    """
    stopped, entries = summary["stopped"], read_metrics(run)
    page = render(
        TEMPLATE,
        name=run.name,
        summary=summary,
        notes=result_notes(run, summary),
        stopped=stopped[:1].upper() + stopped[1:],
        amount=_amount(entries, summary),
        intervals=interval_note(summary["prompts"], summary["held_out"]),
        sheet=base64_text((run / "pictures" / "before-after.png").read_bytes()),
        baselines=baselines(summary),
        note=guidance_note(summary["baseline_guided"]) if summary["baseline_guided"] else "",
        mean=format_mean,
        difference=format_difference,
        captions=captions,
        curves=draw_curves(entries, summary),
        config=(run / "config.yaml").read_text(encoding="utf-8"),
        environment=(run / "environment.json").read_text(encoding="utf-8"),
    )
    write_file(run / "report.html", page.encode())


def render(template: str, **values: object) -> str:
    """Fill a template of this folder.

    Prompts, names of rewards and paths come from the user, and every value is escaped.
    """
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    return templates.get_template(template).render(values)


def _amount(entries: Sequence[Mapping[str, float]], summary: Summary) -> str:
    """Return how much was trained: images, or steps if the run learned from given pictures."""
    if summary["images"]:
        return f"{summary['images']:,} images"
    return f"{max((entry['step'] for entry in entries), default=0):,} steps"


def draw_curves(entries: Sequence[Mapping[str, float]], summary: Summary) -> list[tuple[str, str]]:
    """Draw one curve per metric. Returns names and PNG files in base64."""
    # A run that learns from given pictures makes no images, so its steps are the horizontal axis.
    axis = "images" if summary["images"] else "step"
    last = max([entry[axis] for entry in entries], default=1)
    points, heights = list(entries), {}
    # The summary of a chosen step is of half of the prompts and perhaps of an earlier step. The
    # curves are of all prompts, up to the last step.
    if not summary["chosen_by"]:
        # `metrics.jsonl` has no evaluation before training.
        points += [_evaluation(axis, 0, summary["before"])]
        points += [_evaluation(axis, last, summary["after"])]
        heights = _guided_heights(summary)
    points.sort(key=lambda entry: entry[axis])
    curves = []
    for name in _names(points):
        values = [(point[axis], point[name]) for point in points if name in point]
        curves.append((name, _curve(values, (axis, last), heights.get(name))))
    return curves


def _evaluation(axis: str, x: float, scores: Mapping[str, float]) -> dict[str, float]:
    """Return the evaluation before or after training as a line of `metrics.jsonl`."""
    return {axis: x, **{f"eval/{name}": score for name, score in scores.items()}}


def _names(points: Sequence[Mapping[str, float]]) -> list[str]:
    logged = {name for point in points for name in point}
    scores = {name for name in logged if name.startswith(("reward/", "eval/"))}
    return sorted(scores - NOT_DRAWN) + [name for name in FURTHER_CURVES if name in logged]


def _guided_heights(summary: Summary) -> dict[str, float]:
    """Return the mean of the guided base by the names of the curves that show it."""
    # The curve itself begins at the base, so only a second baseline needs a line.
    others = baselines(summary)[1:]
    return {f"eval/{name}": mean for other in others for name, mean in other.means.items()}


def _curve(points: Points, axis: tuple[str, float], guided: float | None) -> str:
    """Draw a curve over an axis with a name and a last value, and a line for the guided base.

    The page writes the name of the metric: matplotlib lacks letters of many scripts, and takes a
    text with dollar signs for a formula.
    """
    # A figure of its own per metric, so that the page can arrange them for a phone. `Figure` does
    # without pyplot, whose global state is not safe in a thread.
    figure = Figure(figsize=(3.4, 2.4))
    # Fixed margins: the axes of all curves line up. A computed layout would draw each one twice.
    axes = figure.add_axes((0.17, 0.19, 0.75, 0.72))
    axes.locator_params(nbins=5)
    marker = "o" if len(points) < FEW_POINTS else None
    x, y = zip(*points, strict=True)
    axes.plot(x, y, color="#2d52d6", linewidth=1.2, marker=marker, markersize=3)
    if guided is not None:
        axes.axhline(guided, color="#777", linewidth=1, linestyle="--")
        # At the left end, where a curve that begins at the base leaves room above the line.
        axes.annotate("guided base", (0, guided), (3, 2), textcoords="offset points", fontsize=7)
    axes.set_xlabel(axis[0], fontsize=9)
    axes.set_xlim(0, axis[1])
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return embedded(figure)


def embedded(figure: Figure) -> str:
    """Return a figure as a PNG file in base64."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return base64_text(file.getvalue())


def base64_text(content: bytes) -> str:
    """Return the content of a file in base64."""
    return base64.b64encode(content).decode()
