"""Draws that a loss is averaged over: steps of a path, or times of the forward process."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from flowalign.batch import Examples, Pairs, Rollout
from flowalign.flow import Latent, PerImage
from flowalign.settings.types import Count, Positive, Settings, Share, WrongSetting


@dataclass
class PathSteps(Settings):
    """Draws of objectives on paths: the stochastic steps, all of them or the first."""

    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the stochastic steps that is trained on, the noisiest first."""

    def __call__(self, batch: Rollout | Pairs) -> range:
        """Return the indices of the steps to train on, at least one."""
        # Steps run from noise to data, so the first are the noisiest.
        return batch.steps[: max(1, round(self.fraction * len(batch.steps)))]


@dataclass(frozen=True)
class Draw:
    """A time of the forward process for each row, and the noise to take its image there."""

    index: int
    t: PerImage
    noise: Latent


@dataclass
class ForwardTimes(Settings):
    """Draws of objectives on the forward process: one time from each of `count` equal strata.

    With the distribution `discrete`, times are those of a sampler of `points` steps, and the strata
    are parts of its indices, as released for AWM and CRD (arXiv 2509.25050, 2603.14128). The last
    time within `low` and `high` is never drawn. With more draws than times, strata hold one index
    each, and the times are always the same.
    """

    count: Count = 3
    """How many times are drawn for each image."""
    low: Share = 0.0
    """The smallest time."""
    high: Share = 1.0
    """The end of the times, which only `discrete` draws."""
    distribution: Literal["uniform", "logit_normal", "discrete"] = "uniform"
    """How times are distributed before `shift`."""
    points: Annotated[int, Field(ge=2, le=1000)] = 10
    """The number of sampler steps whose times `discrete` draws."""
    shift: Positive = 1.0
    """Times t become shift · t / (1 + (shift - 1) t), as SD3 shifts its schedule."""
    shared: bool = True
    """True if the images of a prompt share times and noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low >= self.high:
            raise WrongSetting(f"low is {self.low} and high is {self.high}. Write low < high.")
        if self.distribution == "discrete" and len(self.schedule()) < 2:
            raise WrongSetting(
                f"low is {self.low} and high is {self.high}, but of {self.points} discrete times "
                f"{len(self.schedule())} lie between them. Write a wider range or more points."
            )

    def must_be_shared(self) -> None:
        """Raise WrongSetting if the images of a prompt have times of their own."""
        if not self.shared:
            raise WrongSetting(
                "times.shared is false, but the images of a prompt are compared at one time. "
                "Write true."
            )

    def __call__(self, batch: Rollout | Pairs | Examples) -> Iterator[Draw]:
        """Yield the draws for a batch; they depend on its keys alone."""
        for index in range(self.count):
            u = batch.uniform("time", index, self.shared)
            t = DISTRIBUTIONS[self.distribution](self, index, u).to(batch.device)
            noise = batch.noise("loss", index, batch.latent_shape, self.shared)
            yield Draw(index, t, noise.to(batch.device))

    def shifted(self, t: PerImage) -> PerImage:
        """Return times after `shift`."""
        return self.shift * t / (1 + (self.shift - 1) * t)

    def schedule(self) -> Tensor:
        """Return the times of a sampler of `points` steps from `high` to `low`, descending."""
        times = self.shifted(1 - torch.arange(self.points) / self.points)
        # A range that ends at a time has it, whatever their last digits are.
        return times[(times > self.low - 1e-6) & (times < self.high + 1e-6)]


def uniform(times: ForwardTimes, index: int, u: PerImage) -> PerImage:
    """Return times at the share u of a stratum."""
    # A time from each of equal strata: a mean over few times varies less that way.
    return within(times, (index + u) / times.count)


def logit_normal(times: ForwardTimes, index: int, u: PerImage) -> PerImage:
    """Return times whose logits are standard normal, at the share u of a stratum."""
    # In float64: close to 0 and 1 the inverse of the normal distribution is steep.
    quantile = ((index + u) / times.count).double()
    return within(times, torch.special.ndtri(quantile).sigmoid().float())


def within(times: ForwardTimes, t: PerImage) -> PerImage:
    """Return times after `shift`, scaled to lie between `low` and `high`."""
    return times.low + (times.high - times.low) * times.shifted(t)


def discrete(times: ForwardTimes, index: int, u: PerImage) -> PerImage:
    """Return times of the schedule, at the share u of a stratum of its indices."""
    schedule = times.schedule()
    last = len(schedule) - 1
    # Both ends are rounded down, as released. So strata that are narrower than 1 hold one index.
    first, end = (i * last // times.count for i in (index, index + 1))
    return schedule[first + (u * (end - first)).long()]


DISTRIBUTIONS: dict[str, Callable[[ForwardTimes, int, PerImage], PerImage]] = {
    "uniform": uniform,
    "logit_normal": logit_normal,
    "discrete": discrete,
}
