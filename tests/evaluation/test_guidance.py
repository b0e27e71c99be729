"""The guided base: how its guidance is chosen, what is kept of it, and what a run says about it."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from flowalign.advantages import group_advantage
from flowalign.config.load import load_config
from flowalign.data.prompts import Prompt
from flowalign.errors import RunError, UserError
from flowalign.evaluation import guidance
from flowalign.evaluation.evaluator import Evaluator
from flowalign.evaluation.guidance import GuidanceSweep, GuidedBaseline
from flowalign.evaluation.results import EvaluationResult
from flowalign.evaluation.statistics import paired_difference
from flowalign.files import read_json
from flowalign.policy import Policy, Sampler
from flowalign.reporting.summary import guidance_note
from flowalign.rewards.base import Reward
from flowalign.rewards.combine import WeightedSum
from flowalign.rewards.pixel_statistics import brightness, contrast
from flowalign.rollouts.scoring import RolloutScorer
from flowalign.runs.adapter import ADAPTER_FILE
from flowalign.runs.adapter_card import CARD
from flowalign.training import trainer
from tests.processes import run_process, TORCHRUN
from tests.runs.damage import cut, flip
from tests.tiny import make_policy, random_flux, ROOT, SMALL, small_config, TEXTS, TINY

SWEEP = "evaluation.guidance_sweep=[3, 7]"
CONTRAST = "evaluation.rewards={contrast: 1.0, scene_match_graded: 1.0}"
VIVIDNESS = """
def vividness(images, prompts, metadata):
    return images.std((1, 2, 3))
"""
"""A reward that rises with guidance in the few steps of these tests."""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache: its folder."""
    monkeypatch.setenv("FLOWALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def base():
    """The bundled model without adapter, with two sampler steps."""
    return make_policy(Sampler(steps=2)).at("reference")


def make_evaluator(prompts=TEXTS, rewards=(contrast, brightness), **changes):
    wrapped = [Reward(reward.__name__, reward) for reward in rewards]
    scorer = RolloutScorer(wrapped, WeightedSum(), group_advantage, 4, torch.device("cpu"))
    settings = {"images_per_prompt": 3, "images_per_pass": 4, "seed": 0, **changes}
    return Evaluator(prompts=[Prompt(text) for text in prompts], scorer=scorer, **settings)


def make_sweep(policy, evaluator=None, **changes):
    evaluator = evaluator or make_evaluator()
    before = evaluator.score(evaluator.sample(policy))
    # In so few steps, guided pictures have less contrast.
    settings = {"scales": [3.0, 7.0], "target": "contrast", "sign": -1, **changes}
    return GuidanceSweep(evaluator=evaluator, policy=policy, before=before, **settings)


def at(policy, **sampler):
    return policy.sampling(replace(policy.sampler, **sampler))


@pytest.fixture
def measured(monkeypatch):
    """The keys of the baselines that were measured and not read back."""
    keys, measure = [], GuidanceSweep.measure

    def counting(sweep, key):
        keys.append(key)
        return measure(sweep, key)

    monkeypatch.setattr(GuidanceSweep, "measure", counting)
    return keys


# how the guidance is chosen


@pytest.mark.parametrize("sign", [1, -1])
def test_the_guidance_with_the_best_target_is_chosen(base, sign, tmp_path):
    choice = make_sweep(base, sign=sign)(tmp_path / "guided").choice
    tuning = make_evaluator(images_per_prompt=2, purpose="tuning")
    scores = {
        scale: tuning.score(tuning.sample(at(base, guidance=scale))).means["contrast"]
        for scale in (1.0, 3.0, 7.0)
    }
    assert choice.scores == pytest.approx(scores, abs=1e-6)
    assert len(set(scores.values())) == 3
    assert choice.best == max(scores, key=lambda scale: sign * scores[scale])
    assert (choice.own, choice.target, choice.setting) == (1, "contrast", "guidance")


def test_the_baseline_is_the_whole_evaluation_at_that_guidance(base, tmp_path):
    guided = make_sweep(base)(tmp_path / "guided")
    evaluator = make_evaluator()
    expected = evaluator.score(evaluator.sample(at(base, guidance=guided.choice.best)))
    assert guided.choice.best != 1
    for name, values in expected.rewards.items():
        assert_close(guided.result.rewards[name], values, atol=1e-4, rtol=0)
    assert (guided.result.images.int() - expected.images.int()).abs().max() <= 1
    assert torch.equal(guided.result.prompt, expected.prompt)


def test_no_image_that_chooses_is_an_image_that_is_reported(base):
    """Otherwise the luck of the choice would be part of the report."""
    evaluator = make_evaluator()
    (reported,), (tuning,) = (
        list(replace(entry, images_per_pass=99).sample(base))
        for entry in (evaluator, evaluator.for_tuning("contrast"))
    )
    assert (len(reported), len(tuning)) == (6, 4)
    starts = [batch.images.flatten(1) for batch in (reported, tuning)]
    equal = (starts[0][:, None] == starts[1][None]).all(2)
    assert not equal.any()


def test_the_choice_takes_few_images_spread_over_the_prompts_and_one_reward():
    evaluator = make_evaluator([f"prompt {number}" for number in range(150)])
    tuning = evaluator.for_tuning("brightness")
    assert [prompt.text for prompt in tuning.prompts] == [f"prompt {n}" for n in range(0, 150, 3)]
    assert tuning.images_per_prompt == 2
    assert [reward.name for reward in tuning.scorer.rewards] == ["brightness"]
    assert make_evaluator(images_per_prompt=1).for_tuning("contrast").images_per_prompt == 1


def test_no_forward_is_larger_than_those_of_the_run_s_own_evaluation(base, monkeypatch, tmp_path):
    """A run without guidance has room for its own passes, and a guided image takes two rows."""
    sweep, rows, forward = make_sweep(base), [], type(base.model).forward

    def counting(model, x, t, inputs):
        rows.append(len(x))
        return forward(model, x, t, inputs)

    monkeypatch.setattr(type(base.model), "forward", counting)
    sweep(tmp_path / "guided")
    assert max(rows) == sweep.evaluator.images_per_pass == 4


def test_the_own_guidance_wins_a_tie_and_costs_no_second_evaluation(base, tmp_path):
    def flat(images, prompts, metadata):
        return torch.ones(len(images))

    sweep = make_sweep(base, make_evaluator(rewards=[flat, contrast]), target="flat")
    guided = sweep(tmp_path / "guided")
    assert guided.choice.best == guided.choice.own == 1
    assert torch.equal(guided.result.rewards["contrast"], sweep.before.rewards["contrast"])


def test_a_guidance_without_scores_is_not_chosen(base, tmp_path):
    def unscored(images, prompts, metadata):
        return torch.full((len(images),), math.nan)

    choice = make_sweep(base, make_evaluator(rewards=[unscored]), target="unscored")(
        tmp_path / "guided"
    ).choice
    assert (choice.best, choice.scores) == (1, {})


def test_a_reward_that_fails_on_guided_images_alone_names_the_setting_that_leaves_them_out(
    base, tmp_path
):
    calls = []

    def fails(images, prompts, metadata):
        calls.append(len(images))
        # The unguided evaluation has two passes.
        return images.mean((1, 2, 3)) / (len(calls) <= 2)

    sweep = make_sweep(base, make_evaluator(rewards=[fails]), target="fails")
    with pytest.raises(RunError, match=r"evaluation\.guidance_sweep=\[\] leaves .* was infinite"):
        sweep(tmp_path / "guided")


def test_a_policy_that_samples_with_guidance_is_compared_with_other_scales(base, tmp_path):
    guided = make_sweep(at(base, guidance=7.0), scales=[3.0], sign=-1)(tmp_path / "guided")
    assert (guided.choice.own, guided.choice.best) == (7, 3)
    assert list(guided.choice.scores) == [7, 3]


def test_a_model_with_distilled_guidance_is_swept_over_its_embedded_scale(tmp_path):
    model = random_flux(tmp_path / "flux", guidance_embeds=True)
    policy = Policy(model, Sampler(steps=2)).at("reference")
    guided = make_sweep(policy, make_evaluator(["ab", "cd"]))(tmp_path / "guided")
    assert (guided.choice.setting, guided.choice.own) == ("embedded_guidance", 3.5)
    assert list(guided.choice.scores) == [3.5, 3, 7]
    assert len(set(guided.choice.scores.values())) == 3
    plain = random_flux(tmp_path / "plain", guidance_embeds=False)
    assert plain.guidance_setting == "guidance"


@pytest.mark.parametrize(
    ("overrides", "target"),
    [
        ([CONTRAST], ("contrast", 1)),
        (["evaluation.rewards={}"], ("scene_match", 1)),
        (
            [CONTRAST, "train.stop={eval/scene_match_graded: {falling: 2}}"],
            ("scene_match_graded", 1),
        ),
        ([CONTRAST, "train.stop={eval/contrast: {rising: 2}}"], ("contrast", -1)),
        ([CONTRAST, "train.stop={eval/velocity_moved: {rising: 2}}"], ("contrast", 1)),
    ],
)
def test_the_target_is_the_reward_that_a_run_is_about(overrides, target, tmp_path):
    config = small_config(tmp_path / "run", "train.evaluate_every=1", *overrides)
    assert config.target_reward == target


# what is kept


def test_the_next_run_with_the_same_base_does_not_measure_again(base, measured, tmp_path):
    first = make_sweep(base)(tmp_path / "first")
    second = make_sweep(base)(tmp_path / "second")
    assert len(measured) == 1
    assert second.choice == first.choice
    assert torch.equal(second.result.images, first.result.images)


CHANGES = {
    "prompts": lambda base: make_sweep(base, make_evaluator([*TEXTS, "a circle"])),
    "wording": lambda base: make_sweep(base, make_evaluator([TEXTS[0], f"{TEXTS[1]} "])),
    "seed": lambda base: make_sweep(base, make_evaluator(seed=1)),
    "images": lambda base: make_sweep(base, make_evaluator(images_per_prompt=2)),
    "rewards": lambda base: make_sweep(base, make_evaluator(rewards=[contrast])),
    "steps": lambda base: make_sweep(at(base, steps=3)),
    "own guidance": lambda base: make_sweep(at(base, guidance=3.0)),
    "scales": lambda base: make_sweep(base, scales=[3.0]),
    "target": lambda base: make_sweep(base, target="brightness"),
    "sign": lambda base: make_sweep(base, sign=1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_the_baseline_depends_on_is_in_its_key(change, base):
    assert CHANGES[change](base).key != make_sweep(base).key


def test_the_weights_of_the_model_are_in_the_key(base):
    key = make_sweep(base).key
    weight = next(base.model.transformer.parameters())
    kept = weight.detach().clone()
    weight.data += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    assert make_sweep(base).key != key
    weight.data.copy_(kept)
    assert make_sweep(base).key == key


def test_the_code_of_a_reward_and_of_the_family_s_guidance_is_in_the_key(base, monkeypatch):
    key = make_sweep(base).key

    def edited(images, prompts, metadata):
        return contrast(images, prompts, metadata) + 1e-3

    edited.__name__ = "contrast"
    assert make_sweep(base, make_evaluator(rewards=[edited, brightness])).key != key
    monkeypatch.setattr(type(base.model), "guide", lambda self, v, v_null, scale: v * scale)
    assert make_sweep(base).key != key


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip(folder / guidance.CHOICE),
        lambda folder: cut(folder / guidance.RESULT),
        lambda folder: (folder / guidance.RESULT).unlink(),
    ],
    ids=["flipped choice", "cut result", "no result"],
)
def test_a_damaged_baseline_is_measured_again_and_replaced(damage, base, measured, cache, tmp_path):
    sweep = make_sweep(base)
    sweep(tmp_path / "first")
    (kept,) = (cache / "guidance").iterdir()
    damage(kept)
    again = make_sweep(base)(tmp_path / "second")
    assert len(measured) == 2
    assert list((cache / "guidance").iterdir()) == [kept]
    assert GuidedBaseline.load(kept).choice == again.choice
    damage(tmp_path / "second")
    # The copy of the cache is whole, so it replaces that of the run.
    make_sweep(base)(tmp_path / "second")
    assert len(measured) == 2


def test_a_baseline_of_other_facts_is_not_taken(base, tmp_path):
    sweep = make_sweep(base)
    sweep(tmp_path / "guided")
    choice = tmp_path / "guided" / guidance.CHOICE
    facts = json.loads(choice.read_text())
    choice.write_text(json.dumps({**facts, "key": "0" * 64}))
    guidance.write_checksums(tmp_path / "guided")
    sweep(tmp_path / "guided")
    assert GuidedBaseline.load(tmp_path / "guided").choice.key == sweep.key
    choice.write_text(json.dumps({"key": sweep.key}))
    guidance.write_checksums(tmp_path / "guided")
    assert GuidedBaseline.load(tmp_path / "guided") is None


def test_a_cache_that_cannot_be_written_costs_a_run_nothing(base, cache, tmp_path, capsys):
    cache.write_text("a file where a folder should be")
    guided = make_sweep(base)(tmp_path / "guided")
    assert guided.choice.best in (3, 7)
    assert "not kept for other runs" in capsys.readouterr().out


def test_a_machine_without_a_folder_for_caches_costs_a_run_nothing(
    base, monkeypatch, tmp_path, capsys
):
    def homeless():
        raise UserError("The cache cannot be found.")

    monkeypatch.setattr(guidance, "cache_folder", homeless)
    sweep = make_sweep(base)
    assert sweep(tmp_path / "guided").choice == sweep(tmp_path / "guided").choice
    assert "not kept for other runs: The cache cannot be found." in capsys.readouterr().out


# runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with a second baseline: its folder, its summary and its rewards."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.with_name("own.py").write_text(VIVIDNESS)
    rewards = f'evaluation.rewards={{"{folder.with_name("own.py")}:vividness": 1, brightness: 1}}'
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("FLOWALIGN_CACHE", str(folder.with_name("cache")))
        summary = trainer.train(small_config(folder, SWEEP, rewards))
    return SimpleNamespace(folder=folder, summary=summary, rewards=rewards)


def test_the_summary_compares_the_trained_weights_with_both_baselines(run):
    written = read_json(run.folder / "summary.json")
    guided = written["baseline_guided"]
    assert written["difference"]["vividness"][1] == pytest.approx(
        written["after"]["vividness"] - written["before"]["vividness"], abs=1e-6
    )
    assert set(guided["means"]) == set(guided["difference"]) == set(written["before"])
    for name, (low, mean, high) in guided["difference"].items():
        assert mean == pytest.approx(written["after"][name] - guided["means"][name], abs=1e-6)
        assert low <= mean <= high
    assert guided["means"]["vividness"] > written["before"]["vividness"]
    assert guided["means"]["brightness"] < written["before"]["brightness"] - 0.01
    assert f"{guided['guidance']:g}" == max(guided["sweep"], key=guided["sweep"].get)
    assert (guided["own_guidance"], guided["chosen_by"], guided["chosen_on"]) == (1, "vividness", 6)


def test_the_report_shows_three_columns_and_says_what_they_are(run):
    page = (run.folder / "report.html").read_text()
    for head in ("base", "guided", "trained", "trained \u2212 base", "trained \u2212 guided"):
        assert f"<th>{head}</th>" in page
    note = guidance_note(run.summary["baseline_guided"])
    assert "on 6 prompts with other noise" in note
    assert note in page


def test_the_readme_of_the_adapter_shows_the_same_table(run):
    card = (run.folder / "adapter" / CARD).read_text(encoding="utf-8")
    (row,) = [line for line in card.splitlines() if line.startswith("| `vividness` |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    guided = run.summary["baseline_guided"]
    means = run.summary["before"], guided["means"], run.summary["after"]
    assert cells[1:4] == [f"{mean['vividness']:.3f}" for mean in means]
    differences = run.summary["difference"], guided["difference"]
    assert [cell.split()[0] for cell in cells[4:]] == [
        f"{difference['vividness'][1]:+.3f}" for difference in differences
    ]
    assert "by `vividness` on 6 prompts with other noise" in card


@pytest.mark.slow
def test_a_resumed_run_keeps_the_baseline_without_the_cache(run, measured, tmp_path):
    """The fixture of this module has emptied the cache."""
    assert not (tmp_path / "cache").exists()
    again = trainer.train(small_config(run.folder, SWEEP, run.rewards, "train.steps=3"))
    assert measured == []
    for key in ("guidance", "sweep", "means"):
        assert again["baseline_guided"][key] == run.summary["baseline_guided"][key]
    # Other scales are another baseline, and no reason to refuse the run.
    other = "evaluation.guidance_sweep=[2]"
    changed = trainer.train(small_config(run.folder, other, run.rewards, "train.steps=3"))
    assert len(measured) == 1
    assert list(changed["baseline_guided"]["sweep"]) == ["1", "2"]


@pytest.mark.slow
def test_a_chosen_step_is_compared_on_the_prompts_that_did_not_choose_it(run, tmp_path):
    overrides = ["train.export=best", "train.evaluate_every=1", SWEEP, run.rewards]
    summary = trainer.train(small_config(tmp_path / "run", *overrides))
    guided = summary["baseline_guided"]
    for name, (_, mean, _) in guided["difference"].items():
        assert mean == pytest.approx(summary["after"][name] - guided["means"][name], abs=1e-6)
    assert guided["means"] != run.summary["baseline_guided"]["means"]
    # What is kept for later runs has the scores of all prompts.
    result = EvaluationResult.load(tmp_path / "run" / "evaluation" / "guided" / guidance.RESULT)
    assert result.means == run.summary["baseline_guided"]["means"]


@pytest.mark.slow
def test_a_reward_edited_where_the_base_does_not_show_it_is_measured_again(run, measured, tmp_path):
    own, rewards = tmp_path / "own.py", []
    for limit in (1.0, 0.99):
        own.write_text(VIVIDNESS.replace("std((1, 2, 3))", f"std((1, 2, 3)).clamp(max={limit})"))
        rewards = f'evaluation.rewards={{"{own}:vividness": 1, brightness: 1}}'
        summary = trainer.train(small_config(tmp_path / f"{limit}", SWEEP, rewards))
        assert summary["before"] == run.summary["before"]
    assert len(set(measured)) == len(measured) == 2


def test_the_second_baseline_changes_no_other_number(run, tmp_path):
    summary = trainer.train(small_config(tmp_path / "run", run.rewards))
    assert summary["baseline_guided"] is None
    assert not (tmp_path / "run" / "evaluation" / "guided").exists()
    for key in ("before", "after", "difference"):
        assert summary[key] == run.summary[key]
    last = f"checkpoints/step-000002/{ADAPTER_FILE}"
    assert (tmp_path / "run" / last).read_bytes() == (run.folder / last).read_bytes()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<th>guided</th>" not in page


def test_a_run_without_rewards_has_no_second_baseline(tmp_path):
    run = trainer.prepare(small_config(tmp_path / "run", SWEEP))
    run.config.evaluation.rewards = {}
    assert run.evaluate_guided(run.evaluate_reference()) is None
    run.lock.release()


def test_scales_without_a_reward_that_could_choose_are_noted(tmp_path):
    overrides = [
        *("objective={name: sft}", "data={pairs: assets/pairs/evaluation.parquet}"),
        *("train.images_per_prompt=1", "rewards={}", "evaluation.rewards={}", SWEEP),
    ]
    notes = load_config(TINY, [*SMALL, *overrides]).notes
    assert any("evaluation.guidance_sweep" in note for note in notes)


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    command = ["train.py", str(TINY), *SMALL, "train.images_per_pass=3", SWEEP, CONTRAST]
    run_process([*TORCHRUN, *command, f"output={tmp_path / 'two'}"])
    two = read_json(tmp_path / "two" / "summary.json")["baseline_guided"]
    one = trainer.train(small_config(tmp_path / "one", "train.images_per_pass=3", SWEEP, CONTRAST))
    assert one["baseline_guided"] is not None
    assert two["guidance"] == one["baseline_guided"]["guidance"]
    assert two["means"] == pytest.approx(one["baseline_guided"]["means"], abs=1e-4)
    assert two["sweep"] == pytest.approx(one["baseline_guided"]["sweep"], abs=1e-4)


def test_the_paired_difference_has_only_figures_that_both_have(base):
    sweep = make_sweep(base)
    after = replace(sweep.before, held_out={"reconstruction_error": torch.ones(4)})
    assert set(paired_difference(sweep.before, after)) == {"contrast", "brightness"}
    assert set(paired_difference(after, after)) == {
        "contrast",
        "brightness",
        "reconstruction_error",
    }
