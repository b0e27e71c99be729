"""DDPO: policy gradient on the steps of a stochastic sampler (arXiv 2305.13301, equations 3 and 4).

    score_function:        loss = -A log π_θ(x_{k+1} | x_k, c), for one update per rollout
    importance_sampling:   loss = -min(ratio A, clip(ratio, 1 - ε, 1 + ε) A), for several

π_old is the policy that sampled the images, and ratio = π_θ / π_old for the step.

Differences from the paper: paths are those of the stochastic sampler (flow_sde, dance_sde or cps).
The log-probability is the mean over latent elements, as in the released code. Advantages compare
the images of a prompt in one step (there: with a running buffer of that prompt's rewards).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from flowalign.batch import Rollout
from flowalign.flow import PerImage
from flowalign.objectives.base import Loss, Max, Mean, PathObjective
from flowalign.policy import Policy
from flowalign.settings.types import Positive


def score_function(
    log_prob: PerImage, old_log_prob: PerImage, advantage: PerImage, clip_range: float
) -> PerImage:
    """Return the loss of equation 3."""
    return -advantage * log_prob


def importance_sampling(
    log_prob: PerImage, old_log_prob: PerImage, advantage: PerImage, clip_range: float
) -> PerImage:
    """Return the loss of equation 4, clipped as PPO's."""
    ratio = (log_prob - old_log_prob).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * advantage, clipped * advantage)


ESTIMATORS = {"score_function": score_function, "importance_sampling": importance_sampling}


@dataclass
class DDPO(PathObjective[Rollout]):
    """DDPO. It needs a stochastic sampler, and `score_function` train.updates_per_step: 1."""

    estimator: Literal["score_function", "importance_sampling"] = "score_function"
    """The estimator of the policy gradient."""
    clip_range: Positive = 1e-4
    """The range ε of importance_sampling."""

    @property
    def on_policy_only(self) -> bool:
        """True for score_function, which is biased from the second update on."""
        return self.estimator == "score_function"

    @property
    def log_ratio_clip(self) -> float:
        """The clip range of importance_sampling."""
        return self.clip_range if self.estimator == "importance_sampling" else math.inf

    def loss(self, policy: Policy, rollout: Rollout, k: int) -> Loss:
        """Return the loss at step k of each image."""
        before, after, old_log_prob = rollout.transition(k)
        log_prob = policy.step(before, k, rollout.cond).log_prob(after)

        estimate = ESTIMATORS[self.estimator]
        loss = estimate(log_prob, old_log_prob, rollout.advantage, self.clip_range).mean()

        # score_function never forms the ratio, but its statistics are logged all the same.
        log_ratio = (log_prob - old_log_prob).detach()
        clipped = (log_ratio.exp() - 1).abs() > self.log_ratio_clip
        stats = {
            "ratio/mean": Mean(log_ratio.exp()),
            "ratio/clipped": Mean(clipped.float()),
            "ratio/max_log_error": Max(log_ratio.abs()),
        }
        return Loss(loss, stats)
