"""DRaFT-LV: the reward's gradient through the last step alone, averaged over fresh noise (arXiv 2309.17400, section 3.2).

From the finished x0, without gradient, go back to the last step's time t with new noise and denoise once:
    loss = -mean over n of reward(decode(x_t - t v_θ(x_t, t))),   x_t = (1 - t) x0 + t noise_n
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from flowalign.batch import Batch, Prompts
from flowalign.errors import UserError
from flowalign.flow import add_noise
from flowalign.objectives.base import Loss, Objective
from flowalign.objectives.terms import reward_loss
from flowalign.policy import Policy, Sampler
from flowalign.settings.types import Count


@dataclass
class DRaFTLV(Objective):
    """Any sampler's steps, taken by the ODE. Every reward must carry a gradient."""

    copies: Count = 2
    """n."""
    step: Annotated[int, Field(ge=-1000, le=-1)] = -1
    """Which step is taken again, counted from the end; at the last step of SD3's schedule t is near 0.01."""
    learns_from: ClassVar[type[Batch]] = Prompts

    def check(self, sampler: Sampler) -> None:
        if -self.step > sampler.steps:
            raise UserError(
                f"objective.step is {self.step}, but sampler.steps is {sampler.steps}; write -{sampler.steps} to -1."
            )

    def loss(self, policy: Policy, prompts: Prompts, _: int) -> Loss:
        with torch.no_grad():
            x0 = policy.unroll(policy.start(prompts), prompts.cond, range(policy.sampler.steps))
        t = x0.new_full((len(x0),), policy.times[policy.sampler.steps + self.step])
        losses = []
        for copy in range(self.copies):
            noise = prompts.noise("copy", copy, tuple(x0.shape[1:])).to(x0.device)
            losses.append(
                reward_loss(
                    policy, prompts, policy.denoise(add_noise(x0, t, noise)[0], t, prompts.cond)
                )
            )
        return Loss(torch.stack([loss.total for loss in losses]).mean(), losses[0].stats)
