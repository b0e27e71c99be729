"""DDPO: policy gradient on the steps of a stochastic sampler (arXiv 2305.13301, equations 3 and 4), on the flow SDE.

score_function:        loss = -A log π_θ(x_{k+1} | x_k, c), for one update a rollout
importance_sampling:   loss = -min(ratio A, clip(ratio, 1 - ε, 1 + ε) A), for several

Differences from the paper: the log-probability is the mean over latent elements, as in the released code; advantages
compare the images of a prompt in one step instead of a running buffer of that prompt's rewards.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from flowalign.batch import Rollout
from flowalign.flow import PerImage
from flowalign.objectives.base import Loss, PathObjective
from flowalign.policy import Policy
from flowalign.settings.types import Positive


def score_function(
    log_prob: PerImage, old_log_prob: PerImage, advantage: PerImage, clip_range: float
) -> PerImage:
    return -advantage * log_prob


def importance_sampling(
    log_prob: PerImage, old_log_prob: PerImage, advantage: PerImage, clip_range: float
) -> PerImage:
    ratio = (log_prob - old_log_prob).exp()
    return -torch.minimum(
        ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage
    )


ESTIMATORS = {"score_function": score_function, "importance_sampling": importance_sampling}


@dataclass
class DDPO(PathObjective):
    """Needs a stochastic sampler, and with `score_function` train.updates_per_step: 1."""

    estimator: Literal["score_function", "importance_sampling"] = "score_function"
    clip_range: Positive = 1e-4
    """ε of importance_sampling."""

    @property
    def on_policy_only(self) -> bool:
        return self.estimator == "score_function"

    @property
    def log_ratio_clip(self) -> float:
        return self.clip_range if self.estimator == "importance_sampling" else math.inf

    def loss(self, policy: Policy, rollout: Rollout, k: int) -> Loss:
        step = policy.step(rollout.path[:, k], k, rollout.cond)
        log_prob, old_log_prob = step.log_prob(rollout.path[:, k + 1]), rollout.log_prob[:, k]

        loss = ESTIMATORS[self.estimator](
            log_prob, old_log_prob, rollout.advantage, self.clip_range
        ).mean()
        difference = (log_prob - old_log_prob).detach()
        clipped = ((difference.exp() - 1).abs() > self.log_ratio_clip).float()
        return Loss(
            loss,
            {
                "ratio/mean": difference.exp(),
                "ratio/clipped": clipped,
                "ratio/max_log_error": difference.abs(),
            },
        )
