"""A run from start to end: its folder, its metrics, resuming, and the answers to wrong input."""

import json
import math
import os
import shlex
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file
from torch.testing import assert_close

from flowalign.cli import main
from flowalign.config.load import load_config
from flowalign.config.resolved import resolve
from flowalign.diagnostics.check import check
from flowalign.errors import RunError, UserError
from flowalign.files import read_tensors, to_json
from flowalign.policy import Policy, Sampler
from flowalign.reporting.trackers import read_metrics
from flowalign.runs.adapter import ADAPTER_FILE, load_adapter
from flowalign.runs.adapter_card import base_model
from flowalign.runs.checkpoint import checkpoints
from flowalign.runs.lock import FolderLock
from flowalign.training import trainer
from tests.tiny import make_policy, ROOT, SMALL, small_config, stir, TINY, two_groups

LEAN = ["train.optimizer=adamw8bit", "model.quantize=nf4", "model.offload=true"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished small run with EMA and KL: its folder."""
    os.chdir(ROOT)
    folder = tmp_path_factory.mktemp("runs") / "small"
    overrides = [
        "train.ema.decay=0.5",
        "objective.kl_weight=0.1",
        "train.evaluate_every=1",
        "train.learning_rate=1e-2",
    ]
    trainer.train(small_config(folder, *overrides))
    return folder


def test_a_run_folder_holds_what_was_promised(run):
    for name in (
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "summary.json",
        "report.html",
        "tensorboard",
    ):
        assert (run / name).exists(), name
    assert (run / "pictures" / "before-after.png").exists()
    assert base_model(run / "adapter") == small_config(run).model.path
    saved = checkpoints(run)[-1]
    assert saved.name == "step-000002"
    assert {
        "state.json",
        "optimizer.safetensors",
        "snapshots",
        "pytorch_lora_weights.safetensors",
    } <= {p.name for p in saved.iterdir()}


def test_metrics_and_summary_keep_the_contract(run):
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == [1, 2]
    wanted = {
        "step",
        "images",
        "seconds",
        "loss",
        "grad_norm",
        "ratio/mean",
        "ratio/max_log_error",
        "kl",
    }
    assert wanted | {"reward/scene_match", "reward/scene_match_graded"} <= set(lines[0])
    assert "eval/scene_match" in lines[0]
    assert lines[-1]["images"] == 12
    assert lines[0]["ratio/max_log_error"] <= 1e-6
    assert lines[0]["kl"] == 0
    assert lines[1]["kl"] > 0
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["before"]) == set(summary["after"]) == {"scene_match", "scene_match_graded"}
    low, mean, high = summary["difference"]["scene_match_graded"]
    assert low <= mean <= high
    assert summary["images"] == 12
    assert summary["stopped"] == "finished"
    assert summary["peak_memory_bytes"] > 1e7


def test_the_resolved_configuration_is_the_same_configuration(run, tmp_path):
    again = load_config(run / "config.yaml")
    assert resolve(again)["train"]["learning_rate"] == 1e-2
    assert resolve(load_config(run / "config.yaml")) == resolve(again)


def test_the_adapter_is_the_average_and_diffusers_loads_it(run):
    """Alpha is not the rank here, so a lost alpha would show."""
    config = small_config(run, "train.ema.decay=0.5")
    policy = make_policy(config.evaluation_sampler, lora=config.model.lora)
    load_adapter(policy, run / "adapter")
    snapshot = load_file(
        checkpoints(run)[-1] / "snapshots" / "ema" / "pytorch_lora_weights.safetensors"
    )
    adapter = load_file(run / "adapter" / "pytorch_lora_weights.safetensors")
    strength = {".lora_A.weight": 1, ".lora_B.weight": 64 / 32}
    for key in snapshot | adapter:
        assert torch.equal(strength[key[-len(".lora_A.weight") :]] * snapshot[key], adapter[key])
    batch = two_groups(policy, 1)
    pipe = StableDiffusion3Pipeline.from_pretrained(
        ROOT / "assets" / "tiny-sd3", text_encoder_3=None, tokenizer_3=None
    )
    pipe.load_lora_weights(str(run / "adapter"))
    settings = {
        "num_inference_steps": config.evaluation_sampler.steps,
        "guidance_scale": 1.0,
        "max_sequence_length": 0,
        "output_type": "pt",
    }
    noise = policy.initial_noise(batch)
    theirs = pipe(batch.prompts, latents=noise, height=64, width=64, **settings).images
    trained, bare = (
        policy.decode(policy.at(n).generate(batch).x0) for n in ("policy", "reference")
    )
    assert_close(trained, theirs, atol=1e-4, rtol=0)
    assert (bare - theirs).abs().max() > 1e-3


@pytest.mark.parametrize("lean", [[], pytest.param(LEAN, marks=pytest.mark.slow)])
def test_stopping_and_resuming_equals_never_stopping(lean, tmp_path):
    overrides = [
        *lean,
        "train.ema.decay=0.5",
        "train.warmup=3",
        "train.updates_per_step=2",
        "train.images_per_pass=3",
    ]
    trainer.train(small_config(tmp_path / "whole", *overrides, "train.steps=3"))
    trainer.train(small_config(tmp_path / "parts", *overrides, "train.steps=2"))
    trainer.train(small_config(tmp_path / "parts", *overrides, "train.steps=3"))
    for file in ("pytorch_lora_weights.safetensors", "optimizer.safetensors"):
        whole, parts = (
            read_tensors(checkpoints(tmp_path / name)[-1] / file) for name in ("whole", "parts")
        )
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert [line["step"] for line in read_metrics(tmp_path / "parts")] == [1, 2, 3]


def test_the_learning_rate_rises_at_the_start_and_falls_at_the_end(tmp_path):
    overrides = [
        "train.warmup=2",
        "train.cooldown=3",
        "train.learning_rate=8e-3",
        "train.updates_per_step=2",
    ]
    run = trainer.prepare(
        small_config(tmp_path / "run", *overrides, "train.images_per_pass=3", "train.steps=3")
    )
    optimizer, rates = run.state.optimizer, []
    (group,), step = optimizer.param_groups, optimizer.step

    def noting() -> None:
        rates.append(group["lr"])
        step()

    optimizer.step = noting
    trainer.fit(run)
    assert rates == pytest.approx([4e-3, 8e-3, 8e-3, 6e-3, 4e-3, 2e-3])


RELEASED_DECAYS = {
    "nft": {"old": [0.002, 0.004]},
    "awm": {"old": [0.002, 0.004]},
    "crd": {"old": [0.26, 0.27], "sampler": [0.0, 0.0]},
    # The one loop that follows in every update, and counts the updates before it.
    "dgpo": {"old": [0.0, 0.001, 0.002, 0.003]},
}
"""The first decays of the released code, in two steps of two updates."""


@pytest.mark.parametrize(
    "name", ["crd", "dgpo", *(pytest.param(n, marks=pytest.mark.slow) for n in ("nft", "awm"))]
)
def test_copies_follow_by_the_updates_made_as_in_the_released_code(name, tmp_path, monkeypatch):
    followed, follow = [], Policy.update_copy

    def following(policy, copy, decay):
        followed.append((copy, decay))
        follow(policy, copy, decay)

    counts = ["train.updates_per_step=2", "train.images_per_pass=3", "train.ema.decay=0"]
    config = small_config(tmp_path / "run", f"objective={{name: {name}}}", *counts)
    run = trainer.prepare(config)
    monkeypatch.setattr(Policy, "update_copy", following)
    monkeypatch.setattr(trainer.Run, "evaluation_due", False)
    trainer.fit(run)
    for copy, decays in RELEASED_DECAYS[name].items():
        assert [decay for other, decay in followed if other == copy] == pytest.approx(decays)
    assert len(followed) == sum(map(len, RELEASED_DECAYS[name].values()))


def test_another_experiment_in_the_same_folder_is_refused_and_leaves_it_unlocked(run):
    with pytest.raises(UserError, match=r"another .*train\.prompts_per_step"):
        trainer.train(small_config(run, "train.prompts_per_step=4"))
    with FolderLock(run) as lock:
        lock.acquire()


def test_two_runs_train_one_after_the_other_in_a_thread(tmp_path):
    """A notebook's thread, for example, in which Python forbids signal handlers."""
    configs = [small_config(tmp_path / name, "train.steps=1") for name in ("first", "second")]
    with ThreadPoolExecutor(1) as thread:
        first, second = thread.map(trainer.train, configs)
    assert first["stopped"] == "finished"
    assert first["after"] == second["after"]
    adapters = [(tmp_path / name / "adapter" / ADAPTER_FILE) for name in ("first", "second")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def sent_in_step(run, step, number):
    """Let the run receive a signal while it makes the batch of a step."""
    source = run.source

    def interrupted(current):
        if current == step:
            os.kill(os.getpid(), number)
        return source(current)

    run.source = interrupted


def test_ctrl_c_saves_and_says_how_to_resume(tmp_path, capsys):
    run = trainer.prepare(small_config(tmp_path / "run", "train.steps=50"))
    sent_in_step(run, 1, signal.SIGINT)
    summary = trainer.execute(run)
    assert summary["stopped"] == "interrupted"
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-000002"]
    assert "The same command resumes from there" in capsys.readouterr().out


def test_sigterm_saves_the_step_and_ends_the_process_with_143(tmp_path, monkeypatch, capsys):
    config = small_config(tmp_path / "run", "train.steps=50")
    run = trainer.prepare(config)
    sent_in_step(run, 1, signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "prepare", lambda _: run)
        with pytest.raises(SystemExit) as ended:
            trainer.train(config)
    assert ended.value.code == 143
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-000002"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["stopped"] == "interrupted"
    assert "The same command resumes from there" in capsys.readouterr().out
    assert trainer.train(small_config(tmp_path / "run", "train.steps=3"))["stopped"] == "finished"
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.slow
def test_sigterm_in_the_last_step_leaves_a_finished_run(tmp_path):
    run = trainer.prepare(small_config(tmp_path / "run", "train.steps=1"))
    sent_in_step(run, 0, signal.SIGTERM)
    assert trainer.execute(run)["stopped"] == "finished"


def test_a_second_ctrl_c_names_the_last_checkpoint(tmp_path):
    config = small_config(tmp_path / "run", "train.save_every=1")
    for step, told in ((0, "No step is saved yet."), (1, "step-000001. The same command resumes")):
        run = trainer.prepare(config)
        run.interrupt.requested = True
        run.stop_reason = lambda: ""
        sent_in_step(run, step, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt, match=told):
            trainer.execute(run)


def test_ctrl_c_before_the_first_step_trains_none(tmp_path):
    run = trainer.prepare(small_config(tmp_path / "run"))
    run.interrupt.requested = True
    assert trainer.execute(run)["stopped"] == "interrupted"
    assert not read_metrics(tmp_path / "run")


def test_too_little_memory_ends_with_what_to_lower(tmp_path):
    run = trainer.prepare(small_config(tmp_path / "run"))

    def too_large(step):
        raise torch.OutOfMemoryError("no room")

    run.source = too_large
    with pytest.raises(RunError, match=r"images_per_pass \(now 6\).*gradient_checkpointing: true"):
        trainer.execute(run)


@pytest.mark.parametrize(
    ("command", "module"), [(trainer.train, "flowalign.training.setup"), (check, check.__module__)]
)
def test_too_little_memory_for_the_model_ends_with_what_to_lower(
    command, module, monkeypatch, tmp_path
):
    def too_large(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(sys.modules[module], "load_model", too_large)
    with pytest.raises(
        RunError, match=r"images_per_pass \(now 6\).*gradient_checkpointing: true. `flowalign plan`"
    ):
        command(small_config(tmp_path / "run"))


def test_figures_that_are_not_finite_are_null_in_the_files():
    assert json.loads(to_json({"a": [1.5, math.inf], "b": (math.nan, 2)})) == {
        "a": [1.5, None],
        "b": [None, 2],
    }


def test_a_group_of_equal_rewards_is_reported_and_trains_nothing(tmp_path):
    (tmp_path / "flat.py").write_text(
        "def flat(images, prompts, metadata):\n    return [1.0] * len(images)\n"
    )
    overrides = [
        f'rewards={{"{tmp_path}/flat.py:flat": 1.0}}',
        "train.steps=1",
        "evaluation.rewards={brightness: 1.0}",
    ]
    trainer.train(small_config(tmp_path / "run", *overrides))
    (line,) = read_metrics(tmp_path / "run")
    assert line["reward/groups_without_spread"] == 1
    assert line["grad_norm"] == 0


def test_two_updates_a_step_are_off_policy_from_the_second_on(tmp_path):
    overrides = [
        "train.updates_per_step=2",
        "train.images_per_pass=3",
        "train.steps=1",
        "train.learning_rate=1e-2",
    ]
    trainer.train(small_config(tmp_path / "run", *overrides))
    (line,) = read_metrics(tmp_path / "run")
    assert line["ratio/max_log_error"] <= 1e-6
    assert line["ratio/mean"] != 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stepz=3"], "Did you mean 'steps'"),
        (["trian.steps=3"], "Did you mean 'train'"),
        (["rewards={scene_mach: 1.0}"], "Did you mean 'scene_match"),
        (["train.images_per_prompt=1"], "use 2 or more"),
        (["data.prompts=nowhere.txt"], "there is no file nowhere.txt"),
        (["model.path=assets/prompts"], "no model_index.json"),
        (["sampler.dynamics={name: ode}"], "stochastic steps"),
        (
            ["train.prompts_per_step=3", "train.updates_per_step=2"],
            "nearest that they can share: 2 or 4",
        ),
        (['rewards={"nowhere.py:f": 1.0}'], "there is no file nowhere.py"),
        (["nonsense"], "write section.key=value"),
    ],
)
def test_what_users_get_wrong_ends_with_one_message_and_status_2(
    overrides, message, tmp_path, capsys
):
    assert main(["train", str(TINY), *SMALL, f"output={tmp_path}/run", *overrides]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_missing_file_is_answered_with_the_nearest(capsys):
    assert main(["train", "configs/tiny/flow_grp.yaml"]) == 2
    assert "Did you mean 'flow_grpo.yaml'" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named(run, tmp_path):
    policy = make_policy(Sampler(), lora=small_config(run).model.lora)
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"not tensors")
    with pytest.raises(UserError, match="is damaged"):
        load_adapter(policy, tmp_path)


def test_an_adapter_of_another_rank_is_refused(run):
    policy: Policy = make_policy(
        lora=small_config(run, "model.lora.targets=[attn.to_q]").model.lora
    )
    with pytest.raises(UserError, match="does not fit"):
        load_adapter(policy, run / "adapter")


def test_stirring_an_adapter_moves_the_pictures():
    policy = make_policy()
    stir(policy)
    batch = two_groups(policy, 1)
    assert not torch.equal(
        policy.at("policy").generate(batch).x0,
        policy.at("reference").generate(batch).x0,
    )


def test_the_readme_s_reward_trains_as_printed_there(tmp_path):
    text = (ROOT / "README.md").read_text()
    (code,) = [
        block.split("```")[0]
        for block in text.split("```python\n")[1:]
        if block.startswith("def redness")
    ]
    (tmp_path / "my_rewards.py").write_text(code)
    (command,) = [
        line
        for line in text.splitlines()
        if line.startswith("python train.py configs/tiny/flow_grpo.yaml rewards=")
    ]
    arguments = [
        word.replace("my_rewards.py", str(tmp_path / "my_rewards.py"))
        for word in shlex.split(command)[2:]
    ]
    assert arguments[-1] == "output=outputs/redness"
    assert (
        main(["train", *arguments[:-1], *SMALL, f"output={tmp_path / 'run'}", "train.steps=1"]) == 0
    )
    assert "reward/redness" in read_metrics(tmp_path / "run")[0]


def test_the_page_s_objective_trains_as_printed_there(tmp_path):
    text = (ROOT / "docs" / "your-own-objective.md").read_text()
    (tmp_path / "mine.py").write_text(text.split("```python\n")[1].split("```")[0])
    (command,) = [line for line in text.splitlines() if line.startswith("python train.py")]
    arguments = [
        word.replace("mine.py", str(tmp_path / "mine.py")) for word in shlex.split(command)[2:]
    ]
    small = [setting for setting in SMALL if "window" not in setting]
    assert (
        main(["train", *arguments[:-1], *small, f"output={tmp_path / 'run'}", "train.steps=1"]) == 0
    )
    assert "moved" in read_metrics(tmp_path / "run")[0]
    assert len(text.splitlines()) < 80
