"""RAFT: imitate the best of every prompt's images (arXiv 2304.06767), on the flow-matching loss.

loss = w ‖v - (noise - x0)‖² + λ ‖v - v_ref‖²,   w = G / n for the n best of a prompt's G images (ties count), 0 for the others
v is the velocity without guidance, however images are sampled, unless `guidance` says otherwise.

Difference from the paper, which is on language models: λ.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

from flowalign.batch import Rollout
from flowalign.flow import add_noise, mean_square
from flowalign.objectives.base import ImageObjective, Loss
from flowalign.objectives.draws import Draw, ForwardTimes
from flowalign.objectives.terms import group_mean, VelocityKL
from flowalign.policy import Policy
from flowalign.settings.types import Count, Guidance


@dataclass
class RAFT(ImageObjective):
    """Any sampler. A prompt whose images are all equally good teaches as plain imitation would."""

    uses_advantages: ClassVar[bool] = False
    times: ForwardTimes = field(default_factory=lambda: ForwardTimes(shared=False))
    keep: Count = 1
    """How many of a prompt's images are imitated."""
    guidance: Guidance | None = 1.0
    kl: VelocityKL = field(default_factory=VelocityKL)
    """Imitating one's own images passes the sampler's errors on; an anchor keeps them from adding up."""

    @property
    def min_images_per_prompt(self) -> int:
        return self.keep + 1

    def prepare(self, policy: Policy, rollout: Rollout) -> Rollout:
        """The weights, which need whole groups."""
        better = (rollout.reward[None] > rollout.reward[:, None]) & (
            rollout.group[None] == rollout.group[:, None]
        ).to(rollout.device)
        best = (better.sum(1) < self.keep).to(rollout.reward.dtype)
        return replace(rollout, prepared=(best / group_mean(best, rollout.group))[:, None])

    def loss(self, policy: Policy, rollout: Rollout, draw: Draw) -> Loss:
        xt, target = add_noise(rollout.x0, draw.t, draw.noise)
        v = policy.velocity(xt, draw.t, self.cond(rollout))

        error, w = mean_square(v - target), rollout.prepared[:, 0]
        loss = Loss((w * error).mean(), {"error": error, "kept": (w > 0).float()})
        return self.kl(loss, policy, v, xt, draw.t, self.cond(rollout))
