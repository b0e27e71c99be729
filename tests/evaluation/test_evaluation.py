"""Evaluations: intervals of paired differences, and signs of over-optimisation."""

import pytest
import torch

from flowalign.evaluation.results import EvaluationResult
from flowalign.evaluation.statistics import paired_difference
from flowalign.reporting.trackers import read_metrics
from flowalign.training import trainer
from tests.tiny import small_config


def test_the_interval_is_student_s_over_prompts():
    prompt = torch.tensor([0, 0, 1, 1, 2, 2])
    before = EvaluationResult(prompt, {"r": torch.zeros(6)}, torch.zeros(0), torch.zeros(0))
    after = EvaluationResult(
        prompt, {"r": torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0])}, torch.zeros(0), torch.zeros(0)
    )
    low, mean, high = paired_difference(before, after)["r"]
    assert mean == pytest.approx(0.5)
    assert high - mean == pytest.approx(4.302653 * 0.5 / 3**0.5, rel=1e-5)
    assert mean - low == pytest.approx(high - mean)


def test_a_mean_around_100_keeps_its_digits():
    scores = torch.tensor([100.001, 99.999, 99.999])
    result = EvaluationResult(torch.arange(3), {"r": scores}, torch.zeros(0), torch.zeros(0))
    assert result.means["r"] == pytest.approx(scores.double().mean().item(), abs=1e-12)


def test_evaluations_measure_over_optimisation(tmp_path):
    overrides = [
        "train.evaluate_every=1",
        "evaluation.images_per_prompt=2",
        "train.learning_rate=1e-2",
    ]
    trainer.train(small_config(tmp_path / "run", *overrides))
    (line, _) = read_metrics(tmp_path / "run")
    assert 0 < line["eval/diversity"] < 1
    assert line["eval/velocity_norm"] == pytest.approx(1, abs=0.2)
    assert 0 < line["eval/velocity_moved"] < 1
    assert {"reward/spread_in_group", "reward/groups_without_spread"} <= set(line)
