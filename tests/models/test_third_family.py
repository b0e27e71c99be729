"""A model family that only this file knows, trained without a change in the package.

Everything that differs between families differs here: there is no pooled vector but a mask; latents
are normalised by vectors; the network predicts x0 - noise at 1 - t; guidance counts from zero; and
there is no diffusers pipeline.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn, Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from flowalign.config.load import load_config
from flowalign.config.resolved import resolve
from flowalign.diagnostics.check import check
from flowalign.diagnostics.rehearsal import rehearse
from flowalign.errors import UserError
from flowalign.models import load_model
from flowalign.models.base import FlowModel
from flowalign.models.config import ModelConfig
from flowalign.policy import Policy, Sampler
from flowalign.reporting.trackers import read_metrics
from flowalign.runs.adapter import load_adapter, save_adapter
from flowalign.settings.types import Count
from flowalign.training.trainer import train
from tests.tiny import stir, TEXTS

WIDTH, HIDDEN = 8, 16
MEAN = torch.tensor([0.2, -0.1, 0.4]).view(3, 1, 1)
DEVIATION = torch.tensor([0.5, 0.8, 0.3]).view(3, 1, 1)


class Network(nn.Module):
    """One layer of attention from the pixels of a latent to the words of its prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels, self.time = nn.Linear(3, HIDDEN), nn.Linear(1, HIDDEN)
        self.query, self.key = nn.Linear(HIDDEN, HIDDEN), nn.Linear(WIDTH, HIDDEN)
        self.value, self.out = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor, time: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        hidden = self.pixels(x.flatten(2).mT) + self.time(time[:, None])[:, None]
        scores = self.query(hidden) @ self.key(words).mT
        attention = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
        return self.out(F.silu(hidden + attention @ self.value(words))).mT.reshape(x.shape)


@dataclass(kw_only=True)
class MaskedConfig(ModelConfig):
    """A setting of its own, and no files."""

    default_guidance: ClassVar[float] = 3.0
    side_step: ClassVar[int] = 2
    path: str = ""
    words: Count = 6


class MaskedModel(FlowModel[MaskedConfig]):
    """Weights, embeddings and latents come from fixed seeds."""

    Config = MaskedConfig
    lora_targets = ("query", "value", "out")

    def __init__(self, config: MaskedConfig, device: str = "cpu"):
        super().__init__(config, device)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.transformer = Network().requires_grad_(False).eval().to(self.device)
            self.table = torch.randn(256, WIDTH)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return 3, self.config.height // 2, self.config.width // 2

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        # The end of a text counts as a word, so that the empty prompt has one.
        letters = [[ord(word[0]) for word in [*text.split(), "."]] for text in texts]
        rows = torch.zeros(len(texts), self.config.words, dtype=torch.long)
        for row, numbers in zip(rows, letters, strict=True):
            row[: len(numbers)] = torch.tensor(numbers)[: self.config.words]
        return {"words": self.table[rows], "mask": rows > 0}

    def forward(self, x: Tensor, t: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        return -self.transformer(x, 1 - t, inputs["words"], inputs["mask"])

    def guide(self, v: Tensor, v_null: Tensor, guidance: float) -> Tensor:
        scale = guidance - 1  # 0 is no guidance
        return v + scale * (v - v_null)

    def schedule(self, steps: int) -> list[float]:
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()

    def decode(self, x0: Tensor) -> Tensor:
        z = x0 * DEVIATION.to(x0) + MEAN.to(x0)
        return (F.interpolate(z, scale_factor=2) / 2 + 0.5).clamp(0, 1)

    def encode_images(self, images: Tensor) -> Tensor:
        z = F.avg_pool2d(images.to(self.device) * 2 - 1, 2)
        return (z - MEAN.to(z)) / DEVIATION.to(z)

    def latent_fingerprint(self) -> str:
        return f"masked/{MEAN.flatten().tolist()}/{DEVIATION.flatten().tolist()}"


NAME = f"{__file__}:MaskedModel"


def configuration(folder: Path, *overrides: str):
    (folder / "prompts.txt").write_text("a red circle\na square\na blue dot above\n")
    content = f"""
model: {{name: "{NAME}", height: 16, width: 16, lora: {{rank: 2, alpha: 4}}}}
sampler: {{steps: 4}}
objective: {{name: nft}}
data: {{prompts: {folder}/prompts.txt}}
rewards: {{brightness: 1.0}}
output: {folder}/run
train:
  {{steps: 2, prompts_per_step: 2, images_per_prompt: 4, images_per_pass: 4, evaluate_every: 0}}
"""
    (folder / "run.yaml").write_text(content)
    return load_config(folder / "run.yaml", list(overrides))


def model() -> MaskedModel:
    return MaskedModel(MaskedConfig(name=NAME, height=16, width=16))


FLOW_GRPO = ["objective={name: flow_grpo, kl_weight: 0.1}", "sampler.dynamics={name: flow_sde}"]
OBJECTIVES = {
    "flow_grpo": FLOW_GRPO,
    "crd": ["objective={name: crd, kl: {weight: 0.1, guidance: null}}"],
    "dpo": ["objective={name: dpo}"],
    "alignprop": ["objective={name: alignprop, depth: 2}"],
    "nft": ["objective={name: nft, kl: {weight: 0.1}}"],
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_trains_two_steps(name, tmp_path):
    config = configuration(tmp_path, *OBJECTIVES[name], "train.learning_rate=1e-2")
    train(config)
    first, second = read_metrics(tmp_path / "run")
    assert first["grad_norm"] > 0
    assert second["loss"] == pytest.approx(second["loss"])  # not NaN
    assert first.get("kl", 0) == 0
    assert first.get("ratio/mean", 1) == 1
    assert ("kl" in first) == (name in ("flow_grpo", "crd", "nft"))
    assert ("ratio/mean" in first) == (name == "flow_grpo")
    policy = Policy(load_model(config.model), config.sampler)
    load_adapter(policy, tmp_path / "run" / "adapter")
    assert any(parameter.abs().max() > 1e-3 for parameter in policy.parameters()[1::2])
    assert "which diffusers does not load" in (tmp_path / "run/adapter/README.md").read_text()


def test_nothing_is_wrong_with_it(tmp_path):
    lines = []
    assert check(configuration(tmp_path, *FLOW_GRPO), lines.append), lines
    assert not [line for line in lines if line.startswith("  sampler:")]


def test_without_a_list_of_blocks_it_cannot_be_compiled():
    with pytest.raises(UserError, match=r"no list of blocks. Set it to false"):
        load_model(MaskedConfig(name=f"{__file__}:MaskedModel", compile=True))


def test_its_velocity_turns_sign_and_time_around():
    family = model()
    cond = family.encode(TEXTS)
    x, t = torch.randn(2, *family.latent_shape), torch.tensor([0.2, 0.9])
    raw = family.transformer(x, 1 - t, cond.inputs["words"], cond.inputs["mask"])
    assert torch.equal(family.velocity(x, t, cond), -raw)


def test_its_guidance_counts_from_zero():
    family = model()
    cond = family.encode(TEXTS)
    x, t = torch.randn(2, *family.latent_shape), torch.tensor([0.2, 0.9])
    v, v_null = family.velocity(x, t, cond), family.velocity(x, t, family.encode(["", ""]))
    guided = family.velocity(x, t, cond.guided(3.5))
    assert_close(guided, v + 2.5 * (v - v_null))
    assert (v - v_null).abs().max() > 1e-3


def test_masked_words_do_not_matter():
    family = model()
    cond = family.encode(["a circle", "a circle"])
    assert cond.inputs["mask"].sum(1).tolist() == [3, 3]
    cond.inputs["words"][1, 3:] = 100.0
    x = torch.randn(1, *family.latent_shape).expand(2, -1, -1, -1)
    v = family.velocity(x, torch.tensor([0.5, 0.5]), cond)
    assert_close(v[0], v[1])


def test_its_latents_are_normalised_by_vectors():
    family = model()
    images = torch.rand(2, 3, 8, 8).repeat_interleave(2, 2).repeat_interleave(2, 3)
    latents = family.encode_images(images)
    assert latents.shape == (2, *family.latent_shape)
    assert_close(family.decode(latents), images)


def test_a_saved_adapter_loads_at_the_same_scale(tmp_path):
    policy = Policy(MaskedModel(MaskedConfig(name=NAME, height=16, width=16)), Sampler(steps=4))
    stir(policy)
    save_adapter(policy, tmp_path)
    policy.model.load_adapter(tmp_path, "saved")
    cond = policy.encode(TEXTS)
    x, t = torch.randn(2, *policy.model.latent_shape), torch.tensor([0.2, 0.9])
    trained = policy.at("policy").velocity(x, t, cond)
    assert torch.equal(policy.at("saved").velocity(x, t, cond), trained)
    assert not torch.equal(policy.at("reference").velocity(x, t, cond), trained)
    policy.model.delete_adapter("saved")
    assert not [name for name, _ in policy.model.transformer.named_parameters() if "saved" in name]


def test_its_settings_are_those_of_its_config(tmp_path):
    config = configuration(tmp_path, "model.words=4")
    assert isinstance(config.model, ModelConfig)
    assert resolve(config)["model"]["words"] == 4
    assert json.loads(json.dumps(resolve(config)["model"]))["name"] == NAME
    with pytest.raises(UserError, match=r"model\.word .*Did you mean 'words'"):
        configuration(tmp_path, "model.word=4")


def test_a_plan_needs_the_files_of_a_pipeline(tmp_path):
    with pytest.raises(UserError, match="counts models that diffusers loads"):
        rehearse(configuration(tmp_path))
