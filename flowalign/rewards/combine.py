"""Combine several rewards into one.

A score of NaN means that a reward did not score the images of a prompt. The other rewards then
decide alone, and an image that no reward scored stays NaN.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from flowalign.errors import RunError, UserError
from flowalign.flow import PerImage
from flowalign.settings.types import NonNegative, Positive, Settings, Share

CEILING = "at_most/"
"""Comes before the names of ceilings in a checkpoint."""


class Combine(Settings):
    """Combines rewards. A subclass is a dataclass of settings with statistics for checkpoints."""

    needs_statistics: ClassVar[bool] = False
    """True if it keeps statistics of whole steps, so that it cannot combine inside a gradient."""
    advice_if_equal: ClassVar[str] = ""
    """Advice for a run that learns nothing, because all images get the same combined reward."""

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

    The bonus rewards are those that `base` does not name. They count in full or not at all.
    Their negative values always count: otherwise an image would gain by missing a threshold.
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
class Modulated(Combine):
    """FIRM's product: base · (floor + (1 - floor) · the worst other score) (arXiv 2603.12247).

    The base says whether an image follows its prompt, and the others say how good it looks. So a
    good look never makes up for a wrong image. All scores must be in [0, 1]. A missing score counts
    as 1 (released: 0, except in the mode `mix`).
    """

    base: str = ""
    """The name of the base reward."""
    floor: Share = 0.5
    """The factor at a worst score of 0. The released code has 0.5, and 0.4 in its mode `mix`."""

    def check(self, weights: dict[str, float]) -> None:
        if self.base not in weights:
            raise UserError(
                f"combine.base is {self.base!r}, which is not a reward of this run. "
                f"Choose from {', '.join(weights)}."
            )
        if len(weights) == 1:
            raise UserError(
                f"combine.name is modulated, but {self.base} is the only reward. "
                "Add a reward whose scores are in [0, 1]."
            )
        for name, weight in weights.items():
            if weight != 1:
                raise UserError(
                    f"rewards.{name} has weight {weight:g}, but modulated multiplies scores in "
                    "[0, 1]. Leave the weight out."
                )

    def __call__(self, scores: dict[str, PerImage], weights: dict[str, float]) -> PerImage:
        for name, score in scores.items():
            _check_unit_interval(name, score)
        base = scores[self.base]
        others = torch.stack([score for name, score in scores.items() if name != self.base])
        # 1 instead of NaN: a score that is missing never is the worst, and lowers nothing.
        worst = others.nan_to_num(nan=1).min(0).values
        product = base.nan_to_num(nan=1) * (self.floor + (1 - self.floor) * worst)
        return torch.where(base.isnan() & others.isnan().all(0), math.nan, product)


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
    """Maximise some rewards while the means of others stay above floors or below ceilings.

    The Lagrangian, with a multiplier λ for each constraint, which every step updates by its mean:
        Σ weight · score + Σ_j λ_j (score_j - floor_j) - Σ_k λ_k (score_k - ceiling_k)
        u_j ← max(0, u_j + rate · (floor_j - mean_j)),   λ = bound · tanh(u / bound)
        u_k ← max(0, u_k + rate · (mean_k - ceiling_k))
    Rewards with a floor enter by their multiplier alone; the others keep their weight, also below a
    ceiling. Floors may hold all rewards. A ceiling keeps a reward from exceeding the point up to
    which it is useful (arXiv 2310.04373).

    Differences from that paper's code: multipliers are squashed by tanh and begin at 0 (there: by a
    sigmoid, at half the bound), and the objective's own KL keeps its weight (there: it loses what
    the multipliers gain).
    """

    at_least: dict[str, float] = field(default_factory=dict)
    """The floors of the means, by reward."""
    at_most: dict[str, float] = field(default_factory=dict)
    """The ceilings of the means, by reward."""
    rate: Positive = 0.1
    """The step size of u, from which the multipliers λ follow."""
    bound: Positive = math.inf
    """The largest multiplier; infinite for none. Below a reward's weight, a ceiling only slows."""
    needs_statistics: ClassVar[bool] = True
    advice_if_equal: ClassVar[str] = (
        "Rewards above their floors do not count: raise combine.at_least, or leave it out for the "
        "reward that should go on rising."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.floors: dict[str, float] = {}  # u by reward
        self.ceilings: dict[str, float] = {}  # u by reward

    def check(self, weights: dict[str, float]) -> None:
        if self.at_least or not self.at_most:
            _check_thresholds("combine.at_least", self.at_least, weights)
        if self.at_most:
            _check_thresholds("combine.at_most", self.at_most, weights)
        for name, floor in self.at_least.items():
            if weights[name] != 1:
                raise UserError(
                    f"rewards.{name} has weight {weights[name]:g}, which would have no effect: "
                    "combine.at_least gives it a multiplier that adapts. Leave the weight out."
                )
            if floor > self.at_most.get(name, math.inf):
                raise UserError(
                    f"combine.at_least.{name} is {floor:g}, but combine.at_most.{name} is "
                    f"{self.at_most[name]:g}. Write a floor below the ceiling."
                )

    def observe(self, scores: dict[str, PerImage]) -> None:
        for name, floor in self.at_least.items():
            self._move(self.floors, name, floor - scores[name].nanmean().item())
        for name, ceiling in self.at_most.items():
            self._move(self.ceilings, name, scores[name].nanmean().item() - ceiling)

    def _move(self, side: dict[str, float], name: str, violation: float) -> None:
        # If no image of the step was scored, the multiplier stays as it is.
        if math.isfinite(violation):
            side[name] = max(0.0, side.get(name, 0.0) + self.rate * violation)

    def multiplier(self, side: dict[str, float], name: str) -> float:
        """Return λ of a reward's floor or ceiling."""
        u = side.get(name, 0.0)
        return u if math.isinf(self.bound) else self.bound * math.tanh(u / self.bound)

    def __call__(self, scores: dict[str, PerImage], weights: dict[str, float]) -> PerImage:
        terms = [
            weights[name] * score for name, score in scores.items() if name not in self.at_least
        ]
        for name, floor in self.at_least.items():
            terms.append(self.multiplier(self.floors, name) * (scores[name] - floor))
        for name, ceiling in self.at_most.items():
            terms.append(self.multiplier(self.ceilings, name) * (ceiling - scores[name]))
        return total(torch.stack(terms))

    def metrics(self) -> dict[str, float]:
        # A ceiling's multiplier is subtracted, so its metric is below 0.
        values = dict.fromkeys([*self.floors, *self.ceilings], 0.0)
        for name in values:
            floor, ceiling = (self.multiplier(u, name) for u in (self.floors, self.ceilings))
            values[name] = floor - ceiling
        return {f"multiplier/{name}": value for name, value in values.items()}

    def state(self) -> dict[str, Tensor]:
        values = self.floors | {CEILING + name: u for name, u in self.ceilings.items()}
        return {name: torch.tensor(u, dtype=torch.float64) for name, u in values.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        values = {name: u.item() for name, u in state.items()}
        ceilings = {name for name in values if name.startswith(CEILING)}
        self.ceilings = {name.removeprefix(CEILING): values.pop(name) for name in ceilings}
        self.floors = values


COMBINE: dict[str, type[Combine]] = {
    "weighted_sum": WeightedSum,
    "minimum": Minimum,
    "uncertainty": Uncertainty,
    "gate": Gate,
    "modulated": Modulated,
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


def _check_unit_interval(name: str, score: PerImage) -> None:
    outside = score[(score < 0) | (score > 1)]
    if len(outside):
        raise RunError(
            f"rewards.{name} gave {outside[0].item():g}, but combine modulated multiplies scores "
            "in [0, 1]. Scale the reward, or choose another combine."
        )
