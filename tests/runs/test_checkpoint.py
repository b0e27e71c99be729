"""Checkpoints are restored exactly, or refused by the name of the file that is damaged."""

import json
import math
import shutil
from dataclasses import asdict
from itertools import product

import pytest
import torch

from flowalign.files import CHECKSUMS
from flowalign.reporting.trackers import read_metrics
from flowalign.runs.checkpoint import checkpoints, Progress, read_progress
from flowalign.training import trainer
from tests.runs.damage import (
    ADAPTER,
    cut,
    FILES,
    flip,
    pickled,
    pickled_with_its_checksum,
    removed,
    renew_checksum,
    same_adapter,
    STEPS,
    tensors,
    train_again,
    values,
)
from tests.tiny import small_config

DAMAGES = [cut, flip, pickled, pickled_with_its_checksum, removed]


def each_damage():
    """Yield every file with every damage, one of them for each file in the fast tests."""
    for (number, name), (which, damage) in product(enumerate(FILES), enumerate(DAMAGES)):
        marks = () if which == number % len(DAMAGES) else pytest.mark.slow
        yield pytest.param(name, damage, marks=marks)


@pytest.mark.parametrize(("name", "damage"), each_damage())
def test_a_damaged_checkpoint_is_refused_by_name(name, damage, run, capsys):
    if damage is pickled_with_its_checksum and name == "sha256.json":
        pytest.skip("the list of checksums is not in itself")
    saved, before = checkpoints(run)[-1], checkpoints(run)[-2]
    damage(saved / name)
    assert train_again(run) == 2
    error = capsys.readouterr().err
    # A flipped bit in the list of checksums makes it disagree with some file.
    if damage is flip and name == "sha256.json":
        assert any(f"{saved / file} is" in error for file in FILES)
    else:
        assert f"{saved / name} is" in error
    assert f"Remove {saved} to resume from {before}." in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("name", "tamper", "why"),
    [
        ("optimizer.safetensors", tensors(dict.clear), "does not fit"),
        (
            "optimizer.safetensors",
            tensors(lambda content: content.pop("0.exp_avg")),
            "0.exp_avg is missing in the file",
        ),
        (
            "optimizer.safetensors",
            tensors(lambda content: content.update({"a.b.c": torch.zeros(1)})),
            "a.b.c is (1,) in the file and missing in the model",
        ),
        (
            "optimizer.safetensors",
            tensors(lambda content: content.update({"0.exp_avg": torch.zeros(1)})),
            "0.exp_avg is (1,)",
        ),
        (
            ADAPTER.name,
            tensors(lambda content: content.update({min(content): torch.zeros(1)})),
            "is (1,) in the file and (",
        ),
        (f"snapshots/ema/{ADAPTER.name}", tensors(dict.clear), "does not fit"),
        (
            "rewards.safetensors",
            tensors(lambda content: content.update(more=torch.zeros(1))),
            "more",
        ),
        (
            "optimizer.safetensors",
            tensors(lambda content: content.update({"0.exp_avg": content["0.exp_avg"].double()})),
            "0.exp_avg is float64 in the file and float32 in the model",
        ),
        (
            ADAPTER.name,
            tensors(lambda content: content.update({min(content): content[min(content)].half()})),
            "is float16 in the file and float32 in the model",
        ),
        (
            ADAPTER.name,
            tensors(lambda content: content[min(content)].view(-1)[3:4].fill_(math.nan)),
            "holds values that are not finite",
        ),
        (
            f"snapshots/ema/{ADAPTER.name}",
            tensors(lambda content: content[min(content)].fill_(math.inf)),
            "holds values that are not finite",
        ),
        (
            "optimizer.safetensors",
            tensors(lambda content: content["0.exp_avg_sq"].view(-1)[-1:].fill_(math.nan)),
            "0.exp_avg_sq holds values that are not finite",
        ),
        ("state.json", values(updates=1), "it counts 1 updates, but the optimizer has made 4"),
        ("state.json", values(seconds=math.nan), "state.json.seconds is nan"),
        ("state.json", values(evaluations=[{"loss": 1}]), "evaluations.0 has the step None of 4"),
        pytest.param(
            "state.json",
            values(evaluations=[{"step": 9}]),
            "evaluations.0 has the step 9 of 4",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "state.json",
            values(evaluations=[{"step": 1.5}]),
            "evaluations.0 has the step 1.5",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "state.json",
            values(step="3"),
            "state.json.step is '3'; it must be a valid integer",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "state.json", values(updates=-1), "state.json.updates is -1", marks=pytest.mark.slow
        ),
        pytest.param(
            "state.json",
            values(evaluations=[3]),
            "state.json.evaluations.0 is 3",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "state.json", values(images=None), "the key images is missing", marks=pytest.mark.slow
        ),
        pytest.param(
            "state.json", values(more=1), "state.json.more is not known", marks=pytest.mark.slow
        ),
    ],
)
def test_a_checkpoint_tampered_with_is_refused_though_its_checksums_are_right(
    name, tamper, why, run, capsys
):
    saved, before = checkpoints(run)[-1], checkpoints(run)[-2]
    tamper(saved / name)
    renew_checksum(saved / name)
    assert train_again(run) == 2
    error = capsys.readouterr().err
    assert str(saved / name) in error
    assert why in error
    assert f"Remove {saved} to resume from {before}." in error
    assert "Traceback" not in error


def test_a_file_without_a_checksum_is_refused(run, capsys):
    saved = checkpoints(run)[-1]
    flip(saved / ADAPTER.name)
    (saved / CHECKSUMS).write_text("{}")
    assert train_again(run) == 2
    assert (
        f"{saved / CHECKSUMS} is damaged: it does not list {ADAPTER.name}."
        in capsys.readouterr().err
    )


def test_a_note_beside_the_weights_damages_nothing(run, finished):
    for folder in (checkpoints(run)[-1], checkpoints(run)[-1] / "snapshots" / "ema"):
        (folder / "notes.txt").write_text("the best one so far")
    assert train_again(run) == 0
    assert same_adapter(run, finished)


def test_progress_with_a_metric_that_is_not_finite_is_read_back(tmp_path):
    state = Progress(step=1, evaluations=[{"step": 1, "loss": float("nan"), "kl": 1.0}])
    (tmp_path / "state.json").write_text(json.dumps(asdict(state)))
    (entry,) = read_progress(tmp_path / "state.json").evaluations
    assert math.isnan(entry["loss"])
    assert isinstance(entry["step"], int)


def test_a_copy_under_another_name_is_not_a_checkpoint(run):
    shutil.copytree(checkpoints(run)[-1], run / "checkpoints" / "step-000004-backup")
    assert [saved.name for saved in checkpoints(run)] == [
        "step-000002",
        "step-000003",
        "step-000004",
    ]


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(run, finished, capsys):
    cut(checkpoints(run)[-1] / "optimizer.safetensors")
    assert train_again(run) == 2
    advised = capsys.readouterr().err.rpartition("Remove ")[2].partition(" to resume")[0]
    shutil.rmtree(advised)
    assert train_again(run) == 0
    assert same_adapter(run, finished)
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4]


def test_equal_adapters_are_equal_files(finished, tmp_path):
    trainer.train(small_config(tmp_path / "other", *STEPS))
    assert same_adapter(tmp_path / "other", finished)


def test_unfinished_checkpoints_of_a_killed_run_are_removed(run, finished):
    unfinished = run / "checkpoints" / ".step-000005.part"
    shutil.copytree(checkpoints(run)[-1], unfinished)
    (unfinished / "state.json").unlink()
    assert train_again(run) == 0
    assert not unfinished.exists()
    assert same_adapter(run, finished)


def test_the_best_checkpoint_stays_though_it_is_old(tmp_path, monkeypatch):
    config = small_config(tmp_path / "run", *STEPS, "train.keep=1")
    run = trainer.prepare(config)
    for step in range(1, 5):
        run.progress = Progress(**{**asdict(run.progress), "step": step})
        run.progress.evaluations.append({"step": step, "selection/scene_match": -abs(step - 2)})
        run.save()
    assert [saved.name for saved in checkpoints(tmp_path / "run")] == ["step-000002", "step-000004"]
