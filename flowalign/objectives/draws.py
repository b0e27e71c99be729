"""Draws that a loss is averaged over: steps of a path, or times of the forward process."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

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
    """Draws of objectives on the forward process: one time from each of `count` equal strata."""

    count: Count = 3
    """How many times are drawn for each image."""
    low: Share = 0.0
    """The smallest time."""
    high: Share = 1.0
    """The end of the times, which is never drawn."""
    distribution: Literal["uniform", "logit_normal"] = "uniform"
    """How times are distributed before `shift`."""
    shift: Positive = 1.0
    """Times t become shift · t / (1 + (shift - 1) t), as SD3 shifts its schedule."""
    shared: bool = True
    """True if the images of a prompt share times and noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low >= self.high:
            raise WrongSetting(f"low is {self.low} and high is {self.high}. Write low < high.")

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
            # A time from each of equal strata: a mean over few times varies less that way.
            u = (index + batch.uniform("time", index, self.shared)) / self.count
            if self.distribution == "logit_normal":
                # In float64: close to 0 and 1 the inverse of the normal distribution is steep.
                u = torch.special.ndtri(u.double()).sigmoid().float()
            t = self.shift * u / (1 + (self.shift - 1) * u)
            t = (self.low + (self.high - self.low) * t).to(batch.device)
            noise = batch.noise("loss", index, batch.latent_shape, self.shared)
            yield Draw(index, t, noise.to(batch.device))
