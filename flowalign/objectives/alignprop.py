"""AlignProp and DRaFT: the reward's gradient through the sampler (arXiv 2310.03739, 2309.17400).

    loss = -reward(decode(x_K)),   x_{k+1} = x_k + (t_{k+1} - t_k) v_θ(x_k, t_k)
The gradient passes through the last steps only. `depth` fixes their number (DRaFT-K; DRaFT if it is
all steps). With `depth: 0` the first of them is drawn in every training step, around `start`
(AlignProp).

Each step and the decoding are recomputed in the backward pass, so that memory does not grow with
the number of steps.

Differences from AlignProp: the steps are those of the ODE (there: DDIM's with noise). The loss is
-reward (there: its distance from a target). A start drawn beyond the schedule is its end (there: it
is drawn again).
"""

from dataclasses import dataclass
from random import Random

import torch

from flowalign.batch import Prompts
from flowalign.errors import UserError
from flowalign.objectives.base import Loss
from flowalign.objectives.terms import reward_loss, RewardGradientObjective
from flowalign.policy import Policy, Sampler
from flowalign.settings.types import CountOrZero, NonNegative, Share


@dataclass
class AlignProp(RewardGradientObjective):
    """AlignProp, and DRaFT-K if `depth` is set. Every reward must carry a gradient."""

    depth: CountOrZero = 0
    """How many last steps carry the gradient, as in DRaFT-K; 0 to draw the first of them."""
    start: Share = 0.84
    """Mean share of the sampler's steps, counted from noise, before the gradient starts."""
    spread: NonNegative = 0.1
    """Standard deviation of that share."""

    def check(self, sampler: Sampler) -> None:
        """Raise UserError if `depth` exceeds the sampler's steps."""
        if self.depth > sampler.steps:
            raise UserError(
                f"objective.depth is {self.depth}, but sampler.steps is {sampler.steps}. "
                f"Write at most {sampler.steps}."
            )

    def loss(self, policy: Policy, prompts: Prompts, _: None) -> Loss:
        """Return the negative reward, with a gradient through the last steps."""
        steps, first = policy.sampler.steps, self.first_step(policy.sampler.steps, prompts)
        with torch.no_grad():
            x = policy.unroll(policy.initial_noise(prompts), prompts.cond, range(first))
        x0 = policy.unroll(x, prompts.cond, range(first, steps))
        return reward_loss(policy, prompts, x0)

    def first_step(self, steps: int, prompts: Prompts) -> int:
        """Return the first step with gradient, the same for all images of a training step."""
        if self.depth:
            return max(0, steps - self.depth)
        # Drawn from the keys: all passes and processes of a step must take the same step.
        random = Random(f"first step/{prompts.keys.of_step}")
        first = random.gauss(self.start, self.spread) * steps
        # At least one step without and one with gradient, wherever the normal draw falls.
        return min(max(round(first), 1), steps - 1)
