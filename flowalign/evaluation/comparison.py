"""Compare the evaluations of several runs, prompt by prompt."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowalign.evaluation.guidance import GuidedBaseline
from flowalign.evaluation.results import EvaluationResult
from flowalign.evaluation.statistics import Interval, paired_difference


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Scores of several runs on the same prompts and noise, and the differences between runs."""

    runs: list[str]
    """Names of the runs. The others are compared with the first."""
    untrained: dict[str, float]
    """Mean of each score without an adapter."""
    guidance: float | None
    """The guidance that suits the model without adapter best; None if it was not measured."""
    guided: dict[str, float]
    """Mean of each reward without an adapter at that guidance; empty if it was not measured."""
    means: dict[str, dict[str, float]]
    """Mean of each score of every run."""
    difference: dict[str, dict[str, Interval]]
    """Low end, mean and high end of the 95 % interval of every other run minus the first."""
    prompts: int
    """The number of prompts that the intervals rest on."""
    held_out: int
    """The number of held-out entries that the intervals of their figures rest on."""

    @property
    def scores(self) -> list[str]:
        """The names of the scores that all runs have."""
        return list(self.untrained)


def compare_results(
    untrained: EvaluationResult,
    results: Mapping[str, EvaluationResult],
    guided: GuidedBaseline | None = None,
) -> Comparison:
    """Compare results of the same prompts and noise.

    Only scores that all runs have count, and only images that are scored in all of them.

    Args:
        untrained: The evaluation of the model without an adapter.
        results: The evaluation of each run, by its name.
        guided: The model without an adapter at its best guidance.
    """
    common = _scored_everywhere([untrained, *results.values()])
    base, *others = common
    trained = dict(zip(results, others, strict=True))
    first, *rest = trained
    return Comparison(
        runs=list(results),
        untrained=base.means,
        guidance=guided.choice.best if guided else None,
        guided=_means_of(guided.result, base) if guided else {},
        means={name: result.means for name, result in trained.items()},
        difference={name: paired_difference(trained[first], trained[name]) for name in rest},
        prompts=base.scored_prompts,
        held_out=base.scored_entries,
    )


def _means_of(result: EvaluationResult, common: EvaluationResult) -> dict[str, float]:
    """Return the means of the rewards and images that are scored in all runs."""
    rewards = {
        name: result.rewards[name].masked_fill(values.isnan(), torch.nan)
        for name, values in common.rewards.items()
        if name in result.rewards
    }
    return replace(result, rewards=rewards, held_out={}).means


def _scored_everywhere(results: list[EvaluationResult]) -> list[EvaluationResult]:
    """Return the results with the scores they share, NaN where one of them has no score."""
    rewards = _shared([result.rewards for result in results])
    held_out = _shared([result.held_out for result in results])
    return [
        replace(result, rewards=ours, held_out=figures)
        for result, ours, figures in zip(results, rewards, held_out, strict=True)
    ]


def _shared(tables: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    names = [name for name in tables[0] if all(name in table for table in tables)]
    missing = {
        name: torch.stack([table[name] for table in tables]).isnan().any(0) for name in names
    }
    return [
        {name: table[name].masked_fill(missing[name], torch.nan) for name in names}
        for table in tables
    ]
