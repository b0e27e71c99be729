"""D3PO: a preference between two paths holds for each of their steps (arXiv 2311.13231).

With ratio_k = clip(π_θ(x_{k+1} | x_k, c) / π_ref(x_{k+1} | x_k, c), 1 - ε, 1 + ε),
    loss = -log σ(β log ratio_k(chosen) - β log ratio_k(rejected))
times the pair's weight (`data.ranking`).

Differences from the released code: paths are those of the stochastic sampler (flow_sde, dance_sde
or cps; there: DDIM), and rewards rank them (there: people).
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch.nn import functional as F

from flowalign.batch import Batch, Pairs
from flowalign.objectives.base import Loss, Mean, PathObjective
from flowalign.objectives.terms import preferred
from flowalign.policy import Policy
from flowalign.settings.types import Positive


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

    def loss(self, policy: Policy, pairs: Pairs, k: int) -> Loss:
        """Return the loss at step k of each pair."""
        # Both paths go through the network in one call, which rounds them alike.
        paths, cond = torch.cat([pairs.chosen, pairs.rejected]), pairs.cond.twice()
        gaussian = policy.step(paths[:, k], k, cond)
        gaussian_ref = policy.at("reference").step(paths[:, k], k, cond)

        log_ratio = gaussian.log_prob(paths[:, k + 1]) - gaussian_ref.log_prob(paths[:, k + 1])
        # Clipping the ratio is clipping its logarithm, which does not overflow.
        clipped = log_ratio.clamp(math.log(1 - self.clip_range), math.log(1 + self.clip_range))
        chosen, rejected = clipped.chunk(2)
        margin = self.beta * (chosen - rejected)
        loss = (pairs.weight * -F.logsigmoid(margin)).mean()

        stats = {
            "chosen_preferred": Mean(preferred(margin)),
            "margin": Mean(margin),
            "ratio/clipped": Mean((log_ratio != clipped).float()),
        }
        return Loss(loss, stats)
