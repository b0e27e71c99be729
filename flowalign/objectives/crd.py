"""CRD: centered reward distillation (arXiv 2603.14128).

The KL-regularised optimum π* has β log(π*/π_old) = R - β log Z(prompt). Z is the same for all
images of a prompt, so centring within the prompt removes it. With
    u = noise - x0
    e(v) = ‖v - u‖², divided by the mean of |v - u| (without gradient) if `adaptive`
    ρ = e(v_old) - e(v), in place of the log-ratio
    R = clamp(A / (2 A_max) + 1/2, 0, 1), how good an image is
    p = softmax(±R / temperature) within the prompt, equal by default
    loss = A_max / β · (β ρ - R - Σ_j p_j (β ρ_j - R_j))² + λ (c + (1 - c) R) ‖v - v_ref‖²
The square is averaged over both signs of p. λ is `kl.weight`, A_max is `limit`, and c is
`kl_least` / λ, so good images are anchored most. v_ref is the model without adapter under guidance,
so guidance is distilled into the policy. The copy that samples differs from the copy that ρ is
measured against.

Differences from the released code: it subtracts one mean over many prompts; here each prompt has
its own mean, since it has its own Z. Times and noise are shared within a prompt. The size of ρ
depends on time and noise. If these differed within a prompt, the centre would mix that with the
reward.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

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


@dataclass
class CRD(AnchoredObjective):
    """CRD. It works with every sampler and compares the images of a prompt."""

    beta: Positive = 1.0
    """The temperature β of the distilled reward."""
    adaptive: bool = True
    """True to divide errors by their own mean size, as released."""
    temperature: NonNegative = 0.0
    """Temperature of the weights p = softmax(±R / temperature), both signs; 0 for equal weights."""
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
        residuals = [self.beta * rho - r - centre for centre in centres.unbind(1)]
        total = self.limit / self.beta * torch.stack(residuals).square().mean()
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
        """Return Σ_j p_j (β ρ_j - R_j) of each image's prompt, a column for each choice of p."""
        r = self.optimality(rollout)
        residual = self.beta * rho - r
        columns = []
        # With equal weights both signs give one centre; sign 0 makes all logits equal.
        for sign in (1, -1) if self.temperature else (0,):
            p = group_softmax(sign * r / (self.temperature or 1), rollout.group)
            columns.append(group_mean(p * residual, rollout.group))
        return torch.stack(columns, 1)
