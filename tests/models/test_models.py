"""Models compared with diffusers' own pipelines, and errors if one cannot be opened."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file
from torch.testing import assert_close

from flowalign.errors import UserError
from flowalign.models import load_model
from flowalign.models.flux import FluxConfig
from flowalign.models.hub import explain_loading
from flowalign.models.sd3 import SD3Config
from flowalign.policy import Policy, Sampler
from tests.tiny import make_policy, random_flux, random_sd35, ROOT, sd3_config, TEXTS, two_groups


def test_the_bundled_models_hold_no_path_of_the_machine_that_trained_them():
    for file in (ROOT / "assets").rglob("*.json"):
        assert '_name_or_path": "/' not in file.read_text(), file


def pictures_of(policy: Policy, images: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """The initial noise of two groups, and the pictures it becomes."""
    batch = two_groups(policy, images)
    x0 = policy.at("reference").generate(batch).x0
    return policy.initial_noise(batch), policy.decode(x0)


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_the_ode_sampler_is_the_sd3_pipeline(guidance):
    policy = make_policy(Sampler(steps=6, guidance=guidance))
    noise, ours = pictures_of(policy)
    pipe = StableDiffusion3Pipeline.from_pretrained(
        ROOT / "assets" / "tiny-sd3", text_encoder_3=None, tokenizer_3=None
    )
    settings = {
        "num_inference_steps": 6,
        "guidance_scale": guidance,
        "max_sequence_length": 0,
        "output_type": "pt",
    }
    theirs = pipe(TEXTS, latents=noise.clone(), height=64, width=64, **settings).images
    assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_the_ode_sampler_is_the_sd35_pipeline_with_t5_and_shifted_times(tmp_path):
    model = random_sd35(tmp_path)
    noise, ours = pictures_of(Policy(model, Sampler(steps=5, guidance=4.5)))
    settings = {
        "num_inference_steps": 5,
        "guidance_scale": 4.5,
        "max_sequence_length": 16,
        "output_type": "pt",
    }
    theirs = model.pipe(TEXTS, latents=noise.clone(), height=64, width=64, **settings).images
    assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_t5_may_be_left_out_of_a_model_that_has_it(tmp_path):
    with_t5 = random_sd35(tmp_path)
    without = load_model(replace(with_t5.config, max_sequence_length=0))
    assert without.pipe.text_encoder_3 is None
    tokens = [model.encode(TEXTS).inputs["embeds"].shape[1] for model in (with_t5, without)]
    assert tokens[0] == tokens[1] + 16


@pytest.mark.parametrize("guidance_embeds", [True, False], ids=["dev", "schnell"])
def test_the_ode_sampler_is_the_flux_pipeline(guidance_embeds, tmp_path):
    model = random_flux(tmp_path, guidance_embeds)
    noise, ours = pictures_of(Policy(model, Sampler(steps=5, embedded_guidance=2.5)))
    packed = model.pipe._pack_latents(noise.clone(), 2, 8, 8, 8)
    settings = {
        "num_inference_steps": 5,
        "guidance_scale": 2.5,
        "max_sequence_length": 16,
        "output_type": "pt",
    }
    theirs = model.pipe(TEXTS, latents=packed, height=64, width=64, **settings).images
    assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_flux_with_true_guidance_is_the_pipeline_with_a_negative_prompt(tmp_path):
    model = random_flux(tmp_path, guidance_embeds=False)
    noise, ours = pictures_of(Policy(model, Sampler(steps=3, guidance=3.0)))
    packed = model.pipe._pack_latents(noise.clone(), 2, 8, 8, 8)
    settings = {
        "num_inference_steps": 3,
        "true_cfg_scale": 3.0,
        "max_sequence_length": 16,
        "output_type": "pt",
    }
    theirs = model.pipe(
        TEXTS, negative_prompt="", latents=packed, height=64, width=64, **settings
    ).images
    assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_pipeline_call_of_a_readme_makes_the_pictures_of_the_sampler(guidance, tmp_path):
    models = [random_sd35(tmp_path / "sd3"), random_flux(tmp_path / "flux", guidance_embeds=True)]
    sampler = Sampler(steps=3, guidance=guidance, embedded_guidance=2.5)
    for model, pack in zip(
        models, (torch.clone, lambda x: pack_for_flux(models[1], x)), strict=True
    ):
        noise, ours = pictures_of(Policy(model, sampler))
        call = model.pipeline_call(
            model.config, sampler.steps, sampler.guidance, sampler.embedded_guidance
        )
        assert call.pipeline == type(model.pipe).__name__
        theirs = model.pipe(TEXTS, latents=pack(noise), output_type="pt", **call.calling).images
        assert_close(ours, theirs, atol=1e-4, rtol=0)


def pack_for_flux(model, x: torch.Tensor) -> torch.Tensor:
    return model.pipe._pack_latents(x.clone(), *x.shape)


@pytest.mark.parametrize("distilled", [True, False])
def test_embedded_guidance_changes_the_picture_of_a_distilled_model_only(distilled, tmp_path):
    policy = Policy(random_flux(tmp_path, distilled), Sampler(steps=2, embedded_guidance=1.0))
    _, weak = pictures_of(policy)
    _, strong = pictures_of(policy.sampling(Sampler(steps=2, embedded_guidance=9.0)))
    assert torch.equal(weak, strong) != distilled


def test_guidance_is_one_formula_of_two_velocities():
    policy = make_policy()
    cond = policy.encode(TEXTS)
    x, t = torch.randn(2, *policy.model.latent_shape), torch.tensor([0.3, 0.8])
    v = policy.model.velocity(x, t, cond)
    null = policy.model.velocity(x, t, policy.encode(["", ""]))
    assert_close(
        policy.model.velocity(x, t, cond.guided(3.0)), null + 3 * (v - null), atol=1e-5, rtol=1e-4
    )
    assert not torch.equal(v, null)


def test_equal_prompts_are_encoded_once():
    model = load_model(sd3_config())
    encoded = []
    encode_texts = model.encode_texts
    model.encode_texts = lambda texts: encoded.extend(texts) or encode_texts(texts)
    cond = model.encode(["a circle", "a square", "a circle"])
    model.encode(["a square"])
    assert encoded == ["", "a circle", "a square"]
    embeds, pooled = cond.inputs["embeds"], cond.inputs["pooled"]
    assert torch.equal(embeds[0], embeds[2])
    assert not torch.equal(pooled[0], pooled[1])
    # Images of one prompt share its embeddings, and all images those of the empty prompt.
    assert [len(rows.table["embeds"]) for rows in cond.rows] == [2, 1]


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        policy = make_policy(gradient_checkpointing=checkpointing)
        x = torch.randn(2, *policy.model.latent_shape, generator=torch.Generator().manual_seed(0))
        policy.velocity(
            x, torch.tensor([0.5, 0.7]), policy.encode(TEXTS)
        ).square().mean().backward()
        gradients.append([p.grad for p in policy.parameters()])
    assert_close(gradients[0], gradients[1])


def test_pictures_survive_encoding_and_decoding():
    policy = make_policy()
    _, pictures = pictures_of(policy, images=4)
    reconstructed = policy.decode(policy.model.encode_images(pictures))
    assert -10 * (reconstructed - pictures).square().mean().log10() > 28


def test_a_dtype_is_that_of_the_network_and_velocities_stay_float32():
    policy = make_policy(dtype="bfloat16")
    assert policy.model.transformer.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in policy.parameters())
    assert (
        policy.velocity(
            torch.randn(2, *policy.model.latent_shape),
            torch.tensor([0.5, 0.5]),
            policy.encode(TEXTS),
        ).dtype
        == torch.float32
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"path": "assets/prompts"}, "has no model_index.json"),
        ({"path": "./nowhere"}, "there is no folder ./nowhere"),
        ({"height": 256}, "model.height and model.width may be at most 128 for "),
        ({"height": 60}, "multiples of 16; nearest: 64 and 64"),
        ({"attention": "flash"}, "SD3 knows native and xformers"),
    ],
)
def test_what_is_wrong_with_a_model_is_explained(changes, expected, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = sd3_config()
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(UserError, match=expected.replace("(", r"\(")):
        load_model(config)


def test_a_folder_of_another_family_is_answered_with_its_class():
    with pytest.raises(UserError, match=r"holds a StableDiffusion3Pipeline.* needs a FluxPipeline"):
        load_model(FluxConfig(path=str(ROOT / "assets" / "tiny-sd3")))


def test_errors_of_gated_and_missing_repositories_say_what_to_do():
    gated = explain_loading(
        "model.path",
        "stabilityai/stable-diffusion-3.5-medium",
        OSError("401 Client Error: gated repo"),
    )
    assert "Accept its licence" in gated
    assert "hf auth login" in gated
    missing = explain_loading(
        "model.path", "nobody/nothing", OSError("RepositoryNotFoundError: 404 Client Error")
    )
    assert "no hub repository" in missing
    offline = explain_loading(
        "model.path", "nobody/nothing", OSError("We couldn't connect to the hub")
    )
    assert "cannot be reached" in offline


def test_a_repository_that_cannot_be_reached_is_a_user_error(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="nobody/nothing"):
        load_model(SD3Config(path="nobody/nothing"))


def test_a_folder_of_another_pipeline_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(UserError, match="KandinskyPipeline"):
        load_model(sd3_config(path=str(tmp_path)))


def test_a_model_saved_as_a_pickle_is_refused(tmp_path):
    shutil.copytree(ROOT / "assets" / "tiny-sd3", tmp_path / "model")
    network = tmp_path / "model" / "transformer"
    weights = load_file(network / "diffusion_pytorch_model.safetensors")
    (network / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(weights, network / "diffusion_pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"model\.path: .* cannot be opened as a model: .*safetensors"
    ):
        load_model(sd3_config(path=str(tmp_path / "model")))


def test_large_pictures_are_decoded_in_slices():
    flux = FluxConfig(
        path=str(ROOT / "assets" / "tiny-flux"), height=64, width=64, max_sequence_length=10
    )
    small, large = (load_model(config) for config in (flux, replace(flux, height=512, width=512)))
    assert not small.vae.use_slicing
    assert large.vae.use_slicing
    x0 = torch.randn(3, *small.latent_shape)
    assert_close(small.decode(x0), large.decode(x0), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "kernel"), [("bfloat16", "_native_flash"), ("float32", "native")]
)
def test_flux_computes_its_attention_by_the_flash_kernel_on_a_gpu(dtype, kernel, monkeypatch):
    """Not by cuDNN's, which PyTorch prefers there: it can end in an illegal memory access."""
    config = FluxConfig(
        path=str(ROOT / "assets" / "tiny-flux"), height=64, width=64, max_sequence_length=10
    )
    config = replace(config, dtype=dtype)
    velocities = []
    for available in (False, True):
        with monkeypatch.context() as patched:
            patched.setattr(
                "flowalign.models.attention.prefers_cudnn", lambda found=available: found
            )
            policy = Policy(load_model(config), Sampler(steps=2))
        processors = policy.model.transformer.attn_processors.values()
        assert {p._attention_backend for p in processors} == {kernel if available else "native"}
        x = torch.ones(2, *policy.model.latent_shape)
        velocities.append(
            policy.at("reference").velocity(x, x[:, 0, 0, 0] / 2, policy.encode(TEXTS))
        )
    assert torch.equal(*velocities)
