"""CRD: centered reward distillation (arXiv 2603.14128).

The KL-regularised optimum π* has β log(π*/π_old) = R - β log Z(prompt). Z is the same for all images of a prompt, so
centring within the prompt removes it: with ρ = -(‖v - u‖² - ‖v_old - u‖²), u = noise - x0, in the place of the log-ratio,
    loss = A_max / β · (β ρ - R - Σ_j p_j (β ρ_j - R_j))² + λ (c + (1 - c) R) ‖v - v_ref‖²
R in [0, 1] is how good an image is; v_ref is the model without adapter under guidance, so that the policy learns to do without;
c = kl_least / λ, so good images are anchored most. The copy that samples is not the one that ρ is measured against.

Differences from the released code: it subtracts one mean over many prompts, here each prompt has its own (its Z is its own);
times and noise are shared within a prompt, since their scale would leak into ρ.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from flowalign.batch import Rollout
from flowalign.flow import add_noise, Latent, mean_square, PerImage
from flowalign.objectives.base import ImageObjective, Loss
from flowalign.objectives.draws import Draw
from flowalign.objectives.terms import (
    adaptive_error,
    group_mean,
    group_softmax,
    optimality,
    VelocityKL,
)
from flowalign.policy import Decay, Policy
from flowalign.settings.types import NonNegative, Positive, WrongSetting


@dataclass
class CRD(ImageObjective):
    """Any sampler. `train.images_per_prompt` of 2 or more."""

    beta: Positive = 1.0
    """Temperature of the distilled reward."""
    adaptive: bool = True
    """Whether errors are divided by their own mean size, as released."""
    temperature: NonNegative = 0.0
    """Of the centring weights p = softmax(±R / temperature), both signs in turn; 0 for equal weights."""
    limit: Positive = 5.0
    """A_max: R is 1 at this advantage and 0 at its negative."""
    kl: VelocityKL = field(default_factory=lambda: VelocityKL(weight=0.1, guidance=4.5))
    kl_least: NonNegative = 1e-4
    """The weight of the KL where R is 0; it rises to kl.weight where R is 1."""
    old: Decay = field(default_factory=lambda: Decay(value=0.25, slope=0.005, end=0.999))
    sampler: Decay = field(default_factory=lambda: Decay(start=75, slope=0.0075, end=0.999))
    sampling_weights: ClassVar[str] = "sampler"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.times.must_be_shared()
        if self.kl.weight and self.kl_least > self.kl.weight:
            raise WrongSetting(
                f"kl_least is {self.kl_least}; it must be between 0 and kl.weight, {self.kl.weight}."
            )

    @property
    def snapshots(self) -> dict[str, Decay]:
        return {"old": self.old, "sampler": self.sampler}

    def prepare(self, policy: Policy, rollout: Rollout) -> Rollout:
        """v_old's errors and the centres of every draw, where passes part the images of a prompt."""
        if rollout.groups_fit(policy.images_per_pass):
            return rollout
        cond, columns = self.cond(rollout), []
        for draw in self.draws(rollout):
            xt, target = add_noise(rollout.x0, draw.t, draw.noise)
            error_old = self.error(policy.at("old").velocity(xt, draw.t, cond), target)
            rho = error_old - self.error(policy.velocity(xt, draw.t, cond), target)
            columns += [error_old, *self.centres(rho, rollout)]
        return replace(rollout, prepared=torch.stack(columns, 1))

    def loss(self, policy: Policy, rollout: Rollout, draw: Draw) -> Loss:
        cond = self.cond(rollout)
        xt, target = add_noise(rollout.x0, draw.t, draw.noise)
        v = policy.velocity(xt, draw.t, cond)
        error, reward = self.error(v, target), self.reward(rollout)
        if rollout.prepared.numel():
            width = 3 if self.temperature else 2
            error_old, *centres = rollout.prepared[
                :, width * draw.index : width * (draw.index + 1)
            ].T
        else:
            error_old = self.error(policy.at("old").velocity(xt, draw.t, cond), target)
            centres = self.centres(error_old - error.detach(), rollout)

        rho = error_old - error
        residuals = [self.beta * rho - reward - centre for centre in centres]
        loss = self.limit / self.beta * torch.stack(residuals).square().mean()
        stats = {"log_ratio": rho}
        if self.kl.weight == 0:
            return Loss(loss, stats)

        kl = self.kl.distance(v, self.kl.velocity(policy, xt, draw.t, cond))
        weight = self.kl_least + (self.kl.weight - self.kl_least) * reward
        return Loss(loss + (weight * kl).mean(), stats | {"kl": kl})

    def reward(self, rollout: Rollout) -> PerImage:
        return optimality(rollout.advantage, self.limit)

    def error(self, v: Latent, target: Latent) -> PerImage:
        return adaptive_error(v, target) if self.adaptive else mean_square(v - target)

    def centres(self, rho: PerImage, rollout: Rollout) -> Iterator[PerImage]:
        """Σ_j p_j (β ρ_j - R_j) over the images of each prompt, for each choice of p."""
        reward = self.reward(rollout)
        residual = self.beta * rho - reward
        for sign in (1, -1) if self.temperature else (0,):
            p = group_softmax(sign * reward / (self.temperature or 1), rollout.group)
            yield group_mean(p * residual, rollout.group)
