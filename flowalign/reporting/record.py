"""The content of a page about one run, and the tables and sides that its sections are made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from flowalign.config.changes import Changes
from flowalign.data.prompts import Prompt
from flowalign.evaluation.results import EvaluationResult
from flowalign.evaluation.statistics import Interval
from flowalign.reporting.console import format_difference

LESS_IS_BETTER = frozenset({"reconstruction_error"})
"""Held-out figures that count errors."""


class Snippet(NamedTuple):
    """Lines that a reader copies."""

    title: str
    text: str


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run, as its folder holds it. What a folder lacks is empty or None."""

    name: str
    objective: str
    model: str
    config: str
    """The text of `config.yaml`."""
    environment: str = ""
    """The text of `environment.json`."""
    changes: Changes | None = None
    """The differences to the file that the run's YAML extends."""
    metrics: Sequence[Mapping[str, float]] = ()
    """The lines of `metrics.jsonl`."""
    metrics_before: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the evaluation before training."""
    prompts: Sequence[Prompt] = ()
    """The evaluation prompts."""
    before: EvaluationResult | None = None
    guided: EvaluationResult | None = None
    """The model without adapter at its best guidance, if that is another one than its own."""
    after: EvaluationResult | None = None
    """The exported weights, or those of the last evaluation of a run that is not finished."""
    steps: Mapping[int, EvaluationResult] = field(default_factory=dict)
    """Some of the evaluations on the way, with thumbnails."""
    snippets: Sequence[Snippet] = ()
    """How to load the adapter."""


class Side(NamedTuple):
    """Weights whose pictures and scores stand beside those of others."""

    label: str
    result: EvaluationResult


class Cell(NamedTuple):
    """A cell of a table. `mood` is "better", "worse" or empty."""

    text: str
    mood: str = ""


class Table(NamedTuple):
    """A table: the first columns have names, the others figures."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    names: int = 1
    """How many columns have names."""


def mood_of(interval: Interval, name: str, less_is_better: frozenset[str] = LESS_IS_BETTER) -> str:
    """Return "better" or "worse" if an interval of a difference leaves out zero, else nothing.

    A difference that is written as 0.000 is neither.
    """
    low, mean, high = interval
    if low <= 0 <= high or abs(mean) < 0.0005 or mean != mean:
        return ""
    return "better" if (low > 0) != (name in less_is_better) else "worse"


def difference_cell(
    differences: Mapping[str, Interval],
    name: str,
    less_is_better: frozenset[str] = LESS_IS_BETTER,
) -> Cell:
    """Return the cell of a difference, or a dash if it was not measured."""
    # The mean of no score is NaN, which differs from itself.
    if name not in differences or differences[name][1] != differences[name][1]:
        return Cell("-")
    mood = mood_of(differences[name], name, less_is_better)
    return Cell(format_difference(differences, name), mood)
