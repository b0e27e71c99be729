"""RWR: reward-weighted regression (arXiv 2305.13301, section 4.1), on the flow-matching loss.

loss = w ‖v - (noise - x0)‖² + λ ‖v - v_ref‖²,   w = G softmax(reward / τ) over the G images of a prompt
v is the velocity without guidance, however images are sampled.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

from flowalign.batch import Rollout
from flowalign.flow import add_noise, mean_square
from flowalign.objectives.base import Anchor, Draw, ForwardObjective, group_softmax, Loss
from flowalign.policy import Policy
from flowalign.settings import Positive


@dataclass
class RWR(ForwardObjective):
    """Any sampler."""

    by_advantage: ClassVar[bool] = False
    temperature: Positive = 0.2
    """τ, in units of the reward."""
    kl: Anchor = field(default_factory=Anchor)
    """Imitating one's own images passes the sampler's errors on; an anchor keeps them from adding up."""

    def prepare(self, policy: Policy, rollout: Rollout) -> Rollout:
        """The weights, which need whole groups."""
        return replace(rollout, prepared=group_softmax(rollout.reward / self.temperature, rollout.group)[:, None])

    def loss(self, policy: Policy, rollout: Rollout, draw: Draw) -> Loss:
        xt, target = add_noise(rollout.x0, draw.t, draw.noise)
        v = policy.velocity(xt, draw.t, rollout.cond.unguided())

        error, w = mean_square(v - target), rollout.prepared[:, 0]
        loss = Loss((w * error).mean(), {"error": error, "weight/of_squares": w**2})
        return self.kl(loss, policy, v, xt, draw.t, rollout.cond.unguided())
