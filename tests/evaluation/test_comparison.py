"""Paired differences between runs, with known answers."""

import math

import pytest
import torch

from flowalign.evaluation.comparison import compare_results
from flowalign.evaluation.guidance import GuidanceChoice, GuidedBaseline
from flowalign.evaluation.results import EvaluationResult

PROMPT = torch.tensor([0, 0, 1, 1, 2, 2])


def result(values, held_out=None, name="r"):
    nothing = torch.zeros(0)
    rewards = {name: torch.tensor(values, dtype=torch.float32)}
    return EvaluationResult(PROMPT, rewards, nothing, nothing, held_out or {})


def test_the_interval_is_student_s_over_prompts_of_the_run_minus_the_first():
    first = result([0, 0, 1, 1, 0, 0])
    second = result([1, 0, 1, 1, 0, 1])
    comparison = compare_results(result([0] * 6), {"a": first, "b": second, "c": first})
    assert comparison.runs == ["a", "b", "c"]
    assert comparison.untrained == {"r": 0}
    assert comparison.means["a"]["r"] == pytest.approx(1 / 3)
    assert set(comparison.difference) == {"b", "c"}
    # Of the prompts: 0.5, 0 and 0.5.
    low, mean, high = comparison.difference["b"]["r"]
    assert mean == pytest.approx(1 / 3)
    assert high - mean == pytest.approx(4.302653 * math.sqrt(1 / 12) / math.sqrt(3), rel=1e-5)
    assert mean - low == pytest.approx(high - mean)
    assert comparison.difference["c"]["r"] == (0, 0, 0)
    assert comparison.prompts == 3


def test_only_images_that_all_runs_have_scored_count():
    nan = math.nan
    first, second = result([1, 1, 1, 1, nan, nan]), result([2, nan, 3, 3, 9, 9])
    comparison = compare_results(result([0, 0, 0, 0, 7, 7]), {"a": first, "b": second})
    assert comparison.untrained == {"r": 0}
    assert comparison.means == {"a": {"r": 1}, "b": {"r": pytest.approx(8 / 3)}}
    assert comparison.difference["b"]["r"][1] == 1.5
    assert comparison.prompts == 2


def test_scores_that_a_run_lacks_are_left_out():
    figures = {"error": torch.tensor([1.0, 2.0])}
    runs = {"a": result([0] * 6, figures), "b": result([0] * 6, figures)}
    assert compare_results(result([0] * 6, figures), runs).scores == ["r", "error"]
    runs["c"] = result([0] * 6)
    assert compare_results(result([0] * 6, figures), runs).scores == ["r"]
    runs["d"] = result([0] * 6, name="other")
    assert compare_results(result([0] * 6, figures), runs).scores == []


def test_the_guided_model_counts_on_the_same_images():
    choice = GuidanceChoice(
        key="", setting="guidance", own=1, best=3, target="r", prompts=3, scores={}
    )
    guided = GuidedBaseline(choice=choice, result=result([1, 2, 3, 4, 9, 9]))
    nan, runs = math.nan, {"a": result([0] * 6), "b": result([0, 0, 0, 0, math.nan, math.nan])}
    comparison = compare_results(result([0, 0, 0, nan, 0, 0]), runs, guided)
    assert comparison.guidance == 3
    assert comparison.guided == {"r": 2}
    assert compare_results(result([0] * 6), runs).guided == {}
