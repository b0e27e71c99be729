"""Steps that fail: numbers that are not finite, rewards that raise, and runs that are killed."""

import json
import math
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from flowalign.cli import main
from flowalign.config.load import load_config
from flowalign.errors import RunError
from flowalign.reporting.trackers import read_metrics
from flowalign.runs.checkpoint import checkpoints, load_checkpoint, Progress
from flowalign.training import trainer, update
from flowalign.training.gradient import compute_gradient, Meter
from tests.runs.damage import ADAPTER
from tests.tiny import ROOT, SMALL, small_config, TINY

NOT_FINITE = """
calls = 0

def sometimes_infinite(images, prompts, metadata):
    global calls
    calls += 1
    scores = images.mean((1, 2, 3))
    scores[0] += float("inf") if calls in CALLS else 0
    return scores
"""


def infinite_at(calls, tmp_path):
    (tmp_path / "mine.py").write_text(NOT_FINITE.replace("CALLS", repr(calls)))
    return [
        f'rewards={{"{tmp_path}/mine.py:sometimes_infinite": 1.0}}',
        "evaluation.rewards={brightness: 1.0}",
    ]


def test_a_step_with_an_infinite_reward_is_not_applied_and_is_dumped(tmp_path, capsys):
    rewards = infinite_at([10], tmp_path)
    before = small_config(
        tmp_path / "run",
        *rewards,
        "train.steps=8",
        "train.learning_rate=1e-9",
        "train.save_every=1",
    )
    trainer.train(before)
    bad = [line for line in read_metrics(tmp_path / "run") if line["loss"] is None]
    assert len(bad) == 1
    (kept,) = (tmp_path / "run" / "failures").iterdir()
    facts = json.loads((kept / "failure.json").read_text())
    assert "sometimes_infinite was infinite" in facts["why"]
    assert facts["step"] == bad[0]["step"] - 1
    assert facts["updates"] == facts["step"]
    batch = load_file(kept / "batch.safetensors")
    assert {"keys", "path", "images", "reward"} <= set(batch)
    assert len(facts["prompts"]) == len(batch["keys"])
    assert str(kept) in capsys.readouterr().out


def exploding(monkeypatch, steps):
    """Make the loss NaN in these steps."""
    next_batch = trainer.Run.next_batch

    def at(self):
        self.config.objective.kl_weight = math.nan if self.progress.step in steps else 0.1
        return next_batch(self)

    monkeypatch.setattr(trainer.Run, "next_batch", at)


def test_a_loss_that_is_not_finite_is_not_applied_and_can_be_repeated_from_its_dump(
    monkeypatch, tmp_path
):
    with monkeypatch.context() as patched:
        exploding(patched, {1})
        config = small_config(
            tmp_path / "run", "train.steps=3", "objective.kl_weight=0.1", "train.learning_rate=1e-3"
        )
        trainer.train(config)
    (kept,) = (tmp_path / "run" / "failures").iterdir()
    run = trainer.prepare(
        load_config(tmp_path / "run" / "config.yaml", [f"output={tmp_path}/again"])
    )
    progress = load_checkpoint(run.state, kept)
    assert (progress.step, progress.updates) == (1, 1)
    batch, _ = run.source(progress.step)
    assert torch.equal(batch.path.cpu(), load_file(kept / "batch.safetensors")["path"])
    run.config.objective.kl_weight = float("nan")
    assert not compute_gradient(
        run.state.policy, run.config.objective, batch, 6, Meter()
    ).isfinite()
    after = Progress(**json.loads((checkpoints(tmp_path / "run")[-1] / "state.json").read_text()))
    assert (after.step, after.updates, after.bad_steps) == (3, 2, 0)


def test_a_run_that_stays_not_finite_stops_and_says_where_the_dumps_are(
    monkeypatch, tmp_path, capsys
):
    exploding(monkeypatch, range(1, 9))
    overrides = [
        "train.steps=9",
        "train.max_bad_steps=2",
        "objective.kl_weight=0.1",
        f"output={tmp_path}/run",
    ]
    assert main(["train", str(TINY), *SMALL, *overrides]) == 1
    error = capsys.readouterr().err
    assert "2 updates in a row were not finite (train.max_bad_steps)" in error
    assert f"they are in {tmp_path}/run/failures" in error
    assert "try a lower train.learning_rate" in error
    assert len(list((tmp_path / "run" / "failures").iterdir())) == 2


def test_both_updates_of_a_step_that_fail_are_kept(tmp_path):
    counts = ["train.prompts_per_step=2", "train.updates_per_step=2", "train.images_per_pass=3"]
    config = small_config(tmp_path / "run", *counts, "train.steps=1")
    config.objective.kl_weight = math.nan
    trainer.train(config)
    kept = sorted(path.name for path in (tmp_path / "run" / "failures").iterdir())
    assert kept == ["step-000000-update-0-process-0", "step-000000-update-1-process-0"]


FEW = [
    "train.images_per_prompt=2",
    "train.images_per_pass=4",
    "sampler.steps=2",
    "sampler.window.range=[0, 1]",
    "evaluation.sampler.steps=2",
]


WEIGHTS = "weights of `rewards` nearer to 1"
FLOOR_HELD = ["rewards={brightness: 1}", "combine={name: constrained, at_least: {brightness: -1}}"]


@pytest.mark.parametrize(
    ("wrong", "advice"),
    [
        (["rewards={brightness: 1e-30}"], WEIGHTS),
        pytest.param(["rewards={brightness: 1e39}"], WEIGHTS, marks=pytest.mark.slow),
        # All groups are dropped, so that no update is made at all.
        (["rewards={brightness: 1e39}", "train.drop_equal_groups=true"], WEIGHTS),
        (FLOOR_HELD, "Rewards above their floors do not count: raise combine.at_least"),
    ],
)
def test_a_gradient_of_0_is_reported_after_ten_steps_and_ends_the_run(
    wrong, advice, tmp_path, capsys
):
    overrides = [*wrong, "train.steps=20", "train.max_bad_steps=2", f"output={tmp_path}/run"]
    assert main(["train", str(TINY), *SMALL, *FEW, *overrides]) == 1
    printed = capsys.readouterr()
    assert "exactly 0 in 10 steps in a row: nothing is learned" in printed.out
    assert "exactly 0 in 12 steps in a row" in printed.err
    assert advice in printed.err
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-000012"]
    assert [line["grad_norm"] for line in read_metrics(tmp_path / "run")] == [0.0] * 12


def test_what_a_failed_step_taught_the_combination_is_not_saved(tmp_path, monkeypatch):
    """The failed step is repeated, and its rewards must not be counted twice."""
    settings = ["combine={name: normalised}", "train.steps=3", "train.learning_rate=1e-2"]
    trainer.train(small_config(tmp_path / "whole", *settings))
    compute = update.compute_gradient

    def failing(policy, *others):
        if policy is run.state.policy and run.progress.step == 1:
            raise RunError("the connection is lost")
        return compute(policy, *others)

    run = trainer.prepare(small_config(tmp_path / "parts", *settings))
    with monkeypatch.context() as patched:
        patched.setattr(update, "compute_gradient", failing)
        with pytest.raises(RunError, match="step-000001"):
            trainer.execute(run)
    trainer.train(small_config(tmp_path / "parts", *settings))
    adapters = [(tmp_path / name / ADAPTER).read_bytes() for name in ("whole", "parts")]
    assert adapters[0] == adapters[1]


@pytest.mark.slow
def test_a_learning_rate_that_destroys_the_adapter_ends_the_run(tmp_path, capsys):
    overrides = ["train.learning_rate=0.99", "train.ema.decay=0", "train.max_bad_steps=2"]
    overrides += ["train.steps=20", f"output={tmp_path}/run"]
    assert main(["train", str(TINY), *SMALL, *FEW, *overrides]) == 1
    assert "a lower train.learning_rate in a new output folder" in capsys.readouterr().err
    norms = [line["grad_norm"] for line in read_metrics(tmp_path / "run")]
    assert norms[0] > 0
    assert norms[1:] == [0.0] * 12


@pytest.mark.parametrize("objective", ["nft", "flow_grpo"])
def test_an_adapter_of_nan_ends_the_run(objective, tmp_path):
    config = small_config(
        tmp_path / "run", *FEW, f"objective={{name: {objective}}}", "train.steps=20"
    )
    run = trainer.prepare(config)
    with torch.no_grad():
        for name in ("policy", *run.state.policy.snapshots):
            for parameter in run.state.policy.parameters(name):
                parameter.fill_(math.nan)
    with pytest.raises(RunError, match=r"updates in a row were not finite|exactly 0 in 13 steps"):
        trainer.fit(run)


def test_steps_without_a_gradient_are_counted_in_a_row():
    progress, counts = Progress(), []
    for has_gradient in (False, False, True, False):
        progress.advance([True], has_gradient, images=1, seconds=0.0)
        counts.append(progress.idle_steps)
    assert counts == [1, 2, 0, 1]
    assert progress.bad_steps == 0


def test_rewards_that_score_nothing_end_the_run(tmp_path):
    (tmp_path / "silent.py").write_text(
        "def silent(images, prompts, metadata):\n    return [None] * len(images)\n"
    )
    rewards = f'rewards={{"{tmp_path}/silent.py:silent": 1.0}}'
    with pytest.raises(
        RunError, match=r"2 updates in a row .*If a reward produced the value, fix the reward"
    ):
        trainer.train(
            small_config(tmp_path / "run", rewards, "train.max_bad_steps=2", "train.steps=9")
        )
    (_, dump) = sorted((tmp_path / "run" / "failures").iterdir())
    assert "no image was given a score by rewards.silent" in (dump / "failure.json").read_text()


def test_steps_that_were_not_finite_are_not_reported_as_steps_without_a_gradient(tmp_path, capsys):
    (tmp_path / "silent.py").write_text(
        "def silent(images, prompts, metadata):\n    return [None] * len(images)\n"
    )
    rewards = f'rewards={{"{tmp_path}/silent.py:silent": 1.0}}'
    config = small_config(
        tmp_path / "run", *FEW, rewards, "train.max_bad_steps=12", "train.steps=20"
    )
    with pytest.raises(RunError, match=r"12 updates in a row were not finite"):
        trainer.train(config)
    assert "exactly 0" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_failure_between_two_updates_of_a_step_leaves_the_step_before(tmp_path, monkeypatch):
    overrides = [
        "train.updates_per_step=2",
        "train.images_per_pass=3",
        "train.save_every=1",
        "train.steps=3",
    ]
    trainer.train(small_config(tmp_path / "whole", *overrides))
    calls, gradient = [], update.compute_gradient

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise RunError("rewards.mine failed")
        return gradient(*arguments)

    monkeypatch.setattr(update, "compute_gradient", failing)
    with pytest.raises(RunError, match=r"rewards.mine failed[\s\S]*step-000001"):
        trainer.train(small_config(tmp_path / "parts", *overrides))
    trainer.train(small_config(tmp_path / "parts", *overrides))
    one, other = (load_file(tmp_path / name / ADAPTER) for name in ("whole", "parts"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_an_evaluation_that_failed_is_repeated_when_the_run_resumes(tmp_path, monkeypatch):
    overrides = ["train.evaluate_every=1", "train.save_every=1", "train.steps=3"]
    evaluate = trainer.Run.evaluate

    def failing(run):
        if run.progress.step == 2:
            monkeypatch.setattr(trainer.Run, "evaluate", evaluate)
            raise RunError("evaluation.rewards.mine failed")
        return evaluate(run)

    monkeypatch.setattr(trainer.Run, "evaluate", failing)
    with pytest.raises(RunError, match=r"mine failed[\s\S]*step-000002"):
        trainer.train(small_config(tmp_path / "run", *overrides))
    trainer.train(small_config(tmp_path / "run", *overrides))
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert [line["step"] for line in lines if "eval/scene_match" in line] == [1, 2, 3]


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_with_the_same_adapter():
    """The short form of `benchmarks/interruptions.py`."""
    command = [sys.executable, "benchmarks/interruptions.py"]
    command += ["--objectives", "crd", "dpo", "alignprop", "--kills", "8"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    same_for_all = r"(\d+) of \1 runs end with the adapter of the run that was never killed"
    assert re.search(same_for_all, ended.stdout), ended.stdout + ended.stderr
