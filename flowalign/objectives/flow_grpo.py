"""Flow-GRPO: group-relative policy optimisation on the steps of an SDE sampler (arXiv 2505.05470, equations 5 to 8).

With ratio_k = π_θ(x_{k+1} | x_k, c) / π_old(x_{k+1} | x_k, c) and advantages within the images of a prompt,
    loss = -min(ratio A, clip(ratio, 1 - ε, 1 + ε) A) + β KL(π_θ ‖ π_ref)

Differences from the paper: the log-probability is the mean over latent elements, as in the released code, and so is the
KL. `kl: per_time` is the released code's KL for SD3, which lacks the step's length: |t - s| times the exact one.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from flowalign.batch import Rollout
from flowalign.errors import UserError
from flowalign.objectives.base import Loss, PathSteps
from flowalign.policy import Decay, Policy


@dataclass
class FlowGRPO:
    """Needs a stochastic sampler: `sampler: {dynamics: {name: flow_sde}}`."""

    clip_range: float = 1e-4
    """ε. For log-probabilities that are means over latent elements, 1e-5 to 1e-3."""
    kl_weight: float = 0.0
    """β. 0 never asks the reference."""
    kl: Literal["exact", "per_time"] = "exact"
    draws: PathSteps = field(default_factory=PathSteps)
    snapshots: ClassVar[dict[str, Decay]] = {}
    learns_from: ClassVar = Rollout
    needs_stochastic_steps: ClassVar[bool] = True
    rollout_with: ClassVar[str] = "policy"

    def __post_init__(self) -> None:
        if not self.clip_range > 0 or not self.kl_weight >= 0:
            found = f"clip_range is {self.clip_range} and kl_weight {self.kl_weight}"
            raise UserError(f"objective: {found}; write a range above 0 and a weight of 0 or more.")

    def loss(self, policy: Policy, rollout: Rollout, k: int) -> Loss:
        x, x_next, advantage = rollout.path[:, k], rollout.path[:, k + 1], rollout.advantage
        step = policy.step(x, k, rollout.cond)

        log_ratio = step.log_prob(x_next) - rollout.log_prob[:, k]
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()
        stats = {
            "ratio/mean": ratio,
            "ratio/max_log_error": log_ratio.abs(),
            "ratio/clipped": (ratio != clipped).float(),
        }
        if self.kl_weight == 0:
            return Loss(loss, stats)

        kl = step.kl(policy.at("reference").step(x, k, rollout.cond))
        if self.kl == "per_time":
            kl = kl * (policy.times[k] - policy.times[k + 1])
        return Loss(loss + self.kl_weight * kl.mean(), stats | {"kl": kl})
