"""Two processes: they compute the gradient of one, resume each other's runs, and fail together."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flowalign import distributed
from flowalign.reporting.trackers import read_metrics
from flowalign.runs.adapter import ADAPTER_FILE
from flowalign.runs.checkpoint import checkpoints
from tests.processes import ENVIRONMENT, run_process, start, start_two, TORCHRUN
from tests.tiny import ROOT, SMALL, TINY

ACCELERATE = [
    *(sys.executable, "-m", "accelerate.commands.launch"),
    *("--multi_gpu", "--num_processes", "2"),
]

GRADIENT = """
import sys
import torch
from safetensors.torch import save_file
from flowalign import distributed
from flowalign.training import trainer
from flowalign.training.gradient import compute_gradient, Meter
from flowalign.policy import Policy
from tests.tiny import small_config, stir

torch.set_num_threads(1)
folder, expected, cases = sys.argv[1], int(sys.argv[2]), eval(sys.argv[3])
distributed.state()
assert distributed.count() == expected, f"{distributed.count()} processes, not {expected}"
for number, (objective, variant) in enumerate(cases):
    settings = [f"objective={objective}", "train.prompts_per_step=4"]
    settings += [f"train.images_per_pass={4 - expected}"]
    settings += ["data.ranking={weighted: true}"] if variant == "weighted" else []
    # Three prompts of four images: each of two processes holds half of the second prompt.
    settings += ["train.prompts_per_step=3", "train.images_per_prompt=4"] * (variant == "cut")
    config = small_config(f"{folder}/{number}", *settings)
    run = trainer.prepare(config)
    policy = run.state.policy
    batch, metrics = run.source(0)
    Policy.loss_scale = lambda self, passes: 1.0
    if variant == "uneven":
        # As if some images had no score. The scale is one that float16 would have.
        keys = batch.keys.table().tolist()
        batch = batch[[i for i, key in enumerate(keys) if key[2] != 3 and key[2:] != [1, 1]]]
        Policy.loss_scale = lambda self, passes: 2.0 ** (5 + passes)
    stir(policy)
    compute_gradient(policy, config.objective, batch, config.train.images_per_pass, Meter())
    if distributed.is_main():
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])
        reward = torch.tensor(metrics["reward/combined"])
        save_file({"gradient": gradient, "reward": reward}, f"{folder}/{number}.safetensors")
"""
CASES = [
    ("{name: flow_grpo, kl_weight: 0.1}", ""),
    ("{name: crd}", ""),
    ("{name: crd}", "uneven"),
    ("{name: dgpo}", ""),
    ("{name: kto}", ""),
    ("{name: dpo}", "weighted"),
    ("{name: flow_grpo, kl_weight: 0.1}", "cut"),
    ("{name: nft}", "cut"),
]


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return math.sqrt(sum((one[key] - other[key]).square().sum().item() for key in one))


@pytest.mark.slow
def test_two_processes_compute_the_gradient_of_one(tmp_path):
    """One process makes passes of whole prompts; two processes cut them."""
    script = tmp_path / "gradient.py"
    script.write_text(GRADIENT)
    for launcher, count in (([sys.executable], 1), (TORCHRUN, 2)):
        folder = tmp_path / str(count)
        run_process([*launcher, str(script), str(folder), str(count), repr(CASES)])
    for number, case in enumerate(CASES):
        one, two = (load_file(tmp_path / str(count) / f"{number}.safetensors") for count in (1, 2))
        assert (one["gradient"] - two["gradient"]).norm() <= 1e-5 * one["gradient"].norm(), case
        assert one["reward"] == pytest.approx(two["reward"].item(), abs=1e-6), case
        assert one["gradient"].norm() > 0, case


def test_values_are_exchanged_on_the_device_of_the_rank(monkeypatch):
    """GPUs exchange only what lies on GPUs. Here `meta` stands for the device."""
    devices = []

    def exchange(values: Tensor, *_: object) -> Tensor:
        devices.append(values.device.type)
        return torch.zeros(values.shape)

    monkeypatch.setattr(distributed, "device", lambda: torch.device("meta"))
    monkeypatch.setattr(distributed, "count", lambda: 2)
    monkeypatch.setattr(distributed, "accelerate_reduce", exchange)
    monkeypatch.setattr(distributed, "accelerate_gather", exchange)
    monkeypatch.setattr(distributed, "pad_across_processes", lambda rows: rows)
    monkeypatch.setattr(torch.distributed, "all_reduce", exchange)
    assert distributed.mean(torch.ones(2)).device.type == "cpu"
    assert len(distributed.gather(torch.ones(2, 3))) == 0
    distributed.maximum(torch.ones(2))
    assert devices == ["meta"] * 3


@pytest.mark.slow
def test_a_run_resumes_on_another_number_of_processes_with_the_same_prompts_and_noise(tmp_path):
    """Two processes by accelerate, then one; and one, then two by torchrun."""
    command = ["train.py", str(TINY), *SMALL, "train.images_per_pass=3", "train.save_every=1"]
    whole = tmp_path / "whole"
    run_process([sys.executable, *command, "train.steps=4", "train.keep=4", f"output={whole}"])
    before, end = (load_file(checkpoints(whole)[i] / ADAPTER_FILE) for i in (-2, -1))
    last_update = distance(before, end)
    later = shutil.ignore_patterns("step-000003", "step-000004", "adapter", "summary.json")
    shutil.copytree(whole, tmp_path / "1-2", ignore=later)
    output = run_process([*ACCELERATE, *command, "train.steps=2", f"output={tmp_path / '2-1'}"])
    assert "2 processes on cpu" in output
    assert [line["images"] for line in read_metrics(tmp_path / "2-1")] == [6, 12]
    for run, launcher, processes in (
        (tmp_path / "2-1", [sys.executable], "1 process"),
        (tmp_path / "1-2", TORCHRUN, "2 processes"),
    ):
        output = run_process([*launcher, *command, "train.steps=4", f"output={run}"])
        assert "Resuming from" in output
        assert f"{processes} on cpu" in output
        environment = json.loads((run / "environment.json").read_text())
        assert environment["processes"] == int(processes[0])
        for one, other in zip(read_metrics(whole), read_metrics(run), strict=True):
            assert one["reward/combined"] == pytest.approx(other["reward/combined"], abs=1e-5)
            assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
        adapter = load_file(checkpoints(run)[-1] / ADAPTER_FILE)
        assert distance(adapter, end) <= 0.01 * last_update


@pytest.mark.slow
def test_sigterm_of_torchrun_saves_the_step_of_both_processes(tmp_path):
    """torchrun passes the signal on to both, and a scheduler would send it to each of them too."""
    run = tmp_path / "run"
    command = ["train.py", str(TINY), *SMALL, "train.images_per_pass=3", f"output={run}"]
    launch = [*TORCHRUN, *command, "train.steps=1000"]
    environment = {**ENVIRONMENT, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        launch, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while not read_metrics(run):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.2)
        workers = psutil.Process(process.pid).children()
        assert len(workers) == 2
        for receiver in (process, *workers):
            receiver.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert output.count("Finishing this step, then saving.") == 1
    (saved,) = checkpoints(run)
    done = read_metrics(run)[-1]["step"]
    assert saved.name == f"step-{done:06d}"
    assert f"Stopped after step {done}. The same command resumes from there." in output
    output = run_process([*TORCHRUN, *command, f"train.steps={done + 1}"])
    assert f"Resuming from {saved}" in output


FAILURE = """
import os
import signal
import sys
import time

import torch

from flowalign import distributed
from flowalign.errors import RunError
from flowalign.rewards.worker import has_ended, in_background

distributed.GRACE = 1.0
assert distributed.count() == 2
# One process may train several times.
with distributed.ending_together():
    distributed.barrier()
time.sleep(1.5)
try:
    with distributed.ending_together():
        distributed.barrier()
        if distributed.is_main():
            try:
                if sys.argv[1] == "busy":
                    has_ended(in_background(time.sleep, 600))
                if sys.argv[1] == "stuck":
                    time.sleep(600)
                distributed.mean(torch.ones(3))
            except RunError:
                distributed.deal_with_failure()
                time.sleep(5)  # as long as saving takes
                print("saved")
                raise
        elif sys.argv[1] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            raise ValueError("the scorer is gone")
except (RunError, ValueError) as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize(
    ("case", "main_status", "message"),
    [
        pytest.param("raises", 1, "Process 1 failed: the scorer is gone", marks=pytest.mark.slow),
        pytest.param(
            "killed", 1, "Another process has ended without a message.", marks=pytest.mark.slow
        ),
        # Rank 0 waits for a reward for longer than the grace, and not for rank 1.
        ("busy", 1, "Process 1 failed: the scorer is gone"),
        # It does not come back from a call, so it cannot save.
        pytest.param(
            "stuck",
            1,
            "Process 1 failed: the scorer is gone\nThis process waited",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_rank_that_fails_alone_ends_the_other(case, main_status, message, tmp_path):
    script = tmp_path / "failure.py"
    script.write_text(FAILURE)
    main, other = start_two(script, case)
    assert main.returncode == main_status
    assert message in main.stderr
    assert ("saved" in main.stdout) == (case != "stuck")
    # The rank that failed first waits for rank 0, also if that takes longer than the grace.
    assert "This process waited" not in other.stderr
    assert other.returncode == (-9 if case == "killed" else 1)


def test_errors_of_this_process_are_not_taken_for_those_of_another(monkeypatch):
    with pytest.raises(RuntimeError, match="dimensions"):
        distributed.gather(torch.ones(3))

    def fail(_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(distributed, "count", lambda: 2)
    monkeypatch.setattr(distributed, "accelerate_gather", fail)
    with pytest.raises(torch.OutOfMemoryError):
        distributed.gather(torch.ones(3, 1))


ENDS_WHILE_WATCHED = """
import sys
import time
from datetime import timedelta

import torch

from flowalign import distributed


class Held:
    # Keeps the interpreter busy while it ends.
    def __del__(self):
        time.sleep(0.5)


class SlowStore:
    # As far away as a store on another machine, and as this one inside PyTorch while it answers.
    store = torch.distributed.TCPStore("127.0.0.1", 0, 1, True)

    def check(self, keys):
        try:
            self.store.wait(["never"], timedelta(seconds=2))
        except RuntimeError:
            return False


distributed._store = SlowStore
distributed._on_connection()
sys.held = Held()
time.sleep(1.9)
"""


def test_a_process_ends_while_its_watchdog_asks_the_store(tmp_path):
    script = tmp_path / "ends.py"
    script.write_text(ENDS_WHILE_WATCHED)
    run_process([sys.executable, str(script)])


FAILS_ON_ONE = """
import os
import signal

import torch

calls = 0


def fails(images, prompts, metadata):
    global calls
    calls += COUNTED
    if calls > FIRST and os.environ.get("RANK") == "1":
        FAULT
    return images.mean((1, 2, 3))
"""
RAISES = 'raise ConnectionError("the scorer is gone")'
SMALL_RUN = [*SMALL, "train.images_per_pass=3", "evaluation.rewards={brightness: 1.0}"]


def failing(folder, fault, first, counted="1"):
    """Write a reward that fails on the second process after some calls. Returns its setting."""
    file = folder / "mine.py"
    code = FAILS_ON_ONE.replace("FAULT", fault).replace("FIRST", str(first))
    file.write_text(code.replace("COUNTED", counted))
    return f'rewards={{"{file}:fails": 1.0}}'


@pytest.mark.slow
def test_a_reward_that_fails_in_backpropagation_on_one_process_ends_both(tmp_path):
    settings = [
        failing(tmp_path, RAISES, 4, "images.requires_grad"),
        "objective={name: alignprop}",
        "sampler.dynamics={name: ode}",
        *("train.steps=20", f"output={tmp_path / 'run'}"),
    ]
    main, other = start_two(ROOT / "train.py", str(TINY), *SMALL_RUN, *settings)
    assert main.returncode == other.returncode == 1
    (saved,) = checkpoints(tmp_path / "run")
    assert "fails raised ConnectionError: the scorer is gone" in other.stderr
    assert "Process 1 failed" in main.stderr
    assert f"The finished steps are in {saved}" in main.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (RAISES, "fails raised ConnectionError: the scorer is gone"),
        (
            "torch.empty(2**50)",
            "can't allocate memory: you tried to allocate 4503599627370496 bytes",
        ),
        # So ends a process when the machine is out of memory.
        ("os.kill(os.getpid(), signal.SIGKILL)", "Signal 9 (SIGKILL)"),
    ],
)
def test_a_process_that_fails_alone_leaves_the_finished_steps(fault, message, tmp_path):
    # One prompt to evaluate: the second rank has no images, and must not make the first one wait.
    (tmp_path / "one.txt").write_text("a red circle\n")
    settings = ["train.steps=20", f"output={tmp_path / 'run'}", failing(tmp_path, fault, 12)]
    settings += [f"evaluation.prompts={tmp_path / 'one.txt'}"]
    ended = start([*TORCHRUN, "train.py", str(TINY), *SMALL_RUN, *settings])
    assert ended.returncode != 0
    assert message in ended.stderr
    (saved,) = checkpoints(tmp_path / "run")
    assert f"The finished steps are in {saved}" in ended.stderr


@pytest.mark.slow
def test_processes_whose_launcher_is_killed_save_and_end_and_the_run_resumes_exactly(tmp_path):
    command = [*TORCHRUN, "train.py", str(TINY), *SMALL_RUN, "rewards={brightness: 1.0}"]
    command += ["train.save_every=1000", "train.learning_rate=1e-2"]
    run, whole = tmp_path / "run", tmp_path / "whole"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    launcher = subprocess.Popen(
        [*command, "train.steps=1000", f"output={run}"], cwd=ROOT, env=ENVIRONMENT, **quiet
    )
    while not read_metrics(run):
        assert launcher.poll() is None
        time.sleep(0.2)
    workers = psutil.Process(launcher.pid).children()
    launcher.kill()
    launcher.wait()
    ended, alive = psutil.wait_procs(workers, timeout=4 * distributed.GRACE)
    assert (len(ended), alive) == (2, [])
    (saved,) = checkpoints(run)
    done = read_metrics(run)[-1]["step"]
    assert saved.name == f"step-{done:06d}"
    for folder in (run, whole):
        run_process([*command, f"train.steps={done + 1}", f"output={folder}"])
    one, other = (load_file(folder / "adapter" / ADAPTER_FILE) for folder in (run, whole))
    assert distance(one, other) == 0
