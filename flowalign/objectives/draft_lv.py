"""DRaFT-LV: the reward's gradient through the last step, averaged over fresh noise.

arXiv 2309.17400, section 3.2. From the finished x0, without gradient, go back to the last step's
time t with new noise, and denoise once:
    loss = -mean over n of reward(decode(x_t - t v_θ(x_t, t))),   x_t = (1 - t) x0 + t noise_n
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from flowalign.batch import Prompts
from flowalign.errors import UserError
from flowalign.flow import add_noise
from flowalign.objectives.base import Loss
from flowalign.objectives.terms import reward_loss, RewardGradientObjective
from flowalign.policy import Policy, Sampler
from flowalign.settings.types import Count


@dataclass
class DRaFTLV(RewardGradientObjective):
    """DRaFT-LV. Every reward must carry a gradient."""

    copies: Count = 2
    """How many noises n the loss is averaged over."""
    step: Annotated[int, Field(ge=-1000, le=-1)] = -1
    """The step to repeat, counted from the end. At SD3's last step t is near 0.01."""

    def check(self, sampler: Sampler) -> None:
        """Raise UserError if the sampler does not have that step."""
        if -self.step > sampler.steps:
            raise UserError(
                f"objective.step is {self.step}, but sampler.steps is {sampler.steps}. "
                f"Write -{sampler.steps} to -1."
            )

    def loss(self, policy: Policy, prompts: Prompts, _: None) -> Loss:
        """Return the negative reward, with a gradient through one repeated step."""
        with torch.no_grad():
            x = policy.initial_noise(prompts)
            x0 = policy.unroll(x, prompts, range(policy.sampler.steps))
        t = x0.new_full((len(x0),), policy.times[policy.sampler.steps + self.step])
        losses = []
        for copy in range(self.copies):
            noise = prompts.noise("copy", copy, tuple(x0.shape[1:])).to(x0.device)
            xt, _target = add_noise(x0, t, noise)
            losses.append(reward_loss(policy, prompts, policy.denoise(xt, t, prompts.cond)))
        # The copies differ by noise alone, so the rewards of one of them are logged.
        return Loss(torch.stack([loss.total for loss in losses]).mean(), losses[0].stats)
