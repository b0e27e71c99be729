"""Negative prompts: diffusers' pictures, several in one batch, and none."""

from functools import partial

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.testing import assert_close

from flowalign.batch import Keys
from flowalign.cli import main
from flowalign.config.load import load_config
from flowalign.data.prompts import Prompt, read_prompts
from flowalign.errors import UserError
from flowalign.evaluation.evaluator import Evaluator
from flowalign.policy import Policy, Sampler
from flowalign.rollouts.collect import collect, make_prompts
from flowalign.runs.adapter_card import adapter_card
from flowalign.sampling.generate import make_scorer
from tests.tiny import make_policy, random_flux, random_sana, random_sd35, small_config, TEXTS

NEGATIVE = "two green triangles"
KEYS = Keys.training(seed=0, step=0, members=[(0, 0), (1, 0)])


def sample(policy: Policy, *metadata: dict[str, str]):
    """The noise and the pictures of two prompts with some metadata."""
    members = [Prompt(text, own) for text, own in zip(TEXTS, metadata, strict=True)]
    prompts = make_prompts(policy, members, KEYS)
    noise = policy.initial_noise(prompts, "rollout")
    return noise, collect(policy, prompts, 2).x0


@pytest.mark.parametrize(
    "make", [random_sd35, partial(random_flux, guidance_embeds=False), random_sana]
)
def test_the_picture_is_that_of_diffusers_with_the_negative_prompt(make, tmp_path):
    model = make(tmp_path)
    sampler = Sampler(steps=3, guidance=3.0, negative_prompt=NEGATIVE)
    policy = Policy(model, sampler)
    noise, x0 = sample(policy, {}, {})
    call = model.pipeline_call(model.config, 3, 3.0, sampler.embedded_guidance)
    calling = {**call.calling, "negative_prompt": [NEGATIVE] * 2}
    if call.scheduler is not None:
        model.pipe.scheduler = FlowMatchEulerDiscreteScheduler(**call.scheduler)
    packed = model.pipe._pack_latents(noise, *noise.shape) if "true_cfg_scale" in calling else noise
    theirs = model.pipe(TEXTS, latents=packed.clone(), output_type="pt", **calling).images
    with torch.no_grad():
        assert_close(policy.decode(x0), theirs, atol=1e-4, rtol=0)
    assert not torch.equal(x0, sample(policy.sampling(Sampler(steps=3, guidance=3.0)), {}, {})[1])


def test_prompts_of_one_batch_have_their_own_negative_prompts():
    policy = make_policy(Sampler(steps=3, guidance=3.0, negative_prompt=NEGATIVE))
    own = {"negative_prompt": "a blue square"}
    _, both = sample(policy, own, {"negative_prompt": None})
    _, first = sample(policy, own, own)
    _, second = sample(policy, {}, {})
    assert_close(both[0], first[0], atol=1e-5, rtol=0)
    assert_close(both[1], second[1], atol=1e-5, rtol=0)
    assert (first[0] - second[0]).abs().max() > 1e-2
    cond = policy.encode(TEXTS, metadata=[own, {}])
    assert [len(rows.table["embeds"]) for rows in cond.rows] == [2, 2]


def test_the_empty_negative_prompt_is_the_empty_prompt_bit_for_bit():
    policy = make_policy(Sampler(steps=3, guidance=3.0))
    cond = policy.encode(TEXTS)
    written = policy.encode(TEXTS, metadata=[{"negative_prompt": ""}] * 2)
    for one, other in zip(cond.rows, written.rows, strict=True):
        assert torch.equal(one.index, other.index)
        assert all(torch.equal(one.table[name], other.table[name]) for name in one.table)
    # One row for all images, as before there were negative prompts.
    assert len(cond.rows[1].table["embeds"]) == 1
    assert torch.equal(cond.null["embeds"][0], policy.encode(["", ""]).inputs["embeds"][0])


def test_evaluations_use_the_negative_prompts_of_their_file(tmp_path):
    (tmp_path / "p.csv").write_text(f"prompt,negative_prompt\n{TEXTS[0]},{NEGATIVE}\n")
    prompts = read_prompts(tmp_path / "p.csv")
    policy = make_policy(Sampler(steps=2, guidance=3.0))
    evaluator = Evaluator(
        prompts=prompts, images_per_prompt=1, scorer=make_scorer([], 1), images_per_pass=1, seed=0
    )
    (own,) = evaluator.sample(policy)
    (general,) = Evaluator(
        prompts=[Prompt(TEXTS[0])],
        images_per_prompt=1,
        scorer=make_scorer([], 1),
        images_per_pass=1,
        seed=0,
    ).sample(policy.sampling(Sampler(steps=2, guidance=3.0, negative_prompt=NEGATIVE)))
    assert torch.equal(own.x0, general.x0)


def test_a_negative_prompt_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "negative_prompt": 3}\n')
    with pytest.raises(UserError, match=r"line 1 has the negative_prompt 3\. Write a text"):
        read_prompts(tmp_path / "p.jsonl")


def test_a_negative_prompt_without_guidance_is_noted_and_refused_by_sample(tmp_path, capsys):
    without = ["sampler.negative_prompt=ugly", "evaluation.guidance_sweep=[]"]
    notes = load_config("configs/tiny/flow_grpo.yaml", without).notes
    assert any("`sampler.negative_prompt` is not used without guidance" in note for note in notes)
    guided = [*without, "evaluation.sampler.guidance=2.0"]
    assert load_config("configs/tiny/flow_grpo.yaml", guided).notes == []
    command = ["sample", "assets/tiny-sd3", "a", "--negative-prompt", "ugly", "--steps", "1"]
    assert main([*command, "--guidance", "1", "--output", str(tmp_path / "out")]) == 2
    assert "The negative prompt would have no effect" in capsys.readouterr().err


def test_the_card_of_a_guided_run_has_the_negative_prompt(tmp_path):
    config = small_config(tmp_path, "sampler.negative_prompt=ugly", "sampler.guidance=2.0")
    assert "negative_prompt='ugly'" in adapter_card(config, tmp_path / "adapter")
