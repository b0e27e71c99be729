"""The lines that say what a run will do before it starts."""

import pytest
import torch

from flowalign.config.load import load_config
from flowalign.reporting.header import plural, run_facts
from tests.tiny import ROOT

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def facts(name, *overrides, processes=1):
    torch.set_num_threads(1)
    return run_facts(load_config(f"configs/tiny/{name}.yaml", list(overrides)), processes, CPU)


def test_a_run_that_makes_images_names_its_rewards_and_counts_its_images():
    overrides = [
        *("train.steps=300", "train.prompts_per_step=8", "train.images_per_prompt=6"),
        *("rewards={scene_match: 1.0, brightness: 0.5}", "train.evaluate_every=50", "output=out/a"),
    ]
    lines = facts("flow_grpo", *overrides, processes=2)
    assert lines["objective"] == "flow_grpo"
    assert lines["rewards"] == "scene_match 1, brightness 0.5"
    assert lines["training"] == "300 steps x 48 images (8 prompts x 6)"
    assert lines["evaluation"].startswith("before, every 50 steps, after; ")
    assert lines["evaluation"].endswith("; the base at its best guidance of 2, 3, 4.5, 7")
    off = facts("flow_grpo", "evaluation.guidance_sweep=[]")
    assert off["evaluation"].endswith("per prompt")
    assert lines["device"] == "2 processes on cpu, 1 thread each"
    assert lines["output"] == "out/a"
    assert lines["model"].endswith("(sd3, float32, 64 x 64 pixels)")


def test_a_run_that_learns_from_pairs_names_them_instead():
    lines = facts("dpo", "train.steps=1", "train.evaluate_every=0")
    assert lines["data"].endswith("assets/pairs/train.parquet")
    assert "rewards" not in lines
    assert lines["training"].startswith("1 step x ")
    assert lines["training"].endswith(" entries")
    assert lines["evaluation"].startswith("before and after; ")


def test_counts_agree_with_their_nouns():
    counts = [plural(1, "process"), plural(2, "process"), plural(1, "image"), plural(1200, "image")]
    assert counts == ["1 process", "2 processes", "1 image", "1,200 images"]
