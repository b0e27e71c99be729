"""Draws that an objective's loss runs over: steps of a path, or times and noise of the forward process."""

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
    """Draws for objectives on trajectories: the stochastic steps of the path, all or evenly thinned."""

    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the stochastic steps that is trained, the noisiest first."""

    def __call__(self, batch: Rollout | Pairs) -> range:
        return batch.steps[: max(1, round(self.fraction * len(batch.steps)))]


@dataclass(frozen=True)
class Draw:
    """A time of the forward process and the noise to take the image there."""

    index: int
    t: PerImage
    noise: Latent


@dataclass
class ForwardTimes(Settings):
    """Draws for objectives on the forward process: times in [low, high), one from each of `count` equal strata."""

    count: Count = 3
    low: Share = 0.0
    high: Share = 1.0
    distribution: Literal["uniform", "logit_normal"] = "uniform"
    shift: Positive = 1.0
    """t becomes shift · t / (1 + (shift - 1) t), as SD3 shifts its schedule."""
    shared: bool = True
    """Whether the images of a prompt share times and noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low >= self.high:
            raise WrongSetting(f"low is {self.low} and high {self.high}; write low < high.")

    def must_be_shared(self) -> None:
        """WrongSetting where they are not."""
        if not self.shared:
            raise WrongSetting(
                "times.shared is false, but the images of a prompt are compared at one time; write true."
            )

    def __call__(self, batch: Rollout | Pairs | Examples) -> Iterator[Draw]:
        for index in range(self.count):
            u = (index + batch.uniform("time", index, self.shared)) / self.count
            if self.distribution == "logit_normal":
                u = torch.special.ndtri(u.double()).sigmoid().float()
            t = self.shift * u / (1 + (self.shift - 1) * u)
            t = (self.low + (self.high - self.low) * t).to(batch.device)
            yield Draw(
                index,
                t,
                batch.noise("loss", index, batch.latent_shape, self.shared).to(batch.device),
            )
