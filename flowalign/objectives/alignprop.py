"""AlignProp and DRaFT: the reward's gradient through the sampler (arXiv 2310.03739, 2309.17400).

    loss = -reward(decode(x_K)) + λ mean over the gradient's steps of ‖v_θ - v_ref‖²
where x_{k+1} is the sampler's step from x_k. The gradient passes through the last steps only.
`depth` fixes their number (DRaFT-K; DRaFT if it is all steps). With `depth: 0` the first of them is
drawn for every pass (AlignProp). λ is `kl.weight`, 0 by default. The penalty, which has v_ref at
the policy's own x_k without a gradient, is DRaFT+'s.

Steps are those of `sampler.dynamics`. AlignProp's last release takes DDIM's steps with η = 1
({name: ddim}), its first release with η = 0 (the ODE). The noise of a step takes no gradient.

Each step and the decoding are recomputed in the backward pass, so that memory does not grow with
the number of steps.

Differences from AlignProp: the loss is -reward (there: its distance from a target, times 0.01). The
start is drawn from the key of a pass's first image, so that equal passes have equal starts on any
number of processes (there: from each process's global generator).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Literal

import torch

from flowalign.batch import Prompts
from flowalign.errors import UserError
from flowalign.objectives.base import Loss
from flowalign.objectives.terms import (
    mean_loss,
    reward_loss,
    RewardGradientObjective,
    VelocityKL,
)
from flowalign.policy import Policy, Sampler
from flowalign.settings.types import CountOrZero, Positive, Share


@dataclass
class AlignProp(RewardGradientObjective):
    """AlignProp, and DRaFT-K if `depth` is set. Every reward must carry a gradient."""

    depth: CountOrZero = 0
    """How many last steps carry the gradient, as in DRaFT-K; 0 to draw the first of them."""
    distribution: Literal["gaussian", "uniform", "fixed"] = "gaussian"
    """How the first step with a gradient is drawn if `depth` is 0.

    gaussian draws around `start`, uniform draws evenly from `start` on, and fixed takes `start`.
    """
    start: Share = 0.84
    """Share of the sampler's steps, counted from noise: the mean, the least or the only start."""
    spread: Positive = 0.1
    """Standard deviation of that share; for gaussian only."""
    kl: VelocityKL = field(default_factory=VelocityKL)
    """The penalty that keeps the steps with a gradient near the model without adapter."""

    def check(self, sampler: Sampler) -> None:
        """Raise UserError if the settings leave none of the sampler's steps to start at."""
        if self.depth > sampler.steps:
            raise UserError(
                f"objective.depth is {self.depth}, but sampler.steps is {sampler.steps}. "
                f"Write at most {sampler.steps}."
            )
        if not self.depth and not any(self.start_weights(sampler.steps)):
            raise UserError(
                f"objective.start is {self.start:g}, from which distribution {self.distribution} "
                f"draws none of the sampler's {sampler.steps} steps. Write for example start: 0.84."
            )

    def loss(self, policy: Policy, prompts: Prompts, _: None) -> Loss:
        """Return the negative reward, with a gradient through the last steps."""
        steps, first = policy.sampler.steps, self.first_step(policy.sampler.steps, prompts)
        with torch.no_grad():
            x = policy.unroll(policy.initial_noise(prompts), prompts, range(first))
        penalties = []
        for k in range(first, steps):
            xk, t = x.detach(), x.new_full((len(x),), policy.times[k])
            x, v = policy.unroll_step(x, prompts, k)
            penalties.append(self.kl.penalty(policy, v, xk, t, prompts.cond))
        return reward_loss(policy, prompts, x) + mean_loss(penalties)

    def first_step(self, steps: int, prompts: Prompts) -> int:
        """Return the first step with a gradient, the same for all images of a pass."""
        if self.depth:
            return max(0, steps - self.depth)
        random = self.random("first step", prompts)
        return random.choices(range(steps), self.start_weights(steps))[0]

    def start_weights(self, steps: int) -> list[float]:
        """Return the relative probability of each step to be the first with a gradient."""
        if steps == 1:
            return [1.0]
        return STARTS[self.distribution](self, steps)


def gaussian(objective: AlignProp, steps: int) -> list[float]:
    """Return the weights of a normal number without its fraction, drawn again out of range."""
    normal = NormalDist(objective.start * steps, objective.spread * steps)
    # The released code takes at least one step without a gradient. The closed form is the law of
    # its repeated draws, and never loops.
    return [0.0, *(normal.cdf(k + 1) - normal.cdf(k) for k in range(1, steps))]


def uniform(objective: AlignProp, steps: int) -> list[float]:
    """Return equal weights from `start` on, but from step 1, as the released code draws 0 again."""
    return [float(k >= max(1, round(objective.start * steps))) for k in range(steps)]


def fixed(objective: AlignProp, steps: int) -> list[float]:
    """Return the weight of `start` alone."""
    return [float(k == round(objective.start * steps)) for k in range(steps)]


STARTS: dict[str, Callable[[AlignProp, int], list[float]]] = {
    "gaussian": gaussian,
    "uniform": uniform,
    "fixed": fixed,
}
