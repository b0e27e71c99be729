"""Flow-GRPO: group-relative policy optimisation on SDE steps (arXiv 2505.05470, equations 5 to 8).

With ratio_k = π_θ(x_{k+1} | x_k, c) / π_old(x_{k+1} | x_k, c) and advantages within the images of a
prompt,
    loss = -w_k min(ratio_k A, clip(ratio_k, 1 - ε, 1 + ε) A) + β KL(π_θ ‖ π_ref)
π_old is the policy that sampled the images; its log-probabilities are in the rollout. The weight
w_k is `step_weight`, 1 by default.

Its relatives are settings:
- `ratio: normalised` and `step_weight: inverse_time` are GRPO-Guard (2510.22319). With Δμ the
  change of the step's mean, the log-ratio becomes mean(noise · Δμ). It is centred and has one scale
  for all steps.
- `step_weight: noise` with one stochastic step per rollout is TempFlow-GRPO (2508.04324):
  `sampler: {window: {size: 1}, same_noise: true}`. Then the images of a prompt differ by that
  step's noise alone.
- `sampler.window` trains on a window of steps (Flow-GRPO-Fast, MixGRPO 2507.21802).

Differences from the paper: the log-probability is the mean over latent elements, as in the released
code, and so is the KL. `kl: per_time` is the released code's KL for SD3. The released code's
variance in the KL omits the factor |t - s|, so its KL is the exact one times |t - s|. The released
code treats the velocity of the empty prompt as a constant under guidance, as `train_null_branch:
false` does; by default it has a gradient too. The last step is one of the ODE. `cps` steps have the
log-probability of a Gaussian (as released: without the division by 2 std²).
"""

from dataclasses import dataclass
from typing import Literal

import torch

from flowalign.batch import Rollout
from flowalign.dynamics import Gaussian
from flowalign.flow import PerImage
from flowalign.objectives.base import Loss, Max, Mean, PathObjective
from flowalign.policy import Policy
from flowalign.settings.types import NonNegative, Positive


def log_ratio(gaussian: Gaussian, rollout: Rollout, k: int) -> PerImage:
    """Return log π_θ - log π_old of step k."""
    _before, after, old_log_prob = rollout.transition(k)
    return gaussian.log_prob(after) - old_log_prob


def normalised_log_ratio(gaussian: Gaussian, rollout: Rollout, k: int) -> PerImage:
    """Return std · (log ratio + ‖Δμ‖² / 2 std²) = mean(noise · Δμ) (GRPO-Guard, equation 8)."""
    noise = rollout.step_noise(k)
    # Δμ: the new mean minus the mean at sampling.
    delta_mean = gaussian.mean - (rollout.transition(k).after - gaussian.std * noise)
    return (noise * delta_mean).flatten(1).mean(1)


def even(policy: Policy, k: int) -> float:
    """Return 1."""
    return 1.0


def by_noise(policy: Policy, k: int) -> float:
    """Return the step's std divided by the mean std of the steps that the window can reach."""
    steps = policy.sampler.window.reach(policy.sampler.steps)
    return policy.std(k) * len(steps) / sum(map(policy.std, steps))


def by_inverse_time(policy: Policy, k: int) -> float:
    """Return 1 over the step's length."""
    return 1 / (policy.times[k] - policy.times[k + 1])


RATIOS = {"plain": log_ratio, "normalised": normalised_log_ratio}
STEP_WEIGHTS = {"even": even, "noise": by_noise, "inverse_time": by_inverse_time}


@dataclass
class FlowGRPO(PathObjective[Rollout]):
    """Flow-GRPO. It needs a stochastic sampler: `sampler: {dynamics: {name: flow_sde}}`."""

    clip_range: Positive = 1e-4
    """The range ε of the ratio.

    Usual are 1e-5 to 1e-3 for the plain ratio, and 2e-6 to 4e-6 for the normalised one.
    """
    kl_weight: NonNegative = 0.0
    """The weight β of the KL. At 0 the reference is never evaluated."""
    kl: Literal["exact", "per_time"] = "exact"
    """The KL: exact, or per_time with the variance per unit of time, as released for SD3."""
    ratio: Literal["plain", "normalised"] = "plain"
    """The form of the log-ratio."""
    step_weight: Literal["even", "noise", "inverse_time"] = "even"
    """The weight of each step."""

    @property
    def log_ratio_clip(self) -> float:
        """The clip range."""
        return self.clip_range

    def loss(self, policy: Policy, rollout: Rollout, k: int) -> Loss:
        """Return the loss at step k of each image."""
        gaussian = policy.step(rollout.transition(k).before, k, rollout.cond)
        advantage = rollout.advantage

        log_ratio = RATIOS[self.ratio](gaussian, rollout, k)
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        # The weight scales the policy gradient alone; the KL has its own.
        weight = STEP_WEIGHTS[self.step_weight](policy, k)
        loss = -torch.minimum(ratio * advantage, clipped * advantage).mean() * weight

        stats = {
            "ratio/mean": Mean(ratio),
            "ratio/max_log_error": Max(log_ratio.abs()),
            "ratio/clipped": Mean((ratio != clipped).float()),
        }
        return Loss(loss, stats) + self.penalty(policy, rollout, k, gaussian)

    def penalty(self, policy: Policy, rollout: Rollout, k: int, gaussian: Gaussian) -> Loss:
        """Return β KL(π_θ ‖ π_ref) at step k."""
        if self.kl_weight == 0:
            return Loss(gaussian.mean.new_zeros(()), {})
        reference = policy.at("reference")
        kl = gaussian.kl(reference.step(rollout.transition(k).before, k, rollout.cond))
        if self.kl == "per_time":
            kl = kl * (policy.times[k] - policy.times[k + 1])
        return Loss(self.kl_weight * kl.mean(), {"kl": Mean(kl)})
