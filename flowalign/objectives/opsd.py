"""DiffusionOPSD: learn from reward-improved predictions at own states (arXiv 2608.24646).

At a state z that the rollout passed at time t, with v_old the velocity of the copy that sampled,
    y_old = z - t v_old,   y = z - t v_θ
The teacher is y_old itself, moved up and down the gradient of the reward f(decode(y)). Each of n
steps adds ±(ρ ‖y_old‖ / n) ∇f / ‖∇f‖, so that no target leaves the ball of radius ρ ‖y_old‖ around
y_old. With these targets y_up and y_down, without gradient, and
    y± = y_old ± β (y - y_old)
    R = clamp(A / (2 A_max) + 1/2, 0, 1), how good the finished image is
    loss = A_max (R ‖y+ - y_up‖² / γ+ + (1 - R) ‖y- - y_down‖² / γ-) + λ ‖v_θ - v_ref‖²
where γ± is the error's mean size (without gradient), and λ is `kl.weight`, 0 by default.

The loss is taken at states and times of the model's own sampler, and no noise is added to images.
So a model of few steps is not drawn to the mean of all images that agree with a noisy one.

Differences from the released code: states are those of `sampler.dynamics` (there: of a second-order
solver, at t = 0.278), and `visited` takes the nearest. There may be several.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from flowalign.batch import Rollout
from flowalign.flow import Latent, mean_square, over_latent
from flowalign.objectives.base import Loss, Mean, Objective
from flowalign.objectives.terms import adaptive_error, optimality, VelocityKL
from flowalign.policy import Decay, Policy
from flowalign.settings.types import Count, NonNegative, Positive, Share


@dataclass
class OPSD(Objective[Rollout, int]):
    """DiffusionOPSD. Every reward must carry a gradient; the lagging copy `old` samples."""

    visited: Annotated[list[Share], Field(min_length=1)] = field(default_factory=lambda: [0.278])
    """Times of the states that are trained. Each stands for the sampler's nearest time above 0."""
    radius: NonNegative = 0.1
    """How far ρ a target is from y_old, as a share of its length.

    At 0 the reward is not used, and the policy is drawn to `old`.
    """
    ascent_steps: Count = 2
    """The number n of steps that lead to a target. Both targets share the first gradient."""
    beta: Positive = 1.0
    """The distance β of the implicit good and bad predictions from the old one."""
    limit: Positive = 5.0
    """The advantage A_max at which R is 1; at its negative R is 0."""
    kl: VelocityKL = field(default_factory=VelocityKL)
    """The penalty that keeps the policy near the model without adapter."""
    old: Decay = field(default_factory=lambda: Decay(slope=1e-3, end=0.5))
    """How `old` follows the policy."""
    sampling_weights: ClassVar[str] = "old"

    @property
    def snapshots(self) -> dict[str, Decay]:
        """The copy `old`."""
        return {"old": self.old}

    @property
    def takes_reward_gradient(self) -> bool:
        """True: targets follow the gradient of the rewards."""
        return True

    def kept_steps(self, times: Sequence[float]) -> Sequence[int]:
        """Return the steps whose times are nearest to `visited`."""
        # No velocity is taken at the last time, which is 0.
        steps = range(len(times) - 1)
        return sorted({min(steps, key=lambda k: abs(times[k] - t)) for t in self.visited})

    def draws(self, rollout: Rollout) -> Sequence[int]:
        """Return the steps that begin at a kept state."""
        return list(rollout.states)

    def loss(self, policy: Policy, rollout: Rollout, k: int) -> Loss:
        """Return the loss at the state before step k."""
        z, cond = rollout.states[k], rollout.cond
        t = z.new_full((len(z),), policy.times[k])
        y_old = z - over_latent(t, z) * policy.at("old").velocity(z, t, cond)
        # Before the policy's forward, so that decoder and rewards keep nothing meanwhile.
        up, down = self.targets(y_old, reward_gradient(policy, rollout))
        v = policy.velocity(z, t, cond)
        y = z - over_latent(t, z) * v

        # y- moves against y: learning y_down from bad images pushes y away from it.
        good = adaptive_error(y_old + self.beta * (y - y_old), up)
        bad = adaptive_error(y_old - self.beta * (y - y_old), down)
        r = optimality(rollout.advantage, self.limit)
        loss = self.limit * (r * good + (1 - r) * bad).mean()

        moved = mean_square(y.detach() - y_old)
        stats = {"error/good": Mean(good), "error/bad": Mean(bad), "moved": Mean(moved)}
        return Loss(loss, stats) + self.kl.penalty(policy, v, z, t, cond)

    def targets(self, y_old: Latent, gradient: Callable[[Latent], Latent]) -> tuple[Latent, Latent]:
        """Return y_up and y_down (B, *latent)."""
        stride = self.radius * length(y_old) / self.ascent_steps
        first = direction(gradient(y_old))
        targets = []
        for sign in (1, -1):
            y = y_old + sign * stride * first
            for _ in range(self.ascent_steps - 1):
                y = y + sign * stride * direction(gradient(y))
            targets.append(y)
        return targets[0], targets[1]


def reward_gradient(policy: Policy, rollout: Rollout) -> Callable[[Latent], Latent]:
    """Return the function from latents (B, *latent) to the gradient of each decoded reward."""

    def gradient(y: Latent) -> Latent:
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            reward, _ = rollout.reward_with_gradient(
                policy.decode(y), rollout.prompts, rollout.metadata
            )
            return torch.autograd.grad(reward.sum(), y)[0]

    return gradient


def length(x: Latent) -> Latent:
    """Return ‖x‖ over the elements of each latent, (B, 1, ...)."""
    return over_latent(x.flatten(1).norm(dim=1), x)


def direction(x: Latent) -> Latent:
    """Return x / ‖x‖; 0 for x = 0."""
    return x / length(x).clamp(min=torch.finfo(x.dtype).tiny)
