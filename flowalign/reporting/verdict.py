"""The first sentences of a report: what improved, against which baseline, and what fell."""

from collections.abc import Mapping, Sequence

from flowalign.evaluation.statistics import Interval
from flowalign.reporting.console import format_difference
from flowalign.reporting.record import LESS_IS_BETTER, mood_of
from flowalign.reporting.summary import baselines, Summary

BASELINES = {"base": "the base", "guided": "the base at its best guidance"}
NOT_EVALUATED = "The trained weights have not been evaluated yet."

Differences = Mapping[str, Interval]


def verdict(summary: Summary, target: str, less_is_better: frozenset[str]) -> list[str]:
    """Say in a few sentences what training did to the scores of a run.

    Args:
        summary: The content of `summary.json`, or of a run that is not finished.
        target: The score that the run is about.
        less_is_better: The scores of which less is better.
    """
    differences = summary["difference"]
    if not differences:
        return [NOT_EVALUATED]
    target = target if target in differences else next(iter(differences))
    columns = baselines(summary)
    against = [
        _against(column.difference[target], target, BASELINES[column.label], less_is_better)
        for column in columns
        if target in column.difference
    ]
    start, end = summary["before"][target], summary["after"][target]
    first = f"{target} went from {start:.3f} to {end:.3f}: {', and '.join(against)}."
    others = {name: value for name, value in differences.items() if name != target}
    return [first, *_others(others, less_is_better)]


def comparison_verdict(first: str, run: str, differences: Differences) -> str:
    """Say in which scores a run is better or worse than the first one."""
    parts = [
        f"{mood} in {_listed(differences, names)}"
        for mood in ("better", "worse")
        if (names := _with_mood(differences, mood, LESS_IS_BETTER))
    ]
    if not parts:
        return f"{run} does not clearly differ from {first} in any score."
    return f"{run} is {', and '.join(parts)}, compared with {first}."


def _against(interval: Interval, name: str, other: str, less_is_better: frozenset[str]) -> str:
    difference = format_difference({name: interval}, name)
    mood = mood_of(interval, name, less_is_better)
    if not mood:
        return f"not clearly different from {other} ({difference})"
    return f"{mood} than {other} ({difference})"


def _others(differences: Differences, less_is_better: frozenset[str]) -> list[str]:
    """Say which of the other scores became better, and which worse."""
    if not differences:
        return []
    better = _with_mood(differences, "better", less_is_better)
    worse = _with_mood(differences, "worse", less_is_better)
    sentences = []
    if better:
        sentences.append(f"Also better than the base: {_listed(differences, better)}.")
    if worse:
        return [*sentences, f"Worse than the base: {_listed(differences, worse)}."]
    return [*sentences, "No other score became clearly worse."]


def _with_mood(differences: Differences, mood: str, less_is_better: frozenset[str]) -> list[str]:
    return [n for n, value in differences.items() if mood_of(value, n, less_is_better) == mood]


def _listed(differences: Differences, names: Sequence[str]) -> str:
    return ", ".join(f"{name} ({format_difference(differences, name)})" for name in names)
