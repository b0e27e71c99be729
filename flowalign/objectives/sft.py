"""SFT: imitate given pictures by flow matching (arXiv 2209.03003).

loss = ‖v - (noise - x0)‖², of the velocity without guidance
"""

from dataclasses import dataclass, field
from typing import ClassVar

from flowalign.batch import Batch, Examples
from flowalign.flow import add_noise, mean_square
from flowalign.objectives.base import ForwardObjective, Loss
from flowalign.objectives.draws import Draw, ForwardTimes
from flowalign.policy import Policy


@dataclass
class SFT(ForwardObjective):
    """From the pictures of `data.pairs`; of pairs, the chosen."""

    times: ForwardTimes = field(
        default_factory=lambda: ForwardTimes(count=1, distribution="logit_normal")
    )
    learns_from: ClassVar[type[Batch]] = Examples

    def loss(self, policy: Policy, examples: Examples, draw: Draw) -> Loss:
        xt, target = add_noise(examples.x0, draw.t, draw.noise)

        error = mean_square(policy.velocity(xt, draw.t, examples.cond.unguided()) - target)
        return Loss(error.mean(), {"error": error})
