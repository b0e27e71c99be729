"""What an objective is: a dataclass that holds its settings and its formula, and nothing about how images were made."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from flowalign.batch import Batch, Cond, Examples, Pairs, Prompts, Rollout
from flowalign.errors import UserError
from flowalign.flow import Latent, mean_square, PerImage
from flowalign.policy import Decay, Policy, Sampler
from flowalign.settings import Count, Guidance, NonNegative, Positive, Settings, Share, WrongSetting


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
    by_advantage: ClassVar[bool] = True
    """Whether it takes advantages from a rollout, or its rewards as they are."""
    rollout_with: ClassVar[str] = "policy"
    """The weights that sample: "policy", or a snapshot."""

    @property
    def snapshots(self) -> dict[str, Decay]:
        """Copies of the policy it compares with or samples from, and how they follow it once a step."""
        return {}

    @property
    def learns_once(self) -> bool:
        """Whether a rollout serves for one update only: `train.updates_per_step: 1`."""
        return False

    @property
    def images_needed(self) -> int:
        """The fewest images of a prompt that it can tell apart."""
        return 2

    @property
    def clips_at(self) -> float:
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
            raise WrongSetting("times.shared is false, but the images of a prompt are compared at one time; write true.")

    def __call__(self, batch: Rollout | Pairs | Examples) -> Iterator[Draw]:
        for index in range(self.count):
            u = (index + batch.uniform("time", index, self.shared)) / self.count
            if self.distribution == "logit_normal":
                u = torch.special.ndtri(u.double()).sigmoid().float()
            t = self.shift * u / (1 + (self.shift - 1) * u)
            t = (self.low + (self.high - self.low) * t).to(batch.device)
            yield Draw(index, t, batch.noise("loss", index, batch.latent_shape, self.shared).to(batch.device))


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


def group_mean(values: PerImage, group: Tensor) -> PerImage:
    """The mean over the images of each image's prompt."""
    labels, index = group.to(values.device).unique(return_inverse=True)
    count = torch.bincount(index, minlength=len(labels))
    total = torch.zeros(len(count), dtype=torch.float64, device=values.device).index_add_(0, index, values.double())
    return (total / count)[index].to(values.dtype)


def group_softmax(logits: PerImage, group: Tensor) -> PerImage:
    """The softmax over the images of each prompt, times their number: weights of mean 1."""
    labels, index = group.to(logits.device).unique(return_inverse=True)
    exact = logits.double()
    largest = exact.new_full((len(labels),), -math.inf).scatter_reduce_(0, index, exact, "amax")
    weight = (exact - largest[index]).exp()
    return (weight / group_mean(weight, group)).to(logits.dtype)


def goodness(advantage: PerImage, limit: float = 5.0) -> PerImage:
    """Advantages as r in [0, 1], ½ for the average image: clamp(A / (2 limit) + ½)."""
    return (advantage / (2 * limit) + 0.5).clamp(0, 1)


def relative_error(x0_hat: Latent, x0: Latent) -> PerImage:
    """Mean square of the error over its own mean size, which takes no gradient (DiffusionNFT's adaptive weight)."""
    size = (x0_hat - x0).detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    return mean_square(x0_hat - x0) / size


@dataclass
class Anchor(Settings):
    """weight · ‖v - v_ref‖²: the KL to the model without adapter on the forward process, up to the weight of each time."""

    weight: NonNegative = 0.0
    """0 never asks the reference."""
    guidance: Guidance | None = None
    """Of the reference, where the policy itself is trained to do with another; by default the policy's."""

    def __call__(self, loss: Loss, policy: Policy, v: Latent, xt: Latent, t: PerImage, cond: Cond) -> Loss:
        """The loss with this added to it."""
        return self.added(loss, v, self.velocity(policy, xt, t, cond)) if self.weight else loss

    def added(self, loss: Loss, v: Latent, v_ref: Latent) -> Loss:
        kl = self.distance(v, v_ref)
        return Loss(loss.total + self.weight * kl.mean(), loss.stats | {"kl": kl})

    def distance(self, v: Latent, v_ref: Latent) -> PerImage:
        return mean_square(v - v_ref)

    def velocity(self, policy: Policy, xt: Latent, t: PerImage, cond: Cond) -> Latent:
        """v_ref."""
        guided = cond if self.guidance is None else cond.guided(self.guidance)
        return policy.at("reference").velocity(xt, t, guided)


def rewarded(policy: Policy, prompts: Prompts, x0: Latent, enough: float = math.inf) -> Loss:
    """-reward of decoded latents, through which a gradient passes; no more than `enough` is asked of an image."""
    reward, by_name = prompts.reward(policy.decode_kept_small(x0), prompts.prompts, prompts.metadata)
    stats = {f"reward/{name}": score for name, score in by_name.items()}
    return Loss(-reward.clamp(max=enough).mean(), stats | {"reward/combined": reward})
