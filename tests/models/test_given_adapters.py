"""Runs that begin with an adapter of another training, whatever tool wrote its file."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    StableDiffusion3Pipeline,
)
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from flowalign.diagnostics.check.adapter import compare_start
from flowalign.diagnostics.check.probes import probe_inputs, row_by_row
from flowalign.diagnostics.check.report import check
from flowalign.errors import UserError
from flowalign.evaluation.results import EvaluationResult
from flowalign.files import read_tensors
from flowalign.models import load_model
from flowalign.models.config import Lora
from flowalign.models.layer_adapter import LayerAdapter
from flowalign.models.lora import ADAPTER_FILE
from flowalign.models.pipeline import PipelineModel
from flowalign.policy import Policy, Sampler
from flowalign.runs.adapter import save_adapter
from flowalign.runs.checkpoint import checkpoints
from flowalign.runs.formats import copy_merged
from flowalign.sampling.generate import load_policy, SampleSettings
from flowalign.sampling.sources import find_source
from flowalign.training.setup import read_inputs
from flowalign.training.trainer import train
from tests.tiny import make_policy, random_flux, ROOT, sd3_config, small_config, stir, TEXTS

RANK, ALPHA = 4, 12  # those of `sd3_config`


def trained(**changes) -> Policy:
    """A policy whose adapter does something."""
    policy = make_policy(**changes)
    stir(policy)
    return policy


def velocity(policy: Policy, name: str = "policy") -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, *policy.model.latent_shape, generator=generator)
    return policy.at(name).velocity(x, torch.tensor([0.3, 0.8]), policy.encode(TEXTS))


def base_weight(policy: Policy) -> Tensor:
    """The frozen weight of one adapted layer."""
    name = "transformer_blocks.0.attn.to_q.base_layer.weight"
    return policy.model.transformer.get_parameter(name)


def matrices(policy: Policy) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every layer, by its name."""
    state = policy.state()
    names = {key.partition(".lora_")[0] for key in state}
    return {
        name: (state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]) for name in names
    }


def as_diffusers(policy: Policy, folder: Path) -> Path:
    save_adapter(policy, folder)
    return folder


def as_old_diffusers(policy: Policy, folder: Path) -> Path:
    """Without PEFT's settings, so with an alpha beside the matrices, and with older names."""
    tensors = {}
    for name, (a, b) in matrices(policy).items():
        tensors[f"transformer.{name}.lora.down.weight"] = a.contiguous()
        tensors[f"transformer.{name}.lora.up.weight"] = b.contiguous()
        tensors[f"transformer.{name}.alpha"] = torch.tensor(float(ALPHA))
    save_file(tensors, folder / "old.safetensors")
    return folder / "old.safetensors"


def as_folded(policy: Policy, folder: Path) -> Path:
    """Without any scale: that of the layers is in B."""
    tensors = {}
    for name, (a, b) in matrices(policy).items():
        tensors[f"transformer.{name}.lora_A.weight"] = a.contiguous()
        tensors[f"transformer.{name}.lora_B.weight"] = b * (ALPHA / RANK)
    save_file(tensors, folder / "folded.safetensors")
    return folder / "folded.safetensors"


def as_peft(policy: Policy, folder: Path) -> Path:
    tensors = {f"base_model.model.{key}": value for key, value in policy.state().items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"r": RANK, "lora_alpha": ALPHA, "alpha_pattern": {}, "use_rslora": False}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def as_kohya(policy: Policy, folder: Path) -> Path:
    """Layers that the original code joins have one pair of matrices: A stacked, B in blocks."""
    found, tensors = matrices(policy), {}
    for name, layers in policy.model.kohya_layers.items():
        for block in range(30):
            pairs = [found.get(layer.format(block)) for layer in layers]
            if pairs[0] is None:
                continue
            key = f"lora_unet_{name.format(block)}"
            tensors[f"{key}.lora_down.weight"] = torch.cat([a for a, _ in pairs])
            tensors[f"{key}.lora_up.weight"] = torch.block_diag(*(b for _, b in pairs))
            # The rank grew with the number of layers, and the scale is alpha / rank.
            tensors[f"{key}.alpha"] = torch.tensor(float(ALPHA * len(pairs)))
    save_file(tensors, folder / "kohya.safetensors")
    return folder / "kohya.safetensors"


@pytest.mark.parametrize("write", [as_diffusers, as_old_diffusers, as_folded, as_peft])
def test_a_run_begins_as_an_adapter_of_any_format(write, tmp_path):
    policy = trained()
    path = str(write(policy, tmp_path))
    started = make_policy(snapshots=["old"], adapter=path)
    if write is as_folded:
        # Its scale is multiplied and divided, which rounds.
        assert (velocity(started) - velocity(policy)).abs().max() < 1e-5
    else:
        assert torch.equal(velocity(started), velocity(policy))
    assert torch.equal(velocity(started, "old"), velocity(started))
    assert torch.equal(velocity(started, "reference"), velocity(policy, "reference"))
    assert (velocity(policy) - velocity(policy, "reference")).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_layers_that_kohya_joins_are_split(family, tmp_path):
    config = sd3_config()
    if family == "flux":
        config = small_flux(tmp_path)
    policy = Policy(load_model(config), Sampler(steps=2))
    stir(policy)
    path = str(as_kohya(policy, tmp_path))
    # q, k and v of a layer share its rank, which is three or four times theirs.
    lora = replace(config.lora, rank=4 * RANK)
    started = Policy(load_model(replace(config, adapter=path, lora=lora)), Sampler(steps=2))
    assert (velocity(started) - velocity(policy)).abs().max() < 1e-5
    assert (velocity(policy) - velocity(policy, "reference")).abs().max() > 1e-3


def small_flux(folder: Path):
    """With adapters on all layers that a single block joins."""
    model = random_flux(folder, guidance_embeds=False)
    targets = [*model.lora_targets, "proj_mlp"]
    return replace(model.config, lora=Lora(rank=RANK, alpha=ALPHA, targets=targets))


def test_flux_reads_kohya_files_as_diffusers_does(tmp_path):
    """On the double blocks: for single ones diffusers knows the published width alone."""
    config = small_flux(tmp_path)
    double = [f"transformer_blocks.0.{name}" for name in config.lora.targets if name != "proj_mlp"]
    config = replace(config, lora=replace(config.lora, targets=double))
    policy = Policy(load_model(config), Sampler(steps=2))
    stir(policy)
    path = as_kohya(policy, tmp_path)
    theirs = policy.model.pipe.lora_state_dict(str(path))
    ours = load_model(config).read_adapter(str(path), "model.adapter")
    for name, adapter in ours.items():
        a, b = (theirs[f"transformer.{name}.lora_{matrix}.weight"] for matrix in "AB")
        assert torch.allclose(adapter.scale * adapter.b @ adapter.a, b @ a, atol=1e-6), name
    assert len(theirs) == 2 * len(ours)


def test_an_adapter_of_a_lower_rank_is_filled_up_with_rows_that_do_nothing_yet(tmp_path):
    policy = trained(lora=Lora(rank=2, alpha=8))
    save_adapter(policy, tmp_path)
    started = make_policy(adapter=str(tmp_path))
    assert (velocity(started) - velocity(policy)).abs().max() < 1e-5
    for name, (a, b) in matrices(started).items():
        assert not b[:, 2:].any(), name
        # With rows of 0 in A as well, these columns would never learn.
        assert a[2:].any(dim=1).all(), name


def test_padding_keeps_the_product():
    given = LayerAdapter(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0], [5.0]]), scale=2)
    padded = given.padded(torch.tensor([[7.0, 7.0], [8.0, 9.0]]))
    assert padded.a.tolist() == [[1, 2], [8, 9]]
    assert torch.equal(padded.b @ padded.a, given.b @ given.a)


def test_merged_adapters_belong_to_the_reference_and_to_the_quantised_weights(tmp_path):
    policy = trained()
    save_adapter(policy, tmp_path)
    path = str(tmp_path)
    expected = velocity(policy)
    change = (expected - velocity(policy, "reference")).norm()
    for settings, bound in (({}, 1e-5), ({"quantize": "int8"}, 0.5)):
        merged = make_policy(merge=[path], **settings)
        for name in ("policy", "reference"):
            error = (velocity(merged, name) - expected).norm()
            assert error < bound * change, (settings, name)
    twice = make_policy(merge=[path, path])
    weight, once, base = map(base_weight, (twice, make_policy(merge=[path]), policy))
    assert torch.allclose(weight - once, once - base, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"transformer.transformer_blocks.9.attn.to_q.lora_A.weight": t}, "do not fit"),
        (lambda t: {"text_encoder.layer.lora_A.weight": t}, "an adapter of text encoders"),
        (lambda t: {"lora_unet_x.lokr_w1": t}, "LoKr"),
        (lambda t: {"transformer.x.lora_magnitude_vector": t}, "DoRA"),
        (lambda t: {"conv.weight": t}, "not belong to a LoRA"),
        (lambda t: {}, "is empty"),
    ],
)
def test_a_file_that_is_no_plain_lora_is_refused(change, message, tmp_path):
    save_file(change(torch.zeros(4, 8)), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=rf"model\.adapter: .*{message}"):
        make_policy(adapter=str(tmp_path / "other.safetensors"))


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        ("transformer_blocks.0.attn.to_qq", (64, 64), "Did you mean"),
        ("transformer_blocks.0.attn.to_q", (8, 16), "8 × 16, but the model's is"),
        ("proj_out", None, r"Set model\.lora\.targets to \[attn\.to_q, .*proj_out\]"),
    ],
)
def test_an_adapter_of_another_model_is_refused_by_layer(layer, shape, message, tmp_path):
    linear = dict(load_model(sd3_config()).transformer.named_modules()).get(layer)
    outputs, inputs = shape or linear.weight.shape
    matrices = {"lora_A": torch.ones(2, inputs), "lora_B": torch.ones(outputs, 2)}
    tensors = {f"transformer.{layer}.{name}.weight": value for name, value in matrices.items()}
    save_file(tensors, tmp_path / ADAPTER_FILE)
    with pytest.raises(UserError, match=message):
        make_policy(adapter=str(tmp_path))


def test_settings_that_cannot_be_read_are_named(tmp_path):
    as_peft(trained(), tmp_path)
    for text in ("{", "[1]", '{"lora_alpha": "many"}'):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(UserError, match=r"model\.adapter: PEFT's settings of .* be read"):
            make_policy(adapter=str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"lora_alpha": 8}, 2),
        ({"lora_alpha": 8, "use_rslora": True}, 4),
        ({"lora_alpha": 8, "alpha_pattern": {"attn.to_q": 2, "blocks.1.attn.to_k": 12}}, 0.5),
        ({}, 1),
    ],
)
def test_the_scale_follows_the_settings_of_peft(settings, scale, tmp_path):
    """Of transformer_blocks.0.attn.to_q, with rank 4."""
    as_peft(trained(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, **settings}))
    adapters = load_model(sd3_config()).read_adapter(str(tmp_path), "model.adapter")
    assert adapters["transformer_blocks.0.attn.to_q"].scale == scale


def test_a_rank_above_that_of_the_run_and_a_missing_file_name_the_fix(tmp_path):
    save_adapter(trained(lora=Lora(rank=8, alpha=8)), tmp_path)
    with pytest.raises(UserError, match=r"rank 8, but model\.lora\.rank is 4\. Set .* to 8"):
        make_policy(adapter=str(tmp_path))
    with pytest.raises(UserError, match=r"model\.adapter: there is no adapter nowhere"):
        make_policy(adapter="nowhere")
    with pytest.raises(UserError, match=r"model\.merge: there is no adapter nowhere"):
        make_policy(merge=["nowhere"])


def test_a_run_that_begins_with_an_adapter_trains_it_and_compares_with_the_model(tmp_path):
    first = small_config(tmp_path / "first", "train.steps=1", "train.learning_rate=1e-2")
    train(first)
    adapter = tmp_path / "first" / "adapter"
    settings = ["train.steps=1", "train.learning_rate=1e-9", f"model.adapter={adapter}"]
    train(small_config(tmp_path / "second", *settings))
    begin, end = (
        read_tensors(folder / ADAPTER_FILE) for folder in (adapter, tmp_path / "second" / "adapter")
    )
    for name in begin:
        if ".lora_B." in name:
            a = name.replace(".lora_B.", ".lora_A.")
            assert torch.allclose(end[name] @ end[a], begin[name] @ begin[a], atol=1e-6), name
    # Evaluations before training are those of the model without any adapter.
    before = [
        EvaluationResult.load(tmp_path / run / "evaluation" / "before.safetensors")
        for run in ("first", "second")
    ]
    assert all(
        torch.equal(before[0].rewards[name], before[1].rewards[name]) for name in before[0].rewards
    )
    assert len(checkpoints(tmp_path / "second")) == 1


def test_an_exported_adapter_says_what_to_merge_first_and_is_sampled_with_it(tmp_path):
    save_adapter(trained(), tmp_path / "style")
    merge = f"model.merge=[{tmp_path / 'style'}]"
    train(small_config(tmp_path / "run", "train.steps=1", "train.learning_rate=1e-2", merge))
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    folder = tmp_path / "run" / "adapter"
    load = f"pipe.load_lora_weights('{folder}', subfolder='merged/1')"
    lines = [load, "pipe.fuse_lora()"]
    assert "\n".join(lines) in card
    assert f"{tmp_path / 'style'}" not in card
    # Apart from its run, and without what was merged.
    shutil.copytree(tmp_path / "run" / "adapter", tmp_path / "alone")
    shutil.rmtree(tmp_path / "style")
    settings = SampleSettings()
    policies = [load_policy(find_source(tmp_path / name), settings) for name in ("run", "alone")]
    weights = [base_weight(policy) for policy in (*policies, make_policy())]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("write", "finding"),
    [
        (as_diffusers, "in diffusers, with an error of "),
        (as_old_diffusers, "which the tools of the model's family do not read"),
        (as_peft, "which the tools of the model's family do not read"),
    ],
)
def test_check_compares_the_start_with_diffusers(write, finding, tmp_path, capsys):
    path = write(trained(), tmp_path)
    settings = ["objective.kl_weight=0.1", "train.ema.decay=0.5", f"model.adapter={path}"]
    assert check(small_config(tmp_path / "run", *settings))
    output = capsys.readouterr().out
    assert f"start:        the policy begins as {path}" in output
    assert finding in output
    assert "the reference is the model without model.adapter" in output
    assert "equal to what a run begins with bit for bit: reference, ema" in output


def test_a_start_that_is_not_the_adapter_or_not_the_model_is_wrong(tmp_path):
    save_adapter(trained(), tmp_path)
    config = small_config(tmp_path / "run")
    for adapter in ("", str(tmp_path)):
        model = load_model(replace(config.model, adapter=adapter))
        probe = probe_inputs(model, read_inputs(config))
        with torch.no_grad():
            bare = row_by_row(model, probe)
        policy = Policy(model, Sampler(steps=2))
        with torch.no_grad():
            right = row_by_row(policy.at("policy"), probe)
        stir(policy)
        with torch.no_grad():
            wrong = row_by_row(policy.at("policy"), probe)
        found = [
            [finding.wrong for finding in compare_start(policy, start, bare, probe)]
            for start in (right, wrong)
        ]
        assert found == ([[False], [True]] if adapter else [[], [True]]), adapter


@pytest.mark.parametrize("write", [as_old_diffusers, as_folded, as_peft, as_kohya])
def test_a_merged_adapter_of_any_format_leaves_the_run_as_one_of_diffusers(write, tmp_path):
    policy = trained()
    path = write(policy, tmp_path)
    merged = make_policy(merge=[str(path)])
    config = replace(small_config(tmp_path / "run"), model=merged.model.config)
    (copy := tmp_path / "copy").mkdir()
    copy_merged(str(path), copy / ADAPTER_FILE, config)
    again = make_policy(merge=[str(copy)])
    assert_close(base_weight(again), base_weight(merged))
    pipe = StableDiffusion3Pipeline.from_pretrained(
        ROOT / "assets" / "tiny-sd3", text_encoder_3=None, tokenizer_3=None
    )
    pipe.load_lora_weights(copy)
    pipe.fuse_lora()
    layer = "transformer_blocks.0.attn.to_q"
    fused = pipe.transformer.get_submodule(layer).base_layer.weight
    own = merged.model.transformer.get_submodule(layer).base_layer.weight
    assert_close(fused, own)


def test_a_family_that_cannot_name_its_layers_refuses_other_formats_at_the_start(
    tmp_path, monkeypatch
):
    path = as_old_diffusers(trained(), tmp_path)
    monkeypatch.delattr(PipelineModel, "empty_transformer")
    with pytest.raises(UserError, match=r"does not say how its layers are named elsewhere"):
        make_policy(merge=[str(path)])
