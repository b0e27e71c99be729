"""What an objective is: a dataclass that holds its settings and its formula, and nothing about how images were made."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from flowalign.batch import Prompts, Rollout
from flowalign.policy import Decay, Policy


@dataclass
class Loss:
    """A scalar to minimise, and statistics to log: scalars or (B,), averaged over the step."""

    total: Tensor
    stats: dict[str, Tensor]


class Objective(Protocol):
    """The loop reads, for every objective: experience, the loss at each draw, an update, then the snapshots follow."""

    learns_from: ClassVar[type[Prompts] | type[Rollout]]
    needs_stochastic_steps: ClassVar[bool]
    """Whether the path it learns from must have steps with a log-probability."""
    rollout_with: ClassVar[str]
    """The weights that sample: "policy", or a snapshot."""
    snapshots: dict[str, Decay]
    """Lagging copies it compares with or samples from."""
    draws: Callable[[Any], Iterable[Any]]
    """What `t` runs over for a batch."""

    def loss(self, policy: Policy, batch: Any, t: Any) -> Loss:
        """The loss of any piece of the batch at one draw."""
        ...


@dataclass
class PathSteps:
    """Draws for objectives on trajectories: the stochastic steps of the path, all or evenly thinned."""

    fraction: float = 1.0
    """Share of the stochastic steps that is trained, the noisiest first."""

    def __call__(self, rollout: Rollout) -> range:
        return rollout.steps[: max(1, round(self.fraction * len(rollout.steps)))]
