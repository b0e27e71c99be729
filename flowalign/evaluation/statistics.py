"""Paired differences and their confidence intervals."""

import math

import torch
from scipy import stats
from torch import Tensor

from flowalign.evaluation.results import EvaluationResult


def paired_difference(
    before: EvaluationResult, after: EvaluationResult
) -> dict[str, tuple[float, float, float]]:
    """{reward: (low, mean, high)}: the 95 % t-interval of the mean difference.

    Pictures of one prompt are not independent, so prompts are the units; pictures are where there is one prompt only.
    Pictures that were not scored before or after are left out.
    """
    differences = {
        name: _interval((score - before.held_out[name]).double())
        for name, score in after.held_out.items()
    }
    for name, score in after.rewards.items():
        difference = (score - before.rewards[name]).double()
        scored = ~difference.isnan()
        difference, (_, unit) = (
            difference[scored],
            before.prompt[scored].unique(return_inverse=True),
        )
        if unit.numel() and unit.max() > 0:
            total = torch.zeros(int(unit.max()) + 1, dtype=torch.float64).index_add_(
                0, unit, difference
            )
            difference = total / torch.bincount(unit)
        differences[name] = _interval(difference)
    return differences


def _interval(values: Tensor) -> tuple[float, float, float]:
    mean, count = values.mean().item(), len(values)
    if count < 2:
        return -math.inf, mean, math.inf
    half = float(stats.t.ppf(0.975, count - 1)) * values.std().item() / math.sqrt(count)
    return mean - half, mean, mean + half
