"""Terms that several objectives share."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowalign.batch import Cond, Prompts
from flowalign.flow import Latent, mean_square, PerImage
from flowalign.objectives.base import Loss
from flowalign.policy import Policy
from flowalign.settings.types import Guidance, NonNegative, Settings


def group_mean(values: PerImage, group: Tensor) -> PerImage:
    """The mean over the images of each image's prompt."""
    labels, index = group.to(values.device).unique(return_inverse=True)
    count = torch.bincount(index, minlength=len(labels))
    total = torch.zeros(len(count), dtype=torch.float64, device=values.device).index_add_(
        0, index, values.double()
    )
    return (total / count)[index].to(values.dtype)


def group_softmax(logits: PerImage, group: Tensor) -> PerImage:
    """The softmax over the images of each prompt, times their number: weights of mean 1."""
    labels, index = group.to(logits.device).unique(return_inverse=True)
    exact = logits.double()
    largest = exact.new_full((len(labels),), -math.inf).scatter_reduce_(0, index, exact, "amax")
    weight = (exact - largest[index]).exp()
    return (weight / group_mean(weight, group)).to(logits.dtype)


def optimality(advantage: PerImage, limit: float = 5.0) -> PerImage:
    """Advantages as r in [0, 1], ½ for the average image: clamp(A / (2 limit) + ½)."""
    return (advantage / (2 * limit) + 0.5).clamp(0, 1)


def adaptive_error(x0_hat: Latent, x0: Latent) -> PerImage:
    """Mean square of the error over its own mean size, which takes no gradient (DiffusionNFT's adaptive weight)."""
    size = (x0_hat - x0).detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    return mean_square(x0_hat - x0) / size


@dataclass
class VelocityKL(Settings):
    """weight · ‖v - v_ref‖²: the KL to the model without adapter on the forward process, up to the weight of each time."""

    weight: NonNegative = 0.0
    """0 never asks the reference."""
    guidance: Guidance | None = None
    """Of the reference, where the policy itself is trained to do with another; by default the policy's."""

    def __call__(
        self, loss: Loss, policy: Policy, v: Latent, xt: Latent, t: PerImage, cond: Cond
    ) -> Loss:
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


def reward_loss(policy: Policy, prompts: Prompts, x0: Latent, enough: float = math.inf) -> Loss:
    """-reward of decoded latents, through which a gradient passes; no more than `enough` is asked of an image."""
    reward, by_name = prompts.reward(
        policy.decode_checkpointed(x0), prompts.prompts, prompts.metadata
    )
    stats = {f"reward/{name}": score for name, score in by_name.items()}
    return Loss(-reward.clamp(max=enough).mean(), stats | {"reward/combined": reward})
