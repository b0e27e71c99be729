"""ReFL: the reward's gradient through one late step, which predicts the finished image (arXiv 2304.05977, algorithm 1).

loss = max(0, c - reward(decode(x_k - t_k v_θ(x_k, t_k)))),   k drawn anew every training step

Differences from the released code: c is infinite (there: 2, on ImageReward's scale, and the whole times 1e-3), and no
pictures are imitated beside it.
"""

import math
from dataclasses import dataclass
from random import Random
from typing import ClassVar

import torch

from flowalign.batch import Batch, Prompts
from flowalign.objectives.base import Loss, Objective
from flowalign.objectives.terms import reward_loss
from flowalign.policy import Policy
from flowalign.settings.types import Share, WrongSetting


@dataclass
class ReFL(Objective):
    """Any sampler's steps, taken by the ODE. Every reward must carry a gradient."""

    low: Share = 0.75
    """k is drawn evenly between these shares of the schedule."""
    high: Share = 0.975
    enough: float = math.inf
    """c: an image with this reward teaches no more."""
    learns_from: ClassVar[type[Batch]] = Prompts

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low > self.high:
            raise WrongSetting(f"low is {self.low} and high {self.high}; write low <= high.")

    def loss(self, policy: Policy, prompts: Prompts, _: int) -> Loss:
        k = self.late_step(policy.sampler.steps, prompts)
        with torch.no_grad():
            x = policy.unroll(policy.start(prompts), prompts.cond, range(k))
        t = x.new_full((len(x),), policy.times[k])
        return reward_loss(policy, prompts, policy.denoise(x, t, prompts.cond), self.enough)

    def late_step(self, steps: int, prompts: Prompts) -> int:
        """k; one draw for all images of a training step."""
        first, last = math.floor(self.low * steps), min(steps - 1, math.floor(self.high * steps))
        return Random(f"late step/{prompts.keys[0, :2].tolist()}").randint(min(first, last), last)
