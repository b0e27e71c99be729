"""What is special to Qwen-Image 2.1: its calls depend on the length of a prompt."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from torch.testing import assert_close

from flowalign.diagnostics.meta_model import CALLS, flops, MetaModel
from flowalign.errors import UserError
from flowalign.models import load_model
from flowalign.policy import Policy, Sampler
from tests.tiny import random_qwen_image, random_qwen_image21, random_z_image, stir

TEXTS = ["a red circle", "two blue squares left of a green triangle", "a red square", "", "a"]
LONG = " ".join(["circle"] * 40)


@pytest.fixture
def model(tmp_path) -> Any:
    return random_qwen_image21(tmp_path)


def noise(model: Any, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, *model.latent_shape, generator=generator)
    return x, torch.rand(count, generator=generator)


def test_a_prompt_beside_longer_ones_has_the_velocity_that_it_has_alone(model):
    x, t = noise(model, len(TEXTS))
    together = model.velocity(x, t, model.encode(TEXTS))
    for row, text in enumerate(TEXTS):
        alone = model.velocity(x[row : row + 1], t[row : row + 1], model.encode([text]))
        assert_close(together[row], alone[0], atol=1e-6, rtol=0)
    # The transformer itself does not do that: its pictures begin after the padding.
    inputs = model.encode(TEXTS[:1]).inputs
    padded = {**inputs, "tokens": inputs["tokens"] + 8}
    change = model.forward(x[:1], t[:1], padded) - together[:1]
    assert change.abs().max() > 1e-3


def test_texts_have_the_embeddings_of_the_pipeline(model):
    for text in TEXTS:
        row = model.encode_texts([text])
        theirs = model.pipe.encode_prompt([text])[0]
        assert int(row["tokens"]) == theirs.shape[1]
        assert_close(row["embeds"][:, : theirs.shape[1]], theirs, atol=1e-6, rtol=0)
        assert not row["embeds"][:, theirs.shape[1] :].any()


def test_pictures_are_encoded_as_opaque_ones(model):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    opaque = torch.cat([images, torch.ones(2, 1, 64, 64)], 1)
    theirs = model.pipe._encode_vae_image(opaque[:, :, None] * 2 - 1, None)
    assert torch.equal(model.encode_images(images), theirs[:, :, 0])


def test_a_prompt_that_is_too_long_is_cut_within_the_template(model):
    cut = model.encode([LONG]).inputs
    assert cut["tokens"].tolist() == [32]
    # The template has twelve tokens without its instruction, which is not counted.
    shorter = model.encode([" ".join(["circle"] * 20)]).inputs
    assert torch.equal(cut["embeds"], shorter["embeds"])


def test_stored_embeddings_of_another_length_are_not_used(model):
    longer = load_model(replace(model.config, max_sequence_length=52))
    assert longer.text_fingerprint() != model.text_fingerprint()


def test_weights_that_are_split_over_processes_are_refused(model):
    with pytest.raises(UserError, match=r"Set it to false\."):
        model.shard(torch.device("cpu"))


def test_a_plan_counts_the_longest_prompts_in_one_call(model):
    meta = MetaModel(model.config)
    policy = Policy(meta, Sampler(steps=2))
    x, t = noise(meta, 2)
    with meta.ledger:
        policy.velocity(x, t, policy.encode(TEXTS[:2])).sum().backward()
    assert meta.texts["embeds"].shape == (1, 32, 32)
    assert [meta.ledger.work[call] for call in CALLS] == [0, 1, 1]
    assert flops(meta.ledger.work) > 0


def test_recomputed_blocks_have_the_same_gradients(model):
    gradients = []
    for recomputes in (False, True):
        config = replace(model.config, gradient_checkpointing=recomputes)
        torch.manual_seed(0)
        policy = Policy(load_model(config), Sampler(steps=2))
        stir(policy)
        x, t = noise(model, len(TEXTS))
        policy.velocity(x, t, policy.encode(TEXTS).guided(3.0)).square().mean().backward()
        gradients.append([parameter.grad for parameter in policy.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])


def test_back_ends_of_other_models_do_not_reach_this_one(model, tmp_path):
    x, t = noise(model, 2)
    cond = model.encode(TEXTS[:2])
    v = model.velocity(x, t, cond)
    other = random_z_image(tmp_path / "other")
    load_model(replace(other.config, attention="_native_math"))
    assert torch.equal(model.velocity(x, t, cond), v)
    with attention_backend("_native_math"):
        changed = model.velocity(x, t, cond)
    assert not torch.equal(changed, v)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("make", [random_qwen_image, random_qwen_image21])
def test_one_step_is_refused_where_the_last_time_is_fixed(make, tmp_path):
    model = make(tmp_path)
    with pytest.raises(UserError, match="this model needs 2 or more"):
        model.schedule(1)
    assert model.schedule(2)[1] == pytest.approx(0.02)


def test_a_model_with_times_of_its_own_samples_with_them_as_its_pipeline_does(tmp_path):
    times = [1.0, 0.9, 0.4]
    model: Any = random_qwen_image21(tmp_path, times)
    assert model.is_step_distilled
    scheduler = model.pipe.scheduler
    with torch.no_grad():
        model.pipe("a red circle", height=64, width=64, output_type="latent")
    assert model.schedule(3) == scheduler.sigmas.tolist()
    with pytest.raises(UserError, match=r"Set it to 3\."):
        model.schedule(4)
