"""SFT: imitate given pictures by flow matching (arXiv 2209.03003).

loss = ‖v - (noise - x0)‖², of the velocity without guidance
"""

from dataclasses import dataclass

from flowalign.batch import Examples
from flowalign.flow import add_noise, mean_square
from flowalign.objectives.base import Loss, Mean
from flowalign.objectives.draws import Draw
from flowalign.objectives.terms import ExampleObjective
from flowalign.policy import Policy


@dataclass
class SFT(ExampleObjective):
    """Supervised fine-tuning on the pictures of `data.pairs`; of pairs, on the chosen."""

    def loss(self, policy: Policy, examples: Examples, draw: Draw) -> Loss:
        """Return the loss at one time for each picture."""
        xt, target = add_noise(examples.x0, draw.t, draw.noise)

        error = mean_square(policy.velocity(xt, draw.t, examples.cond.unguided()) - target)
        return Loss(error.mean(), {"error": Mean(error)})
