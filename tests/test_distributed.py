"""Fresh processes: two that compute one gradient, the documented commands, and diffusers alone with our adapter."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowalign import distributed
from flowalign.reporting.trackers import read_metrics
from flowalign.runs.checkpoint import checkpoints
from tests.tiny import make_policy, ROOT, SMALL, small_config, stir, TINY, two_groups

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

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
for number, (objective, more) in enumerate(cases):
    settings = ["train.prompts_per_step=4", f"train.images_per_pass={4 - expected}", f"objective={objective}"]
    config = small_config(f"{folder}/{number}", *settings, *(["data.ranking={weighted: true}"] if "weighted" in more else []))
    run = trainer.prepare(config)
    batch, metrics = run.source(0)
    Policy.loss_scale = lambda self, passes: 1.0
    if "uneven" in more:  # as where images have no score; and with a scale, as float16 has
        batch = batch[[row for row, key in enumerate(batch.keys.table().tolist()) if key[2] != 3 and key[2:] != [1, 1]]]
        Policy.loss_scale = lambda self, passes: 2.0 ** (5 + passes)
    stir(run.state.policy)
    compute_gradient(run.state.policy, config.objective, batch, config.train.images_per_pass, Meter())
    if distributed.is_main():
        gradient = torch.cat([p.grad.flatten() for p in run.state.policy.parameters()])
        save_file({"gradient": gradient, "reward": torch.tensor(metrics["reward/combined"])}, f"{folder}/{number}.safetensors")
"""
CASES = [
    ("{name: flow_grpo, kl_weight: 0.1}", ""),
    ("{name: crd}", ""),
    ("{name: crd}", "uneven"),
    ("{name: dgpo}", ""),
    ("{name: kto}", ""),
    ("{name: dpo}", "weighted"),
]


def run_process(command: list[str], folder: Path = ROOT) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return math.sqrt(sum((one[key] - other[key]).square().sum().item() for key in one))


def test_two_processes_compute_the_gradient_of_one(tmp_path):
    """One makes passes of whole prompts, two part them."""
    (tmp_path / "gradient.py").write_text(GRADIENT)
    for launcher, count in (([sys.executable], 1), (TORCHRUN, 2)):
        run_process(
            [
                *launcher,
                str(tmp_path / "gradient.py"),
                str(tmp_path / str(count)),
                str(count),
                repr(CASES),
            ]
        )
    for number, case in enumerate(CASES):
        one, two = (load_file(tmp_path / str(count) / f"{number}.safetensors") for count in (1, 2))
        assert (one["gradient"] - two["gradient"]).norm() <= 1e-5 * one["gradient"].norm(), case
        assert one["reward"] == pytest.approx(two["reward"].item(), abs=1e-6), case
        assert one["gradient"].norm() > 0, case


def test_what_processes_tell_each_other_is_on_their_device(monkeypatch):
    """GPUs exchange what lies on GPUs alone, and hand it back where it came from. `meta` stands for the device here."""
    seen = []

    def exchanged(values: Tensor, *_: object) -> Tensor:
        seen.append(values.device.type)
        return torch.zeros(values.shape)

    monkeypatch.setattr(distributed, "device", lambda: torch.device("meta"))
    monkeypatch.setattr(distributed, "count", lambda: 2)
    monkeypatch.setattr(distributed, "accelerate_reduce", exchanged)
    monkeypatch.setattr(distributed, "accelerate_gather", exchanged)
    monkeypatch.setattr(distributed, "pad_across_processes", lambda rows: rows)
    monkeypatch.setattr(torch.distributed, "all_reduce", exchanged)
    assert distributed.mean(torch.ones(2)).device.type == "cpu"
    assert len(distributed.gather(torch.ones(2, 3))) == 0
    distributed.maximum(torch.ones(2))
    assert seen == ["meta"] * 3


def test_a_run_goes_on_with_another_number_of_processes_and_the_same_prompts_and_noise(tmp_path):
    """Of one process, and of two by accelerate and by torchrun."""
    accelerate = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
    ]
    command = ["train.py", str(TINY), *SMALL, "train.images_per_pass=3", "train.save_every=1"]
    whole = tmp_path / "whole"
    run_process([sys.executable, *command, "train.steps=4", "train.keep=4", f"output={whole}"])
    before, end = (
        load_file(checkpoints(whole)[i] / "pytorch_lora_weights.safetensors") for i in (-2, -1)
    )
    last_update = distance(before, end)
    shutil.copytree(
        whole,
        tmp_path / "1-2",
        ignore=shutil.ignore_patterns("step-000003", "step-000004", "adapter", "summary.json"),
    )
    out = run_process([*accelerate, *command, "train.steps=2", f"output={tmp_path / '2-1'}"])
    assert "2 processes on cpu" in out
    assert [line["images"] for line in read_metrics(tmp_path / "2-1")] == [6, 12]
    for parted, launcher, then in (
        (tmp_path / "2-1", [sys.executable], 1),
        (tmp_path / "1-2", TORCHRUN, 2),
    ):
        out = run_process([*launcher, *command, "train.steps=4", f"output={parted}"])
        assert "Resuming from" in out
        assert f"{then} process{'es' * (then > 1)} on cpu" in out
        assert json.loads((parted / "environment.json").read_text())["processes"] == then
        for one, other in zip(read_metrics(whole), read_metrics(parted), strict=True):
            assert one["reward/combined"] == pytest.approx(other["reward/combined"], abs=1e-5)
            assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
        adapter = load_file(checkpoints(parted)[-1] / "pytorch_lora_weights.safetensors")
        assert distance(adapter, end) <= 0.01 * last_update


DIFFUSERS_ALONE = """
import sys
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

pipe = StableDiffusion3Pipeline.from_pretrained("assets/tiny-sd3", text_encoder_3=None, tokenizer_3=None)
pipe.load_lora_weights(sys.argv[1])
given = load_file(sys.argv[2])
settings = dict(num_inference_steps=4, guidance_scale=1.0, height=64, width=64, max_sequence_length=0, output_type="pt")
save_file({"images": pipe(sys.argv[4:], latents=given["noise"], **settings).images}, sys.argv[3])
assert "flowalign" not in sys.modules
"""


def test_diffusers_alone_makes_our_pictures_from_the_adapter(tmp_path):
    from flowalign.runs.adapter import save_adapter

    policy = make_policy()
    stir(policy)
    save_adapter(policy, tmp_path / "adapter")
    batch = two_groups(policy, 1)
    path = policy.at("policy").generate(batch).x
    save_file({"noise": path[:, 0].clone()}, tmp_path / "noise.safetensors")
    files = [
        str(tmp_path / name) for name in ("adapter", "noise.safetensors", "images.safetensors")
    ]
    run_process([sys.executable, "-c", DIFFUSERS_ALONE, *files, *batch.prompts])
    theirs = load_file(tmp_path / "images.safetensors")["images"]
    assert (policy.decode(path[:, -1]) - theirs).abs().max() <= 1e-4


def test_the_lines_of_the_adapter_s_readme_run(tmp_path):
    from flowalign.training import trainer

    trainer.train(small_config(tmp_path / "run", "train.steps=1"))
    readme = (tmp_path / "run" / "adapter" / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    run_process([sys.executable, "-c", code.replace("picture.png", str(tmp_path / "picture.png"))])
    assert (tmp_path / "picture.png").exists()


FAILS_ON_ONE = """
import os

calls = 0


def fails(images, prompts, metadata):
    global calls
    calls += 1
    if calls > 12 and os.environ.get("RANK") == "1":
        raise ConnectionError("the scorer is gone")
    return images.mean((1, 2, 3))
"""


def test_a_reward_that_fails_on_one_process_leaves_the_steps_done(tmp_path):
    (tmp_path / "mine.py").write_text(FAILS_ON_ONE)
    rewards = [
        f'rewards={{"{tmp_path}/mine.py:fails": 1.0}}',
        "evaluation.rewards={brightness: 1.0}",
    ]
    settings = ["train.images_per_pass=3", "train.steps=20", f"output={tmp_path / 'run'}", *rewards]
    command = [*TORCHRUN, "train.py", str(TINY), *SMALL, *settings]
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode != 0
    assert "fails raised ConnectionError: the scorer is gone" in done.stderr
    (saved,) = checkpoints(tmp_path / "run")
    assert f"The finished steps are in {saved}" in done.stderr
