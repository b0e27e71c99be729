"""Combine several rewards into one.

A score of NaN means that a reward did not score the images of a prompt. The other rewards then
decide alone, and an image that no reward scored stays NaN.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from flowalign.errors import UserError
from flowalign.flow import PerImage
from flowalign.settings.types import NonNegative, Positive, Settings


class Combine(Settings):
    """Combines rewards. A subclass is a dataclass of settings with statistics for checkpoints."""

    needs_statistics: ClassVar[bool] = False
    """True if it keeps statistics of whole steps, so that it cannot combine inside a gradient."""

    def check(self, weights: dict[str, float]) -> None:
        """Raise UserError if the settings do not fit the rewards and their weights."""

    def observe(self, scores: dict[str, PerImage]) -> None:
        """Update the statistics with the scores (N,) of a step, gathered from all ranks.

        Called before the scores are combined.
        """

    def __call__(self, scores: dict[str, PerImage], weights: dict[str, float]) -> PerImage:
        """Combine the scores (N,) of each reward into one (N,)."""
        raise NotImplementedError

    def metrics(self) -> dict[str, float]:
        """Return the statistics to log."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Return the statistics, for a checkpoint."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""


@dataclass
class WeightedSum(Combine):
    """The sum: Σ weight · score."""

    def __call__(self, scores: dict[str, PerImage], weights: dict[str, float]) -> PerImage:
        return total(weighted(scores, weights))


@dataclass
class Minimum(Combine):
    """The worst case: min weight · score (arXiv 2310.02743)."""

    def __call__(self, scores: dict[str, PerImage], weights: dict[str, float]) -> PerImage:
        values = weighted(scores, weights)
        # Infinity instead of NaN, so that a missing score is never the minimum.
        least = values.nan_to_num(nan=math.inf).min(0).values
        return torch.where(values.isnan().all(0), math.nan, least)


@dataclass
class Uncertainty(Combine):
    """The mean of weight · score minus caution · its variance over the rewards (arXiv 2310.02743).

    Images that the rewards disagree on count less. The rewards must have the same scale.
    """

    caution: NonNegative = 0.5
    """The weight of the variance."""

    def __call__(self, scores: dict[str, PerImage], weights: dict[str, float]) -> PerImage:
        values = weighted(scores, weights)
        mean = values.nanmean(0)
        return mean - self.caution * (values - mean).square().nanmean(0)


@dataclass
class Gate(Combine):
    """A weighted sum in which bonus rewards count only above thresholds of the base rewards.

    The bonus rewards are those that `base` does not name. Their negative values always count:
    otherwise an image would gain by missing a threshold.
    """

    base: dict[str, float] = field(default_factory=dict)
    """The thresholds of the base rewards, by name."""

    def check(self, weights: dict[str, float]) -> None:
        _check_thresholds("combine.base", self.base, weights)
        for name in self.base:
            if weights[name] < 0:
                raise UserError(
                    f"rewards.{name} has a weight below 0, but combine.base asks for more of it. "
                    "Write a weight of 0 or more."
                )
        if len(self.base) == len(weights):
            raise UserError("combine.base names all rewards. Leave out those that are the bonus.")

    def __call__(self, scores: dict[str, PerImage], weights: dict[str, float]) -> PerImage:
        base = {name: score for name, score in scores.items() if name in self.base}
        bonus = {name: score for name, score in scores.items() if name not in self.base}
        # Not `score >= threshold`: an image that a base reward did not score has not missed it.
        reached = torch.stack([~(score < self.base[name]) for name, score in base.items()]).all(0)
        full = weighted(bonus, weights)
        allowed = torch.where(reached, full, full.clamp(max=0))
        return total(torch.cat([weighted(base, weights), allowed]))


@dataclass
class Normalised(Combine):
    """The sum of standardised scores: Σ weight · (score - mean) / deviation.

    Mean and deviation are those of all scores of a reward so far, so that rewards of different
    scales have the same influence.
    """

    needs_statistics: ClassVar[bool] = True

    def __post_init__(self) -> None:
        # Count, sum and sum of squares by reward. In float64, which adds a long run exactly enough.
        self.moments: dict[str, Tensor] = {}

    def observe(self, scores: dict[str, PerImage]) -> None:
        for name, score in scores.items():
            scored = score[~score.isnan()].double()
            count = torch.tensor(len(scored)).double()
            moments = torch.stack([count, scored.sum(), scored.square().sum()])
            self.moments[name] = self.moments.get(name, torch.zeros(3).double()) + moments

    def __call__(self, scores: dict[str, PerImage], weights: dict[str, float]) -> PerImage:
        standard = {name: self.standardised(name, score) for name, score in scores.items()}
        return total(weighted(standard, weights))

    def standardised(self, name: str, score: PerImage) -> PerImage:
        """Return the z-scores (N,) of a reward, by the statistics so far."""
        count, first, second = self.moments[name].tolist()
        mean = first / max(count, 1)
        # The difference can round to below 0 where all scores are equal.
        deviation = math.sqrt(max(second / max(count, 1) - mean**2, 0))
        # In float64, or the mean would be rounded before it is subtracted.
        return ((score.double() - mean) / (deviation + 1e-6)).to(score.dtype)

    def state(self) -> dict[str, Tensor]:
        return dict(self.moments)

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.moments = dict(state)


@dataclass
class Constrained(Combine):
    """Maximise some rewards while the mean of each reward in `at_least` stays above its threshold.

    The Lagrangian, with one multiplier λ per constraint, which every step updates by its mean:
        Σ weight · score + Σ_j λ_j (score_j - threshold_j)
        λ_j ← max(0, λ_j + rate · (threshold_j - mean_j))
    """

    at_least: dict[str, float] = field(default_factory=dict)
    """The thresholds of the constrained rewards, by name."""
    rate: Positive = 0.1
    """The step size of the multipliers λ."""
    needs_statistics: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.multipliers: dict[str, float] = {}  # λ by reward

    def check(self, weights: dict[str, float]) -> None:
        _check_thresholds("combine.at_least", self.at_least, weights)
        for name in self.at_least:
            if weights[name] != 1:
                raise UserError(
                    f"rewards.{name} has weight {weights[name]:g}, which would have no effect: "
                    "combine.at_least gives it a multiplier that adapts. Leave the weight out."
                )
        if len(self.at_least) == len(weights):
            raise UserError("combine.at_least names all rewards. Leave out the one to maximise.")

    def observe(self, scores: dict[str, PerImage]) -> None:
        for name, threshold in self.at_least.items():
            mean = scores[name].nanmean().item()
            # If no image of the step was scored, the multiplier stays as it is.
            if math.isfinite(mean):
                multiplier = self.multipliers.get(name, 0.0) + self.rate * (threshold - mean)
                self.multipliers[name] = max(0.0, multiplier)

    def __call__(self, scores: dict[str, PerImage], weights: dict[str, float]) -> PerImage:
        free = {name: score for name, score in scores.items() if name not in self.at_least}
        slack = {name: scores[name] - threshold for name, threshold in self.at_least.items()}
        multipliers = {name: self.multipliers.get(name, 0.0) for name in slack}
        return total(torch.cat([weighted(free, weights), weighted(slack, multipliers)]))

    def metrics(self) -> dict[str, float]:
        return {f"multiplier/{name}": value for name, value in self.multipliers.items()}

    def state(self) -> dict[str, Tensor]:
        values = self.multipliers.items()
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in values}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.multipliers = {name: value.item() for name, value in state.items()}


COMBINE: dict[str, type[Combine]] = {
    "weighted_sum": WeightedSum,
    "minimum": Minimum,
    "uncertainty": Uncertainty,
    "gate": Gate,
    "normalised": Normalised,
    "constrained": Constrained,
}


def weighted(scores: dict[str, PerImage], weights: dict[str, float]) -> Tensor:
    """Return weight · score as (rewards, N)."""
    return torch.stack([weights[name] * score for name, score in scores.items()])


def total(values: Tensor) -> PerImage:
    """Sum the scores (rewards, N) over rewards: (N,), NaN for an image that no reward scored."""
    return torch.where(values.isnan().all(0), math.nan, values.nansum(0))


def _check_thresholds(key: str, thresholds: dict[str, float], weights: dict[str, float]) -> None:
    if not thresholds:
        example = next(iter(weights))
        raise UserError(
            f"{key} is empty. Write thresholds by reward, for example {{{example}: 0.5}}."
        )
    for name in thresholds:
        if name not in weights:
            raise UserError(
                f"{key} names {name!r}, which is not a reward of this run. "
                f"Choose from {', '.join(weights)}."
            )
