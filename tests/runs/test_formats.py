"""Exports for other tools hold the change that was trained, wherever those tools put it."""

from dataclasses import replace

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from flowalign.cli import main
from flowalign.errors import UserError
from flowalign.models import load_model
from flowalign.models.config import Lora
from flowalign.models.layer_adapter import joined, LayerAdapter
from flowalign.models.layer_names import linear_layers
from flowalign.policy import Policy, Sampler
from flowalign.runs.adapter import export_weights, save_adapter
from flowalign.runs.formats import write_comfyui, write_kohya, write_merged
from tests.runs.comfyui import flux_places, load, sd3_places
from tests.runs.test_adapter import made_by_diffusers
from tests.tiny import make_policy, random_flux, random_sd35, ROOT, small_config, stir, two_groups

RANK, ALPHA = 2, 6
PLACES = {"sd3": sd3_places(blocks=2, hidden=32), "flux": flux_places(1, 1, hidden=32)}
LAST = {"norm_out.linear", "proj_out"}


def policy_of(family, folder, without=()):
    """A policy with a stirred adapter on every linear layer of a random model."""
    model = random_sd35(folder) if family == "sd3" else random_flux(folder, guidance_embeds=False)
    layers = sorted({*linear_layers(model.transformer)} - {*without})
    lora = Lora(rank=RANK, alpha=ALPHA, targets=layers)
    policy = Policy(load_model(replace(model.config, lora=lora)), Sampler(steps=2))
    stir(policy)
    return policy


def changes(policy):
    """scale · B A of every layer."""
    state = policy.state()
    return {
        key.removesuffix(".lora_A.weight"): ALPHA
        / RANK
        * (state[key.replace("lora_A", "lora_B")] @ a)
        for key, a in state.items()
        if ".lora_A." in key
    }


def exported(policy, write, folder):
    """The file that a format makes of a policy's adapter."""
    config = replace(small_config(folder / "run"), model=policy.model.config)
    save_adapter(policy, folder / "trained")
    file = folder / f"{write.__name__}.safetensors"
    write(folder / "trained", file, config)
    return file


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_comfyui_puts_both_files_where_they_belong_at_full_strength(family, tmp_path):
    without = LAST if family == "flux" else ()
    policy = policy_of(family, tmp_path / "model", without)
    expected, places = changes(policy), PLACES[family]
    assert {*expected} <= {*places}
    named, original = (
        load(load_file(exported(policy, write, tmp_path)), places)
        for write in (write_comfyui, write_kohya)
    )
    for layer, change in expected.items():
        place = places[layer]
        ours = torch.cat(change.chunk(2)[::-1]) if place.swap else change
        assert_close(named[place.weight][place.start], ours)
        rows = slice(place.start, place.start + len(change))
        assert_close(original[place.weight][0][rows], ours, rtol=1e-5, atol=1e-6)
    assert named.keys() == original.keys()


def test_layers_without_a_name_in_kohyas_scripts_are_refused_by_name(tmp_path):
    policy = policy_of("flux", tmp_path / "model")
    with pytest.raises(UserError, match=r"norm_out\.linear has no name in kohya's scripts"):
        exported(policy, write_kohya, tmp_path)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_kohya_file_begins_a_run_at_the_rank_it_was_trained_with(family, tmp_path):
    policy = policy_of(family, tmp_path / "model", LAST if family == "flux" else ())
    file = exported(policy, write_kohya, tmp_path)
    for layer, adapter in load_model(policy.model.config).read_adapter(str(file), "x").items():
        assert adapter.rank == RANK
        assert_close(adapter.change, changes(policy)[layer], rtol=1e-5, atol=1e-6)


def test_diffusers_reads_the_kohya_file_of_flux_as_the_same_change(tmp_path):
    """On the double blocks: for single ones diffusers knows the published width alone."""
    model = random_flux(tmp_path / "model", guidance_embeds=False)
    double = [f"transformer_blocks.0.{name}" for name in model.lora_targets]
    lora = Lora(rank=RANK, alpha=ALPHA, targets=double)
    policy = Policy(load_model(replace(model.config, lora=lora)), Sampler(steps=2))
    stir(policy)
    theirs = model.pipe.lora_state_dict(str(exported(policy, write_kohya, tmp_path)))
    for layer, change in changes(policy).items():
        a, b = (theirs[f"transformer.{layer}.lora_{matrix}.weight"] for matrix in "AB")
        assert_close(b @ a, change, rtol=1e-5, atol=1e-6)


def test_a_layer_that_joins_others_has_their_changes_in_its_rows():
    first = LayerAdapter(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]), scale=2)
    third = LayerAdapter(torch.tensor([[5.0, 7.0]]), torch.tensor([[1.0], [0.5]]), scale=1)
    adapter = joined([first, None, third], [1, 2, 2])
    assert adapter.change.tolist() == [[6, 12], [0, 0], [0, 0], [5, 7], [2.5, 3.5]]
    parts = adapter.split([1, 2, 2])
    assert [part.rank for part in parts] == [1, 0, 1]
    assert torch.equal(torch.cat([part.change for part in parts]), adapter.change)


def test_diffusers_draws_one_picture_from_every_file_it_loads(tmp_path):
    policy = make_policy()  # alpha / rank is 3
    stir(policy)
    config = replace(small_config(tmp_path / "run"), model=policy.model.config)
    save_adapter(policy, tmp_path / "trained")
    export_weights(tmp_path / "trained", tmp_path / "folder")
    comfyui = exported(policy, write_comfyui, tmp_path)
    batch = two_groups(policy, 1)
    noise = policy.initial_noise(batch)
    one = made_by_diffusers(tmp_path / "folder", batch, noise)
    assert torch.equal(made_by_diffusers(comfyui, batch, noise), one)
    write_merged(tmp_path / "trained", tmp_path / "whole", config)
    merged = made_by_diffusers(None, batch, noise, tmp_path / "whole")
    # Another order of sums.
    assert (merged - one).abs().max() <= 1e-4
    assert (made_by_diffusers(None, batch, noise) - one).abs().max() > 1e-2


def test_a_merged_model_keeps_shards_and_dtype_and_rounds_once(tmp_path):
    base = tmp_path / "base"
    parts = {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(ROOT / "assets" / "tiny-sd3", **parts)
    pipe.transformer.to(torch.bfloat16)
    pipe.save_pretrained(base, max_shard_size="3MB")
    (base / "LICENSE.md").write_text("terms")
    policies = [make_policy(path=str(base), dtype="bfloat16") for _ in range(2)]
    for policy, size in zip(policies, (0.05, 0.2), strict=True):
        stir(policy, size=size)
    save_adapter(policies[0], tmp_path / "style")
    save_adapter(policies[1], tmp_path / "trained")
    model = replace(policies[1].model.config, merge=[str(tmp_path / "style")])
    config = replace(small_config(tmp_path / "run"), model=model)
    write_merged(tmp_path / "trained", tmp_path / "whole", config)
    before, after = (
        SD3Transformer2DModel.from_pretrained(folder / "transformer", dtype="auto").state_dict()
        for folder in (base, tmp_path / "whole")
    )
    layer = "transformer_blocks.0.attn.to_k"
    weight = before[f"{layer}.weight"].float()
    for policy in policies:
        state = policy.state()
        weight = weight + 3 * state[f"{layer}.lora_B.weight"] @ state[f"{layer}.lora_A.weight"]
    assert torch.equal(after[f"{layer}.weight"], weight.to(torch.bfloat16))
    assert torch.equal(after["proj_out.weight"], before["proj_out.weight"])
    files, others = (
        sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        for folder in (base, tmp_path / "whole")
    )
    assert [name for name in others if str(name) != "README.md"] == files
    assert len([name for name in files if name.parts[0] == "transformer"]) > 3


def test_single_files_hold_what_was_merged_too(tmp_path):
    style, policy = make_policy(), make_policy()
    stir(style)
    stir(policy, size=0.02)
    save_adapter(style, tmp_path / "style")
    policy.model.config.merge = [str(tmp_path / "style")]
    file = exported(policy, write_comfyui, tmp_path)
    layer = "transformer_blocks.1.attn.add_q_proj"
    tensors = load_file(file)
    a, b = (tensors[f"transformer.{layer}.lora_{name}.weight"] for name in "AB")
    expected = sum(
        3 * (state[f"{layer}.lora_B.weight"] @ state[f"{layer}.lora_A.weight"])
        for state in (style.state(), policy.state())
    )
    assert_close(b @ a, expected, rtol=1e-5, atol=1e-6)
    assert len(a) == 8


def test_every_format_of_a_run_has_a_name_of_its_own(run, finished, capsys):
    names = {
        "comfyui": "adapter-step-000004-comfyui.safetensors",
        "kohya": "adapter-step-000004-kohya.safetensors",
        "merged": "model-step-000004",
    }
    for name, output in names.items():
        assert main(["export", str(run), "--format", name]) == 0
        assert f": {run / output}" in capsys.readouterr().out
        assert (run / output).exists()
    card = (run / "model-step-000004" / "README.md").read_text()
    assert f"from_pretrained({str(run / names['merged'])!r}" in card
    assert main(["sample", str(run / names["merged"]), "a red circle", "--steps", "1"]) == 0
    # The same file again is no loss.
    assert main(["export", str(run), "--format", "kohya"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "kohya", "--output", "somewhere"], "is not the name of a .safetensors file"),
        (["--format", "comfyui", "--output", "{taken}"], "exists already. Choose another file"),
        (["--format", "merged", "--output", "assets"], "assets exists already. Choose a new"),
    ],
)
def test_an_export_never_replaces_something_else(arguments, message, run, tmp_path, capsys):
    taken = tmp_path / "taken.safetensors"
    save_file({"x": torch.zeros(1)}, taken)
    filled = [argument.format(taken=taken) for argument in arguments]
    assert main(["export", str(run), *filled]) == 2
    assert message in capsys.readouterr().err
    assert list(load_file(taken)) == ["x"]
