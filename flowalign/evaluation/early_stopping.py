"""When a run ends before its last step, and which of its evaluations was the best: functions of the evaluations so far."""

import math
from dataclasses import dataclass

from flowalign.errors import RunError
from flowalign.settings.types import CountOrZero, Settings, Unbounded, WrongSetting

Evaluations = list[dict[str, float]]
"""Of every evaluated step, oldest first: "step" and the metrics by name."""


@dataclass
class StopRule(Settings):
    """Of one metric, looked at whenever the run is evaluated."""

    above: Unbounded = math.inf
    """Stop when it is larger."""
    below: Unbounded = -math.inf
    """Stop when it is smaller."""
    falling: CountOrZero = 0
    """Stop when it has been below its best for so many evaluations in a row; 0 for never."""
    rising: CountOrZero = 0
    """Likewise of a metric of which less is better."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = (
            self.falling or self.rising or math.isfinite(self.above) or math.isfinite(self.below)
        )
        if not given or not self.below < self.above or (self.falling and self.rising):
            raise WrongSetting(
                f"above is {self.above}, below {self.below}, falling {self.falling} and rising {self.rising}; "
                "write at least one, below less than above, and not both falling and rising."
            )

    def holds(self, value: float) -> bool:
        """Whether the value is within the limits; NaN is within none."""
        return self.below <= value <= self.above

    def __call__(self, values: list[float]) -> str:
        """Why to stop after these values of the metric, or nothing."""
        last = values[-1]
        if last > self.above:
            return f"{last:.4g} is above {self.above:g}"
        if last < self.below:
            return f"{last:.4g} is below {self.below:g}"
        for count, sign, what in ((self.falling, 1, "below"), (self.rising, -1, "above")):
            signed = [sign * value for value in values]
            if count and len(values) > count and max(signed[-count:]) < max(signed[:-count]):
                return f"{last:.4g} has been {what} its best, {sign * max(signed):.4g}, for {count} evaluations"
        return ""


def stop_reason(rules: dict[str, StopRule], evaluations: Evaluations) -> str:
    """The first rule that ends the run, or nothing. RunError when a metric is not logged."""
    for name, rule in rules.items():
        values = values_of(name, evaluations)
        if values and (why := rule(values)):
            return f"{name}: {why}"
    return ""


def values_of(name: str, evaluations: Evaluations) -> list[float]:
    """One metric over the evaluations; a step that was not applied may lack it."""
    if evaluations and not any(name in entry for entry in evaluations):
        raise RunError(
            f"train.stop: there is no metric {name!r}; this run logs {', '.join(evaluations[-1])}."
        )
    return [entry[name] for entry in evaluations if not math.isnan(entry.get(name, math.nan))]


def within(rules: dict[str, StopRule], evaluations: Evaluations) -> Evaluations:
    """The evaluations at which no metric was beyond its limits."""
    return [
        e
        for e in evaluations
        if all(rule.holds(e[name]) for name, rule in rules.items() if name in e)
    ]


def best_step(name: str, sign: int, evaluations: Evaluations) -> int | None:
    """The step at which the metric, times the sign, was largest; of equal ones the first."""
    scored = [entry for entry in evaluations if not math.isnan(entry.get(name, math.nan))]
    return int(max(scored, key=lambda entry: sign * entry[name])["step"]) if scored else None
