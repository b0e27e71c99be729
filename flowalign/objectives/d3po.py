"""D3PO: a preference between two paths of one prompt holds for every step of them (arXiv 2311.13231), on the flow SDE.

With ratio_k = clip(π_θ(x_{k+1} | x_k, c) / π_ref(x_{k+1} | x_k, c), 1 - ε, 1 + ε),
    loss = -log σ(β log ratio_k(chosen) - β log ratio_k(rejected))

Differences from the released code: paths are those of a flow SDE, and rewards rank them (there: DDIM, and people).
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch.nn import functional as F

from flowalign.batch import Batch, Pairs
from flowalign.objectives.base import Loss, PathObjective
from flowalign.policy import Policy
from flowalign.settings.types import Positive


@dataclass
class D3PO(PathObjective):
    """Needs a stochastic sampler. Pairs are the ranked images of a prompt; best with sampler.same_noise: true, as published."""

    learns_from: ClassVar[type[Batch]] = Pairs
    beta: Positive = 0.1
    clip_range: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """ε: beyond it a path gives no gradient."""

    def loss(self, policy: Policy, pairs: Pairs, k: int) -> Loss:
        paths, cond = torch.cat([pairs.chosen, pairs.rejected]), pairs.cond.twice()
        step, step_ref = (
            policy.step(paths[:, k], k, cond),
            policy.at("reference").step(paths[:, k], k, cond),
        )

        log_ratio = step.log_prob(paths[:, k + 1]) - step_ref.log_prob(paths[:, k + 1])
        clipped = log_ratio.clamp(math.log(1 - self.clip_range), math.log(1 + self.clip_range))
        chosen, rejected = clipped.chunk(2)
        s = self.beta * (chosen - rejected)
        loss = (pairs.weight * -F.logsigmoid(s)).mean()
        stats = {"chosen_preferred": (s > 0).float() + 0.5 * (s == 0), "margin": s}
        return Loss(loss, stats | {"ratio/clipped": (log_ratio != clipped).float()})
