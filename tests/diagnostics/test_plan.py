"""`flowalign plan`: what it says is what is measured."""

import importlib
import json
import sys
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn

from flowalign.cli import main
from flowalign.config.load import load_config
from flowalign.diagnostics.meta_model import (
    CALLS,
    flops,
    fused_attention,
    Kernel,
    kernels,
    Ledger,
    META,
    MetaModel,
)
from flowalign.diagnostics.plan import Gpu, GPUS, kernel_seconds, largest_pass, step_seconds
from flowalign.diagnostics.rehearsal import rehearse, reward_weights
from flowalign.errors import UserError
from flowalign.models.adapted_linear import AdaptedLinear
from flowalign.models.rms_norm import replace_norms
from flowalign.models.sd3 import SD3
from tests.tiny import random_flux, random_sd35, ROOT, sd3_config, TINY

TOLERANCE = 0.15
CASES = [
    pytest.param("Flux, recomputed", marks=pytest.mark.slow),
    "crd, passes of 2, 2 updates",
    "alignprop",
]
SD35_MEDIUM = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "in_channels": 16,
    "out_channels": 16,
    "dual_attention_layers": list(range(13)),
    "sample_size": 128,
}
FLUX_DEV = {
    "num_layers": 19,
    "num_single_layers": 38,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "axes_dims_rope": (16, 56, 56),
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "in_channels": 64,
}
VAE = {"block_out_channels": (128, 256, 512, 512), "latent_channels": 16, "norm_num_groups": 32}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
T5 = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "is_gated_act": True,
    "feed_forward_proj": "gated-gelu",
}
SD35_INPUTS = [(16, 64, 64), (205, 4096), (2048,)]
"""Latents, text tokens and the pooled text of an image."""


@cache
def compared(case: str) -> dict:
    """Return what the benchmark says of a case."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("plan").compare(case)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.mark.parametrize("case", CASES)
def test_parameters_and_what_a_pass_keeps_are_as_measured(case):
    ratios = compared(case)["ratios"]
    assert ratios["parameters"] == ratios["weights"] == 1
    assert ratios["kept"] == pytest.approx(1, abs=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_the_most_that_is_allocated_is_as_measured(case):
    ratios = compared(case)["ratios"]
    assert ratios["pass_peak"] == pytest.approx(1, abs=TOLERANCE)
    assert ratios["peak"] == pytest.approx(1, abs=TOLERANCE)
    # The decoder decides. On a CPU each of its convolutions holds a copy beside its result.
    assert 0.7 < ratios["evaluation_peak"] <= 1


@pytest.mark.parametrize("case", CASES)
def test_operations_and_calls_of_a_step_are_as_counted(case):
    comparison = compared(case)
    assert comparison["ratios"]["flops"] == pytest.approx(1, abs=0.01)
    assert comparison["plan"]["calls"] == comparison["measured"]["calls"]


def test_frozen_weights_and_what_their_passes_need_are_as_measured():
    """4-bit weights in main memory: decoded ones exist only while a layer computes."""
    ratios = compared("flow_grpo, nf4, recomputed, offloaded")["ratios"]
    assert ratios["parameters"] == ratios["weights"] == 1
    assert ratios["kept"] == pytest.approx(1, abs=0.02)
    assert ratios["pass_peak"] == pytest.approx(1, abs=0.02)


def test_each_bit_that_a_weight_loses_is_planned():
    """16, 8.5, 4.5 and 0 bits for the weights of blocks. All others have 16 bits in all cases."""
    cases = [{}, {"quantize": "int8"}, {"quantize": "nf4"}, {"quantize": "nf4", "offload": True}]
    models = [MetaModel(sd3_config(dtype="bfloat16", **case)) for case in cases]
    full, *lean = (model.weights["transformer"] for model in models)
    saved = [(full - bytes_left) / (full - lean[-1]) for bytes_left in lean]
    assert saved == pytest.approx([7.5 / 16, 11.5 / 16, 1])
    assert len({model.parameters["transformer"] for model in models}) == 1


def small(*overrides: str, file: str = str(TINY)):
    counts = ["train.prompts_per_step=2", "train.images_per_prompt=3"]
    return load_config(file, [*counts, "sampler.steps=4", *overrides])


@cache
def planned(*overrides: str):
    return rehearse(small(*overrides))


def test_what_a_pass_keeps_grows_with_its_images_and_shrinks_with_recomputation():
    one, six = planned("train.images_per_pass=1").kept, planned("train.images_per_pass=6").kept
    assert 5 * one < six <= 6 * one
    assert planned("train.images_per_pass=6", "model.gradient_checkpointing=true").kept < six / 4


def test_a_plan_compiles_nothing():
    assert planned("model.compile=true").peak == planned().peak


def test_the_work_of_a_step_depends_neither_on_updates_nor_on_passes():
    work = planned("train.images_per_pass=6").work
    halves = planned("train.images_per_pass=3", "train.updates_per_step=2").work
    assert flops(halves) == flops(work)
    assert all(halves[name] == 2 * work[name] for name in CALLS)


def test_without_its_gradient_the_empty_prompt_has_calls_of_its_own():
    few = ["train.prompts_per_step=1", "train.images_per_prompt=2", "sampler.steps=3"]
    guided = [*few, "sampler.guidance=3", "evaluation.sampler={steps: 2}"]
    both, alone = (
        rehearse(load_config(TINY, [*guided, f"objective.train_null_branch={trained}"]))
        for trained in ("true", "false")
    )
    # Two passes of three steps make the images, and two of two steps are trained on.
    calls = {name: (both.work[name], alone.work[name]) for name in CALLS}
    assert calls[CALLS[1]] == calls[CALLS[2]] == (2, 2)
    assert calls[CALLS[0]] == (3, 3 + 3 + 2)
    assert alone.kept < 0.6 * both.kept
    assert alone.evaluation_peak == both.evaluation_peak


@pytest.mark.slow
def test_steps_before_the_window_are_planned_once_for_each_prompt():
    """A window of one of steps 0, 1 and 2: 12, 10 and 8 calls in passes of 2 of 6 images."""
    shared, passes = "sampler.same_noise=true", "train.images_per_pass=2"
    places = [f"sampler.window={{size: 1, range: [{k}, {k + 1}]}}" for k in range(3)]
    works = [planned(shared, passes, place).work for place in places]
    assert [work["forwards without gradient"] for work in works] == [12, 10, 8]
    moving = planned(shared, passes, "sampler.window={size: 1, range: [0, 3]}").work
    assert moving["forwards without gradient"] == 10
    assert flops(moving) == pytest.approx(sum(map(flops, works)) / 3, rel=1e-6)
    assert flops(works[1]) < flops(works[0])


@pytest.mark.slow
def test_a_combination_that_wants_scores_of_a_range_is_planned_like_another():
    """A plan has no pictures to score, so its scores are in no range."""
    rewards = "rewards={brightness: 1, contrast: 1}"
    work = planned(rewards, "combine={name: modulated, base: brightness}").work
    assert work == planned(rewards).work


@pytest.mark.parametrize(
    ("name", "compares"), [("dpo", True), pytest.param("sft", False, marks=pytest.mark.slow)]
)
def test_training_on_given_pictures_is_planned_without_encoding_them(name, compares):
    counts = ["train.images_per_prompt=1", "train.images_per_pass=2"]
    work = rehearse(small(*counts, file=str(ROOT / f"configs/tiny/{name}.yaml"))).work
    assert work["forwards with gradient"] == work["backwards"] > 0
    assert (work["forwards without gradient"] > 0) == compares


def test_the_largest_pass_fits_and_the_next_does_not():
    config = small(
        "train.prompts_per_step=1", "train.images_per_prompt=5", "train.images_per_pass=5"
    )
    most = rehearse(config).peak
    assert largest_pass(config, most) == 5
    assert largest_pass(config, most - 1) == 1


def test_the_published_size_is_planned_from_configuration_files_alone(tmp_path):
    random_sd35(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    file = tmp_path / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | SD35_MEDIUM))
    model = MetaModel(sd3_config(path=str(tmp_path), dtype="float16", max_sequence_length=16))
    assert model.parameters["transformer"] == pytest.approx(2.24e9, rel=0.01)
    assert model.dtype.itemsize == 2
    # T5 keeps this layer in float32.
    feed_forward = model.networks()["text_encoder_3"].encoder.block[0].layer[-1].DenseReluDense
    assert feed_forward.wo.weight.dtype.itemsize == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "gigabytes"),
    [("sd3/pickscore_16gb", 16), ("sd3/crd_16gb", 16), ("flux/pickscore_24gb", 24)],
)
def test_files_for_small_cards_fit_and_would_not_with_full_weights(file, gigabytes, tmp_path):
    """At the published sizes, beside PickScore in half precision."""
    is_flux, pick_score = file.startswith("flux"), 2e9
    (partial(random_flux, guidance_embeds=True) if is_flux else random_sd35)(tmp_path)
    sizes = {"vae": VAE, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": T5}
    sizes |= {"transformer": SD35_MEDIUM}
    if is_flux:
        sizes |= {"text_encoder_2": T5, "transformer": FLUX_DEV}
    for part, size in sizes.items():
        if (config := tmp_path / part / "config.json").exists():
            config.write_text(json.dumps(json.loads(config.read_text()) | size))
    prompts = [f"{key}.prompts={ROOT / 'tests/prompts.jsonl'}" for key in ("data", "evaluation")]
    config = load_config(ROOT / "configs" / f"{file}.yaml", [*prompts, f"model.path={tmp_path}"])
    full = replace(config, model=replace(config.model, quantize="none"))
    assert rehearse(config).peak + pick_score < 1e9 * gigabytes < rehearse(full).peak + pick_score


def sd35_medium(rows):
    """The network without weights, and inputs for rows of 512 x 512 pixels and 205 text tokens."""
    with META:
        network = SD3Transformer2DModel(**SD35_MEDIUM, qk_norm="rms_norm").to(torch.bfloat16)
        inputs = [torch.empty(rows, *size, dtype=torch.bfloat16) for size in SD35_INPUTS]
        return network.requires_grad_(False), [*inputs, torch.empty(rows)]


def adapted_sd35_medium(rows, lean):
    """The same with adapters of rank 32: lean as here, or else as in PEFT."""
    network, inputs = sd35_medium(rows)
    lora = LoraConfig(r=32, lora_alpha=64, target_modules=list(SD3.lora_targets))
    lora._register_custom_module({nn.Linear: AdaptedLinear if lean else Linear})
    if lean:
        replace_norms(network)
    network.add_adapter(lora)
    for name, parameter in network.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.float()
    return network, inputs


@pytest.mark.parametrize(("lean", "gib"), [(True, 1.41), (False, 2.40)])
def test_a_pass_of_sd35_medium_keeps_this_much_for_each_image(lean, gib):
    network, inputs = adapted_sd35_medium(1, lean)
    ledger = Ledger((16, 8, 8), (16, 64, 64))
    with fused_attention(), ledger, ledger.part() as cost:
        velocity = network(*inputs)
    assert velocity.sample.requires_grad
    assert cost.kept / 2**30 == pytest.approx(gib, abs=0.005)


def test_the_time_of_a_step_is_near_that_of_a_compiled_one_on_an_h200():
    """Eight guided images in one pass, 4 sampler steps, 3 trained: docs/performance.md."""
    network, inputs = adapted_sd35_medium(16, lean=True)
    ledger = Ledger((16, 8, 8), (16, 64, 64))
    with fused_attention(), ledger:
        with ledger.part() as forward:
            velocity = network(*inputs).sample
        with ledger.part() as backward:
            velocity.backward(torch.empty_like(velocity))
    times = [step_seconds(cost.work, GPUS["h200"]) for cost in (forward, backward)]
    # The calls of the transformer in the row "medium, compiled" of benchmarks/measured/gpu.json.
    rows = json.loads((ROOT / "benchmarks" / "measured" / "gpu.json").read_text())["rows"]
    measured = rows["medium, compiled"]["seconds"]
    measured = measured["adapted forwards"] + measured["adapted backwards"]
    assert 4 * times[0] + 3 * sum(times) == pytest.approx(measured, rel=0.25)


def test_a_kernel_takes_the_longer_of_its_two_times():
    a, b = (torch.empty(side, 1024, device=META, dtype=torch.bfloat16) for side in (4096, 8))
    ledger = Ledger((1, 1, 1), (1, 1, 1))
    with ledger, ledger.part() as cost:
        # A view and an allocation move nothing.
        large = a @ a.T
        thin = a @ b.T
        total = large[:, :8].add(thin).mul_(2)
        torch.empty_like(total)
    found = sorted(kernels(cost.work), key=lambda entry: entry[0].bytes)
    side, inner, rows = 4096, 1024, 8
    assert found == [
        (Kernel("half", 0, 2 * 2 * side * rows), 1),
        (Kernel("half", 0, 3 * 2 * side * rows), 1),
        (Kernel("half", 2 * side * inner * rows, 2 * (side + rows) * inner + 2 * side * rows), 1),
        (Kernel("half", 2 * side * side * inner, 2 * (2 * side * inner + side * side)), 1),
    ]
    gpu = Gpu(memory=1, half=100, tf32=50, float32=10, bandwidth=1)
    by_operations = 2 * side * side * inner / (0.65 * 100e12)
    by_bytes = (2 * (side + rows) * inner + 2 * side * rows) / (0.85 * 1e12)
    assert kernel_seconds(found[3][0], gpu) == by_operations
    assert kernel_seconds(found[2][0], gpu) == by_bytes


def test_the_time_of_sd35_medium_is_that_of_an_independent_count():
    """16 rows without adapters: 104 ms on an H100.

    The count was made kernel by kernel for the same shares of the peaks.
    """
    network, inputs = sd35_medium(16)
    ledger = Ledger((16, 8, 8), (16, 64, 64))
    with fused_attention(), torch.no_grad(), ledger, ledger.part() as cost:
        network(*inputs)
    assert step_seconds(cost.work, GPUS["h100"]) == pytest.approx(0.104, rel=0.02)


def test_the_command_prints_one_screen(capsys):
    counts = ["train.prompts_per_step=1", "train.images_per_prompt=2", "train.images_per_pass=1"]
    assert main(["plan", str(TINY), *counts, "--gpu", "h100", "--memory", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 120
    assert lines[-1].split()[:2] == ["train.images_per_pass", "2"]


def test_overrides_may_follow_an_option(capsys):
    assert main(["plan", str(TINY), "--gpu", "h100", "train.updates_per_step=7"]) == 2
    assert "7 updates" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["plan", str(TINY), "--gpus", "h100"], ["reward", "list", "more"]]
)
def test_unknown_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "unrecognized arguments" in capsys.readouterr().err


def test_the_network_of_a_reward_is_counted_if_it_is_local():
    config = small(
        "train.images_per_pass=6", "rewards={pick_score: 1.0, clip_score: 1.0, scene_match: 1.0}"
    )
    weights = reward_weights(config)
    assert (weights["pick_score"], weights["scene_match"]) == (None, 0)
    assert (
        weights["clip_score"]
        == (ROOT / "assets" / "tiny-clip" / "model.safetensors").stat().st_size
    )


def test_a_faster_gpu_takes_less_time():
    work = planned("train.images_per_pass=6").work
    seconds = [step_seconds(work, GPUS[name]) for name in ("h100", "a100-80", "t4")]
    assert seconds == sorted(seconds)
    assert len(set(seconds)) == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gpu", "h10"], "'h100'"),
        (["model.path=nowhere/at/all"], "model.path: there is no folder"),
        (["train.updates_per_step=7"], "cannot share evenly"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_the_fix(options, said, capsys):
    assert main(["plan", str(TINY), *options]) == 2
    assert said in capsys.readouterr().err


def test_a_model_without_a_network_s_configuration_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text(
        (ROOT / "assets/tiny-sd3/model_index.json").read_text()
    )
    with pytest.raises(UserError, match=r"model\.path"):
        MetaModel(sd3_config(path=str(tmp_path)))


def test_text_encoders_that_stay_are_in_every_peak():
    visit, stay = (
        rehearse(load_config(TINY, [f"model.keep_text_encoders={keep}"]))
        for keep in ("false", "true")
    )
    weights = sum(size for name, size in stay.weights.items() if name.startswith("text_encoder"))
    assert stay.peaks.pop("while prompts are encoded") == visit.peaks.pop(
        "while prompts are encoded"
    )
    assert stay.peaks == {part: peak + weights for part, peak in visit.peaks.items()}
