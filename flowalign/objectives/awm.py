"""AWM: advantage-weighted matching, a policy gradient on the forward process (arXiv 2509.25050).

With e = ‖v - (noise - x0)‖² and ℓ = -w(e, t), a bound on the log-probability, in its place,
    loss = -min(ratio A, clip(ratio, 1 - ε, 1 + ε) A) + β_old ‖v - v_old‖² + λ ‖v - v_ref‖²
and ratio = exp(ℓ - ℓ_old).

Differences from the released code: one lagging copy `old` serves the ratio and the trust region
(there: the weights before the step, and an average of them). The images of a prompt share times and
noise unless `times.shared` is false.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch

from flowalign.batch import Rollout
from flowalign.flow import add_noise, mean_square, PerImage
from flowalign.objectives.base import Loss, Mean
from flowalign.objectives.draws import Draw
from flowalign.objectives.terms import AnchoredObjective, VelocityKL
from flowalign.policy import Decay, Policy
from flowalign.settings.types import NonNegative, Positive

# The small constants keep the roots differentiable at e = 0.
WEIGHTINGS = {
    "uniform": lambda e, t: e,
    "t": lambda e, t: t * e,
    "t_squared": lambda e, t: t**2 * e,
    "huber": lambda e, t: t * ((e + 1e-10).sqrt() - 1e-5),
    "ghuber": lambda e, t: t / 0.25 * ((e + 1e-10) ** 0.25 - 1e-10**0.25),
}


@dataclass
class AWM(AnchoredObjective):
    """AWM. It works with every sampler."""

    weighting: Literal["uniform", "t", "t_squared", "huber", "ghuber"] = "ghuber"
    """The weighting w of errors over time."""
    clip_range: Positive = 1.0
    """The range ε of the ratio. It matters if `old` lags, and from a step's second update on."""
    scale: Positive = 0.2
    """Factor of the advantages."""
    trust: NonNegative = 1.0
    """The weight β_old of the trust region."""
    kl: VelocityKL = field(default_factory=lambda: VelocityKL(weight=1e-3))
    old: Decay = field(default_factory=lambda: Decay(slope=1e-3, end=0.3))

    def loss(self, policy: Policy, rollout: Rollout, draw: Draw) -> Loss:
        """Return the loss at one time for each image."""
        cond = self.cond(rollout)
        xt, target = add_noise(rollout.x0, draw.t, draw.noise)
        v = policy.velocity(xt, draw.t, cond)
        # Sampling did not pass through xt, so ℓ_old cannot be stored there.
        v_old = policy.at("old").velocity(xt, draw.t, cond)

        log_prob = self.log_prob(mean_square(v - target), draw.t)
        old_log_prob = self.log_prob(mean_square(v_old - target), draw.t)
        advantage = self.scale * rollout.advantage
        ratio = (log_prob - old_log_prob).exp()
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        moved = mean_square(v - v_old)
        surrogate = -torch.minimum(ratio * advantage, clipped * advantage).mean()
        loss = surrogate + self.trust * moved.mean()

        stats = {
            "ratio/mean": Mean(ratio),
            "ratio/clipped": Mean((ratio != clipped).float()),
            "moved": Mean(moved),
        }
        return Loss(loss, stats) + self.kl.penalty(policy, v, xt, draw.t, cond)

    def log_prob(self, error: PerImage, t: PerImage) -> PerImage:
        """Return ℓ, the forward process's bound on the log-probability."""
        return -WEIGHTINGS[self.weighting](error, t)
