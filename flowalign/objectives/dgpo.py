"""DGPO: direct group preference optimisation (arXiv 2510.08425).

The better half of a prompt's images shall outweigh the worse: maximise log σ(-S) with
S = β mean_i A_i δ_i over the group, δ = e - e_ref and e = ‖v - (noise - x0)‖². Up to a factor β,
which the released code leaves out, its gradient is that of
    loss = σ(S) A e + λ ‖v - v_ref‖²,   σ(S) without gradient
The weight σ(S) falls to 0 once the policy separates the group. An image gives no gradient once its
ratio exp(e_old - e) has left [1 - ε, 1 + ε] in the direction of its advantage. Times and noise are
shared within a prompt.

Differences from the released code: the policy samples throughout (there: a fast average, after 200
steps). Times are drawn from an interval and each has noise of its own (there: the sampler's times,
with one noise for a prompt).
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from flowalign.batch import Rollout
from flowalign.flow import add_noise, mean_square, PerImage
from flowalign.objectives.base import Loss, Mean, Term
from flowalign.objectives.draws import Draw
from flowalign.objectives.terms import AnchoredObjective, group_mean, VelocityKL
from flowalign.policy import Decay, Policy
from flowalign.settings.types import Positive


@dataclass
class DGPO(AnchoredObjective):
    """DGPO. It works with every sampler and compares the images of a prompt."""

    beta: Positive = 100.0
    """The steepness β of the preference."""
    clip_range: Positive = 1e-2
    """The range ε of the ratio."""
    kl: VelocityKL = field(default_factory=lambda: VelocityKL(weight=1e-3))
    """The penalty; its guidance is also that of e_ref."""
    old: Decay = field(default_factory=lambda: Decay(slope=1e-3, end=0.3))
    # The released loop moves this copy in every update, and counts the update afterwards.
    copies_follow_after: ClassVar[Literal["step", "update"]] = "update"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.times.must_be_shared()

    def group_terms(self, policy: Policy, rollout: Rollout, draw: Draw) -> dict[str, Term]:
        """Return S of each image's group."""
        cond = self.cond(rollout)
        xt, target = add_noise(rollout.x0, draw.t, draw.noise)
        error = mean_square(policy.velocity(xt, draw.t, cond) - target)
        error_ref = mean_square(self.kl.velocity(policy, xt, draw.t, cond) - target)
        return {"preference": self.preference(error, error_ref, rollout)}

    def loss(self, policy: Policy, rollout: Rollout, draw: Draw) -> Loss:
        """Return the loss at one time for each image."""
        cond = self.cond(rollout)
        xt, target = add_noise(rollout.x0, draw.t, draw.noise)
        v = policy.velocity(xt, draw.t, cond)
        v_old = policy.at("old").velocity(xt, draw.t, cond)
        # The reference is evaluated even at weight 0, because S needs its error.
        v_ref = self.kl.velocity(policy, xt, draw.t, cond)

        error, advantage = mean_square(v - target), rollout.advantage
        ratio = (mean_square(v_old - target) - error.detach()).exp()
        gone = torch.where(advantage > 0, ratio > 1 + self.clip_range, ratio < 1 - self.clip_range)
        preference = rollout.term(
            "preference",
            lambda: self.preference(error.detach(), mean_square(v_ref - target), rollout),
        )
        weight = preference.sigmoid()
        # Images that are clipped keep their value in the loss, as in PPO, but give no gradient.
        loss = (weight * advantage * torch.where(gone, error.detach(), error)).mean()

        stats = {
            "ratio/mean": Mean(ratio),
            "ratio/clipped": Mean(gone.float()),
            "group_weight": Mean(weight),
        }
        return Loss(loss, stats) + self.kl.penalty_from(v, v_ref)

    def preference(self, error: PerImage, error_ref: PerImage, rollout: Rollout) -> PerImage:
        """Return S of each image's group."""
        return self.beta * group_mean(rollout.advantage * (error - error_ref), rollout.group)
