"""RWR: reward-weighted regression (arXiv 2305.13301, section 4.1), on the flow-matching loss.

    loss = w ‖v - (noise - x0)‖² + λ ‖v - v_ref‖²,   w = G softmax(reward / τ)
over the G images of a prompt.
If images are sampled under guidance, v is guided too: the paper found that rounds after the first
need it.

Differences from the paper: λ (there: none), and τ, which is here for rewards from 0 to 1 (there: 5,
for aesthetic scores and file sizes).
"""

from dataclasses import dataclass

from flowalign.batch import Rollout
from flowalign.flow import add_noise, mean_square, PerImage
from flowalign.objectives.base import Loss, Mean, Term
from flowalign.objectives.draws import Draw
from flowalign.objectives.terms import group_softmax, ImitationObjective
from flowalign.policy import Policy
from flowalign.settings.types import Positive


@dataclass
class RWR(ImitationObjective):
    """RWR. It works with every sampler and compares the images of a prompt."""

    temperature: Positive = 0.2
    """The temperature τ, in units of the reward."""

    def group_terms(self, policy: Policy, rollout: Rollout, draw: Draw) -> dict[str, Term]:
        """Return the weights."""
        # No forward is needed, but passes that cut a group cannot normalise its weights.
        return {"weight": self.weight(rollout)}

    def loss(self, policy: Policy, rollout: Rollout, draw: Draw) -> Loss:
        """Return the loss at one time for each image."""
        cond = self.cond(rollout)
        xt, target = add_noise(rollout.x0, draw.t, draw.noise)
        v = policy.velocity(xt, draw.t, cond)

        error = mean_square(v - target)
        w = rollout.term("weight", lambda: self.weight(rollout))
        stats = {"error": Mean(error), "weight/of_squares": Mean(w**2)}
        return Loss((w * error).mean(), stats) + self.kl.penalty(policy, v, xt, draw.t, cond)

    def weight(self, rollout: Rollout) -> PerImage:
        """Return w."""
        # In float64: rewards near 100 that differ by 1e-3 keep too few digits over a small τ.
        return group_softmax(rollout.reward.double() / self.temperature, rollout.group).float()
