"""DiffusionNFT: learn from good and bad images in the forward process (arXiv 2509.16117, equation 5).

With v± = v_old ± β (v - v_old) and r in [0, 1] how good an image is,
    loss = A_max / β · (r ‖v+ - (noise - x0)‖² + (1 - r) ‖v- - (noise - x0)‖²) + λ ‖v - v_ref‖²

Differences from the released code: times are drawn from strata of an interval (there: those of the sampler's steps, in random
order), and the images of a prompt share times and noise unless `times.shared` is false.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from flowalign.batch import Rollout
from flowalign.flow import add_noise, Latent, mean_square, PerImage
from flowalign.objectives.base import ImageObjective, Loss
from flowalign.objectives.draws import Draw
from flowalign.objectives.terms import adaptive_error, optimality, VelocityKL
from flowalign.policy import Decay, Policy
from flowalign.settings.types import Positive


@dataclass
class NFT(ImageObjective):
    """Any sampler; the lagging copy `old` samples."""

    beta: Positive = 1.0
    """How far the implicit good and bad policies stand from the old one."""
    adaptive: bool = True
    """Whether errors of x0 are divided by their own mean size, as released, or errors of v are taken as they are."""
    limit: Positive = 5.0
    """A_max: r is 1 at this advantage and 0 at its negative."""
    kl: VelocityKL = field(default_factory=lambda: VelocityKL(weight=1e-4))
    old: Decay = field(default_factory=lambda: Decay(slope=1e-3, end=0.5))
    sampling_weights: ClassVar[str] = "old"

    @property
    def snapshots(self) -> dict[str, Decay]:
        return {"old": self.old}

    def loss(self, policy: Policy, rollout: Rollout, draw: Draw) -> Loss:
        cond = self.cond(rollout)
        xt, target = add_noise(rollout.x0, draw.t, draw.noise)
        v = policy.velocity(xt, draw.t, cond)
        v_old = policy.at("old").velocity(xt, draw.t, cond)

        good = self.error(v_old + self.beta * (v - v_old), target, draw.t)
        bad = self.error(v_old - self.beta * (v - v_old), target, draw.t)
        r = optimality(rollout.advantage, self.limit)
        loss = self.limit / self.beta * (r * good + (1 - r) * bad).mean()
        stats = {"error/good": good, "error/bad": bad, "moved": mean_square(v.detach() - v_old)}
        return self.kl(Loss(loss, stats), policy, v, xt, draw.t, cond)

    def error(self, v: Latent, target: Latent, t: PerImage) -> PerImage:
        # x0_hat - x0 is -t (v - target): the adaptive weight divides t² ‖·‖² by t |·|.
        return t * adaptive_error(v, target) if self.adaptive else mean_square(v - target)
