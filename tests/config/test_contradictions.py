"""Settings that contradict each other are answered with what to change."""

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flowalign.bundled import CONFIGS
from tests.config.wrong import (
    examples,
    explains,
    loaded,
    refusal,
    resolved,
    SCENE,
    SHIPPED,
)

STOCHASTIC = [path for path in SHIPPED if loaded(path).objective.needs_stochastic_steps]
GIVEN = [path for path in SHIPPED if loaded(path).data.pairs]
COMPARING = [
    path
    for path in SHIPPED
    if not loaded(path).data.pairs and loaded(path).train.images_per_prompt > 1
]


@examples(30)
@given(
    path=st.sampled_from(STOCHASTIC),
    dynamics=st.sampled_from(["ode", "flow_sde", "dance_sde", "cps"]),
)
def test_an_objective_of_stochastic_steps_refuses_a_sampler_without(path, dynamics):
    section = {"name": dynamics} | ({"eta": 0.0} if dynamics != "ode" else {})
    message = refusal(resolved(path), f"sampler.dynamics={section}")
    assert explains(
        message,
        "sampler.dynamics has none. Write for example sampler: {dynamics: {name: flow_sde}}",
    )


@examples(30)
@given(
    path=st.sampled_from(COMPARING),
    pairs=st.sampled_from(["assets/pairs/train.parquet", "nowhere.jsonl"]),
)
def test_pairs_for_an_objective_that_makes_its_own_images_are_refused(path, pairs):
    message = refusal(resolved(path), f"data.pairs={pairs}")
    either = ("remove data.pairs", "write images_per_prompt: 1")
    assert "data.pairs" in message
    assert any(advice in message for advice in either)


@examples(15)
@given(path=st.sampled_from(GIVEN))
def test_an_objective_of_given_pictures_needs_them(path):
    message = refusal(resolved(path), "data.pairs=''", "data.prompts=''")
    assert "data.pairs is missing" in message or "data.prompts is missing" in message


@examples(30)
@given(
    path=st.sampled_from(COMPARING),
    key=st.sampled_from(["rewards={}", "train.images_per_prompt=1", "data.prompts=''"]),
)
def test_a_comparison_without_what_it_needs_is_refused(path, key):
    assert explains(refusal(resolved(path), key), key.partition("=")[0])


@examples(30)
@given(path=st.sampled_from(GIVEN), count=st.integers(2, 1000))
def test_given_pictures_have_one_image_per_prompt(path, count):
    assert explains(
        refusal(resolved(path), f"train.images_per_prompt={count}"),
        "train.images_per_prompt is",
        "images_per_prompt: 1",
    )


@examples(40)
@given(
    prompts=st.integers(1, 60),
    images=st.integers(2, 24),
    updates=st.integers(2, 5),
)
def test_prompts_that_updates_cannot_share_are_answered_with_the_nearest_that_they_can(
    prompts, images, updates
):
    assume(prompts % updates)
    counts = {
        "prompts_per_step": prompts,
        "images_per_prompt": images,
        "updates_per_step": updates,
    }
    raw = resolved(CONFIGS / "tiny" / "nft.yaml") | SCENE
    raw["train"] |= counts
    message = refusal(raw)
    assert f"train.prompts_per_step is {prompts}" in message
    nearest = [int(number) for number in re.findall(r"\d+", message.rpartition(":")[2])]
    assert nearest
    assert all(number > 0 and number % updates == 0 for number in nearest)


@examples(20)
@given(
    path=st.sampled_from([p for p in SHIPPED if loaded(p).model.name == "sd3"]),
    where=st.sampled_from(["", "evaluation."]),
)
def test_embedded_guidance_for_a_model_that_has_none_is_refused(path, where):
    message = refusal(resolved(path), f"{where}sampler.embedded_guidance=2.5")
    assert explains(message, "sampler.embedded_guidance is 2.5", "write guidance")


CONTRADICTIONS = [
    ("ddpo", ["train.updates_per_step=2"], "train.updates_per_step is 2"),
    (
        "nft",
        ["sampler.same_noise=true"],
        "sampler.same_noise is true, but sampler.dynamics adds no noise",
    ),
    (
        "draft_lv",
        ["sampler.same_noise=true"],
        "sampler.same_noise is true, but sampler.dynamics adds no noise",
    ),
    (
        "nft",
        ["train.updates_per_step=2", "objective.old.every=3"],
        "the snapshot old follows every 3 updates, but snapshots follow once a step",
    ),
    (
        "dpo",
        ["train.updates_per_step=2", "objective.reference.every=3"],
        "the snapshot moving_reference follows every 3 updates, but snapshots follow once a step",
    ),
    (
        "alignprop",
        ["objective={name: alignprop, distribution: fixed, start: 1}"],
        "objective.start is 1, from which distribution fixed draws none of the sampler's 8 steps",
    ),
    (
        "crd",
        ["train.updates_per_step=2", "objective.sampler.every=3"],
        "the snapshot sampler follows every 3 updates, but snapshots follow once a step",
    ),
    ("draft_lv", ["sampler.steps=3"], "objective.step is -5, but sampler.steps is 3"),
    ("alignprop", ["objective.depth=9"], "objective.depth is 9, but sampler.steps is 8"),
    (
        "flow_grpo",
        ["sampler.window.range=[0, 30]"],
        "sampler.window.range is [0, 30], but sampler.steps is 8",
    ),
    ("flow_grpo", ["sampler.window.range=[3, 2]"], "sampler.window.range is [3, 2]"),
    ("flow_grpo", ["sampler.window.size=4"], "sampler.window.size is 4"),
    ("flow_grpo", ["sampler.steps=1", "sampler.window.range=[0, 0]"], "sampler.steps is 1"),
    ("d3po", ["data.ranking.top=7"], "data.ranking.top is 7, but a prompt has 12 images; write 6"),
    ("crd", ["objective.kl_least=1.5"], "objective.kl_least is 1.5"),
    (
        "crd",
        ["objective.kl=0.5"],
        "write one or more of objective.kl: {weight: ..., guidance: ...}",
    ),
    ("crd", ["objective.old=0.9"], "write one or more of objective.old: {start: ..., value: ..., "),
    (
        "flow_grpo",
        ["train.ema=0.9"],
        "write one or more of train.ema: {decay: ..., every: ..., warmup: ...}",
    ),
    (
        "raft",
        ["objective.keep=12"],
        "train.images_per_prompt is 12, but images of the same prompt are compared; use 13",
    ),
    ("nft", ["objective={name: draft_k}"], "Here it is objective: {name: alignprop, depth: K}"),
    (
        "nft",
        ["objective={name: GRPO-Guard}"],
        "Here it is objective: {name: flow_grpo, ratio: normalised, step_weight: inverse",
    ),
    ("nft", ["objective={name: gdpo}"], "Here it is advantage: {name: gdpo}"),
    (
        "nft",
        ["advantage={name: Pref-GRPO}"],
        'Here it is a reward with @traits(level="pairwise"), and advantage: {std: group}',
    ),
    ("nft", ["objective={name: NFT}"], "Did you mean 'nft'?"),
    (
        "dpo",
        ["data.pairs=''", "data.prompts=''", "train.images_per_prompt=2"],
        "data.prompts is missing; write a file with a",
    ),
    ("crd", ["objective.old={value: 0.9, end: 0.5}"], "objective.old.value is 0.9, but end is 0.5"),
    ("refl", ["objective.low=0.9"], "objective.low is 0.9 and high is 0.65"),
    (
        "crd",
        ["objective.times.shared=false"],
        "objective.times.shared is false, but the images of a prompt are compared",
    ),
    (
        "dgpo",
        ["objective.times.shared=false"],
        "objective.times.shared is false, but the images of a prompt are compared",
    ),
    (
        "nft",
        ["objective.times={low: 0.6, high: 0.6}"],
        "objective.times.low is 0.6 and high is 0.6",
    ),
    ("flow_grpo_flux", ["model.max_sequence_length=0"], "model.max_sequence_length is 0"),
    ("nft", ["model.attention=flash"], "model.attention is 'flash'; choose from native, xformers"),
    ("flow_grpo_flux", ["model.attention=natve"], "Did you mean 'native'?"),
    ("nft", ["rewards={'a.py:good': 1, 'b.py:good': 1}"], "rewards: two rewards are called 'good'"),
    (
        "nft",
        ["evaluation.rewards={'a.py:good': 1, 'b.py:good': 1}"],
        "evaluation.rewards: two rewards are called 'good'",
    ),
    ("nft", ["rewards={mine: {reward: scene_mach}}"], "rewards: there is no reward 'scene_mach'"),
    ("nft", ["rewards={mine: {reward: 3}}"], "rewards: there is no reward 3"),
    ("nft", ["rewards={mine: {reward: null}}"], "rewards: there is no reward None"),
    ("nft", ["rewards={mine: {reward: {a: 1}}}"], "rewards: there is no reward {'a': 1}"),
    (
        "nft",
        ["combine={name: minimum}", "advantage={name: gdpo}"],
        "combine.name is minimum, but advantage.name gdpo weighs",
    ),
    ("nft", ["combine={name: gate}"], "combine.base is empty. Write thresholds"),
    (
        "nft",
        ["combine={name: gate, base: {scene_mtch: 1}}"],
        "combine.base names 'scene_mtch', which is not a reward",
    ),
    (
        "nft",
        ["combine={name: constrained, at_least: {scene_match: .nan}}"],
        "combine.at_least.scene_match is nan",
    ),
    ("alignprop", ["combine={name: normalised}"], "combine.name is normalised"),
    (
        "nft",
        ["evaluation.sampler={dynamics: {name: ode}}"],
        "Key evaluation.sampler.dynamics is not known",
    ),
    ("nft", ["output=README.md"], "output is 'README.md', which cannot be a folder"),
    ("nft", ["output=README.md/run"], "output is 'README.md/run', which cannot be a folder"),
    ("nft", [f"output={'a' * 300}"], "which cannot be a folder"),
    ("nft", ['output="a\\0b"'], "which cannot be a folder"),
    *(
        ("nft", [f"{key}={{name: 'flowalign.flow:mean_square'}}"], f"{key}.name: {message}")
        for key, message in (
            ("objective", "flowalign.flow:mean_square must be a subclass of"),
            ("combine", "flowalign.flow:mean_square must be a subclass of"),
            ("advantage", "flowalign.flow:mean_square must be a function of (rewards, group)"),
            (
                "sampler.dynamics",
                "flowalign.flow:mean_square must be a function of (x, v, t, s)",
            ),
        )
    ),
    *(
        (
            "nft",
            [f"{key}={{name: 'os:getcwd'}}"],
            f"{key}.name: os:getcwd belongs to Python's standard library",
        )
        for key in ("objective", "combine", "advantage", "sampler.dynamics", "model")
    ),
    (
        "nft",
        ["train.stop={eval/scene_match: {faling: 2}}"],
        "train.stop.eval/scene_match.faling is not known. Did you mean 'falling'",
    ),
    (
        "nft",
        ["train.stop={eval/scene_match: {above: .nan}}"],
        "train.stop.eval/scene_match.above is nan",
    ),
]


def test_an_objective_is_written_with_its_name():
    message = refusal(resolved(CONFIGS / "tiny" / "nft.yaml"), "objective=crd")
    assert explains(message, "objective is 'crd'; write objective: {name: crd}.")


def test_a_key_is_found_by_its_initials():
    assert explains(
        refusal(resolved(CONFIGS / "tiny" / "nft.yaml"), "train.lr=1e-3"),
        "Did you mean 'learning_rate'?",
    )


@pytest.mark.parametrize(
    ("file", "overrides", "expected"), CONTRADICTIONS, ids=lambda value: str(value)[:40]
)
def test_settings_that_contradict_each_other_are_refused(file, overrides, expected, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    assert explains(refusal(resolved(CONFIGS / "tiny" / f"{file}.yaml"), *overrides), expected)
