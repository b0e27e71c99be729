"""Kinds of LoRA: rsLoRA, ranks and alphas of single layers, and DoRA, from start to export."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from flowalign.config.load import load_config
from flowalign.diagnostics.check.report import check
from flowalign.diagnostics.meta_model import flops, MetaModel
from flowalign.dynamics import flow_sde
from flowalign.errors import UserError
from flowalign.models.config import Lora
from flowalign.models.lora import ADAPTER_FILE
from flowalign.policy import Policy, Sampler
from flowalign.reporting.trackers import read_metrics
from flowalign.runs.adapter import export_weights, load_adapter, lora_settings, save_adapter
from flowalign.runs.formats import write_comfyui, write_kohya, write_merged
from flowalign.settings.types import WrongSetting
from flowalign.training.trainer import train
from tests.runs.test_adapter import made_by_diffusers
from tests.tiny import make_policy, sd3_config, small_config, stir, TEXTS, two_groups

LAYER = "transformer_blocks.2.attn.to_q"
KINDS = {
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"attn.to_k": 2},
        "alpha_pattern": {r"transformer_blocks\.2\..*to_q": 8},
    },
    "dora": {"use_dora": True},
    "all": {"use_rslora": True, "use_dora": True, "rank_pattern": {"attn.to_k": 2}},
}


def policy_of(kind, stirred=True, **changes) -> Policy:
    policy = make_policy(lora=Lora(rank=4, alpha=12, **KINDS[kind]), **changes)
    if stirred:
        stir(policy)
    return policy


def velocity(policy: Policy, name: str = "policy") -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, *policy.model.latent_shape, generator=generator)
    with torch.no_grad():
        return policy.at(name).velocity(x, torch.tensor([0.3, 0.8]), policy.encode(TEXTS))


def test_scales_and_ranks_are_those_of_the_settings():
    layers = dict(policy_of("patterns").model.transformer.named_modules())
    keys = layers["transformer_blocks.0.attn.to_k"]
    assert len(keys.lora_A["policy"].weight) == 2
    assert keys.scaling["policy"] == 12 / 2
    assert layers[LAYER].scaling["policy"] == 8 / 4
    assert layers["transformer_blocks.1.attn.to_q"].scaling["policy"] == 12 / 4
    layers = dict(policy_of("rslora").model.transformer.named_modules())
    assert layers[LAYER].scaling["policy"] == 12 / 4**0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing_and_its_copies_follow_it(kind, dtype):
    policy = policy_of(kind, stirred=False, dtype=dtype, snapshots=["old"])
    reference = velocity(policy, "reference")
    assert torch.equal(velocity(policy), reference)
    stir(policy)
    assert torch.equal(velocity(policy, "old"), reference)
    policy.update_copy("old", 0.0)
    assert torch.equal(velocity(policy, "old"), velocity(policy))
    assert not torch.equal(velocity(policy), reference)
    assert torch.equal(velocity(policy, "reference"), reference)


@pytest.mark.parametrize("kind", KINDS)
def test_ratios_are_exactly_1_and_saved_weights_come_back_bit_for_bit(kind, tmp_path):
    policy = policy_of(kind, sampler=Sampler(steps=3, dynamics=flow_sde))
    batch = two_groups(policy, 2)
    with torch.no_grad():
        path = policy.generate(batch, steps=range(2))
    for k in range(2):
        gaussian = policy.step(path.x[:, k], k, batch.cond)
        assert torch.equal(gaussian.log_prob(path.x[:, k + 1]), path.log_prob[:, k])
    policy.velocity(path.x0, torch.full((4,), 0.5), batch.cond).square().mean().backward()
    layer = policy.model.transformer.get_submodule(LAYER)
    learning = [p for name, p in layer.named_parameters() if ".policy" in name]
    assert len(learning) == (3 if policy.lora.use_dora else 2)
    assert all(p.grad.any() for p in learning)
    save_adapter(policy, tmp_path)
    other = policy_of(kind, stirred=False)
    load_adapter(other, tmp_path)
    assert all(map(torch.equal, policy.parameters(), other.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["patterns", "all"])
def test_a_run_begins_with_a_ratio_of_1_moves_and_resumes_bit_for_bit(kind, tmp_path):
    def config(name, *overrides):
        made = small_config(
            tmp_path / name, "train.learning_rate=1e-2", "train.ema.decay=0.5", *overrides
        )
        lora = Lora(rank=4, alpha=12, **KINDS[kind])
        return replace(made, model=replace(made.model, lora=lora))

    train(config("whole"))
    assert load_config(tmp_path / "whole" / "config.yaml").model.lora == config("whole").model.lora
    metrics = read_metrics(tmp_path / "whole")
    assert metrics[0]["ratio/max_log_error"] < 1e-6
    assert metrics[0]["grad_norm"] > 0
    train(config("parts", "train.steps=1"))
    train(config("parts"))
    for name in ("adapter", "checkpoints/step-000002", "checkpoints/step-000002/snapshots/ema"):
        first, second = (
            (tmp_path / run / name / ADAPTER_FILE).read_bytes() for run in ("whole", "parts")
        )
        assert first == second
    moved = load_file(tmp_path / "whole" / "checkpoints" / "step-000002" / ADAPTER_FILE)
    assert any(value.any() for key, value in moved.items() if ".lora_B." in key)


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_draws_what_was_trained_with_metadata_and_without(kind, tmp_path):
    policy = policy_of(kind)
    save_adapter(policy, tmp_path / "trained")
    export_weights(tmp_path / "trained", tmp_path / "exported")
    (tmp_path / "plain").mkdir()
    save_file(load_file(tmp_path / "exported" / ADAPTER_FILE), tmp_path / "plain" / ADAPTER_FILE)
    batch = two_groups(policy, 1)
    noise = policy.initial_noise(batch)
    ours = policy.decode(policy.at("policy").generate(batch).x0)
    assert (ours - policy.decode(policy.at("reference").generate(batch).x0)).abs().max() > 1e-2
    for name in ("trained", "exported", "plain"):
        theirs = made_by_diffusers(tmp_path / name, batch, noise)
        assert (theirs - ours).abs().max() <= 1e-4, name
        # The file alone brings what a policy needs.
        other = make_policy(lora=lora_settings(tmp_path / name))
        load_adapter(other, tmp_path / name)
        assert_close(velocity(other), velocity(policy), rtol=1e-4, atol=1e-5)


def test_dora_leaves_a_run_merged_or_for_diffusers_alone(tmp_path):
    policy = policy_of("all")
    save_adapter(policy, tmp_path / "trained")
    config = replace(small_config(tmp_path / "run"), model=policy.model.config)
    write_merged(tmp_path / "trained", tmp_path / "whole", config)
    merged = make_policy(path=str(tmp_path / "whole"))
    assert_close(velocity(merged), velocity(policy), rtol=1e-4, atol=1e-5)
    for write in (write_comfyui, write_kohya):
        with pytest.raises(UserError, match="is a DoRA, which not all tools"):
            write(tmp_path / "trained", tmp_path / "file.safetensors", config)
    with pytest.raises(UserError, match="is a DoRA, which has no strengths"):
        with policy.at_strength(0.5):
            pass


def test_dora_begins_as_a_plain_adapter_of_another_training(tmp_path):
    plain = make_policy()
    stir(plain)
    save_adapter(plain, tmp_path)
    started = policy_of("dora", stirred=False, adapter=str(tmp_path))
    assert_close(velocity(started), velocity(plain), rtol=1e-4, atol=1e-5)


def test_check_finds_the_saved_adapter_in_diffusers(tmp_path, capsys):
    config = small_config(
        tmp_path / "run", "model.lora.use_dora=true", "model.lora.rank_pattern={attn.to_k: 2}"
    )
    assert check(config)
    assert "diffusers loads the saved adapter" in capsys.readouterr().out


def test_a_plan_counts_the_whole_weights_that_dora_computes():
    operations = []
    for kind in ({}, {"use_dora": True}):
        model = MetaModel(sd3_config(lora=Lora(rank=4, **kind)))
        policy, x = Policy(model, Sampler(steps=2)), torch.zeros(1, *model.latent_shape)
        with model.ledger:
            policy.velocity(x, torch.zeros(1), policy.encode(["a square"]))
        operations.append(flops(model.ledger.work))
    # B A of 5 blocks with 8 layers of 128 x 128, of which the last lacks one, at rank 4.
    assert operations[1] - operations[0] >= 39 * 2 * 128 * 128 * 4


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank_pattern": {"attn.to_x": 2}}, r"rank_pattern: no adapted layer's name ends with"),
        ({"alpha_pattern": {"ff.net.2": 2}}, r"alpha_pattern: no adapted layer's name ends with"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern: '\(' is not a regular expression"),
    ],
)
def test_a_pattern_that_stands_for_no_layer_is_answered(lora, message):
    with pytest.raises(UserError, match=message):
        make_policy(lora=Lora(**lora))


def test_dora_is_not_compiled():
    with pytest.raises(WrongSetting, match="compile is true, but adapters of DoRA"):
        sd3_config(compile=True, lora=Lora(use_dora=True))
