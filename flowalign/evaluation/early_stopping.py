"""When a run ends before its last step, and which of its evaluations was the best.

All functions here look only at the evaluations so far, so a resumed run decides as before.
"""

import math
from dataclasses import dataclass

from flowalign.errors import RunError
from flowalign.settings.types import CountOrZero, Settings, Unbounded, WrongSetting

Evaluations = list[dict[str, float]]
"""Metrics by name of every step that was evaluated, oldest first; "step" is one of them."""


@dataclass
class StopRule(Settings):
    """A rule about one metric, checked after every evaluation."""

    above: Unbounded = math.inf
    """Stop if the metric is larger than this."""
    below: Unbounded = -math.inf
    """Stop if the metric is smaller than this."""
    falling: CountOrZero = 0
    """Stop after this many evaluations in a row below the best; 0 for never. More is better."""
    rising: CountOrZero = 0
    """Stop after this many evaluations in a row above the best; 0 for never. Less is better."""

    def __post_init__(self) -> None:
        super().__post_init__()
        limited = math.isfinite(self.above) or math.isfinite(self.below)
        empty = not (self.falling or self.rising or limited)
        if empty or not self.below < self.above or (self.falling and self.rising):
            raise WrongSetting(
                f"above is {self.above}, below {self.below}, falling {self.falling} and rising "
                f"{self.rising}; write at least one, below less than above, and not both falling "
                "and rising."
            )

    def holds(self, value: float) -> bool:
        """Return True if the value is within the limits. NaN is not within any."""
        return self.below <= value <= self.above

    def __call__(self, values: list[float]) -> str:
        """Return why to stop after these values of the metric, or an empty string."""
        last = values[-1]
        if last > self.above:
            return f"{last:.4g} is above {self.above:g}"
        if last < self.below:
            return f"{last:.4g} is below {self.below:g}"
        return self._patience_reason(values)

    def _patience_reason(self, values: list[float]) -> str:
        for count, sign, side in ((self.falling, 1, "below"), (self.rising, -1, "above")):
            signed = [sign * value for value in values]
            # Only a value strictly better than all before counts as progress.
            if count and len(values) > count and max(signed[-count:]) < max(signed[:-count]):
                best = sign * max(signed)
                return (
                    f"{values[-1]:.4g} has been {side} its best, {best:.4g}, "
                    f"for {count} evaluations"
                )
        return ""


def stop_reason(rules: dict[str, StopRule], evaluations: Evaluations) -> str:
    """Return the first rule that ends the run and why, or an empty string.

    Raises:
        RunError: A rule names a metric that the run does not log.
    """
    for name, rule in rules.items():
        values = metric_values(name, evaluations)
        reason = rule(values) if values else ""
        if reason:
            return f"{name}: {reason}"
    return ""


def metric_values(name: str, evaluations: Evaluations) -> list[float]:
    """Return one metric over the evaluations. A step that was skipped may lack it.

    Raises:
        RunError: No evaluation has the metric.
    """
    if evaluations and not any(name in entry for entry in evaluations):
        raise RunError(
            f"train.stop: there is no metric {name!r}. This run logs {', '.join(evaluations[-1])}."
        )
    values = [entry.get(name, math.nan) for entry in evaluations]
    return [value for value in values if not math.isnan(value)]


def within_limits(rules: dict[str, StopRule], evaluations: Evaluations) -> Evaluations:
    """Return the evaluations in which every metric was within the limits of its rule."""
    return [entry for entry in evaluations if _keeps_limits(rules, entry)]


def _keeps_limits(rules: dict[str, StopRule], entry: dict[str, float]) -> bool:
    return all(rule.holds(entry[name]) for name, rule in rules.items() if name in entry)


def best_step(name: str, sign: int, evaluations: Evaluations) -> int | None:
    """Return the step of the best evaluation, or None if none has the metric.

    Args:
        name: The metric that decides.
        sign: 1 if more of it is better, -1 if less is.
        evaluations: The evaluations to choose from. Of equal ones the first is the best.
    """
    scored = [entry for entry in evaluations if not math.isnan(entry.get(name, math.nan))]
    if not scored:
        return None
    return int(max(scored, key=lambda entry: sign * entry[name])["step"])
