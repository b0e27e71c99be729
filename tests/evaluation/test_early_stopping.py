"""Rules that end a run early, and the weights that it exports then."""

import pytest
import torch
from safetensors.torch import load_file

from flowalign.cli import main
from flowalign.errors import RunError, UserError
from flowalign.evaluation.early_stopping import best_step, stop_reason, StopRule
from flowalign.reporting.trackers import read_metrics
from flowalign.training import trainer
from tests.runs.damage import ADAPTER
from tests.tiny import SMALL, small_config, TINY


@pytest.mark.parametrize(
    ("rule", "values", "why"),
    [
        (StopRule(above=0.5), [0.1, 0.5], ""),
        (StopRule(above=0.5), [0.1, 0.6], "0.6 is above 0.5"),
        (StopRule(below=0.5), [0.6, 0.4], "0.4 is below 0.5"),
        (StopRule(falling=2), [0.5, 0.4], ""),
        (StopRule(falling=2), [0.5, 0.4, 0.5], ""),
        (
            StopRule(falling=2),
            [0.5, 0.3, 0.4],
            "0.4 has been below its best, 0.5, for 2 evaluations",
        ),
        (
            StopRule(falling=2),
            [0.1, 0.5, 0.3, 0.4],
            "0.4 has been below its best, 0.5, for 2 evaluations",
        ),
        (StopRule(rising=1), [0.5, 0.4], ""),
        (StopRule(rising=1), [0.5, 0.6], "0.6 has been above its best, 0.5, for 1 evaluations"),
    ],
)
def test_a_rule_stops_when_it_says(rule, values, why):
    assert rule(values) == why


@pytest.mark.parametrize(
    "settings", [{}, {"falling": 1, "rising": 1}, {"above": 0.1, "below": 0.2}]
)
def test_a_rule_that_means_nothing_is_refused(settings):
    with pytest.raises(UserError, match=r"above is .*write at least one"):
        StopRule(**settings)


def test_the_best_evaluation_is_the_first_of_the_largest():
    evaluations = [
        {"step": 2, "r": 0.1},
        {"step": 4, "r": 0.3},
        {"step": 6, "r": 0.3},
        {"step": 8, "r": float("nan")},
    ]
    assert best_step("r", 1, evaluations) == 4
    assert best_step("r", -1, evaluations) == 2
    assert best_step("other", 1, evaluations) is None


def test_a_rule_about_a_metric_that_is_not_logged_is_named():
    with pytest.raises(RunError, match=r"no metric 'kll'\. This run logs step, kl\."):
        stop_reason({"kll": StopRule(above=1)}, [{"step": 1, "kl": 0.1}])
    assert (
        stop_reason(
            {"kl": StopRule(above=1)}, [{"step": 1, "kl": 0.1}, {"step": 2, "loss": float("nan")}]
        )
        == ""
    )


def test_a_run_stops_by_its_rule_and_exports_the_best_weights(tmp_path, capsys):
    overrides = [
        "train.steps=9",
        "train.evaluate_every=1",
        "train.learning_rate=3e-2",
        "train.keep=1",
        "train.save_every=9",
    ]
    rules = "train.stop={eval/scene_match_graded: {falling: 2}}"
    summary = trainer.train(small_config(tmp_path / "run", *overrides, rules))
    graded = [line["eval/scene_match_graded"] for line in read_metrics(tmp_path / "run")]
    assert summary["stopped"].startswith("eval/scene_match_graded: ")
    assert len(graded) < 9
    chosen = [line["selection/scene_match_graded"] for line in read_metrics(tmp_path / "run")]
    assert summary["step"] == chosen.index(max(chosen)) + 1
    assert summary["chosen_by"] == "eval/scene_match_graded"
    best = (
        tmp_path
        / "run"
        / "checkpoints"
        / f"step-{summary['step']:06d}"
        / "snapshots"
        / "ema"
        / ADAPTER.name
    )
    exported, kept = load_file(tmp_path / "run" / ADAPTER), load_file(best)
    assert all(torch.equal(exported[key], kept[key]) for key in kept if "lora_A" in key)
    assert "by train.stop: eval/scene_match_graded: " in capsys.readouterr().out
    assert (
        trainer.train(small_config(tmp_path / "run", *overrides, rules))["stopped"]
        == summary["stopped"]
    )


def test_a_budget_of_distance_stops_a_run(tmp_path):
    overrides = ["train.steps=9", "train.evaluate_every=1", "train.learning_rate=1e-2"]
    summary = trainer.train(
        small_config(
            tmp_path / "run", *overrides, "train.stop={eval/velocity_moved: {above: 6e-3}}"
        )
    )
    moved = [line["eval/velocity_moved"] for line in read_metrics(tmp_path / "run")]
    assert summary["stopped"].startswith("eval/velocity_moved: ")
    assert moved[-1] > 6e-3
    assert all(value <= 6e-3 for value in moved[:-1])
    assert summary["step"] < len(moved)  # the exported weights are within the budget


@pytest.mark.slow
def test_an_evaluation_whose_checkpoint_is_gone_is_not_exported(tmp_path):
    """Rules of train.stop may be added later, when the best checkpoint is already removed."""
    overrides = [
        "train.evaluate_every=1",
        "train.save_every=1",
        "train.keep=1",
        "evaluation.images_per_prompt=2",
    ]
    trainer.train(small_config(tmp_path / "run", *overrides, "train.steps=3"))
    rules = "train.stop={eval/diversity: {falling: 9}, eval/scene_match: {falling: 9}}"
    summary = trainer.train(small_config(tmp_path / "run", *overrides, "train.steps=4", rules))
    assert (tmp_path / "run" / "adapter").is_dir()
    assert summary["stopped"] == "finished"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stop={eval/scene_mach: {falling: 2}}"], "Did you mean 'eval/scene_match"),
        (
            ["train.stop={kl: {above: 0.1}}", "train.evaluate_every=0"],
            "but train.evaluate_every is 0 and train.steps 2",
        ),
        (
            ["train.stop={kl: {above: 0.1}}", "train.evaluate_every=2"],
            "but train.evaluate_every is 2 and train.steps 2",
        ),
        (["train.stop={eval/diversity: {below: 0.1}}"], "there is no metric 'eval/diversity'"),
        (
            ["train.stop={eval/reconstruction_error: {rising: 2}}"],
            "there is no metric 'eval/reconstruction_error'",
        ),
        (["train.stop={kl: {falling: 2, rising: 2}}"], "train.stop.kl.above is inf"),
        (["train.stop={kl: {falling: -1}}"], "train.stop.kl.falling is -1"),
        (["train.stop={kl: {}}"], "write at least one"),
        (["train.stop={kl: {abov: 1}}"], "Did you mean 'above'"),
        (["train.stop={kl: 0.5}"], "train.stop.kl"),
    ],
)
def test_stop_rules_that_cannot_work_are_answered(overrides, message, tmp_path, capsys):
    assert (
        main(
            [
                "train",
                str(TINY),
                *SMALL,
                "train.evaluate_every=1",
                f"output={tmp_path}/run",
                *overrides,
            ]
        )
        == 2
    )
    assert message in capsys.readouterr().err
