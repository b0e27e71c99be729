"""A reward changes neither the run nor other rewards, and one that hangs or exits is stopped."""

import signal
import subprocess
import sys
import time
from threading import Event

import pytest
import torch

from flowalign.errors import RunError, UserError
from flowalign.rewards.adapters import make_reward
from flowalign.rewards.base import traits
from flowalign.rewards.inspection import bundled_samples, inspect_scores
from flowalign.rewards.registry import load_rewards
from tests.processes import ENVIRONMENT
from tests.tiny import ROOT, SMALL, TINY

IMAGES = torch.tensor([0.2, 0.4, 0.8])[:, None, None, None].expand(3, 3, 4, 4)
PROMPTS = ["one", "two", "three"]


def metadata():
    return [{"boxes": [{"width": width}]} for width in (1, 2, 3)]


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3))


@pytest.mark.parametrize("returned", [torch.Tensor, torch.Tensor.numpy], ids=["tensor", "array"])
def test_a_reward_that_fills_its_own_buffer_keeps_no_hold_on_its_scores(returned):
    buffer = torch.zeros(3)

    def buffered(images, prompts, metadata):
        buffer.copy_(images.mean((1, 2, 3)))
        return buffer if returned is torch.Tensor else returned(buffer)

    reward = make_reward("mine", buffered)
    first = reward(IMAGES, PROMPTS, metadata())
    reward(IMAGES / 2, PROMPTS, metadata())
    assert first.tolist() == pytest.approx([0.2, 0.4, 0.8])


def test_scores_with_a_gradient_are_a_copy_too():
    kept = []

    def keeps(images, prompts, metadata):
        kept.append(images.mean((1, 2, 3)))
        return kept[-1]

    images = IMAGES.clone().requires_grad_()
    scores = make_reward("mine", keeps).with_gradient(images, PROMPTS, metadata())
    kept[-1].data.zero_()
    assert scores.tolist() == pytest.approx([0.2, 0.4, 0.8])
    assert torch.autograd.grad(scores.sum(), images)[0].sum().item() == pytest.approx(3)


def spoils(images, prompts, metadata):
    images.zero_()
    prompts.reverse()
    prompts.pop()
    metadata[0]["boxes"][0]["width"] = 99
    metadata[1].clear()
    return [0.0] * len(images)


@traits(level="pairwise")
def spoils_pairs(first, second, prompts, metadata):
    assert {entry["boxes"][0]["width"] for entry in metadata} <= {1, 2, 3}
    first.zero_()
    prompts.clear()
    metadata[0]["boxes"][0]["width"] = 99
    return [0.5] * len(first)


@pytest.mark.parametrize("function", [spoils, spoils_pairs])
def test_inputs_that_a_reward_writes_into_are_its_own(function):
    images, prompts, entries = IMAGES.clone(), list(PROMPTS), metadata()
    make_reward("spoils", function)(images, prompts, entries)
    assert torch.equal(images, IMAGES)
    assert prompts == PROMPTS
    assert entries == metadata()


CARELESS = """
import os, random
import numpy as np
import torch

def careless(images, prompts, metadata):
    scores = images.mean((1, 2, 3)).clone()
    torch.set_grad_enabled(False)
    guard = torch.inference_mode()
    guard.__enter__()
    guards.append(guard)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    os.chdir("/")
    images.zero_()
    return scores

guards = []
os.chdir("/")
torch.manual_seed(0)
torch.set_grad_enabled(False)
torch.set_default_dtype(torch.float64)
guard = torch.inference_mode()
guard.__enter__()
"""


def state():
    return [
        *(torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()),
        *(torch.is_inference_mode_enabled(), torch.get_rng_state().tolist()),
    ]


def test_global_state_is_restored_after_import_and_after_every_call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "careless.py").write_text(CARELESS)
    before = state()
    (reward,) = load_rewards({"careless.py:careless": 1.0})
    assert state() == before
    images = IMAGES.clone().requires_grad_()
    for _ in range(2):
        scores = reward(images, PROMPTS, metadata())
        scores += 1  # an inference tensor would refuse
        assert reward.with_gradient(images, PROMPTS, metadata()).requires_grad
        assert state() == before
    assert reward.changed == {
        *("the default dtype", "the number of threads", "the working directory"),
    }


def test_a_change_that_sampling_may_see_is_a_finding(tmp_path):
    def careless(images, prompts, metadata):
        torch.set_default_dtype(torch.float64)
        return brightness(images, prompts, metadata)

    _, findings = inspect_scores(make_reward("mine", careless), bundled_samples())
    (finding,) = [finding for finding in findings if finding.subject == "global state"]
    assert finding.wrong
    assert "calls change the default dtype" in finding.text


@pytest.mark.parametrize("ending", [SystemExit(0), GeneratorExit(), RuntimeError("no")], ids=repr)
def test_a_reward_that_ends_the_program_has_failed(ending):
    def ends(images, prompts, metadata):
        raise ending

    for call in ("__call__", "with_gradient"):
        with pytest.raises(
            RunError, match=rf"rewards\.mine raised {type(ending).__name__}: .*line"
        ):
            getattr(make_reward("mine", ends), call)(IMAGES, PROMPTS, metadata())


EXITS = """
def factory(device):
    raise SystemExit(0)


class Weights:
    def __init__(self):
        raise SystemExit(0)

    def __call__(self, images, prompts, metadata):
        return [0.0] * len(images)
"""


@pytest.mark.parametrize("name", ["factory", "Weights"])
def test_a_reward_that_ends_the_program_while_it_is_made_is_refused(name, tmp_path):
    (tmp_path / "exits.py").write_text(EXITS)
    with pytest.raises(UserError, match=rf"{name} cannot be made: SystemExit: 0"):
        load_rewards({f"{tmp_path}/exits.py:{name}": 1.0})


def test_a_reward_that_exceeds_its_time_limit_has_failed():
    over = Event()

    def waits(images, prompts, metadata):
        over.wait(60)
        return [0.0] * len(images)

    began = time.monotonic()
    with pytest.raises(
        RunError, match=r"rewards\.mine has not returned after 0\.05 s, its time_li"
    ):
        make_reward("mine", waits, time_limit=0.05)(IMAGES, PROMPTS, metadata())
    assert time.monotonic() - began < 30
    over.set()
    assert (
        make_reward("mine", waits, time_limit=60)(IMAGES, PROMPTS, metadata()).tolist() == [0] * 3
    )


def test_a_timeout_of_the_reward_itself_is_an_error_of_the_reward():
    def times_out(images, prompts, metadata):
        raise TimeoutError("the server is slow")

    with pytest.raises(RunError, match="raised TimeoutError: the server is slow"):
        make_reward("mine", times_out, time_limit=60)(IMAGES, PROMPTS, metadata())


# It catches every exception, and computes in C++ while Python ends.
STUBBORN = """
import torch

calls = 0


def stubborn(images, prompts, metadata):
    global calls
    calls += 1
    while calls > 8:
        try:
            print("hangs", flush=True)
            while True:
                torch.rand(300, 300) @ torch.rand(300, 300)
        except BaseException:
            pass
    return images.mean((1, 2, 3))
"""


@pytest.mark.slow
def test_two_times_ctrl_c_end_a_run_whose_reward_hangs(tmp_path):
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    overrides = [
        f'rewards={{"{tmp_path}/stubborn.py:stubborn": 1.0}}',
        "evaluation={rewards: {brightness: 1.0}, guidance_sweep: []}",
        "train.steps=20",
        f"output={tmp_path}/run",
    ]
    process = subprocess.Popen(
        [sys.executable, "train.py", str(TINY), *SMALL, *overrides],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout
    try:
        for expected in ("hangs", "Press Ctrl-C again"):
            while expected not in (line := process.stdout.readline()):
                assert line, "the run ended"
            process.send_signal(signal.SIGINT)
        assert process.wait(60) == 1
    finally:
        process.kill()
        process.stdout.close()
