"""What holds for every family, on small models of the real classes with random weights."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from torch import nn, Tensor
from torch.testing import assert_close

from flowalign.batch import Keys
from flowalign.data.prompts import Prompt
from flowalign.diagnostics.check.report import check
from flowalign.dynamics import flow_sde
from flowalign.models import load_model
from flowalign.models.base import FlowModel
from flowalign.models.qwen_image21 import QwenImage21
from flowalign.policy import Policy, Sampler
from flowalign.rollouts.collect import collect, make_prompts
from flowalign.runs.adapter import export_weights, save_adapter
from flowalign.runs.formats import write_kohya
from flowalign.training.trainer import train
from tests.tiny import (
    random_flux2,
    random_flux2_dev,
    random_qwen_image,
    random_qwen_image21,
    random_sana,
    random_z_image,
    small_config,
    stir,
)

Make = Callable[[Path], FlowModel]
FAMILIES: dict[str, Make] = {
    "klein": random_flux2,
    "klein, distilled": partial(random_flux2, is_distilled=True),
    "flux2-dev": random_flux2_dev,
    "z-image": random_z_image,
    "qwen-image": random_qwen_image,
    "qwen-image-2.1": random_qwen_image21,
    "sana": partial(random_sana, qk_norm=None),
    "sana 1.5": random_sana,
}
TEXTS = ["a red circle", "two blue squares left of a green triangle and a circle"]
ROUNDING = {
    # Its pipeline divides latents by the inverse of their deviations before it decodes them.
    "qwen-image": 1e-6,
    # Its texts are padded before they are encoded. Without the padding, nothing differs.
    "qwen-image-2.1": 1e-5,
}
LEFT_OUT = {
    "flux2": "x_embedder context_embedder proj_out norm_out.linear time_guidance_embed modulation",
    "z": "all_x_embedder all_final_layer cap_embedder t_embedder adaLN_modulation",
    "qwen": "img_in txt_in proj_out norm_out.linear time_text_embed img_mod txt_mod modulation",
    "sana": "caption_projection time_embed proj_out",
}
"""Parts of names of linear layers that have no adapter by default: they lie outside the blocks."""


@pytest.fixture(params=FAMILIES)
def model(request, tmp_path) -> FlowModel:
    return FAMILIES[request.param](tmp_path)


def sized(model: FlowModel, height: int, width: int) -> FlowModel:
    return load_model(replace(model.config, height=height, width=width))


def sampler_of(model: FlowModel, guidance: float, **settings: Any) -> Sampler:
    """Guidance as the family takes it."""
    return Sampler(**{model.guidance_setting: guidance}, **settings)


def pictures(policy: Policy, texts: list[str]) -> tuple[Tensor, Tensor]:
    """The initial noise of prompts, and the pictures that it becomes."""
    keys = Keys.training(0, 0, [(slot, 0) for slot in range(len(texts))])
    batch = make_prompts(policy, [Prompt(text) for text in texts], keys)
    x0 = policy.generate(batch).x0
    return policy.initial_noise(batch), policy.decode(x0)


def of_pipeline(model: Any, noise: Tensor, sampler: Sampler, texts: list[str]) -> Tensor:
    """The pictures of diffusers' own pipeline, as the README of an adapter calls it."""
    if isinstance(model, QwenImage21) and len(texts) > 1:
        # In that pipeline, a picture depends on the longest prompt of the call.
        each = zip(noise.split(1), texts, strict=True)
        return torch.cat([of_pipeline(model, one, sampler, [text]) for one, text in each])
    call = model.pipeline_call(
        model.config, sampler.steps, sampler.guidance, sampler.embedded_guidance
    )
    assert call.pipeline == type(model.pipe).__name__
    if call.pipeline in ("QwenImagePipeline", "QwenImage21Pipeline"):
        noise = model.pipe._pack_latents(noise, *noise.shape)
    if call.scheduler is not None:
        model.pipe.scheduler = FlowMatchEulerDiscreteScheduler(**call.scheduler)
    with torch.no_grad():
        images = model.pipe(
            prompt=list(texts), latents=noise.clone(), output_type="pt", **call.calling
        ).images
    # Some pictures have a fourth channel, their transparency.
    return images[:, :3]


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (3, 5)])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_pictures_are_those_of_the_pipeline(model, guidance, rows, columns):
    if model.is_step_distilled and guidance > 1:
        pytest.skip("its pipeline does not guide")
    height, width = (count * model.config.side_step for count in (rows, columns))
    model = sized(model, height, width)
    sampler = sampler_of(model, guidance, steps=4)
    noise, ours = pictures(Policy(model, sampler).at("reference"), TEXTS)
    theirs = of_pipeline(model, noise, sampler, TEXTS)
    assert ours.shape == (2, 3, height, width)
    # With guidance, both halves are one batch here and two in the pipeline, which rounds.
    bound = ROUNDING.get(model.config.name, 0) if sampler.guidance == 1 else 2e-5
    assert_close(ours, theirs, atol=bound, rtol=0)


def test_a_prompt_is_encoded_alike_alone_and_in_a_batch(model):
    together = model.encode_texts(list(TEXTS))
    for row, text in enumerate(TEXTS):
        for name, values in model.encode_texts([text]).items():
            assert_close(values[0], together[name][row], atol=1e-6, rtol=0)


def test_a_velocity_is_the_same_alone_and_in_a_batch(model):
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.3, 0.8])
    together = model.velocity(x, t, model.encode(list(TEXTS)))
    for row, text in enumerate(TEXTS):
        alone = model.velocity(x[row : row + 1], t[row : row + 1], model.encode([text]))
        assert_close(alone[0], together[row], atol=1e-5, rtol=0)


def test_times_fall_from_one_to_zero(model):
    for steps in (2, 10, 50):
        times = model.schedule(steps)
        assert len(times) == steps + 1
        assert times == sorted(times, reverse=True)
        assert (times[0], times[-1]) == (1, 0)


def test_latents_of_pictures_are_normalised_and_decoding_has_a_gradient(model):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    x0 = model.encode_images(images).requires_grad_()
    assert x0.shape == (2, *model.latent_shape)
    assert_close(model.normalise(model.denormalise(x0)), x0, atol=1e-5, rtol=1e-5)
    model.decode(x0).sum().backward()
    assert x0.grad.abs().max() > 0


def test_a_trained_adapter_is_loaded_by_diffusers(model, tmp_path):
    sampler = sampler_of(model, 1.0, steps=3)
    policy = Policy(model, sampler)
    stir(policy, size=0.1)
    noise, trained = pictures(policy, TEXTS)
    bare = pictures(policy.at("reference"), TEXTS)[1]
    save_adapter(policy, tmp_path / "checkpoint")
    (tmp_path / "adapter").mkdir()
    export_weights(tmp_path / "checkpoint", tmp_path / "adapter")
    fresh: Any = load_model(model.config)
    fresh.pipe.load_lora_weights(tmp_path / "adapter")
    theirs = of_pipeline(fresh, noise, sampler, TEXTS)
    assert_close(theirs, trained, atol=2e-5, rtol=0)
    assert (trained - bare).abs().max() > 1e-2


def test_an_export_for_kohya_s_scripts_is_read_back_and_by_diffusers_too(model, tmp_path):
    if not model.kohya_layers:
        pytest.skip("kohya's scripts have no names for it")
    policy = Policy(model, Sampler(steps=3))
    stir(policy, size=0.1)
    save_adapter(policy, tmp_path / "trained")
    config = replace(small_config(tmp_path / "run"), model=model.config)
    kohya = tmp_path / "kohya.safetensors"
    write_kohya(tmp_path / "trained", kohya, config)
    networks = [load_model(replace(model.config, merge=[str(kohya)]))]
    # diffusers 0.42 reads gate_layer as gate.layer, which it then leaves out.
    names = [None] if isinstance(model, QwenImage21) else [kohya.name, None]
    for name in names:
        fresh: Any = load_model(model.config)
        fresh.pipe.load_lora_weights(tmp_path if name else tmp_path / "trained", weight_name=name)
        fresh.pipe.fuse_lora()
        networks.append(fresh)
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    cond, t = model.encode(list(TEXTS), embedded_guidance=4.0), torch.tensor([0.3, 0.8])
    *others, own = (network.velocity(x, t, cond) for network in networks)
    for other in others:
        assert_close(other, own, atol=1e-4, rtol=1e-4)
    bare = load_model(model.config).velocity(x, t, cond)
    assert (own - bare).abs().max() > 1e-2


def test_every_linear_layer_is_adapted_or_left_out_on_purpose(model):
    linears = [n for n, m in model.transformer.named_modules() if isinstance(m, nn.Linear)]
    policy = Policy(model, Sampler(steps=2))
    adapted = {name.partition(".lora_")[0] for name in policy.state()}
    outside = LEFT_OUT[model.config.name.partition("-")[0]].split()
    for name in linears:
        assert (name in adapted) != any(part in name for part in outside), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ratios_are_one_and_the_kl_is_zero_at_the_start(model, dtype):
    model = load_model(replace(model.config, dtype=dtype))
    sampler = sampler_of(model, 1.0, steps=3, dynamics=flow_sde)
    policy = Policy(model, sampler)
    keys = Keys.training(0, 0, [(0, 0), (1, 0)])
    batch = make_prompts(policy, [Prompt(text) for text in TEXTS], keys)
    rollout = collect(policy.at("policy"), batch, images_per_pass=2)
    for step in rollout.steps:
        before, after, old = rollout.transition(step)
        gaussian = policy.step(before, step, rollout.cond)
        assert torch.equal(gaussian.log_prob(after), old)
        base = policy.at("reference").step(before, step, rollout.cond)
        assert gaussian.kl(base).abs().max() == 0


OBJECTIVES = {
    "flow_grpo": [],
    "crd": ["sampler.dynamics={name: ode}", "objective.kl.guidance=1"],
    "dpo": ["sampler.dynamics={name: ode}", "train.images_per_prompt=4"],
    "alignprop": ["sampler.dynamics={name: ode}"],
    "opsd": ["sampler.dynamics={name: ode}"],
}
"""Objectives of each kind, and what they need besides."""


def run(model: FlowModel, folder: Path, objective: str, *settings: str) -> dict[str, Tensor]:
    """The matrices of an adapter that was trained on a model."""
    config = model.config
    tokens = config.max_sequence_length
    about = f"name: {config.name}, path: {config.path}, max_sequence_length: {tokens}"
    overrides = [
        f"model={{{about}, height: 64, width: 64, lora: {{rank: 2, alpha: 4}}}}",
        f"objective={{name: {objective}}}",
        "rewards={brightness: 1.0}",
        "evaluation.rewards={brightness: 1.0}",
        "train.save_every=1",
        *OBJECTIVES[objective],
        *settings,
    ]
    train(small_config(folder, *overrides))
    return load_file(folder / "adapter" / "pytorch_lora_weights.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_and_resumes_bit_for_bit(model, objective, tmp_path):
    if model.is_step_distilled:
        pytest.skip("its base trains")
    whole = run(model, tmp_path / "whole", objective)
    run(model, tmp_path / "halves", objective, "train.steps=1")
    halves = run(model, tmp_path / "halves", objective)
    assert whole.keys() == halves.keys()
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    assert any(value.abs().max() > 0 for name, value in whole.items() if "lora_B" in name)


@pytest.mark.slow
def test_a_check_finds_nothing_wrong_but_says_what_blurs_few_steps(model, tmp_path, capsys):
    tokens = model.config.max_sequence_length
    about = f"name: {model.config.name}, path: {model.config.path}, max_sequence_length: {tokens}"
    overrides = [
        f"model={{{about}, height: 64, width: 64, lora: {{rank: 2, alpha: 4}}}}",
        "objective={name: crd, kl: {guidance: 1}}",
        "rewards={brightness: 1.0}",
        "evaluation.rewards={brightness: 1.0}",
        *OBJECTIVES["crd"],
    ]
    assert check(small_config(tmp_path / "run", *overrides))
    blurs = "its pictures of few steps will blur" in capsys.readouterr().out
    assert blurs == model.is_step_distilled
