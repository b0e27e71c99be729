"""CRD: centered reward distillation (arXiv 2603.14128).

The KL-regularised optimum π* has β log(π*/π_old) = R - β log Z(prompt). Z is the same for all
images of a prompt, so centring within the prompt removes it. With
    u = noise - x0
    e(v) = ‖v - u‖², divided by the mean of |v - u| (without gradient) if `adaptive`
    ρ = e(v_old) - e(v), in place of the log-ratio
    R = clamp(A / (2 A_max) + 1/2, 0, 1), how good an image is
    ρ_c = ρ - Σ_j p_j ρ_j  and  R_c = R - Σ_j p_j R_j  within the prompt
    loss = A_max / β · (β ρ_c - R_c)² + λ (c + (1 - c) R) ‖v - v_ref‖²
With `form: bce`, the square is the cross-entropy of σ(β ρ_c) and σ(R_c). Both are least where β ρ_c
is R_c. λ is `kl.weight`, A_max is `limit`, and c is `kl_least` / λ, so good images are anchored
most. v_ref is the model without adapter under guidance, so guidance is distilled into the policy.
The copy that samples differs from the copy that ρ is measured against.

The weights p of `centring: soft` are equal, or with a temperature softmax(±R / temperature). Those
of `hard` are softmax(R) over the images with R > 1/2, and over those with R < 1/2. With two choices
of p, the loss is the mean over both.

Differences from the released code: it subtracts one mean over many prompts; here each prompt has
its own mean, since it has its own Z. Times and noise are shared within a prompt. The size of ρ
depends on time and noise. If these differed within a prompt, the centre would mix that with the
reward. In its hard mode, which it calls temperature 0, the thresholds are R > 0 and R < 0. As R is
in [0, 1], it finds no image below, and its second weights are equal.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from flowalign.batch import Rollout
from flowalign.flow import add_noise, Latent, mean_square, PerImage
from flowalign.objectives.base import Loss, Mean, Term
from flowalign.objectives.draws import Draw
from flowalign.objectives.terms import (
    adaptive_error,
    AnchoredObjective,
    group_mean,
    group_softmax,
    optimality,
    VelocityKL,
)
from flowalign.policy import Decay, Policy
from flowalign.settings.types import NonNegative, Positive, WrongSetting


def square(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the squared difference."""
    return (prediction - target).square()


def cross_entropy(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy of two logits. It is least where they are equal."""
    return binary_cross_entropy_with_logits(prediction, target.sigmoid(), reduction="none")


FORMS = {"mse": square, "bce": cross_entropy}


@dataclass
class CRD(AnchoredObjective):
    """CRD. It works with every sampler and compares the images of a prompt."""

    beta: Positive = 1.0
    """The temperature β of the distilled reward."""
    adaptive: bool = True
    """True to divide errors by their own mean size, as released."""
    form: Literal["mse", "bce"] = "mse"
    """The distance of β ρ and R: the square, or the cross-entropy, whose slope is 8 times less."""
    centring: Literal["soft", "hard"] = "soft"
    """The weights p of the centres: soft over all images, or hard over the better and the worse."""
    temperature: NonNegative = 0.0
    """The soft weights are p = softmax(±R / temperature), with both signs; 0 for equal weights."""
    limit: Positive = 5.0
    """The advantage A_max at which R is 1; at its negative R is 0."""
    kl: VelocityKL = field(default_factory=lambda: VelocityKL(weight=0.1, guidance=4.5))
    kl_least: NonNegative = 1e-4
    """The weight of the KL at R = 0; it rises to kl.weight at R = 1."""
    old: Decay = field(default_factory=lambda: Decay(value=0.25, slope=0.005, end=0.999))
    sampler: Decay = field(default_factory=lambda: Decay(start=75, slope=0.0075, end=0.999))
    """How the copy that samples follows the policy."""
    sampling_weights: ClassVar[str] = "sampler"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.times.must_be_shared()
        if self.centring == "hard" and self.temperature:
            raise WrongSetting(
                f"temperature is {self.temperature}, but centring is hard, which has none. "
                "Leave the temperature out, or write centring: soft."
            )
        # Otherwise bad images would be anchored most.
        if self.kl.weight and self.kl_least > self.kl.weight:
            raise WrongSetting(
                f"kl_least is {self.kl_least}, but kl.weight is {self.kl.weight}. "
                "Write a kl_least between 0 and kl.weight."
            )

    @property
    def snapshots(self) -> dict[str, Decay]:
        """The copy that ρ is measured against, and the copy that samples."""
        return {"old": self.old, "sampler": self.sampler}

    def group_terms(self, policy: Policy, rollout: Rollout, draw: Draw) -> dict[str, Term]:
        """Return the errors of v_old and the centres."""
        xt, target = add_noise(rollout.x0, draw.t, draw.noise)
        cond = self.cond(rollout)
        # It concerns one image, but `loss` reads it here, so that `old` is not evaluated twice.
        error_old = self.error(policy.at("old").velocity(xt, draw.t, cond), target)
        rho = error_old - self.error(policy.velocity(xt, draw.t, cond), target)
        return {"error_old": error_old, "centres": self.centres(rho, rollout)}

    def loss(self, policy: Policy, rollout: Rollout, draw: Draw) -> Loss:
        """Return the loss at one time for each image."""
        cond, r = self.cond(rollout), self.optimality(rollout)
        xt, target = add_noise(rollout.x0, draw.t, draw.noise)
        v = policy.velocity(xt, draw.t, cond)

        error = self.error(v, target)
        error_old = rollout.term(
            "error_old", lambda: self.error(policy.at("old").velocity(xt, draw.t, cond), target)
        )
        rho = error_old - error
        # Centres take no gradient: they stand in the place of log Z, a constant of the prompt.
        centres = rollout.term("centres", lambda: self.centres(rho.detach(), rollout))
        rho_c, r_c = (torch.stack([rho, r], 1)[:, None] - centres).unbind(2)
        total = self.limit / self.beta * FORMS[self.form](self.beta * rho_c, r_c).mean()
        loss = Loss(total, {"log_ratio": Mean(rho)})
        if self.kl.weight == 0:
            return loss
        return loss + self.penalty(v, self.kl.velocity(policy, xt, draw.t, cond), r)

    def penalty(self, v: Latent, v_ref: Latent, r: PerImage) -> Loss:
        """Return λ (c + (1 - c) R) ‖v - v_ref‖²."""
        kl = mean_square(v - v_ref)
        weight = self.kl_least + (self.kl.weight - self.kl_least) * r
        return Loss((weight * kl).mean(), {"kl": Mean(kl)})

    def optimality(self, rollout: Rollout) -> PerImage:
        """Return R."""
        return optimality(rollout.advantage, self.limit)

    def error(self, v: Latent, target: Latent) -> PerImage:
        """Return ‖v - u‖², as `adaptive` says."""
        return adaptive_error(v, target) if self.adaptive else mean_square(v - target)

    def centres(self, rho: PerImage, rollout: Rollout) -> Tensor:
        """Return Σ_j p_j ρ_j and Σ_j p_j R_j of each image's prompt: (B, choices of p, 2)."""
        r, group = self.optimality(rollout), rollout.group
        means = [
            torch.stack([group_mean(p * rho, group), group_mean(p * r, group)], 1)
            for p in self.weights(r, group)
        ]
        return torch.stack(means, 1)

    def weights(self, r: PerImage, group: Tensor) -> list[PerImage]:
        """Return each choice of p, times the number of the prompt's images."""
        if self.centring == "hard":
            return [softmax_over(r > 0.5, r, group), softmax_over(r < 0.5, r, group)]
        if self.temperature == 0:
            return [torch.ones_like(r)]
        return [group_softmax(sign * r / self.temperature, group) for sign in (1, -1)]


def softmax_over(chosen: Tensor, r: PerImage, group: Tensor) -> PerImage:
    """Return the softmax of r over the chosen images of each group, times the group's size.

    A group without a chosen image has equal weights.
    """
    any_chosen = group_mean(chosen.float(), group) > 0
    logits = torch.where(chosen, r, -torch.inf)
    return group_softmax(torch.where(any_chosen, logits, 0.0), group)
