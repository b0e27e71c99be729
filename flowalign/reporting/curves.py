"""Curves of all metrics of one or several runs, as geometry that the page draws as SVG.

The page holds the points too, so that its script can show the values under the pointer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

MOST_POINTS = 400
"""The most points of a line. Longer ones show means of equally many steps in a row."""
WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 24
"""Margins around the area of a curve."""
FEW_POINTS = 20
"""Lines with fewer points than this mark each point."""
GROUPS = (
    ("Evaluations", ("eval/",)),
    ("Preferences in training", ("chosen_preferred", "margin", "moved/", "error/")),
    ("Rewards in training", ("reward/", "multiplier/")),
    ("Objective and optimiser", ("",)),
    ("Evaluations of the half of the prompts that chooses a step", ("selection/",)),
    ("Time", ("seconds", "images_per_second")),
)
"""Headings, and how the names of their metrics begin. The longest beginning that fits counts."""
FOLDED = frozenset(title for title, _ in GROUPS[-2:])
"""Headings whose curves are folded."""
AXES = ("step", "images")

Metrics = Mapping[str, float]
Point = tuple[float, float, float]
"""Place on the horizontal axis, value and step."""


class Line(NamedTuple):
    """The line of one run."""

    label: str
    color: int
    """Number of the colour of the run."""
    points: Sequence[Point]
    path: str
    """The line as an SVG path."""
    marks: Sequence[tuple[float, float]]
    """The places of points that are marked."""


class Tick(NamedTuple):
    """A labelled place on an axis, in pixels."""

    place: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A metric over training."""

    name: str
    axis: str
    """The horizontal axis: "images" or "step"."""
    lines: Sequence[Line]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    guided: float | None = None
    """The height of the line of the guided base, in pixels, or None."""

    @property
    def description(self) -> str:
        """Say in words where each line begins and ends."""
        parts = [
            f"{line.label} from {number(line.points[0][1])} to {number(line.points[-1][1])}"
            for line in self.lines
        ]
        return f"{self.name} over {self.axis}: {'; '.join(parts)}"

    @property
    def data(self) -> dict[str, object]:
        """The content that the script of the page reads."""
        return {
            "axis": self.axis,
            "lines": [
                {
                    "label": line.label,
                    "color": line.color,
                    "points": line.points,
                    "places": _places(line.path),
                }
                for line in self.lines
            ],
        }


@dataclass(frozen=True, kw_only=True)
class Logged:
    """The metrics of a run."""

    label: str
    entries: Sequence[Metrics]
    """The lines of `metrics.jsonl`."""
    before: Metrics = field(default_factory=dict)
    """The evaluation before training."""


def make_curves(
    runs: Sequence[Logged], guided: Mapping[str, float]
) -> list[tuple[str, list[Curve]]]:
    """Return the curves of all metrics but the axes, under headings.

    Args:
        runs: One or several runs.
        guided: The means of the guided base, by the names of the curves that show them.
    """
    runs = [run for run in runs if run.entries]
    # Runs that learn from given pictures make no images, so their steps are the horizontal axis.
    made = all(run.entries[-1].get("images") for run in runs)
    axis = "images" if made else "step"
    names = {name for run in runs for entry in [run.before, *run.entries] for name in entry}
    curves = [
        curve
        for name in sorted(names - {*AXES})
        if (curve := _curve(name, axis, runs, guided.get(name)))
    ]
    groups = [(title, [c for c in curves if _group(c.name) == title]) for title, _ in GROUPS]
    return [(title, members) for title, members in groups if members]


def number(value: float) -> str:
    """Return a number with four digits."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _group(name: str) -> str:
    starts = [(start, title) for title, starts in GROUPS for start in starts]
    return max((s, title) for s, title in starts if name.startswith(s))[1]


def _curve(name: str, axis: str, runs: Sequence[Logged], guided: float | None) -> Curve | None:
    series = [_points(name, axis, run) for run in runs]
    values = [value for points in series for _, value, _ in points]
    if not values:
        return None
    if guided is not None:
        values.append(guided)
    last = max([entry.get(axis) or 0 for run in runs for entry in run.entries] + [1])
    low, high = _range(values)
    across = _Scale(0, last, LEFT, WIDTH - RIGHT)
    up = _Scale(low, high, HEIGHT - BOTTOM, TOP)
    lines = [
        _line(run.label, color, points, across, up)
        for color, (run, points) in enumerate(zip(runs, series, strict=True))
        if points
    ]
    return Curve(
        name=name,
        axis=axis,
        lines=lines,
        x_ticks=[tick for tick in _ticks(0, last, across) if "." not in tick.text],
        y_ticks=_ticks(low, high, up),
        guided=None if guided is None else up(guided),
    )


def _points(name: str, axis: str, run: Logged) -> list[Point]:
    """Return the points of a metric: the value before training, and those of steps, thinned."""
    entries = [{axis: 0, "step": 0, **run.before}, *run.entries]
    points = [
        (float(entry[axis]), float(entry[name]), float(entry["step"]))
        for entry in entries
        if _is_number(entry.get(name)) and _is_number(entry.get(axis))
    ]
    size = math.ceil(len(points) / MOST_POINTS)
    if size <= 1:
        return points
    chunks = [points[start : start + size] for start in range(0, len(points), size)]
    return [(c[-1][0], sum(value for _, value, _ in c) / len(c), c[-1][2]) for c in chunks]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


class _Scale(NamedTuple):
    """A linear map from values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def _line(label: str, color: int, points: Sequence[Point], across: _Scale, up: _Scale) -> Line:
    places = [(across(x), up(y)) for x, y, _ in points]
    path = "M" + "L".join(f"{x} {y}" for x, y in places)
    return Line(label, color, points, path, places if len(places) < FEW_POINTS else [])


def _places(path: str) -> list[list[float]]:
    """Return the pixels of the points of a path."""
    return [[float(value) for value in place.split()] for place in path[1:].split("L")]


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of a vertical axis, with some space around the values."""
    low, high = min(values), max(values)
    space = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - space, high + space


def _ticks(low: float, high: float, scale: _Scale) -> list[Tick]:
    """Return three to six round numbers between two ends."""
    raw = (high - low) / 4
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    values = [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    if max(map(abs, values)) < 1e-3:
        return [Tick(scale(x), f"{x:.3g}") for x in values]
    # As many decimals as tell neighbours apart: one more for a step of 2.5.
    digits = max(0, -math.floor(math.log10(step)))
    digits += any(round(x, digits) != round(x, digits + 1) for x in values)
    return [Tick(scale(x), f"{x:,.{digits}f}") for x in values]
