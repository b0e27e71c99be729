"""AlignProp and DRaFT: the reward's gradient through the sampler (arXiv 2310.03739, 2309.17400).

    loss = -reward(decode(x_K)),   x_{k+1} = x_k + (t_{k+1} - t_k) v_θ(x_k, t_k)
with gradient through the last steps only: a fixed number of them (DRaFT-K; all K is DRaFT), or from a step on that is drawn anew
every training step around `start` (AlignProp). Each step and the decoding are recomputed in the backward pass, so memory does
not grow with the steps.

Differences from AlignProp: the steps are the ODE's (there: DDIM's with noise), the loss is -reward (there: its distance from a
target), and a start drawn beyond the schedule is its end (there: drawn again).
"""

from dataclasses import dataclass
from random import Random
from typing import ClassVar

import torch

from flowalign.batch import Batch, Prompts
from flowalign.errors import UserError
from flowalign.objectives.base import Loss, Objective
from flowalign.objectives.terms import reward_loss
from flowalign.policy import Policy, Sampler
from flowalign.settings.types import CountOrZero, NonNegative, Share


@dataclass
class AlignProp(Objective):
    """Any sampler's steps, taken by the ODE. Every reward must carry a gradient."""

    depth: CountOrZero = 0
    """K of DRaFT-K: how many last steps carry the gradient; 0 to draw the first of them."""
    start: Share = 0.84
    """Where on the schedule the gradient starts on average, of 0 to 1, and"""
    spread: NonNegative = 0.1
    """its standard deviation."""
    learns_from: ClassVar[type[Batch]] = Prompts

    def check(self, sampler: Sampler) -> None:
        if self.depth > sampler.steps:
            raise UserError(
                f"objective.depth is {self.depth}, but sampler.steps is {sampler.steps}; write at most that."
            )

    def loss(self, policy: Policy, prompts: Prompts, _: int) -> Loss:
        steps, first = policy.sampler.steps, self.first_step(policy.sampler.steps, prompts)
        with torch.no_grad():
            x = policy.unroll(policy.start(prompts), prompts.cond, range(first))
        x0 = policy.unroll(x, prompts.cond, range(first, steps))
        return reward_loss(policy, prompts, x0)

    def first_step(self, steps: int, prompts: Prompts) -> int:
        """The first step with gradient; one draw for all images of a training step."""
        if self.depth:
            return max(0, steps - self.depth)
        drawn = (
            Random(f"first step/{prompts.keys[0, :2].tolist()}").gauss(self.start, self.spread)
            * steps
        )
        return min(max(round(drawn), 1), steps - 1)
