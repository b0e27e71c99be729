"""Passes of an update: padding, terms of whole groups, and equal work on all processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from flowalign import distributed
from flowalign.objectives.base import Max, Mean
from flowalign.objectives.crd import CRD
from flowalign.objectives.kto import KTO
from flowalign.training.gradient import Meter, split
from tests.objectives.gaussian import gradient, policy_at
from tests.objectives.test_forward import images
from tests.objectives.toy import pairs_of, random, standard_normal, VelocityPolicy
from tests.tiny import ROOT

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def beside_a_process_with(monkeypatch, rows: int, cuts_a_group: bool) -> None:
    """Let another process hold so many rows; what it computes is left out."""
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [value, (rows, cuts_a_group)])


@pytest.mark.parametrize("rows", [8, 9, 12, 30])
def test_a_process_with_fewer_rows_makes_as_many_passes_of_weight_0(rows, monkeypatch):
    beside_a_process_with(monkeypatch, rows, cuts_a_group=False)
    passes = list(split(policy_at(0.2, old=0.0), CRD(), images(2, 4), 4))
    by_draw = passes[::3]
    assert len(by_draw) == -(-rows // 4)
    assert [one.weight > 0 for one in by_draw] == [True, True] + [False] * (len(by_draw) - 2)
    assert sum(one.weight for one in passes) == pytest.approx(8 / ((8 + rows) / 2))
    assert all(len(one.batch) for one in passes)


def test_padded_passes_add_nothing_to_the_gradient(monkeypatch):
    policy, rollout = policy_at(torch.full((3,), 0.2), old=0.05), images(2, 4)
    alone = gradient(CRD(), policy, rollout)
    beside_a_process_with(monkeypatch, 24, cuts_a_group=True)
    policy.images_per_pass = 4
    assert_close(gradient(CRD(), policy, rollout), alone * 8 / 16)


def test_a_process_without_trainable_rows_pads_with_finite_rows(monkeypatch):
    policy, rollout = policy_at(torch.full((3,), 0.2), old=0.05), images(2, 4)
    rollout.weight, rollout.reward = torch.zeros(8), torch.full((8,), torch.nan)
    beside_a_process_with(monkeypatch, 4, cuts_a_group=True)
    passes = list(split(policy, CRD(), rollout, 4))
    assert [one.weight for one in passes] == [0, 0, 0]
    assert all(one.batch.reward.isfinite().all() for one in passes)
    assert (gradient(CRD(), policy, rollout) == 0).all()


def test_terms_are_those_of_the_real_rows_whatever_is_padded(monkeypatch):
    policy, rollout = policy_at(torch.full((3,), 0.2), old=0.05), images(2, 4)
    whole = list(split(policy, CRD(), rollout, 3))
    beside_a_process_with(monkeypatch, 20, cuts_a_group=True)
    for one, padded in zip(whole, split(policy, CRD(), rollout, 3), strict=False):
        for name, term in one.batch.terms.items():
            assert_close(padded.batch.terms[name], term)


def test_the_mean_over_images_leaves_padded_rows_out(monkeypatch):
    policy = VelocityPolicy(standard_normal, torch.tensor([0.3]), torch.zeros(1))
    pairs = pairs_of(1 + 0.1 * random(4, 1), -2 + 0.1 * random(4, 1, seed=1))
    (alone,) = split(policy, KTO(), pairs, 8)
    beside_a_process_with(monkeypatch, 12, cuts_a_group=False)
    for one in split(policy, KTO(), pairs, 8):
        expected = alone.batch.terms["g_liked"][:1].expand(len(one.batch))
        assert_close(one.batch.terms["g_liked"], expected)


def test_a_largest_value_is_that_of_the_first_update_and_a_mean_of_all():
    meter = Meter()
    for values in ([1.0, 3.0], [5.0, 7.0]):
        meter.add({"mean": Mean(torch.tensor(values)), "most": Max(torch.tensor(values))}, 2)
        meter.updates += 1
    assert meter.values() == {"mean": 4.0, "most": 3.0}


def test_a_statistic_of_one_number_counts_for_every_row():
    meter = Meter()
    meter.add({"loss": Mean(torch.tensor(1.0))}, 3)
    meter.add({"loss": Mean(torch.tensor(5.0))}, 1)
    assert meter.values() == {"loss": 2.0}


COUNTS = """
import json
import sys
import warnings
from pathlib import Path

import torch
from flowalign import distributed
from flowalign.training.run import prepare
from flowalign.training.update import update
from tests.tiny import small_config

warnings.simplefilter("ignore")
torch.set_num_threads(1)
folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
distributed.state()
assert distributed.count() == 2, f"{distributed.count()} processes"
results = []
for number, (objective, images_per_pass, reward) in enumerate(cases):
    config = small_config(
        folder / str(number),
        "train.prompts_per_step=4",
        f"train.images_per_pass={images_per_pass}",
        "train.drop_equal_groups=true",
        f"objective={objective}",
        f'rewards={{"{folder}/mine.py:{reward}": 1.0}}',
        "evaluation.rewards={brightness: 1.0}",
    )
    run = prepare(config)
    calls = {"forwards": 0, "backwards": 0}

    def count(kind):
        def hook(*arguments):
            calls[kind] += 1
        return hook

    network = run.state.policy.model.transformer
    network.register_forward_hook(count("forwards"))
    network.register_full_backward_hook(count("backwards"))
    batch, _ = run.source(0)
    result = update(run.state, config.objective, batch, config.train, run.skip_update)
    rows = len(batch.trainable_rows())
    results.append({**calls, "rows": rows, "applied": result.outcomes})
everyone = distributed.gather_objects(results)
if distributed.is_main():
    (folder / "counts.json").write_text(json.dumps(everyone))
"""

REWARDS = """
import os


def flat_on_one(images, prompts, metadata):
    return images.mean((1, 2, 3)) * (os.environ["RANK"] == "0")


def missing_on_one(images, prompts, metadata):
    return images.mean((1, 2, 3)) if os.environ["RANK"] == "0" else [None] * len(images)


def flat(images, prompts, metadata):
    return [0.5] * len(images)
"""
CASES = [
    ("{name: flow_grpo, kl_weight: 0.1}", 2, "flat_on_one"),
    ("{name: crd}", 2, "flat_on_one"),
    ("{name: crd}", 3, "flat_on_one"),
    ("{name: dgpo}", 2, "missing_on_one"),
    ("{name: rwr}", 2, "missing_on_one"),
    ("{name: kto}", 2, "flat_on_one"),
    ("{name: prdp}", 2, "missing_on_one"),
    ("{name: crd}", 3, "flat"),
]


@pytest.mark.slow
def test_two_processes_make_the_same_forwards_and_backwards_if_one_has_nothing_to_train_on(
    tmp_path: Path,
):
    (tmp_path / "counts.py").write_text(COUNTS)
    (tmp_path / "mine.py").write_text(REWARDS)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(tmp_path / "counts.py"), str(tmp_path), json.dumps(CASES)]
    ended = subprocess.run(
        [sys.executable, *launcher, *script],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    first, second = json.loads((tmp_path / "counts.json").read_text())
    for case, one, other in zip(CASES, first, second, strict=True):
        assert (one["forwards"], one["backwards"]) == (other["forwards"], other["backwards"]), case
        assert other["rows"] == 0, case
        if case[2] == "flat":
            assert (one["rows"], one["backwards"], one["applied"]) == (0, 0, []), case
        else:
            assert one["rows"] > 0, case
            assert one["backwards"] > 0, case
            assert one["applied"] == other["applied"] == [True], case
