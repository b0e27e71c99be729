"""Parts of formulas and base classes that several objectives share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import ClassVar

import torch
from torch import Tensor

from flowalign.batch import Batch, Cond, Examples, Pairs, Prompts
from flowalign.flow import add_noise, Latent, mean_square, PerImage
from flowalign.objectives.base import ForwardObjective, ImageObjective, Loss, Mean, Objective
from flowalign.objectives.draws import Draw, ForwardTimes
from flowalign.policy import Decay, Policy
from flowalign.settings.types import CountOrZero, Guidance, NonNegative, Settings, Share


def group_mean(values: PerImage, group: Tensor) -> PerImage:
    """Return the mean over each image's group."""
    labels, index = group.to(values.device).unique(return_inverse=True)
    count = torch.bincount(index, minlength=len(labels))
    # In float64, so that the order of the images in a pass hardly matters.
    total = torch.zeros(len(count), dtype=torch.float64, device=values.device)
    total.index_add_(0, index, values.double())
    return (total / count)[index].to(values.dtype)


def group_softmax(logits: PerImage, group: Tensor) -> PerImage:
    """Return the softmax over each group times its size: weights of mean 1."""
    labels, index = group.to(logits.device).unique(return_inverse=True)
    exact = logits.double()
    # The largest logit is subtracted, as always in a softmax, or `exp` would overflow.
    largest = exact.new_full((len(labels),), -math.inf).scatter_reduce_(0, index, exact, "amax")
    weight = (exact - largest[index]).exp()
    return (weight / group_mean(weight, group)).to(logits.dtype)


def optimality(advantage: PerImage, limit: float = 5.0) -> PerImage:
    """Return R = clamp(A / (2 limit) + 1/2, 0, 1): how good an image is (NFT's r, 2509.16117)."""
    return (advantage / (2 * limit) + 0.5).clamp(0, 1)


def adaptive_error(prediction: Latent, target: Latent) -> PerImage:
    """Return the mean square error over the error's mean size, which takes no gradient.

    This is the adaptive weight of DiffusionNFT (arXiv 2509.16117).
    """
    # Detached, or shrinking the error would raise its own weight. The floor avoids 0 / 0.
    size = (prediction - target).detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    return mean_square(prediction - target) / size


def preferred(margin: PerImage) -> PerImage:
    """Return 1 for each pair with a positive margin, ½ for a margin of 0, else 0."""
    return (margin > 0).float() + 0.5 * (margin == 0)


@dataclass
class VelocityKL(Settings):
    """The penalty weight · ‖v - v_ref‖²; v_ref is the model without adapter.

    This is the KL on the forward process, up to the weight of each time.
    """

    weight: NonNegative = 0.0
    """Weight of the penalty. At 0 the reference is never evaluated."""
    guidance: Guidance | None = None
    """Guidance of the reference, if it differs from the policy's."""

    def penalty(self, policy: Policy, v: Latent, xt: Latent, t: PerImage, cond: Cond) -> Loss:
        """Return the penalty of velocities v at xt, to add to a loss; 0 at weight 0."""
        # The reference costs a forward, which nobody should pay for a penalty of 0.
        if not self.weight:
            return Loss(v.new_zeros(()), {})
        return self.penalty_from(v, self.velocity(policy, xt, t, cond))

    def penalty_from(self, v: Latent, v_ref: Latent) -> Loss:
        """Return the penalty, given the reference's velocities."""
        kl = mean_square(v - v_ref)
        return Loss(self.weight * kl.mean(), {"kl": Mean(kl)})

    def velocity(self, policy: Policy, xt: Latent, t: PerImage, cond: Cond) -> Latent:
        """Return v_ref."""
        guided = cond if self.guidance is None else cond.guided(self.guidance)
        return policy.at("reference").velocity(xt, t, guided)


@dataclass
class AnchoredObjective(ImageObjective):
    """An image objective that stays near the reference and compares with a lagging copy `old`."""

    kl: VelocityKL = field(default_factory=VelocityKL)
    """The penalty that keeps the policy near the model without adapter."""
    old: Decay = field(default_factory=Decay)
    """How `old` follows the policy."""

    @property
    def snapshots(self) -> dict[str, Decay]:
        """The copy `old`."""
        return {"old": self.old}


@dataclass
class ImitationObjective(ImageObjective):
    """Weighted imitation of the policy's own images by flow matching.

    The loss is w ‖v - (noise - x0)‖² + λ ‖v - v_ref‖², with weights w of mean 1 in each group.
    """

    uses_advantages: ClassVar[bool] = False
    # Each image has a time of its own: there is nothing to compare within a group.
    times: ForwardTimes = field(default_factory=lambda: ForwardTimes(shared=False))
    kl: VelocityKL = field(default_factory=VelocityKL)
    """A penalty against adding up the sampler's errors, which imitated images carry."""


@dataclass
class Reference(Settings):
    """The policy that a preference objective compares with.

    It is the model without adapter, or a copy of the policy that is renewed now and then. A
    reference that moves has no optimum: k rounds at β move as far as one round at β / k.
    """

    every: CountOrZero = 0
    """Updates between two renewals, by which the reference follows the policy; 0 for none."""
    decay: Share = 0.0
    """The share of the old reference that stays at a renewal; 0 copies the policy."""

    COPY: ClassVar[str] = "moving_reference"

    @property
    def snapshots(self) -> dict[str, Decay]:
        """The copy of the policy, if the reference is one."""
        if not self.every:
            return {}
        return {self.COPY: Decay(value=self.decay, every=self.every)}

    def of(self, policy: Policy) -> Policy:
        """Return the gradient-free view of the policy under the reference's weights."""
        return policy.at(self.COPY if self.every else "reference")


@dataclass
class PairObjective(ForwardObjective[Pairs]):
    """An objective on the flow-matching errors of pairs, whose two images share time and noise.

    Velocities are those without guidance, however images are sampled.
    """

    learns_from: ClassVar[type[Batch]] = Pairs
    times: ForwardTimes = field(
        default_factory=lambda: ForwardTimes(count=1, distribution="logit_normal", shared=False)
    )
    reference: Reference = field(default_factory=Reference)
    """The policy that the errors are compared with."""

    @property
    def snapshots(self) -> dict[str, Decay]:
        """The reference, if it moves."""
        return self.reference.snapshots

    def errors(self, policy: Policy, pairs: Pairs, draw: Draw) -> PerImage:
        """Return ‖v - (noise - x0)‖² of the chosen, then of the rejected images (2 B,)."""
        (errors,) = self.errors_of([policy], pairs, draw)
        return errors

    def errors_of(
        self, policies: Sequence[Policy], pairs: Pairs, draw: Draw
    ) -> tuple[PerImage, ...]:
        """Return the `errors` (2 B,) under each of these weights, at one time and noise."""
        # Both images go through the network in one call, which rounds them alike.
        t, noise = draw.t.repeat(2), torch.cat([draw.noise, draw.noise])
        xt, target = add_noise(torch.cat(pairs.x0), t, noise)
        cond = pairs.cond.unguided().twice()
        return tuple(mean_square(one.velocity(xt, t, cond) - target) for one in policies)


@dataclass
class ExampleObjective(ForwardObjective[Examples]):
    """An objective on given pictures."""

    learns_from: ClassVar[type[Batch]] = Examples
    times: ForwardTimes = field(
        default_factory=lambda: ForwardTimes(count=1, distribution="logit_normal")
    )


class RewardGradientObjective(Objective[Prompts, None]):
    """An objective on the gradient that rewards pass to the images. It has no draws of its own."""

    learns_from: ClassVar[type[Batch]] = Prompts

    def draws(self, prompts: Prompts) -> list[None]:
        """Return one draw: the loss is that of the sampled images."""
        return [None]

    def random(self, purpose: str, prompts: Prompts) -> Random:
        """Return the random numbers of a pass: a function of the key of its first image."""
        return Random(f"{purpose}/{prompts.keys.table()[0].tolist()}")


def mean_loss(losses: Sequence[Loss]) -> Loss:
    """Return the mean of losses of the same rows, and of their statistics."""
    total = torch.stack([loss.total for loss in losses]).mean()
    values = {name: [loss.stats[name].values for loss in losses] for name in losses[0].stats}
    return Loss(total, {name: Mean(torch.stack(each).mean(0)) for name, each in values.items()})


def reward_loss(policy: Policy, prompts: Prompts, x0: Latent, enough: float = math.inf) -> Loss:
    """Return -reward of decoded latents, with gradient; rewards above `enough` add nothing."""
    # Recomputed in the backward pass, or all activations of the decoder would be kept.
    images = policy.decode_checkpointed(x0)
    reward, by_name = prompts.reward(images, prompts.prompts, prompts.metadata)
    stats = {f"reward/{name}": Mean(score) for name, score in by_name.items()}
    return Loss(-reward.clamp(max=enough).mean(), {**stats, "reward/combined": Mean(reward)})
