"""DiffusionNFT: learn from good and bad images in the forward process (arXiv 2509.16117, eq. 5).

With v± = v_old ± β (v - v_old) and R = clamp(A / (2 A_max) + 1/2, 0, 1), how good an image is,
    loss = A_max / β · (R ‖v+ - (noise - x0)‖² + (1 - R) ‖v- - (noise - x0)‖²) + λ ‖v - v_ref‖²
R is the paper's r. If `adaptive`, an error is that of x0, over its mean size (without gradient).

Differences from the released code: times are drawn from strata of an interval (there: those of the
sampler's steps, in random order). The images of a prompt share times and noise unless
`times.shared` is false.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from flowalign.batch import Rollout
from flowalign.flow import add_noise, Latent, mean_square, PerImage
from flowalign.objectives.base import Loss, Mean
from flowalign.objectives.draws import Draw
from flowalign.objectives.terms import adaptive_error, AnchoredObjective, optimality, VelocityKL
from flowalign.policy import Decay, Policy
from flowalign.settings.types import Positive


@dataclass
class NFT(AnchoredObjective):
    """DiffusionNFT. It works with every sampler; the lagging copy `old` samples."""

    beta: Positive = 1.0
    """The distance β of the implicit good and bad policies from the old one."""
    adaptive: bool = True
    """True to divide errors of x0 by their own mean size, as released; false for errors of v."""
    limit: Positive = 5.0
    """The advantage A_max at which R is 1; at its negative R is 0."""
    kl: VelocityKL = field(default_factory=lambda: VelocityKL(weight=1e-4))
    old: Decay = field(default_factory=lambda: Decay(slope=1e-3, end=0.5))
    sampling_weights: ClassVar[str] = "old"

    def loss(self, policy: Policy, rollout: Rollout, draw: Draw) -> Loss:
        """Return the loss at one time for each image."""
        cond = self.cond(rollout)
        xt, target = add_noise(rollout.x0, draw.t, draw.noise)
        v = policy.velocity(xt, draw.t, cond)
        v_old = policy.at("old").velocity(xt, draw.t, cond)

        # v- moves against v: learning v- from bad images pushes v away from them.
        good = self.error(v_old + self.beta * (v - v_old), target, draw.t)
        bad = self.error(v_old - self.beta * (v - v_old), target, draw.t)
        r = optimality(rollout.advantage, self.limit)
        loss = self.limit / self.beta * (r * good + (1 - r) * bad).mean()

        moved = mean_square(v.detach() - v_old)
        stats = {"error/good": Mean(good), "error/bad": Mean(bad), "moved": Mean(moved)}
        return Loss(loss, stats) + self.kl.penalty(policy, v, xt, draw.t, cond)

    def error(self, v: Latent, target: Latent, t: PerImage) -> PerImage:
        """Return the squared error, as `adaptive` says."""
        # x0_hat - x0 is -t (v - target): the adaptive weight divides t² ‖·‖² by t |·|.
        return t * adaptive_error(v, target) if self.adaptive else mean_square(v - target)
