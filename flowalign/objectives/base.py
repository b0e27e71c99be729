"""What an objective is: a dataclass that holds its settings and its formula, and nothing about how images were made."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from flowalign.batch import Batch, Cond, Rollout
from flowalign.errors import UserError
from flowalign.objectives.draws import Draw, ForwardTimes, PathSteps
from flowalign.policy import Decay, Policy, Sampler
from flowalign.settings.types import Guidance, Settings


@dataclass
class Loss:
    """A scalar to minimise, the mean over the rows of the batch, and statistics to log: scalars or (B,)."""

    total: Tensor
    stats: dict[str, Tensor]


class Objective(Settings):
    """The loop reads, for every objective: experience, the loss at each draw, an update, then the snapshots follow."""

    learns_from: ClassVar[type[Batch]] = Rollout
    """Prompts, Rollout, Pairs or Examples."""
    needs_stochastic_steps: ClassVar[bool] = False
    """Whether the path it learns from must have steps with a log-probability."""
    uses_advantages: ClassVar[bool] = True
    """Whether it takes advantages from a rollout, or its rewards as they are."""
    sampling_weights: ClassVar[str] = "policy"
    """The weights that sample: "policy", or a snapshot."""

    @property
    def snapshots(self) -> dict[str, Decay]:
        """Copies of the policy it compares with or samples from, and how they follow it once a step."""
        return {}

    @property
    def on_policy_only(self) -> bool:
        """Whether a rollout serves for one update only: `train.updates_per_step: 1`."""
        return False

    @property
    def min_images_per_prompt(self) -> int:
        """The fewest images of a prompt that it can tell apart."""
        return 2

    @property
    def log_ratio_clip(self) -> float:
        """Log-ratios beyond this are clipped; infinite where none is."""
        return math.inf

    def check(self, sampler: Sampler, /) -> None:
        """UserError where it cannot work with the sampler."""

    def draws(self, batch: Any, /) -> Iterable[Any]:
        """What `t` runs over for a batch; once, where the loss has no time of its own."""
        return [0]

    def prepare(self, policy: Policy, batch: Any, /) -> Any:
        """The batch with what the loss must know of whole groups; it sees all images of an update. `policy` gives no gradient."""
        return batch

    def loss(self, policy: Policy, batch: Any, t: Any, /) -> Loss:
        """The loss of any piece of the batch at one draw."""
        raise NotImplementedError


@dataclass
class PathObjective(Objective):
    """Learns from the stochastic steps of a path."""

    steps: PathSteps = field(default_factory=PathSteps)
    needs_stochastic_steps: ClassVar[bool] = True

    def check(self, sampler: Sampler) -> None:
        if not sampler.stochastic_steps(0, 0):
            raise UserError(
                "the objective learns from stochastic steps, but sampler.dynamics has none; "
                "write for example sampler: {dynamics: {name: flow_sde}}."
            )

    def draws(self, batch: Any) -> range:
        return self.steps(batch)


@dataclass
class ForwardObjective(Objective):
    """Learns from images alone, taken to times of the forward process; any sampler will do."""

    times: ForwardTimes = field(default_factory=ForwardTimes)

    def draws(self, batch: Any) -> Iterable[Draw]:
        return self.times(batch)


@dataclass
class ImageObjective(ForwardObjective):
    """Learns from the policy's own images and their scores."""

    guidance: Guidance | None = None
    """Of the velocities that are trained and compared; 1 for none, by default the sampler's."""

    def cond(self, rollout: Rollout) -> Cond:
        return rollout.cond if self.guidance is None else rollout.cond.guided(self.guidance)
