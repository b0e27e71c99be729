"""Every shipped file of a family takes a step, on a small model of the published classes.

It is what "Ran on a small random model" in these files says.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest

from flowalign.config.load import load_config
from flowalign.models.base import FlowModel
from flowalign.training.trainer import train
from tests.tiny import (
    random_flux2,
    random_qwen_image,
    random_qwen_image21,
    random_sana,
    random_z_image,
    ROOT,
)

Make = Callable[[Path], FlowModel]
FAMILIES: Mapping[str, Make] = {
    "flux2": random_flux2,
    "z_image": random_z_image,
    "qwen_image": random_qwen_image,
    "qwen_image21": random_qwen_image21,
    "sana": random_sana,
}
DISTILLED: Mapping[str, Make] = {
    "flux2": partial(random_flux2, is_distilled=True),
    "z_image": partial(random_z_image, shift=3.0),
}
"""The model that a file evaluates on."""
SHIPPED = [path for name in FAMILIES for path in sorted((ROOT / "configs" / name).glob("*.yaml"))]
MARK = "# Ran on a small random model."
SMALL = [
    *("model.height=64", "model.width=64", "model.lora.rank=2", "sampler.steps=4"),
    *("train.steps=1", "train.prompts_per_step=2", "train.images_per_prompt=2"),
    *("train.updates_per_step=1", "train.images_per_pass=4", "rewards={brightness: 1.0}"),
    # An average that follows later would be evaluated as it began.
    *("train.ema.every=1", "train.learning_rate=0.01"),
    *("evaluation.images_per_prompt=1", "evaluation.guidance_sweep=[]"),
    *("evaluation.sampler.steps=3", "evaluation.prompts=tests/prompts.jsonl"),
]
PROMPTS = ["data.prompts=tests/prompts.jsonl"]
PAIRS = [
    *("data.pairs=assets/pairs/train.parquet", "evaluation.pairs=assets/pairs/train.parquet"),
    *("train.images_per_prompt=1", "rewards={}", "evaluation.rewards={brightness: 1.0}"),
]


def marked(path: Path) -> bool:
    return MARK in path.read_text().splitlines()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_file_says_what_it_ran_on(path):
    assert marked(path)


@pytest.mark.slow
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_shipped_file_takes_a_step_on_a_small_model(path, tmp_path):
    family, shipped = path.parent.name, load_config(path)
    small = FAMILIES[family](tmp_path / "model").config
    settings = [
        *SMALL,
        *(PAIRS if shipped.data.pairs else PROMPTS),
        f"model.path={small.path}",
        f"model.max_sequence_length={small.max_sequence_length}",
        f"output={tmp_path / 'run'}",
    ]
    if shipped.evaluation.model:
        other = DISTILLED[family](tmp_path / "distilled").config
        settings.append(f"evaluation.model={other.path}")
    summary = train(load_config(path, settings))
    assert summary["step"] == 1
    assert summary["after"]["brightness"] != summary["before"]["brightness"]
