"""`flowalign compare`: differences between runs, or the reason why they cannot be compared."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file

import flowalign
from flowalign.cli import main
from flowalign.evaluation.guidance import GuidanceChoice, GuidedBaseline
from flowalign.evaluation.results import EvaluationResult
from flowalign.runs.comparable import compare_runs
from flowalign.runs.folder import BEFORE, GUIDED
from flowalign.training import trainer
from tests.hostile import assert_harmless, NAMES
from tests.runs.damage import STEPS
from tests.tiny import ROOT, small_config

AFTER = "evaluation/after.safetensors"


@pytest.fixture(scope="session")
def slower(finished, tmp_path_factory):
    """The run of `finished` with another learning rate."""
    run = tmp_path_factory.mktemp("runs") / "slower"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        trainer.train(small_config(run, *STEPS, "train.learning_rate=1e-3"))
    return run


@pytest.fixture
def two(finished, slower, tmp_path):
    """Copies of both runs, to change."""
    return [shutil.copytree(run, tmp_path / run.name) for run in (finished, slower)]


def edit_config(run, **sections):
    """Change values of config.yaml: `train={"seed": 3}`."""
    file = run / "config.yaml"
    config = yaml.safe_load(file.read_text())
    for name, values in sections.items():
        config[name] = {**config[name], **values}
    file.write_text(yaml.safe_dump(config))


def test_two_runs_of_different_learning_rates_are_compared(two, capsys):
    assert main(["compare", *map(str, two)]) == 0
    page = two[0].parent / "comparison.html"
    out = capsys.readouterr().out
    assert f"Page: {page}" in out
    assert "Differences are to whole, on the same prompts and noise." in out
    first, second = (EvaluationResult.load(run / AFTER).means for run in two)
    for name, mean in first.items():
        assert f"{second[name] - mean:+.3f}" in out
    shown = assert_harmless(page.read_text())
    assert "train.learning_rate" in shown.text
    assert "train.learning_rate0.010.001" in shown.text
    # Of each prompt: the model without adapter and both runs, and the gallery of both runs.
    prompts = len(EvaluationResult.load(two[0] / AFTER).prompt)
    assert shown.count("img") == 3 * prompts + 2 * 2 * prompts


def test_the_function_returns_the_figures(two, tmp_path):
    comparison = flowalign.compare(iter(two), tmp_path / "mine.html")
    summaries = [json.loads((run / "summary.json").read_text()) for run in two]
    assert comparison.runs == ["whole", "slower"]
    for name, before in summaries[0]["before"].items():
        assert comparison.untrained[name] == pytest.approx(before)
        means = [summary["after"][name] for summary in summaries]
        assert comparison.means["whole"][name] == pytest.approx(means[0])
        assert comparison.difference["slower"][name][1] == pytest.approx(
            means[1] - means[0], abs=1e-6
        )
    assert (tmp_path / "mine.html").is_file()


@pytest.mark.parametrize(("best", "shown"), [(3.0, True), (1.0, False)])
def test_the_guided_model_of_the_first_run_has_a_row(best, shown, two, capsys):
    before = EvaluationResult.load(two[0] / BEFORE)
    score, *_ = before.rewards
    choice = GuidanceChoice(
        key="", setting="guidance", own=1.0, best=best, target=score, prompts=2, scores={}
    )
    rewards = {score: torch.full_like(before.rewards[score], 0.375)}
    result = replace(before, rewards=rewards)
    GuidedBaseline(choice=choice, result=result).save(two[0] / GUIDED)
    assert main(["compare", *map(str, two)]) == 0
    out = capsys.readouterr().out
    page = (two[0].parent / "comparison.html").read_text()
    for text in ("no adapter, guided", "0.375", "Guided is the model at its best guidance, 3."):
        assert (text in out) == (text in page) == shown


def test_a_run_equals_its_copy_and_several_runs_may_be_compared(two, tmp_path):
    copy = shutil.copytree(two[0], tmp_path / "copy")
    comparison, _ = compare_runs([*two, copy])
    assert all(interval == (0, 0, 0) for interval in comparison.difference["copy"].values())


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"train": {"seed": 3}}, "train.seed is 0 and 3"),
        ({"model": {"dtype": "float16"}}, "model.dtype is float32 and float16"),
        ({"evaluation": {"images_per_prompt": 5}}, "evaluation.images_per_prompt is 1 and 5"),
        ({"evaluation": {"sampler": {"steps": 7}}}, "evaluation.sampler.steps is 4 and 7"),
        (
            {"evaluation": {"sampler": {"steps": 4, "guidance": 2.5}}},
            "evaluation.sampler.guidance is 1.0 and 2.5",
        ),
        (
            {"evaluation": {"rewards": {"scene_match": {"reward": "brightness"}}}},
            "evaluation.rewards.scene_match has other settings",
        ),
    ],
)
def test_runs_that_were_evaluated_otherwise_are_refused_by_name(sections, reason, two, capsys):
    edit_config(two[1], **sections)
    assert main(["compare", *map(str, two)]) == 2
    error = capsys.readouterr().err
    assert f"{two[0]} and {two[1]} were not evaluated in the same way: {reason}" in error
    assert "Traceback" not in error


def test_other_prompts_are_refused_though_their_file_has_the_same_name(two, capsys):
    state = two[1] / "checkpoints" / "step-000004" / "state.json"
    content = json.loads(state.read_text())
    content["files"]["evaluation.prompts"] = "0" * 64
    state.write_text(json.dumps(content))
    assert main(["compare", *map(str, two)]) == 2
    assert "the file of evaluation.prompts has changed between the runs" in capsys.readouterr().err


def test_the_path_of_the_model_does_not_matter_but_its_pictures_do(two, capsys):
    edit_config(two[1], model={"path": "elsewhere/tiny-sd3"})
    assert main(["compare", *map(str, two)]) == 0
    before = two[1] / "evaluation" / "before.safetensors"
    result = EvaluationResult.load(before)
    result.images = 255 - result.images
    result.save(before)
    assert main(["compare", *map(str, two)]) == 2
    assert "the model without an adapter makes other pictures" in capsys.readouterr().err


def test_a_comparison_runs_no_code_of_a_configuration(two, tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'hacked')!r}, 'w')\ndef f(*_): ...\n")
    code = f"{tmp_path}/evil.py:f"
    for run in two:
        edit_config(run, evaluation={"rewards": {"scene_match": {"reward": code}}})
        edit_config(run, objective={"name": code}, advantage={"name": code})
    compare_runs(two)
    assert not (tmp_path / "hacked").exists()


def test_what_is_not_a_finished_run_is_answered(two, tmp_path, capsys):
    (two[1] / AFTER).unlink()
    shutil.copytree(two[0], tmp_path / "other" / two[0].name)
    cases = {
        "slower has no evaluation": [two[1], two[0]],
        "is not a run, because it has no config.yaml": [two[0], tmp_path],
        "A comparison needs two runs": [two[0]],
        "is given twice": [two[0], two[0]],
    }
    for message, runs in cases.items():
        assert main(["compare", *map(str, runs)]) == 2
        assert message in capsys.readouterr().err
    assert main(["compare", str(two[0]), str(tmp_path / "other" / "whole")]) == 0
    out = capsys.readouterr().out
    assert "Differences are to whole, on" in out
    assert " other/whole " in out


def test_a_run_that_goes_on_is_not_compared_by_its_earlier_end(two, capsys):
    trainer.prepare(small_config(two[1], *STEPS, "train.learning_rate=1e-3", "train.steps=5"))
    assert main(["compare", *map(str, two)]) == 2
    assert "so this run is not finished" in capsys.readouterr().err


def test_runs_without_a_score_in_common_are_refused(two, capsys):
    for file in (AFTER, "evaluation/before.safetensors"):
        result = EvaluationResult.load(two[1] / file)
        result.rewards = {"other": torch.zeros(len(result.prompt))}
        result.save(two[1] / file)
    assert main(["compare", *map(str, two)]) == 2
    assert "have no evaluation score in common" in capsys.readouterr().err


@pytest.mark.parametrize("name", [NAMES[0], NAMES[2], NAMES[4], NAMES[10]])
def test_a_page_of_hostile_names_is_harmless(name, two):
    run = two[1].rename(two[1].with_name(name))
    file = run / "config.yaml"
    config = yaml.safe_load(file.read_text())
    config[name] = {name: name}
    file.write_text(yaml.safe_dump(config))
    _, page = compare_runs([two[0], run])
    text = assert_harmless(page.read_text(encoding="utf-8")).text
    assert text.count(name) >= 3


def test_the_files_of_a_finished_run_hold_every_evaluation(finished):
    names = sorted(file.name for file in (finished / "evaluation").iterdir())
    last = "step-000004.safetensors"
    assert names == ["after.safetensors", "before.safetensors", "prompts.jsonl", last]
    after, last = (load_file(finished / "evaluation" / name) for name in (names[0], last))
    assert len(after["images"])
    assert not len(last["images"])
    assert torch.equal(after["reward/scene_match"], last["reward/scene_match"])


def test_held_out_figures_of_other_pairs_are_left_out(two):
    for run in two:
        for file in (AFTER, "evaluation/before.safetensors"):
            result = EvaluationResult.load(run / file)
            result.held_out = {"error": torch.ones(3)}
            result.save(run / file)
    assert "error" in compare_runs(two)[0].scores
    edit_config(two[1], data={"pairs": "other_pairs"})
    assert "error" not in compare_runs(two)[0].scores


@pytest.mark.parametrize("figures", [["error"], ["error", "margin"]])
def test_a_held_out_tenth_is_not_compared_with_all_entries_or_with_pairs(two, figures):
    """Both runs name one file: as data and as evaluation, or for pictures and for pairs."""
    for run, names, count in zip(two, (["error"], figures), (3, 7), strict=True):
        for file in (AFTER, "evaluation/before.safetensors"):
            result = EvaluationResult.load(run / file)
            result.held_out = {name: torch.ones(count) for name in names}
            result.save(run / file)
    edit_config(two[0], data={"pairs": "pairs"})
    edit_config(two[1], **{"data" if figures[1:] else "evaluation": {"pairs": "pairs"}})
    assert "error" not in compare_runs(two)[0].scores
