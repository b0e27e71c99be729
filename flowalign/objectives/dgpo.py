"""DGPO: direct group preference optimisation (arXiv 2510.08425).

Of a prompt's images the better half shall outweigh the worse: maximise log σ(-S), S = β mean_i A_i δ_i over the group, with
δ = e - e_ref and e = ‖v - (noise - x0)‖². Its gradient is, up to a factor β that the released code leaves out, that of
    loss = σ(S) A e + λ ‖v - v_ref‖²,   σ(S) without gradient
which stops by itself where the group is told apart. Images whose ratio exp(e_old - e) has left [1 - ε, 1 + ε] the way their
advantage points give no gradient. Times and noise are shared within a prompt.

Differences from the released code: the policy samples throughout (there: a fast average, after 200 steps); times are any of an
interval and each has noise of its own (there: the sampler's, with one noise a prompt); `old` follows once a step (there: after
every update).
"""

from dataclasses import dataclass, field, replace

import torch

from flowalign.batch import Rollout
from flowalign.flow import add_noise, mean_square, PerImage
from flowalign.objectives.base import ImageObjective, Loss
from flowalign.objectives.draws import Draw
from flowalign.objectives.terms import group_mean, VelocityKL
from flowalign.policy import Decay, Policy
from flowalign.settings.types import Positive


@dataclass
class DGPO(ImageObjective):
    """Any sampler. `train.images_per_prompt` of 2 or more."""

    beta: Positive = 100.0
    clip_range: Positive = 1e-2
    """ε."""
    kl: VelocityKL = field(default_factory=lambda: VelocityKL(weight=1e-3))
    """Its guidance is also that of e_ref."""
    old: Decay = field(default_factory=lambda: Decay(slope=1e-3, end=0.3))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.times.must_be_shared()

    @property
    def snapshots(self) -> dict[str, Decay]:
        return {"old": self.old}

    def prepare(self, policy: Policy, rollout: Rollout) -> Rollout:
        """S of every draw, where passes part the images of a prompt."""
        if rollout.groups_fit(policy.images_per_pass):
            return rollout
        cond, columns = self.cond(rollout), []
        for draw in self.draws(rollout):
            xt, target = add_noise(rollout.x0, draw.t, draw.noise)
            v, v_ref = policy.velocity(xt, draw.t, cond), self.kl.velocity(policy, xt, draw.t, cond)
            columns.append(
                self.preference(mean_square(v - target), mean_square(v_ref - target), rollout)
            )
        return replace(rollout, prepared=torch.stack(columns, 1))

    def loss(self, policy: Policy, rollout: Rollout, draw: Draw) -> Loss:
        cond = self.cond(rollout)
        xt, target = add_noise(rollout.x0, draw.t, draw.noise)
        v = policy.velocity(xt, draw.t, cond)
        v_old = policy.at("old").velocity(xt, draw.t, cond)
        v_ref = self.kl.velocity(policy, xt, draw.t, cond)

        error, advantage = mean_square(v - target), rollout.advantage
        ratio = (mean_square(v_old - target) - error.detach()).exp()
        gone = torch.where(advantage > 0, ratio > 1 + self.clip_range, ratio < 1 - self.clip_range)
        if rollout.prepared.numel():
            preference = rollout.prepared[:, draw.index]
        else:
            preference = self.preference(error.detach(), mean_square(v_ref - target), rollout)
        weight = preference.sigmoid()
        loss = (weight * advantage * torch.where(gone, error.detach(), error)).mean()
        stats = {"ratio/mean": ratio, "ratio/clipped": gone.float(), "group_weight": weight}
        return self.kl.added(Loss(loss, stats), v, v_ref)

    def preference(self, error: PerImage, error_ref: PerImage, rollout: Rollout) -> PerImage:
        """S of each image's group."""
        return self.beta * group_mean(rollout.advantage * (error - error_ref), rollout.group)
