"""RWR: reward-weighted regression (arXiv 2305.13301, section 4.1), on the flow-matching loss.

loss = w ‖v - (noise - x0)‖² + λ ‖v - v_ref‖²,   w = G softmax(reward / τ) over the G images of a prompt
Where images are sampled under guidance, so is v: the paper found that rounds after the first need it.

Differences from the paper: λ (there: none), and τ, here for rewards from 0 to 1 (there: 5, for aesthetic scores and sizes of
files).
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

from flowalign.batch import Rollout
from flowalign.flow import add_noise, mean_square
from flowalign.objectives.base import ImageObjective, Loss
from flowalign.objectives.draws import Draw, ForwardTimes
from flowalign.objectives.terms import group_softmax, VelocityKL
from flowalign.policy import Policy
from flowalign.settings.types import Positive


@dataclass
class RWR(ImageObjective):
    """Any sampler."""

    uses_advantages: ClassVar[bool] = False
    times: ForwardTimes = field(default_factory=lambda: ForwardTimes(shared=False))
    temperature: Positive = 0.2
    """τ, in units of the reward."""
    kl: VelocityKL = field(default_factory=VelocityKL)
    """Imitating one's own images passes the sampler's errors on; an anchor keeps them from adding up."""

    def prepare(self, policy: Policy, rollout: Rollout) -> Rollout:
        """The weights, which need whole groups."""
        return replace(
            rollout,
            prepared=group_softmax(rollout.reward / self.temperature, rollout.group)[:, None],
        )

    def loss(self, policy: Policy, rollout: Rollout, draw: Draw) -> Loss:
        xt, target = add_noise(rollout.x0, draw.t, draw.noise)
        v = policy.velocity(xt, draw.t, self.cond(rollout))

        error, w = mean_square(v - target), rollout.prepared[:, 0]
        loss = Loss((w * error).mean(), {"error": error, "weight/of_squares": w**2})
        return self.kl(loss, policy, v, xt, draw.t, self.cond(rollout))
