"""Paired differences between two evaluations, with confidence intervals."""

import math

import torch
from scipy import stats
from torch import Tensor

from flowalign.evaluation.results import EvaluationResult

CONFIDENCE = 0.95

Interval = tuple[float, float, float]
"""Low end, mean and high end."""


def paired_difference(before: EvaluationResult, after: EvaluationResult) -> dict[str, Interval]:
    """Return the mean difference of every reward and held-out figure, with its 95 % t-interval.

    Both evaluations must be of the same prompts and noise. Images of one prompt are not
    independent, so the interval is over prompts; with a single prompt it is over images. Images
    without a score before or after do not count. Held-out figures are left out if `before` has
    none.
    """
    differences = {}
    for name, values in before.held_out.items():
        difference = after.held_out[name].double() - values.double()
        differences[name] = _interval(difference[~difference.isnan()])
    for name, values in after.rewards.items():
        difference = values.double() - before.rewards[name].double()
        scored = ~difference.isnan()
        units = _mean_by_prompt(difference[scored], before.prompt[scored])
        differences[name] = _interval(units)
    return differences


def _mean_by_prompt(values: Tensor, prompt: Tensor) -> Tensor:
    """Return the mean of each prompt's values, or the values if they are all of one prompt."""
    prompts, unit = prompt.unique(return_inverse=True)
    if len(prompts) < 2:
        return values
    total = torch.zeros(len(prompts), dtype=torch.float64).index_add_(0, unit, values)
    return total / torch.bincount(unit)


def _interval(values: Tensor) -> Interval:
    """Return Student's t-interval of the mean of independent values."""
    mean, count = values.mean().item(), len(values)
    # One value has a mean but says nothing about its spread.
    if count < 2:
        return -math.inf, mean, math.inf
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
    half_width = quantile * values.std().item() / math.sqrt(count)
    return mean - half_width, mean, mean + half_width
