"""Rewards written for TRL: the step that they are given, and what they log."""

import math

import pytest
import torch

from flowalign.errors import RunError
from flowalign.reporting.trackers import read_metrics
from flowalign.rewards.adapters import make_reward
from flowalign.rewards.combine import WeightedSum
from flowalign.rollouts.scoring import RolloutScorer
from flowalign.training import trainer
from tests.tiny import small_config

IMAGES = torch.tensor([0.2, 0.4])[:, None, None, None].expand(2, 3, 4, 4)
INPUTS = IMAGES, ["one", "two"], [{"answer": "a"}, {"answer": "b"}]

# The form of TRL's documentation: logging is optional, and columns are taken as they come.
CODE = """
def logged(completions, answer=None, log_extra=None, log_metric=None, **kwargs):
    step = kwargs["trainer_state"].global_step
    assert kwargs["completion_ids"] == [None] * len(completions)
    log_metric("step", step)
    log_metric("calls", 1.0)
    log_extra("width", [picture.width for picture in completions])
    log_extra("text", ["a"] * len(completions))
    return [float(step)] * len(completions)
"""


def test_what_a_reward_logs_in_training_reaches_the_metrics(tmp_path):
    (tmp_path / "trl.py").write_text(CODE)
    rewards = f'{{"{tmp_path}/trl.py:logged": 1.0, "brightness": 1.0}}'
    overrides = [f"rewards={rewards}", f"evaluation.rewards={rewards}", "train.evaluate_every=1"]
    summary = trainer.train(small_config(tmp_path / "run", *overrides))
    lines = read_metrics(tmp_path / "run")
    assert [line["reward/logged"] for line in lines] == [0, 1]
    assert [line["logged/step"] for line in lines] == [0, 1]
    assert [(line["logged/calls"], line["logged/width"]) for line in lines] == [(1, 64)] * 2
    assert not [name for name in lines[0] if "text" in name]
    # In evaluations the step is always 0, so that they can be compared.
    assert summary["before"]["logged"] == summary["after"]["logged"] == 0


def log_with(function):
    """The metrics of step 3, in which the function scores two passes."""
    reward = make_reward("mine", function)
    for step in (None, 3, 3):
        reward(*INPUTS, step)
    scorer = RolloutScorer([reward], WeightedSum(), lambda *_: torch.zeros(0), 2, IMAGES.device)
    metrics = scorer.take_logged()
    assert scorer.take_logged() == {}
    return metrics


def test_the_metric_of_a_step_is_the_mean_over_its_calls():
    values = iter([100.0, 1.0, 2.0])

    def logs(images, prompts, log_metric):
        log_metric("value", next(values))
        return [0.0, 0.0]

    assert log_with(logs) == {"mine/value": 1.5}


def test_numbers_of_a_column_are_averaged_and_what_is_not_finite_is_left_out():
    def logs(images, prompts, log_extra, log_metric):
        log_extra("mixed", [1, "text", 3.0, None, math.nan, True])
        log_extra("tensor", torch.tensor([1.0, 2.0]))
        log_metric("nothing", math.inf)
        return [0.0, 0.0]

    assert log_with(logs) == {"mine/mixed": pytest.approx(5 / 3), "mine/tensor": 1.5}


def test_a_metric_that_is_not_a_number_is_an_error_of_the_reward():
    def logs(images, prompts, log_metric):
        log_metric("value", "high")
        return [0.0, 0.0]

    with pytest.raises(RunError, match=r"rewards\.mine raised ValueError: could not convert.*line"):
        make_reward("mine", logs)(*INPUTS, 0)


def test_the_step_is_that_of_the_call_and_0_outside_of_training():
    steps = []

    def sees(prompts, completions, trainer_state, **columns):
        steps.append(trainer_state.global_step)
        return [0.0, 0.0]

    reward = make_reward("mine", sees)
    for step in (None, 7, None):
        reward(*INPUTS, step)
    assert steps == [0, 7, 0]
