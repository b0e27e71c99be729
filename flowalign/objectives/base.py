"""The base of objectives: a dataclass of settings that holds one formula.

An objective knows nothing of how images were made, of passes, of processes or of logging.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Generic, Literal, Self, TypeVar

from torch import Tensor

from flowalign.batch import Batch, Cond, Examples, Pairs, Prompts, Rollout
from flowalign.errors import UserError
from flowalign.objectives.draws import Draw, ForwardTimes, PathSteps
from flowalign.policy import Decay, Policy, Sampler
from flowalign.settings.types import Guidance, Settings

B = TypeVar("B", bound=Batch)
"""The kind of batch that an objective learns from."""
D = TypeVar("D")
"""A draw: what the loss is averaged over for one batch."""
Forward = TypeVar("Forward", Rollout, Pairs, Examples)
"""A batch whose x0 is known."""
Paths = TypeVar("Paths", Rollout, Pairs)
"""A batch whose paths are known."""


@dataclass(frozen=True)
class Mean:
    """A statistic to average over the images and draws of a step."""

    values: Tensor  # (B,), or one number for all rows


@dataclass(frozen=True)
class Max:
    """A statistic of which the largest value of a step's first update is logged."""

    values: Tensor  # (B,), or one number for all rows


Statistics = Mapping[str, Mean | Max]
"""Values to log, by the metric's name."""


@dataclass(frozen=True)
class MeanOverImages:
    """A term to replace by its mean over all images of the update, on all processes."""

    values: Tensor  # (B, ...)


@dataclass(frozen=True)
class SumOverDraws:
    """A term to replace by its sum over all draws of the update."""

    values: Tensor  # (B, ...)


Term = Tensor | MeanOverImages | SumOverDraws
"""Rows (B, ...) that a loss needs, or what is to be made of them first."""


@dataclass
class Loss:
    """A scalar to minimise, the mean over the rows of a batch, and statistics to log."""

    total: Tensor
    stats: Statistics

    # Penalties are losses too, so that a formula is written as their sum.
    def __add__(self, other: "Loss") -> Self:
        return type(self)(self.total + other.total, {**self.stats, **other.stats})


class Objective(Settings, Generic[B, D]):
    """A method to train by. Subclass it as a dataclass and write `loss`.

    B is the batch it learns from and D its draw, such as a time or a sampler step.

    Example:
        >>> class Imitate(flowalign.Objective[flowalign.Examples, torch.Tensor]):
        ...     learns_from = flowalign.Examples
        ...
        ...     def draws(self, batch):
        ...         return [batch.uniform("time", 0)]
        ...
        ...     def loss(self, policy, batch, t):
        ...         noise = batch.noise("loss", 0, batch.latent_shape)
        ...         times = t.view(-1, 1, 1, 1)
        ...         xt = (1 - times) * batch.x0 + times * noise
        ...         v = policy.velocity(xt, t, batch.cond)
        ...         return flowalign.Loss((v - (noise - batch.x0)).square().mean(), {})
        >>> Imitate().min_images_per_prompt
        2
    """

    learns_from: ClassVar[type[Batch]] = Rollout
    """The kind of batch: Prompts, Rollout, Pairs or Examples."""
    needs_stochastic_steps: ClassVar[bool] = False
    """True if it learns from stochastic steps and their log-probabilities, and not from x0 alone.

    Otherwise a rollout keeps no path.
    """
    learns_from_likes: ClassVar[bool] = False
    """True if it learns from single pictures that were liked or disliked, too."""
    uses_advantages: ClassVar[bool] = True
    """True if it learns from a rollout's advantages, false if from its rewards."""
    sampling_weights: ClassVar[str] = "policy"
    """The weights that sample: "policy", or a snapshot."""
    copies_follow_after: ClassVar[Literal["step", "update"]] = "step"
    """When the snapshots follow the policy.

    After a step, the decay counts the updates up to its end. After an update, it counts those
    before that update.
    """
    train_null_branch: bool = True
    """False if the velocity of the empty prompt is a constant in the backward pass."""
    matches_velocities: ClassVar[bool] = False
    """True if its targets are velocities between noise and data, which few steps do not follow."""
    terms_span_update: ClassVar[bool] = False
    """True if `group_terms` looks beyond a group, so that its terms are always computed first."""

    @property
    def snapshots(self) -> dict[str, Decay]:
        """Copies of the policy to compare with or to sample from, and how they follow it."""
        return {}

    @property
    def takes_reward_gradient(self) -> bool:
        """True if every reward must pass a gradient to the images."""
        return self.learns_from is Prompts

    @property
    def learns_from_ties(self) -> bool:
        """True if it learns from pairs that voters call equal, too."""
        return False

    @property
    def on_policy_only(self) -> bool:
        """True if a rollout serves for one update only: `train.updates_per_step: 1`."""
        return False

    @property
    def min_images_per_prompt(self) -> int:
        """The fewest images of a prompt that it can compare."""
        return 2

    @property
    def log_ratio_clip(self) -> float:
        """The size beyond which log-ratios are clipped; infinite if none is."""
        return math.inf

    @property
    def has_group_terms(self) -> bool:
        """True if the class defines `group_terms`."""
        return type(self).group_terms is not Objective.group_terms

    def check(self, sampler: Sampler, /) -> None:
        """Raise UserError if it cannot work with the sampler."""

    def kept_steps(self, times: Sequence[float], /) -> Sequence[int]:
        """Return the sampler's steps before which a rollout keeps the latents (`states`).

        Step k of the sampler leads from times[k] to times[k + 1].
        """
        return ()

    def draws(self, batch: B, /) -> Iterable[D]:
        """Return what the loss of a batch is averaged over, such as times or steps."""
        raise NotImplementedError

    def group_terms(self, policy: Policy, batch: B, draw: D, /) -> dict[str, Term]:
        """Return what the loss needs to know about whole groups, as rows by name.

        Called before the passes of an update, and only if a pass cuts a group or
        `terms_span_update` is True. Otherwise `loss` computes the term in place. It reads a term
        by `batch.term(name, compute)`, so that no forward runs twice.

        The batch holds whole groups, and `policy` takes no gradient.
        """
        return {}

    def loss(self, policy: Policy, batch: B, draw: D, /) -> Loss:
        """Return the loss of any rows of a batch at one draw."""
        raise NotImplementedError


@dataclass
class PathObjective(Objective[Paths, int]):
    """An objective on the stochastic steps of a path. Its draws are the steps' indices."""

    steps: PathSteps = field(default_factory=PathSteps)
    """Steps at which the loss is taken."""
    train_null_branch: bool = True
    """Under guidance, whether the velocity of the empty prompt has a gradient too.

    False is the gradient of Flow-GRPO's released code, from half the memory.
    """
    needs_stochastic_steps: ClassVar[bool] = True

    def check(self, sampler: Sampler) -> None:
        """Raise UserError if the sampler has no stochastic steps."""
        # A window moves, but it always has steps or never has any.
        if not sampler.stochastic_steps(0, 0):
            raise UserError(
                "The objective learns from stochastic steps, but sampler.dynamics has none. "
                "Write for example sampler: {dynamics: {name: flow_sde}}."
            )

    def draws(self, batch: Paths) -> range:
        """Return the steps to train on."""
        return self.steps(batch)


@dataclass
class ForwardObjective(Objective[Forward, Draw]):
    """An objective on images alone, taken to times of the forward process."""

    matches_velocities: ClassVar[bool] = True
    # It needs no log-probability, so the images may come from every sampler.
    times: ForwardTimes = field(default_factory=ForwardTimes)
    """Times at which the loss is taken."""

    def draws(self, batch: Forward) -> Iterable[Draw]:
        """Return times and noise for each row."""
        return self.times(batch)


@dataclass
class ImageObjective(ForwardObjective[Rollout]):
    """An objective on the policy's own images and their scores."""

    guidance: Guidance | None = None
    """Guidance of the velocities that are trained and compared; by default the sampler's."""

    def cond(self, rollout: Rollout) -> Cond:
        """Return the conditioning under which velocities are trained."""
        return rollout.cond if self.guidance is None else rollout.cond.guided(self.guidance)
