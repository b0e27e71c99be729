"""RAFT: imitate the best of every prompt's images (arXiv 2304.06767), on the flow-matching loss.

    loss = w ‖v - (noise - x0)‖² + λ ‖v - v_ref‖²
w = G / n for the n best of a prompt's G images (ties count), and 0 for the others. v is the
velocity without guidance, however images are sampled, unless `guidance` says otherwise.

Difference from the paper, which is on language models: λ.
"""

from dataclasses import dataclass

from flowalign.batch import Rollout
from flowalign.flow import add_noise, mean_square, PerImage
from flowalign.objectives.base import Loss, Mean, Term
from flowalign.objectives.draws import Draw
from flowalign.objectives.terms import group_mean, ImitationObjective
from flowalign.policy import Policy
from flowalign.settings.types import Count, Guidance


@dataclass
class RAFT(ImitationObjective):
    """RAFT. If all images of a prompt are equally good, all of them are imitated."""

    keep: Count = 1
    """How many of a prompt's images are imitated."""
    guidance: Guidance | None = 1.0
    """Guidance of the velocity that is trained; 1 means none, whatever the sampler has."""

    @property
    def min_images_per_prompt(self) -> int:
        """One more than are imitated."""
        return self.keep + 1

    def group_terms(self, policy: Policy, rollout: Rollout, draw: Draw) -> dict[str, Term]:
        """Return the weights."""
        return {"weight": self.weight(rollout)}

    def loss(self, policy: Policy, rollout: Rollout, draw: Draw) -> Loss:
        """Return the loss at one time for each image."""
        cond = self.cond(rollout)
        xt, target = add_noise(rollout.x0, draw.t, draw.noise)
        v = policy.velocity(xt, draw.t, cond)

        error = mean_square(v - target)
        w = rollout.term("weight", lambda: self.weight(rollout))
        stats = {"error": Mean(error), "kept": Mean((w > 0).float())}
        return Loss((w * error).mean(), stats) + self.kl.penalty(policy, v, xt, draw.t, cond)

    def weight(self, rollout: Rollout) -> PerImage:
        """Return w."""
        reward, group = rollout.reward, rollout.group
        same_group = (group[None] == group[:, None]).to(rollout.device)
        better = (reward[None] > reward[:, None]) & same_group
        # Images that tie for the last place all count, or their order in the batch would decide.
        best = (better.sum(1) < self.keep).to(reward.dtype)
        return best / group_mean(best, group)
