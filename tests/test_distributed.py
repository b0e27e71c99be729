"""Two processes: they compute the gradient of one, resume each other's runs, and fail together."""

import json
import math
import shutil
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flowalign import distributed
from flowalign.errors import UserError
from flowalign.models import load_model
from flowalign.models.families import describe
from flowalign.reporting.trackers import read_metrics
from flowalign.runs.adapter import ADAPTER_FILE
from flowalign.runs.checkpoint import checkpoints
from flowalign.training.setup import batch_plan, check_sharding, load
from tests.processes import ENVIRONMENT, run_process, start, start_two, TORCHRUN
from tests.tiny import ROOT, SMALL, small_config, TINY

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
    settings += ["distributed.shard=true"] * ("sharded" in variant)
    # Few layers with adapters are compiled sooner.
    compiled = ["model.compile=true", "model.lora.targets=[attn.to_q]"]
    settings += compiled * ("compiled" in variant)
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
BLIND = """
import os
import sys
from pathlib import Path

from flowalign.cli import run
from flowalign.evaluation.results import EvaluationResult
from flowalign.runs import checkpoint, folder

if os.environ["RANK"] == "1":
    # A file system shows this machine what the other wrote, but late. Only what it is told to read
    # may be looked for.
    def unseen(*_):
        raise AssertionError("looked for files that another machine has written")

    folder.checkpoints = checkpoint.checkpoints = EvaluationResult.load = unseen
run(["train", *sys.argv[1:]])
"""
WEIGHTS = """
import json
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from flowalign import distributed
from flowalign.batch import Keys
from flowalign.data.prompts import Prompt
from flowalign.models import load_model
from flowalign.models.families import describe
from flowalign.policy import Policy, Sampler
from flowalign.rollouts.collect import make_prompts

distributed.state()
model = load_model(describe("assets/tiny-sd3"))
model.shard(torch.device("cpu"))
policy = Policy(model, Sampler(steps=2))
parameters = list(model.transformer.parameters())
gathered = []


def count_gathered(*_):
    whole = [not any(isinstance(p, DTensor) for p in b.parameters()) for b in model.blocks]
    gathered.append(sum(whole))


for block in model.blocks:
    # Inside the block: its own hook would run after its weights are freed.
    next(block.children()).register_forward_hook(count_gathered)
batch = make_prompts(policy, [Prompt("a red circle")], Keys.training(0, 0, [(0, 0)]))
x = torch.zeros(1, *model.latent_shape)
policy.velocity(x, torch.full((1,), 0.5), batch.cond).square().mean().backward()
result = {
    "weights": sum(p.to_local().numel() for p in parameters if isinstance(p, DTensor)),
    "adapter": sum(p.numel() for p in parameters if not isinstance(p, DTensor)),
    "largest_gathered": max(gathered),
}
Path(sys.argv[1], f"{distributed.rank()}.json").write_text(json.dumps(result))
distributed.barrier()
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
    ("{name: flow_grpo, kl_weight: 0.1}", "sharded"),
    ("{name: crd}", "sharded"),
    ("{name: flow_grpo, kl_weight: 0.1}", "sharded and compiled"),
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
    # One prompt to evaluate: the second rank repeats it, and what it makes is dropped.
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


@pytest.mark.slow
def test_a_sharded_run_that_is_killed_resumes_to_the_same_bits_as_an_unsharded_one(tmp_path):
    """One prompt to evaluate on two ranks: both must make the same forwards, or they hang."""
    (tmp_path / "one.txt").write_text("a red circle\n")
    settings = ["train.save_every=1", f"evaluation.prompts={tmp_path / 'one.txt'}"]
    settings += ["train.evaluate_every=1", "objective={name: crd}", "sampler.dynamics={name: ode}"]
    command = [*TORCHRUN, "train.py", str(TINY), *SMALL_RUN, *settings]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    sharded = [*command, "distributed.shard=true", f"output={killed}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    launcher = subprocess.Popen([*sharded, "train.steps=1000"], cwd=ROOT, env=ENVIRONMENT, **quiet)
    while not checkpoints(killed):
        assert launcher.poll() is None
        time.sleep(0.2)
    for process in (*psutil.Process(launcher.pid).children(), launcher):
        process.kill()
    launcher.wait()
    last = int(checkpoints(killed)[-1].name.removeprefix("step-")) + 1
    output = run_process([*sharded, f"train.steps={last}"])
    assert "Resuming from" in output
    run_process([*command, f"train.steps={last}", f"output={whole}"])
    one, other = (load_file(folder / "adapter" / ADAPTER_FILE) for folder in (killed, whole))
    assert distance(one, other) == 0
    timed = ("seconds", "images_per_second")
    lines, whole_lines = (
        [{k: v for k, v in line.items() if k not in timed} for line in read_metrics(run)]
        for run in (killed, whole)
    )
    assert lines == whole_lines


@pytest.mark.slow
def test_two_machines_that_share_the_run_folder_alone_train_and_resume(tmp_path):
    """Each has prompts, a home and caches of its own, and does not see files that are new."""
    run = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for steps in (2, 4):
        machines = []
        for rank in range(2):
            home = tmp_path / f"home-{rank}"
            home.mkdir(exist_ok=True)
            shutil.copy(ROOT / "tests" / "prompts.jsonl", home)
            (home / "blind.py").write_text(BLIND)
            launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
            launcher += ["--node-rank", str(rank), "--nproc-per-node", "1"]
            launcher += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
            settings = [*SMALL_RUN, "evaluation.guidance_sweep=[3.0]", "train.export=best"]
            settings += ["evaluation.prompts=prompts.jsonl", "train.evaluate_every=1"]
            settings += ["train.save_every=1", f"train.steps={steps}", f"output={run}"]
            machines.append(
                subprocess.Popen(
                    [*launcher, "blind.py", str(TINY), *settings],
                    cwd=home,
                    env={**ENVIRONMENT, "HOME": str(home), "FLOWALIGN_CACHE": str(home / "cache")},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        outputs = [machine.communicate(timeout=300)[0] for machine in machines]
        assert [machine.returncode for machine in machines] == [0, 0], "\n".join(outputs)
    assert "Resuming from" in outputs[0]
    assert json.loads((run / "summary.json").read_text())["baseline_guided"]["guidance"]
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4]


@pytest.mark.slow
def test_two_processes_share_the_weights_of_a_sharded_model(tmp_path):
    (tmp_path / "weights.py").write_text(WEIGHTS)
    ended = start_two(tmp_path / "weights.py", str(tmp_path))
    assert [process.returncode for process in ended] == [0, 0], ended[0].stderr
    whole = sum(p.numel() for p in load_model(describe("assets/tiny-sd3")).transformer.parameters())
    parts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert sum(part["weights"] for part in parts) == whole
    assert max(part["weights"] for part in parts) < 0.51 * whole
    assert parts[0]["adapter"] == parts[1]["adapter"] > 0
    # A process holds its part of the weights, and gathers one block at a time.
    assert {part["largest_gathered"] for part in parts} == {1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.quantize=int8"], "only weights in their own dtype"),
        (["model.offload=true"], "only weights in their own dtype"),
        (["objective={name: alignprop}"], "alignprop passes gradients through the sampler"),
        (
            ["train.images_per_prompt=4", "train.prompts_per_step=1", "sampler.same_noise=true"],
            "processes share the images of a prompt",
        ),
    ],
)
def test_sharding_is_refused_for_other_weights_and_where_forwards_would_differ(
    settings, message, tmp_path, monkeypatch
):
    config = small_config(tmp_path, *settings, "distributed.shard=true")
    monkeypatch.setattr(distributed, "count", lambda: 2)
    with pytest.raises(UserError, match=message):
        check_sharding(config, batch_plan(config, 2))


def test_sharding_by_one_process_has_no_effect_and_says_so(tmp_path, capsys):
    config = small_config(tmp_path, "distributed.shard=true")
    check_sharding(config, batch_plan(config))
    assert (
        "distributed.shard has no effect, because there is one process" in capsys.readouterr().out
    )
    assert type(load(config).transformer).__name__ == "SD3Transformer2DModel"


@pytest.mark.parametrize(("entries", "shares"), [(4, 2), (5, 3), (1, 1)])
def test_ranks_share_entries_in_equal_numbers(entries, shares, monkeypatch):
    monkeypatch.setattr(distributed, "count", lambda: 2)
    positions = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        assert len(distributed.share(entries)) == shares
        positions += distributed.share(entries)
    assert sorted(positions) == list(range(2 * shares))


def test_what_rank_0_decides_by_files_is_not_computed_by_others(monkeypatch):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(distributed, "_broadcast", lambda value: ("from rank 0", ""))
    assert distributed.from_main(lambda: pytest.fail("looked for files")) == "from rank 0"
    monkeypatch.setattr(distributed, "_broadcast", lambda value: (None, "The disk is full."))
    with pytest.raises(UserError, match="The disk is full"):
        distributed.from_main(lambda: "not called")


def test_an_error_of_rank_0_is_raised_there_too():
    def fail() -> None:
        raise UserError("The file is damaged.")

    with pytest.raises(UserError, match="The file is damaged"):
        distributed.from_main(fail)
    assert distributed.from_main(lambda: 3) == 3
