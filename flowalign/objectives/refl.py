"""ReFL: the reward's gradient through one late step that predicts the finished image.

arXiv 2304.05977, algorithm 1:
    loss = -min(c, reward(decode(x_k - t_k v_θ(x_k, t_k)))),   k drawn anew for every pass

Differences from the released code: c is infinite (there: 2, on ImageReward's scale, and the whole
loss times 1e-3). k comes from the key of a pass's first image, so that equal passes have equal k on
any number of processes (there: from each process's global generator). No pictures are imitated in
addition.
"""

import math
from dataclasses import dataclass

import torch

from flowalign.batch import Prompts
from flowalign.objectives.base import Loss
from flowalign.objectives.terms import reward_loss, RewardGradientObjective
from flowalign.policy import Policy
from flowalign.settings.types import Share, WrongSetting


@dataclass
class ReFL(RewardGradientObjective):
    """ReFL. Every reward must carry a gradient."""

    low: Share = 0.75
    """The share of the schedule from which k is drawn."""
    high: Share = 0.975
    """The share of the schedule up to which k is drawn."""
    enough: float = math.inf
    """The reward c from which on an image gives no gradient."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low > self.high:
            raise WrongSetting(f"low is {self.low} and high is {self.high}. Write low <= high.")

    def loss(self, policy: Policy, prompts: Prompts, _: None) -> Loss:
        """Return the negative reward of images predicted at step k."""
        k = self.late_step(policy.sampler.steps, prompts)
        with torch.no_grad():
            x = policy.unroll(policy.initial_noise(prompts), prompts, range(k))
        t = x.new_full((len(x),), policy.times[k])
        return reward_loss(policy, prompts, policy.denoise(x, t, prompts.cond), self.enough)

    def late_step(self, steps: int, prompts: Prompts) -> int:
        """Return k, the same for all images of a pass."""
        first, last = math.floor(self.low * steps), min(steps - 1, math.floor(self.high * steps))
        return self.random("late step", prompts).randint(min(first, last), last)
