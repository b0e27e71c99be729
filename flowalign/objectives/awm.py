"""AWM: advantage-weighted matching, the policy gradient of the forward process's ELBO (arXiv 2509.25050).

With e = ‖v - (noise - x0)‖² and ℓ = -w(e, t) in the place of the log-probability,
    loss = -min(ratio A, clip(ratio, 1 - ε, 1 + ε) A) + β_old ‖v - v_old‖² + λ ‖v - v_ref‖²
and ratio = exp(ℓ - ℓ_old).

Differences from the released code: one lagging copy `old` serves the ratio and the trust region (there: the weights before
the step, and an average of them). The images of a prompt share times and noise unless `times.shared` is false.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch

from flowalign.batch import Rollout
from flowalign.flow import add_noise, mean_square, PerImage
from flowalign.objectives.base import ImageObjective, Loss
from flowalign.objectives.draws import Draw
from flowalign.objectives.terms import VelocityKL
from flowalign.policy import Decay, Policy
from flowalign.settings.types import NonNegative, Positive

WEIGHTINGS = {
    "uniform": lambda e, t: e,
    "t": lambda e, t: t * e,
    "t_squared": lambda e, t: t**2 * e,
    "huber": lambda e, t: t * ((e + 1e-10).sqrt() - 1e-5),
    "ghuber": lambda e, t: t / 0.25 * ((e + 1e-10) ** 0.25 - 1e-10**0.25),
}


@dataclass
class AWM(ImageObjective):
    """Any sampler."""

    weighting: Literal["uniform", "t", "t_squared", "huber", "ghuber"] = "ghuber"
    clip_range: Positive = 1.0
    """ε; it matters where `old` lags, and from a step's second update on."""
    scale: Positive = 0.2
    """Of the advantages, which are cut to [-5, 5]."""
    trust: NonNegative = 1.0
    """β_old."""
    kl: VelocityKL = field(default_factory=lambda: VelocityKL(weight=1e-3))
    old: Decay = field(default_factory=lambda: Decay(slope=1e-3, end=0.3))

    @property
    def snapshots(self) -> dict[str, Decay]:
        return {"old": self.old}

    def loss(self, policy: Policy, rollout: Rollout, draw: Draw) -> Loss:
        cond = self.cond(rollout)
        xt, target = add_noise(rollout.x0, draw.t, draw.noise)
        v = policy.velocity(xt, draw.t, cond)
        v_old = policy.at("old").velocity(xt, draw.t, cond)

        log_prob, old_log_prob = (
            self.log_prob(mean_square(u - target), draw.t) for u in (v, v_old)
        )
        advantage = self.scale * rollout.advantage
        ratio = (log_prob - old_log_prob).exp()
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        moved = mean_square(v - v_old)
        loss = (
            -torch.minimum(ratio * advantage, clipped * advantage).mean()
            + self.trust * moved.mean()
        )
        stats = {"ratio/mean": ratio, "ratio/clipped": (ratio != clipped).float(), "moved": moved}
        return self.kl(Loss(loss, stats), policy, v, xt, draw.t, cond)

    def log_prob(self, error: PerImage, t: PerImage) -> PerImage:
        """ℓ: the forward process's stand-in for a log-probability."""
        return -WEIGHTINGS[self.weighting](error, t)
