"""Runs that are cut off, files that are damaged, disks that are full, figures that are not finite: nothing is lost or hidden."""

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowalign import checkpoint, folder, trainer
from flowalign.checkpoint import checkpoints, load_checkpoint, State
from flowalign.cli import main
from flowalign.config import load_config
from flowalign.errors import RunError, UserError
from flowalign.gradient import compute_gradient, Meter
from flowalign.stopping import best_step, stop_reason, StopRule
from flowalign.tracking import read_metrics
from tests.tiny import ROOT, SMALL, small_config, TINY

STEPS = ["train.steps=4", "train.save_every=1", "train.keep=3", "train.ema.decay=0.5", "train.learning_rate=1e-2"]
ADAPTER = Path("adapter") / "pytorch_lora_weights.safetensors"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps with a checkpoint of each of the last three: its folder."""
    os.chdir(ROOT)
    run = tmp_path_factory.mktemp("runs") / "whole"
    trainer.train(small_config(run, *STEPS))
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it that may be damaged, and a fourth step to make again."""
    copy = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(copy / "adapter")
    return copy


def again(run, *overrides):
    return main(["train", str(TINY), *SMALL, *STEPS, f"output={run}", *overrides])


def same_adapter(run, finished):
    return (run / ADAPTER).read_bytes() == (finished / ADAPTER).read_bytes()


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    file.write_bytes(bytes(content))


def pickled(file):
    torch.save({"weights": torch.zeros(3)}, file)


def pickled_with_its_sum(file):
    """As one who knows the format would tamper with it."""
    file.write_bytes(pickle.dumps(Path))
    sums = file.parents[[p.name.startswith("step-") for p in file.parents].index(True)] / checkpoint.SUMS
    listed = json.loads(sums.read_text())
    listed[str(file.relative_to(sums.parent))] = checkpoint.sha256(file)
    sums.write_text(json.dumps(listed))


def removed(file):
    file.unlink()


FILES = [
    "pytorch_lora_weights.safetensors",
    "snapshots/ema/pytorch_lora_weights.safetensors",
    "optimizer.safetensors",
    "rewards.safetensors",
    "state.json",
    "sha256.json",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [cut, flip, pickled, pickled_with_its_sum, removed])
def test_a_damaged_checkpoint_is_refused_by_name(name, damage, run, capsys):
    if damage is pickled_with_its_sum and name == "sha256.json":
        pytest.skip("a file of sums has no sum")
    saved, before = checkpoints(run)[-1], checkpoints(run)[-2]
    damage(saved / name)
    assert again(run) == 2
    error = capsys.readouterr().err
    named = name.removesuffix(".json") if damage is flip and name == "sha256.json" else name
    assert named.rpartition("/")[2] in error or "is missing" in error or "is damaged" in error
    assert str(saved) in error
    assert f"Remove {saved} to go on from {before}." in error
    assert "Traceback" not in error


def test_after_removing_it_the_run_goes_on_to_the_same_end(run, finished, capsys):
    cut(checkpoints(run)[-1] / "optimizer.safetensors")
    assert again(run) == 2
    asked = capsys.readouterr().err.rpartition("Remove ")[2].partition(" to go on")[0]
    shutil.rmtree(asked)
    assert again(run) == 0
    assert same_adapter(run, finished)
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4]


def test_equal_adapters_are_equal_files(finished, tmp_path):
    trainer.train(small_config(tmp_path / "other", *STEPS))
    assert same_adapter(tmp_path / "other", finished)


@pytest.mark.parametrize("name", ["config.yaml", "evaluation/before.safetensors"])
def test_other_damaged_files_of_a_run_are_named(name, run, capsys):
    (run / name).write_bytes(b"\0\1")
    assert again(run) == 2
    assert f"{run / name} is" in capsys.readouterr().err


def test_what_a_killed_run_left_behind_is_cleared(run, finished):
    left = run / "checkpoints" / ".step-000005.part"
    shutil.copytree(checkpoints(run)[-1], left)
    (left / "state.json").unlink()
    assert again(run) == 0
    assert not left.exists()
    assert same_adapter(run, finished)


class Failing:
    """Stands before the functions that write a checkpoint; the n-th call finds the disk full, and so do all after it."""

    def __init__(self, monkeypatch, first):
        self.calls, self.first = 0, first
        for module, name in ((checkpoint, "save_file"), (checkpoint, "flush"), (checkpoint, "order_header"), (folder, "to_json")):
            monkeypatch.setattr(module, name, self.before(getattr(module, name)))
        monkeypatch.setattr(Path, "rename", self.before(Path.rename))
        monkeypatch.setattr(Path, "write_text", self.before(Path.write_text))

    def before(self, function):
        def write(*arguments, **settings):
            self.calls += 1
            if self.calls >= self.first:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))
            return function(*arguments, **settings)

        return write


@pytest.mark.parametrize("first", range(1, 40, 3))
def test_a_full_disk_at_any_write_loses_no_checkpoint(first, run, finished, monkeypatch, capsys):
    for number in (4, 3):
        shutil.rmtree(run / "checkpoints" / f"step-00000{number}")
    with monkeypatch.context() as patched:
        failing = Failing(patched, first)
        status = again(run)
    error = capsys.readouterr().err
    if failing.calls < first:
        pytest.skip("there are fewer writes")
    assert status in (1, 2)
    assert "No space left on device" in error
    assert "Traceback" not in error
    for saved in checkpoints(run):
        checkpoint.verify(saved)
    assert (run / "checkpoints" / "step-000002").is_dir()
    assert again(run) == 0
    assert same_adapter(run, finished)


def test_a_file_that_may_grow_no_larger_is_named_and_the_run_goes_on_afterwards(run, finished):
    """A real failing write: the system refuses bytes beyond a limit, as a quota does."""
    shutil.rmtree(run / "checkpoints" / "step-000004")
    command = [sys.executable, "train.py", str(TINY), *SMALL, *STEPS, f"output={run}"]
    limited = ["bash", "-c", 'ulimit -f 1000; trap "" XFSZ; exec "$@"', "bash", *command]
    ended = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "File too large" in ended.stderr
    assert f"The steps done are in {run / 'checkpoints' / 'step-000003'}" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert again(run) == 0
    assert same_adapter(run, finished)


def test_a_folder_that_cannot_be_written_is_named_before_training(tmp_path, capsys):
    (tmp_path / "taken").write_text("a file, not a folder")
    assert main(["train", str(TINY), *SMALL, f"output={tmp_path}/taken/run"]) == 2
    error = capsys.readouterr().err
    assert "output" in error
    assert f"{tmp_path}/taken" in error
    assert "Traceback" not in error


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
    return [f'rewards={{"{tmp_path}/mine.py:sometimes_infinite": 1.0}}', "evaluation.rewards={brightness: 1.0}"]


def test_a_step_with_an_infinite_reward_is_not_applied_and_is_kept(tmp_path, capsys):
    rewards = infinite_at([20], tmp_path)
    before = small_config(tmp_path / "run", *rewards, "train.steps=30", "train.learning_rate=1e-9", "train.save_every=1")
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
    """A loss that is NaN in these steps."""
    step = trainer.Run.step

    def at(self):
        self.config.objective.kl_weight = float("nan") if self.state.step in steps else 0.1
        return step(self)

    monkeypatch.setattr(trainer.Run, "step", at)


def test_a_loss_that_is_not_finite_is_not_applied_and_can_be_repeated_from_what_was_kept(monkeypatch, tmp_path):
    with monkeypatch.context() as patched:
        exploding(patched, {1})
        config = small_config(tmp_path / "run", "train.steps=3", "objective.kl_weight=0.1", "train.learning_rate=1e-3")
        trainer.train(config)
    (kept,) = (tmp_path / "run" / "failures").iterdir()
    run = trainer.prepare(load_config(tmp_path / "run" / "config.yaml", [f"output={tmp_path}/again"]))
    state = load_checkpoint(run.learned, kept)
    assert (state.step, state.updates) == (1, 1)
    batch, _ = run.assembly.source(state.step)
    assert torch.equal(batch.path, load_file(kept / "batch.safetensors")["path"])
    run.config.objective.kl_weight = float("nan")
    assert not compute_gradient(run.policy, run.config.objective, batch, 6, Meter()).isfinite()
    after = State(**json.loads((checkpoints(tmp_path / "run")[-1] / "state.json").read_text()))
    assert (after.step, after.updates, after.bad_steps) == (3, 2, 0)


def test_a_run_that_stays_not_finite_stops_and_says_where_the_batches_are(monkeypatch, tmp_path, capsys):
    exploding(monkeypatch, range(1, 9))
    overrides = ["train.steps=9", "train.max_bad_steps=2", "objective.kl_weight=0.1", f"output={tmp_path}/run"]
    assert main(["train", str(TINY), *SMALL, *overrides]) == 1
    error = capsys.readouterr().err
    assert (
        f"2 updates in a row were not finite (train.max_bad_steps) and not applied; they are in {tmp_path}/run/failures" in error
    )
    assert "Try a lower train.learning_rate" in error
    assert len(list((tmp_path / "run" / "failures").iterdir())) == 2


@pytest.mark.parametrize(
    ("rule", "values", "why"),
    [
        (StopRule(above=0.5), [0.1, 0.5], ""),
        (StopRule(above=0.5), [0.1, 0.6], "0.6 is above 0.5"),
        (StopRule(below=0.5), [0.6, 0.4], "0.4 is below 0.5"),
        (StopRule(falling=2), [0.5, 0.4], ""),
        (StopRule(falling=2), [0.5, 0.4, 0.5], ""),
        (StopRule(falling=2), [0.5, 0.3, 0.4], "0.4 has been below its best, 0.5, for 2 evaluations"),
        (StopRule(falling=2), [0.1, 0.5, 0.3, 0.4], "0.4 has been below its best, 0.5, for 2 evaluations"),
        (StopRule(rising=1), [0.5, 0.4], ""),
        (StopRule(rising=1), [0.5, 0.6], "0.6 has been above its best, 0.5, for 1 evaluations"),
    ],
)
def test_a_rule_stops_when_it_says(rule, values, why):
    assert rule(values) == why


@pytest.mark.parametrize("settings", [{}, {"falling": -1}, {"above": 0.1, "below": 0.2}])
def test_a_rule_that_means_nothing_is_refused(settings):
    with pytest.raises(UserError, match=r"train\.stop has .*write at least one"):
        StopRule(**settings)


def test_the_best_evaluation_is_the_first_of_the_largest():
    evaluations = [{"step": 2, "r": 0.1}, {"step": 4, "r": 0.3}, {"step": 6, "r": 0.3}, {"step": 8, "r": float("nan")}]
    assert best_step("r", 1, evaluations) == 4
    assert best_step("r", -1, evaluations) == 2
    assert best_step("other", 1, evaluations) is None


def test_a_rule_about_a_metric_that_is_not_logged_is_named():
    with pytest.raises(RunError, match=r"no metric 'kll'; this run logs step, kl\."):
        stop_reason({"kll": StopRule(above=1)}, [{"step": 1, "kl": 0.1}])
    assert stop_reason({"kl": StopRule(above=1)}, [{"step": 1, "kl": 0.1}, {"step": 2, "loss": float("nan")}]) == ""


def test_a_run_stops_by_its_rule_and_hands_over_the_best_weights(tmp_path, capsys):
    overrides = ["train.steps=9", "train.evaluate_every=1", "train.learning_rate=3e-2", "train.keep=1", "train.save_every=9"]
    rules = "train.stop={eval/scene_match_graded: {falling: 2}}"
    summary = trainer.train(small_config(tmp_path / "run", *overrides, rules))
    graded = [line["eval/scene_match_graded"] for line in read_metrics(tmp_path / "run")]
    assert summary["stopped"].startswith("eval/scene_match_graded: ")
    assert len(graded) < 9
    assert summary["step"] == graded.index(max(graded)) + 1
    assert summary["after"]["scene_match_graded"] == pytest.approx(max(graded), abs=1e-6)
    best = tmp_path / "run" / "checkpoints" / f"step-{summary['step']:06d}" / "snapshots" / "ema" / ADAPTER.name
    assert best.read_bytes() == (tmp_path / "run" / ADAPTER).read_bytes()
    assert "by train.stop: eval/scene_match_graded: " in capsys.readouterr().out
    assert trainer.train(small_config(tmp_path / "run", *overrides, rules))["stopped"] == summary["stopped"]


def test_a_budget_of_distance_stops_a_run(tmp_path):
    overrides = ["train.steps=9", "train.evaluate_every=1", "train.learning_rate=1e-2"]
    summary = trainer.train(small_config(tmp_path / "run", *overrides, "train.stop={eval/velocity_moved: {above: 1e-3}}"))
    moved = [line["eval/velocity_moved"] for line in read_metrics(tmp_path / "run")]
    assert summary["stopped"].startswith("eval/velocity_moved: ")
    assert moved[-1] > 1e-3
    assert all(value <= 1e-3 for value in moved[:-1])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stop={eval/scene_mach: {falling: 2}}"], "Did you mean 'eval/scene_match"),
        (["train.stop={kl: {above: 0.1}}", "train.evaluate_every=0"], "train.evaluate_every is 0; write a number of steps"),
        (["train.stop={kl: {}}"], "write at least one"),
        (["train.stop={kl: {abov: 1}}"], "Did you mean 'above'"),
        (["train.stop={kl: 0.5}"], "train.stop.kl"),
    ],
)
def test_stop_rules_that_cannot_work_are_answered(overrides, message, tmp_path, capsys):
    assert main(["train", str(TINY), *SMALL, "train.evaluate_every=1", f"output={tmp_path}/run", *overrides]) == 2
    assert message in capsys.readouterr().err


def test_evaluations_tell_of_over_optimisation(tmp_path):
    overrides = ["train.evaluate_every=1", "evaluation.images_per_prompt=2", "train.learning_rate=1e-2"]
    trainer.train(small_config(tmp_path / "run", *overrides))
    (line, _) = read_metrics(tmp_path / "run")
    assert 0 < line["eval/diversity"] < 1
    assert line["eval/velocity_norm"] == pytest.approx(1, abs=0.2)
    assert 0 < line["eval/velocity_moved"] < 1
    assert {"reward/spread_in_group", "reward/groups_without_spread"} <= set(line)


def test_the_best_checkpoint_stays_though_it_is_old(tmp_path, monkeypatch):
    config = small_config(tmp_path / "run", *STEPS, "train.keep=1")
    run = trainer.prepare(config)
    for step in range(1, 5):
        run.state = State(**{**asdict(run.state), "step": step})
        run.state.evaluations.append({"step": step, "eval/scene_match": -abs(step - 2)})
        run.save()
    assert [saved.name for saved in checkpoints(tmp_path / "run")] == ["step-000002", "step-000004"]


def test_runs_killed_at_random_moments_end_with_the_same_adapter():
    """The short form of `benchmarks/interruptions.py`."""
    command = [sys.executable, "benchmarks/interruptions.py", "--runs", "2"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "2 of 2 runs end with the adapter of the run that was never killed" in ended.stdout, ended.stdout + ended.stderr
