"""Several rewards made into one. A score of NaN stands for a reward that no image of a prompt has: the others decide there."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from flowalign.errors import UserError
from flowalign.flow import PerImage
from flowalign.settings.types import NonNegative, Positive, Settings

Scores = dict[str, PerImage]


class Combine(Settings):
    """A dataclass of settings; what it learns from step to step goes into checkpoints."""

    needs_statistics: ClassVar[bool] = False
    """Whether it looks at whole steps; a reward that a gradient passes through is combined image by image."""

    def check(self, weights: dict[str, float]) -> None:
        """UserError where the settings name a reward that is not there, or its weight makes no sense."""

    def observe(self, scores: Scores) -> None:
        """Learn from the scores of a step, (N,) each, of all processes; called before they are combined."""

    def __call__(self, scores: Scores, weights: dict[str, float]) -> PerImage:
        raise NotImplementedError

    def metrics(self) -> dict[str, float]:
        """What to log of what it has learned."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """What it has learned."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from there."""


@dataclass
class WeightedSum(Combine):
    """Σ weight · score."""

    def __call__(self, scores: Scores, weights: dict[str, float]) -> PerImage:
        return total(weighted(scores, weights))


@dataclass
class Minimum(Combine):
    """min weight · score: the worst case counts (arXiv 2310.02743)."""

    def __call__(self, scores: Scores, weights: dict[str, float]) -> PerImage:
        values = weighted(scores, weights)
        least = values.nan_to_num(nan=math.inf).min(0).values
        return torch.where(values.isnan().all(0), math.nan, least)


@dataclass
class Uncertainty(Combine):
    """mean - caution · variance of weight · score over the rewards: what they disagree on counts less (arXiv 2310.02743).

    For rewards of one scale.
    """

    caution: NonNegative = 0.5

    def __call__(self, scores: Scores, weights: dict[str, float]) -> PerImage:
        values = weighted(scores, weights)
        mean = values.nanmean(0)
        return mean - self.caution * (values - mean).square().nanmean(0)


@dataclass
class Gate(Combine):
    """Base and bonus: what rewards not named in `base` give, counts only where all that are have reached their thresholds.

    What they take counts everywhere; otherwise a picture would gain by missing a threshold.
    """

    base: dict[str, float] = field(default_factory=dict)
    """Thresholds by reward."""

    def check(self, weights: dict[str, float]) -> None:
        _known("combine.base", self.base, weights)
        for name in self.base:
            if weights[name] < 0:
                raise UserError(
                    f"rewards.{name} has a weight below 0, but combine.base asks for more of it; write 0 or more."
                )
        if len(self.base) == len(weights):
            raise UserError("combine.base names all rewards; leave out those that are the bonus.")

    def __call__(self, scores: Scores, weights: dict[str, float]) -> PerImage:
        base = {name: score for name, score in scores.items() if name in self.base}
        bonus = {name: score for name, score in scores.items() if name not in self.base}
        reached = torch.stack([~(score < self.base[name]) for name, score in base.items()]).all(0)
        more = weighted(bonus, weights)
        return total(
            torch.cat([weighted(base, weights), torch.where(reached, more, more.clamp(max=0))])
        )


@dataclass
class Normalised(Combine):
    """Σ weight · (score - mean) / deviation, over all scores of the reward so far, so that no scale drowns another."""

    needs_statistics: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.moments: dict[str, Tensor] = {}  # count, sum and sum of squares by reward, in float64

    def observe(self, scores: Scores) -> None:
        for name, score in scores.items():
            seen = score[~score.isnan()].double()
            new = torch.stack([torch.tensor(len(seen)).double(), seen.sum(), seen.square().sum()])
            self.moments[name] = self.moments.get(name, torch.zeros(3).double()) + new

    def __call__(self, scores: Scores, weights: dict[str, float]) -> PerImage:
        return total(
            weighted({name: self.standard(name, score) for name, score in scores.items()}, weights)
        )

    def standard(self, name: str, score: PerImage) -> PerImage:
        count, first, second = self.moments[name].tolist()
        mean = first / max(count, 1)
        deviation = math.sqrt(max(second / max(count, 1) - mean**2, 0))
        return (score - mean) / (deviation + 1e-6)

    def state(self) -> dict[str, Tensor]:
        return dict(self.moments)

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.moments = dict(state)


@dataclass
class Constrained(Combine):
    """Maximise the rewards not named, subject to the mean of every named one staying at its threshold or above.

    The Lagrangian of it: Σ weight · score + Σ_j λ_j (score_j - threshold_j), λ_j ← max(0, λ_j + rate · (threshold_j - mean_j)).
    """

    at_least: dict[str, float] = field(default_factory=dict)
    """Thresholds by reward."""
    rate: Positive = 0.1
    needs_statistics: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.multipliers: dict[str, float] = {}  # λ by reward

    def check(self, weights: dict[str, float]) -> None:
        _known("combine.at_least", self.at_least, weights)
        for name in self.at_least:
            if weights[name] != 1:
                found = f"rewards.{name} has weight {weights[name]:g}, which would have no effect"
                raise UserError(
                    f"{found}: combine.at_least gives it a multiplier that adapts; leave the weight out."
                )
        if len(self.at_least) == len(weights):
            raise UserError("combine.at_least names all rewards; leave out the one to maximise.")

    def observe(self, scores: Scores) -> None:
        for name, threshold in self.at_least.items():
            mean = scores[name].nanmean().item()
            if math.isfinite(mean):
                self.multipliers[name] = max(
                    0.0, self.multipliers.get(name, 0.0) + self.rate * (threshold - mean)
                )

    def __call__(self, scores: Scores, weights: dict[str, float]) -> PerImage:
        free = {name: score for name, score in scores.items() if name not in self.at_least}
        held = {name: scores[name] - threshold for name, threshold in self.at_least.items()}
        multipliers = {name: self.multipliers.get(name, 0.0) for name in held}
        return total(torch.cat([weighted(free, weights), weighted(held, multipliers)]))

    def metrics(self) -> dict[str, float]:
        return {f"multiplier/{name}": value for name, value in self.multipliers.items()}

    def state(self) -> dict[str, Tensor]:
        return {
            name: torch.tensor(value, dtype=torch.float64)
            for name, value in self.multipliers.items()
        }

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


def weighted(scores: Scores, weights: dict[str, float]) -> Tensor:
    """(rewards, N) weight · score."""
    return torch.stack([weights[name] * score for name, score in scores.items()])


def total(values: Tensor) -> PerImage:
    """The sum over rewards of what was scored; NaN where nothing was."""
    return torch.where(values.isnan().all(0), math.nan, values.nansum(0))


def _known(key: str, named: dict[str, float], names: Iterable[str]) -> None:
    names = list(names)
    if not named:
        raise UserError(
            f"{key} is empty; write thresholds by reward, for example {{{names[0]}: 0.5}}."
        )
    if unknown := [name for name in named if name not in names]:
        raise UserError(f"{key} names {unknown[0]!r}; the rewards are {', '.join(names)}.")
