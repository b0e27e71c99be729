"""`flowalign check`: nothing is wrong with the shipped configurations, and code that is broken on purpose is caught."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from flowalign import assembly, checkpoint
from flowalign import check as checks
from flowalign.batch import Batch
from flowalign.check import check
from flowalign.cli import main
from flowalign.config import load_config
from flowalign.dynamics import Gaussian
from flowalign.errors import UserError
from flowalign.models.sd3 import SD3
from flowalign.objectives.base import Anchor
from flowalign.policy import Policy
from flowalign.trainer import train
from tests.tiny import ROOT, SMALL, small_config

GRPO = ["objective.kl_weight=0.1", "train.ema.decay=0.5"]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def said(name, folder, *overrides):
    """Whether nothing is wrong, and what `check` says."""
    lines = []
    config = load_config(f"configs/tiny/{name}.yaml", [*overrides, f"output={folder}"])
    return check(config, lines.append), "\n".join(lines)


def wrong_lines(text):
    return [line for line in text.splitlines() if line.startswith("!")]


@pytest.mark.parametrize("name", ["flow_grpo", "crd", "dpo_online", "kto", "draft_lv", "flow_grpo_flux"])
def test_nothing_is_wrong_with_what_is_shipped(name, tmp_path):
    fine, text = said(name, tmp_path / "run")
    assert fine, text
    assert not wrong_lines(text)
    for subject in ("step", "disk", "schedule", "noise", "optimizer", "sampler", "reference", "gradient", "update", "adapter"):
        assert f"  {subject}:" in text, subject
    assert not (tmp_path / "run").exists()


def test_the_screen_gives_the_arithmetic_and_the_ratios(tmp_path, capsys):
    assert main(["check", "configs/tiny/flow_grpo.yaml", *SMALL, *GRPO, f"output={tmp_path}/run"]) == 0
    text = capsys.readouterr().out
    assert "2 prompts × 3 images = 6 images; 1 update(s) of 6 images on each of 1 process(es), in 1 pass(es)" in text
    assert "log-ratios before the first update, step by step, in float32: " in text
    assert "kl:           0 before the first update" in text
    assert "Nothing wrong was found." in text


def kl_without_gradient(monkeypatch):
    exact = Gaussian.kl
    monkeypatch.setattr(Gaussian, "kl", lambda self, other: exact(self, other).detach())
    distance = Anchor.distance
    monkeypatch.setattr(Anchor, "distance", torch.no_grad()(distance))


def schedule_off_by_one(monkeypatch):
    step = Policy.step

    def late(self, x, k, cond, stochastic=True):
        view = self.at(self.weights)
        view._gradient, view.times = self._gradient, [*self.times[1:], 0.0]
        return step(view, x, k, cond, stochastic)

    monkeypatch.setattr(Policy, "step", late)


def times_off_by_one(monkeypatch):
    times = SD3.schedule
    monkeypatch.setattr(SD3, "schedule", lambda self, steps: [*times(self, steps)[1:], 0.0])


def noise_shared_across_prompts(monkeypatch):
    seeds = Batch._seeds

    def shared(self, purpose, shared):
        return seeds(replace(self, keys=self.keys * torch.tensor([1, 1, 0, 1])), purpose, shared)

    monkeypatch.setattr(Batch, "_seeds", shared)


def noise_the_same_in_every_step(monkeypatch):
    seeds = Batch._seeds

    def same(self, purpose, shared):
        return seeds(replace(self, keys=self.keys * torch.tensor([1, 0, 1, 1])), purpose, shared)

    monkeypatch.setattr(Batch, "_seeds", same)


def adapter_left_on_in_the_reference(monkeypatch):
    at = Policy.at
    monkeypatch.setattr(Policy, "at", lambda self, name: at(self, "policy" if name == "reference" else name))


def alpha_lost_on_saving(monkeypatch):
    def save(policy, folder, name="policy"):
        layers = {key: value.contiguous() for key, value in policy.state(name).items()}
        policy.model.pipeline_class.save_lora_weights(folder, transformer_lora_layers=layers)

    monkeypatch.setattr(checkpoint, "save_adapter", save)
    monkeypatch.setattr(checks, "save_adapter", save)


def optimiser_of_the_wrong_adapter(monkeypatch):
    def wrong(policy, learning_rate, weight_decay):
        return torch.optim.AdamW(policy.parameters("ema"), lr=learning_rate, weight_decay=weight_decay)

    monkeypatch.setattr(assembly, "make_optimizer", wrong)


def sampler_with_the_wrong_drift(monkeypatch):
    def dynamics(x, v, t, s, eta=0.7):
        variance = eta**2 * t / (1 - (s if t == 1 else t))
        return Gaussian(x + (s - t) * (v + variance / (2 * t) * (x - (1 - t) * v)), std=math.sqrt(variance * (t - s)))

    build = assembly.read_inputs

    def inputs(config):
        config.sampler.dynamics = partial(dynamics, eta=0.7)
        return build(config)

    monkeypatch.setattr(checks, "read_inputs", inputs)


def frozen_matrices(monkeypatch):
    begin = Policy.__init__

    def frozen(self, *arguments, **settings):
        begin(self, *arguments, **settings)
        self.parameters()[0].requires_grad_(False)

    monkeypatch.setattr(Policy, "__init__", frozen)


def base_weights_that_train(monkeypatch):
    begin = Policy.__init__

    def thawed(self, *arguments, **settings):
        begin(self, *arguments, **settings)
        next(iter(self.model.transformer.parameters())).requires_grad_(True)

    monkeypatch.setattr(Policy, "__init__", thawed)


def log_probabilities_of_another_step(monkeypatch):
    log_prob = Gaussian.log_prob
    monkeypatch.setattr(Gaussian, "log_prob", lambda self, x: log_prob(self, x) + (0.5 if self.mean.requires_grad else 0))


@pytest.mark.parametrize(
    ("broken", "subject"),
    [
        (kl_without_gradient, "kl gradient"),
        (schedule_off_by_one, "sampler"),
        (times_off_by_one, "schedule"),
        (noise_shared_across_prompts, "noise"),
        (noise_the_same_in_every_step, "noise"),
        (adapter_left_on_in_the_reference, "reference"),
        (alpha_lost_on_saving, "adapter"),
        (optimiser_of_the_wrong_adapter, "optimizer"),
        (optimiser_of_the_wrong_adapter, "update"),
        (sampler_with_the_wrong_drift, "marginals"),
        (frozen_matrices, "optimizer"),
        (base_weights_that_train, "gradient"),
        (log_probabilities_of_another_step, "ratio"),
    ],
)
def test_broken_code_is_caught(broken, subject, monkeypatch, tmp_path):
    broken(monkeypatch)
    fine, text = said("flow_grpo", tmp_path / "run", *SMALL, *GRPO)
    assert not fine
    assert [line for line in wrong_lines(text) if line.startswith(f"! {subject}:")], text
    assert subject in text.splitlines()[-1]


def test_a_kl_without_gradient_is_caught_on_the_forward_process(monkeypatch, tmp_path):
    kl_without_gradient(monkeypatch)
    assert "! kl gradient:  kl has no gradient" in said("crd", tmp_path / "run")[1]


def test_a_clip_range_below_the_noise_is_answered_with_a_better_one():
    finding = checks.ratio([2e-5, 3e-5], 1e-5, "bfloat16")
    assert finding.wrong
    assert finding.text.endswith("below their noise: write objective.clip_range: 3e-04 or model.dtype: float32")
    assert not checks.ratio([2e-7, 3e-7], 1e-5, "float32").wrong


def test_a_reward_that_cannot_be_relied_on_is_caught(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import random\n\ndef dice(images, prompts, metadata):\n    return [random.random() for _ in images]\n"
    )
    fine, text = said(
        "flow_grpo", tmp_path / "run", *SMALL, f'rewards={{"{tmp_path}/mine.py:dice": 1.0}}', "evaluation.rewards={}"
    )
    assert not fine
    assert "asked twice, scores differ" in "\n".join(wrong_lines(text))
    assert text.endswith("Wrong: reward.")


def test_a_disk_without_room_is_named_before_training(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 10_000})())
    with pytest.raises(UserError, match=r"disk: a checkpoint has .*0.01 MB are free; make room, or choose another folder"):
        train(small_config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_every_run_begins_with_the_cheap_part(monkeypatch, tmp_path):
    times_off_by_one(monkeypatch)
    with pytest.raises(UserError, match=r"schedule: .*does not fall from 1 to 0"):
        train(small_config(tmp_path / "run"))
