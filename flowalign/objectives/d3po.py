"""D3PO: a preference between two paths holds for each of their steps (arXiv 2311.13231).

With ratio_k = clip(π_θ(x_{k+1} | x_k, c) / π_ref(x_{k+1} | x_k, c), 1 - ε, 1 + ε),
    loss = -log σ(β log ratio_k(chosen) - β log ratio_k(rejected)) + λ KL(π_θ ‖ π_base)
where the logarithm is weighted by the pair (`data.ranking`), λ is `kl_weight`, 0 by default, and
π_base the model without adapter. If a share q of the voters prefers the rejected path, the first
term is (1 - q) times itself plus q times itself with both paths exchanged. π_ref is π_base too,
unless `reference` moves it.

Clipped on both sides, a path that moved the wrong way beyond ε gives no gradient either. With
`clip: one_sided` the ratio of the chosen path has no lower limit, and that of the rejected no upper
one, so that such a path is still pulled back.

Votes of people train by `data.pairs`: their paths are made again from their keys. Otherwise rewards
rank the paths.

Differences from the released code: the KL, the one-sided clip and shares of voters are not part of
it. Paths are those of `sampler.dynamics`; the released steps are
{name: ddim} with η = 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch.nn import functional as F

from flowalign.batch import Batch, Pairs
from flowalign.dynamics import Gaussian
from flowalign.flow import PerImage
from flowalign.objectives.base import Loss, Mean, PathObjective
from flowalign.objectives.terms import preferred, Reference
from flowalign.policy import Decay, Policy
from flowalign.settings.types import NonNegative, Positive


def both_sides(log_ratio: PerImage, low: float, high: float) -> PerImage:
    """Return the log-ratios of the chosen, then of the rejected paths, within both limits."""
    return log_ratio.clamp(low, high)


def one_side(log_ratio: PerImage, low: float, high: float) -> PerImage:
    """Return the same, with an upper limit for chosen and a lower limit for rejected paths."""
    chosen, rejected = log_ratio.chunk(2)
    return torch.cat([chosen.clamp(max=high), rejected.clamp(min=low)])


CLIPS: dict[str, Callable[[PerImage, float, float], PerImage]] = {
    "two_sided": both_sides,
    "one_sided": one_side,
}


@dataclass
class D3PO(PathObjective[Pairs]):
    """D3PO on the ranked images of a prompt. It needs a stochastic sampler.

    It works best with `sampler.same_noise: true`, as published.
    """

    learns_from: ClassVar[type[Batch]] = Pairs
    beta: Positive = 0.1
    """The temperature β."""
    clip_range: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """The range ε of the ratio. Beyond it a path gives no gradient."""
    clip: Literal["two_sided", "one_sided"] = "two_sided"
    """Clip the ratio on both sides, or only where a path moved the right way."""
    kl_weight: NonNegative = 0.0
    """The weight λ of the KL to the model without adapter."""
    reference: Reference = field(default_factory=Reference)
    """The policy π_ref."""

    @property
    def snapshots(self) -> dict[str, Decay]:
        """The reference, if it moves."""
        return self.reference.snapshots

    def loss(self, policy: Policy, pairs: Pairs, k: int) -> Loss:
        """Return the loss at step k of each pair."""
        # Both paths go through the network in one call, which rounds them alike.
        (before, after, _old_log_prob), cond = pairs.transition(k), pairs.cond.twice()
        gaussian = policy.step(before, k, cond)
        gaussian_ref = self.reference.of(policy).step(before, k, cond)

        log_ratio = gaussian.log_prob(after) - gaussian_ref.log_prob(after)
        # Clipping the ratio is clipping its logarithm, which does not overflow.
        low, high = math.log(1 - self.clip_range), math.log(1 + self.clip_range)
        clipped = CLIPS[self.clip](log_ratio, low, high)
        chosen, rejected = clipped.chunk(2)
        margin = self.beta * (chosen - rejected)
        won, lost = pairs.votes
        loss = (pairs.weight * -(won * F.logsigmoid(margin) + lost * F.logsigmoid(-margin))).mean()

        stats = {
            "chosen_preferred": Mean(preferred(margin)),
            "margin": Mean(margin),
            "ratio/clipped": Mean((log_ratio != clipped).float()),
        }
        # A reference that does not move is the base, whose step is known already.
        needs_base = self.kl_weight and self.reference.every
        base = policy.at("reference").step(before, k, cond) if needs_base else gaussian_ref
        return Loss(loss, stats) + self.penalty(gaussian, base)

    def penalty(self, gaussian: Gaussian, base: Gaussian) -> Loss:
        """Return λ KL(π_θ ‖ π_base) of both paths' steps."""
        if not self.kl_weight:
            return Loss(gaussian.mean.new_zeros(()), {})
        kl = gaussian.kl(base)
        return Loss(self.kl_weight * kl.mean(), {"kl": Mean(kl)})
