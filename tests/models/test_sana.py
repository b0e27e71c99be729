"""SANA: its instruction, its times, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SanaTransformer2DModel,
    SCMScheduler,
)
from torch.testing import assert_close

from flowalign.errors import UserError
from flowalign.models import load_model
from flowalign.models.families import describe, read_model_config
from flowalign.policy import Policy, Sampler
from flowalign.runs.adapter import save_adapter
from flowalign.runs.adapter_card import adapter_card
from flowalign.runs.formats import write_comfyui, write_kohya
from tests.models.test_every_family import pictures, TEXTS
from tests.tiny import random_sana, small_config, stir


@pytest.fixture
def model(tmp_path) -> Any:
    return random_sana(tmp_path / "sana")


def test_prompts_have_the_instruction_and_small_letters_and_negative_prompts_have_none(model):
    found = model.encode(["A red CIRCLE "], negative=["A Square"])
    expected = model.pipe.encode_prompt(
        "a red circle",
        negative_prompt="a square",
        max_sequence_length=32,
        complex_human_instruction=model.instruction,
    )
    rows = [rows.table[name] for rows in found.rows for name in ("embeds", "mask")]
    for ours, theirs in zip(rows, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert model.encode([""]).null["mask"].sum() == 1
    assert model.instruction[0].startswith("Given a user prompt, generate an 'Enhanced prompt'")


def test_the_published_scheduler_makes_other_steps_with_the_same_velocity(model):
    """Its steps, with our velocity, end at the pipeline's picture; steps of Euler do not."""
    scheduler = model.pipe.scheduler
    noise, ours = pictures(Policy(model, Sampler(steps=5)).at("reference"), TEXTS)
    calling = {"guidance_scale": 1.0, "height": 64, "width": 64, "max_sequence_length": 32}
    theirs = model.pipe(
        TEXTS,
        num_inference_steps=5,
        latents=noise.clone(),
        output_type="pt",
        use_resolution_binning=False,
        **calling,
    ).images
    scheduler.set_timesteps(5)
    cond, x = model.encode(TEXTS), noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            v = model.velocity(x, (t / 1000).expand(2), cond)
            x = scheduler.step(v, t, x, return_dict=False)[0]
        assert_close(model.decode(x), theirs, atol=1e-6, rtol=0)
    assert (ours - theirs).abs().max() > 1e-3


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 28, 50])
def test_the_times_are_those_of_the_call_that_a_readme_shows(model, steps):
    call = model.pipeline_call(model.config, steps, 1.0, 1.0)
    scheduler = FlowMatchEulerDiscreteScheduler(**call.scheduler)
    scheduler.set_timesteps(sigmas=call.calling["sigmas"])
    assert scheduler.sigmas.tolist() == model.schedule(steps)
    # Within the rounding of the published scheduler, whose times are whole numbers of thousandths.
    model.pipe.scheduler.set_timesteps(steps)
    published = model.pipe.scheduler.sigmas
    assert_close(torch.tensor(model.schedule(steps)), published, atol=1e-3, rtol=0)


def test_an_euler_scheduler_in_the_folder_has_its_own_shift(model, tmp_path):
    FlowMatchEulerDiscreteScheduler(shift=5.0).save_pretrained(tmp_path / "sana" / "scheduler")
    model.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    assert model.schedule(2) == pytest.approx([1, 5 / 6, 0])
    assert model.pipeline_call(model.config, 2, 1.0, 1.0).scheduler == {"shift": 5.0}


def test_the_readme_of_an_adapter_puts_the_euler_scheduler_in(model, tmp_path):
    config = replace(small_config(tmp_path / "run"), model=model.config)
    card = adapter_card(config, tmp_path / "adapter")
    assert "from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline\n" in card
    assert "\npipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)\npipe.load_lora" in card
    assert "sigmas=[1.0, 0.75, 0.5, 0.25], use_resolution_binning=False" in card


def test_a_model_without_a_run_has_the_published_settings(model):
    config: Any = describe(model.config.path)
    assert (config.name, config.height, config.width) == ("sana", 512, 512)
    assert (config.default_guidance, config.max_sequence_length) == (4.5, 300)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float16"}, "activations overflow. Set it to bfloat16"),
        ({"height": 80}, "height is 80, but it must be a multiple of 32. Set it to 64"),
        ({"attention": "flash"}, "attention is 'flash'; choose from native"),
    ],
)
def test_what_the_model_cannot_do_is_refused(model, settings, message):
    with pytest.raises(UserError, match=message):
        read_model_config({"path": model.config.path, **settings})


def test_sana_sprint_is_refused_by_its_name(model, tmp_path):
    folder = tmp_path / "sana"
    SCMScheduler().save_pretrained(folder / "scheduler")
    parts = {**model.transformer.config, "guidance_embeds": True}
    SanaTransformer2DModel.from_config(parts).save_pretrained(folder / "transformer")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("DPMSolverMultistepScheduler", "SCMScheduler"))
    with pytest.raises(UserError, match="is a SANA-Sprint, whose network does not return a vel"):
        load_model(model.config)
    index.write_text(index.read_text().replace('"SanaPipeline"', '"SanaSprintPipeline"'))
    with pytest.raises(UserError, match="holds a SanaSprintPipeline, but"):
        read_model_config({"path": str(folder)})


@pytest.mark.parametrize("write", [write_kohya, write_comfyui])
def test_names_of_other_tools_are_refused(model, tmp_path, write):
    policy = Policy(model, Sampler(steps=2))
    stir(policy)
    save_adapter(policy, tmp_path / "trained")
    config = replace(small_config(tmp_path / "run"), model=model.config)
    with pytest.raises(UserError, match="Choose --format diffusers"):
        write(tmp_path / "trained", tmp_path / "out.safetensors", config)
