"""Which step is exported, and what a run says about a better one."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from flowalign.cli import main
from flowalign.config.load import load_config
from flowalign.data.prompts import read_prompts
from flowalign.evaluation.halves import split_prompts
from flowalign.evaluation.results import EvaluationResult
from flowalign.reporting.trackers import read_metrics
from flowalign.runs.adapter import ADAPTER_FILE
from flowalign.training import trainer
from tests.tiny import ROOT, small_config

PROMPTS = "assets/prompts/evaluation.jsonl"
SETTINGS = [
    f"evaluation.prompts={PROMPTS}",
    "train.evaluate_every=1",
    "train.save_every=1",
    "train.keep=1",
    "train.ema.decay=0",
]


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A run whose learning rate rose after its first step, which spoilt its pictures."""
    run = tmp_path_factory.mktemp("runs") / "my run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        short = [*SETTINGS, "train.steps=1", "train.learning_rate=1e-6"]
        assert trainer.train(small_config(run, *short))["better_step"] is None
        trainer.train(small_config(run, *SETTINGS, "train.steps=3", "train.learning_rate=0.3"))
    return run


def summary_of(run):
    return json.loads((run / "summary.json").read_text())


def halves_of_prompts():
    return split_prompts([prompt.text for prompt in read_prompts(PROMPTS)])


def test_a_run_that_ends_below_its_best_names_the_command_for_the_better_step(broken, capsys):
    summary = summary_of(broken)
    better = summary["better_step"]
    assert (summary["step"], summary["chosen_by"], better["step"]) == (3, "", 1)
    assert max(better["change"]) < 0
    command = f"flowalign export '{broken}' --step 1"
    assert command.replace("'", "&#39;") in (broken / "report.html").read_text()
    # The checkpoint is kept, although train.keep is 1.
    assert main(["export", str(broken), "--step", "1"]) == 0
    exported = load_file(broken / "adapter-step-000001" / ADAPTER_FILE)
    kept = load_file(broken / "checkpoints" / "step-000001" / ADAPTER_FILE)
    assert all(torch.equal(exported[key], kept[key]) for key in kept if "lora_A" in key)


def test_the_change_is_measured_on_the_prompts_that_did_not_choose(broken):
    better = summary_of(broken)["better_step"]
    first, last = (
        EvaluationResult.load(broken / "evaluation" / f"step-{step:06d}.safetensors")
        for step in (1, better["step"] + 2)
    )
    measured = [halves_of_prompts().measure(result).means for result in (first, last)]
    name = better["metric"]
    assert better["change"][1] == pytest.approx(measured[1][name] - measured[0][name], abs=1e-6)
    line = read_metrics(broken)[0]
    assert line[f"selection/{name}"] == halves_of_prompts().choose(first).means[name]
    assert line[f"eval/{name}"] == first.means[name]


def test_the_best_step_is_exported_with_figures_of_the_other_half(broken, tmp_path, capsys):
    run = shutil.copytree(broken, tmp_path / "best")
    settings = [*SETTINGS, "train.steps=3", "train.learning_rate=0.3", "train.export=best"]
    summary = trainer.train(small_config(run, *settings))
    name = summary["chosen_by"].removeprefix("eval/")
    assert (summary["step"], summary["better_step"]) == (1, None)
    files = [run / "evaluation" / f"{name}.safetensors" for name in ("before", "step-000001")]
    before, after = (halves_of_prompts().measure(EvaluationResult.load(file)) for file in files)
    assert summary["before"][name] == pytest.approx(before.means[name], abs=1e-6)
    assert summary["after"][name] == pytest.approx(after.means[name], abs=1e-6)
    exported, kept = (
        load_file(run / folder / ADAPTER_FILE) for folder in ("adapter", "checkpoints/step-000001")
    )
    assert all(torch.equal(exported[key], kept[key]) for key in kept if "lora_A" in key)
    out = capsys.readouterr().out
    assert f"Step 1 was chosen by eval/{name} on one half of the evaluation prompts." in out
    assert f"intervals (±) rest on {after.scored_prompts} prompts." in out


def test_a_damaged_evaluation_of_a_step_costs_its_note_and_not_the_export(broken, tmp_path):
    run = shutil.copytree(broken, tmp_path / "damaged")
    shutil.rmtree(run / "adapter")
    (run / "evaluation" / "step-000001.safetensors").write_bytes(b"{")
    settings = [*SETTINGS, "train.steps=3", "train.learning_rate=0.3"]
    assert trainer.train(small_config(run, *settings))["better_step"] is None
    assert (run / "adapter" / ADAPTER_FILE).is_file()


@pytest.mark.slow
def test_a_run_that_resumes_with_another_metric_knows_the_steps_before(broken, tmp_path):
    run = shutil.copytree(broken, tmp_path / "other")
    settings = [*SETTINGS, "train.steps=3", "train.learning_rate=0.3"]
    rule = "train.stop={eval/scene_match_graded: {falling: 9}}"
    summary = trainer.train(small_config(run, *settings, rule))
    assert (summary["step"], summary["chosen_by"]) == (1, "eval/scene_match_graded")


@pytest.mark.slow
def test_the_best_step_of_a_resumed_run_is_that_of_a_run_without_a_stop(tmp_path):
    settings = ["train.evaluate_every=1", "train.save_every=1", "train.learning_rate=3e-2"]
    settings += ["train.export=best", "train.ema.decay=0"]
    whole = trainer.train(small_config(tmp_path / "whole", *settings, "train.steps=4"))
    trainer.train(small_config(tmp_path / "parts", *settings, "train.steps=2"))
    parts = trainer.train(small_config(tmp_path / "parts", *settings, "train.steps=4"))
    for key in ("step", "before", "after", "difference", "chosen_by"):
        assert parts[key] == whole[key], key
    adapters = [tmp_path / name / "adapter" / ADAPTER_FILE for name in ("whole", "parts")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.export=first"], "train.export"),
        (["train.export=best"], "train.export: best looks at evaluations, but"),
        (["train.export=best", "train.evaluate_every=1", "one"], "holds one prompt"),
    ],
)
def test_a_choice_that_cannot_be_made_is_answered(overrides, message, tmp_path, capsys):
    if overrides[-1] == "one":
        (tmp_path / "one.txt").write_text("a red circle\na red circle\n")
        overrides = [*overrides[:-1], f"evaluation.prompts={tmp_path}/one.txt"]
    config = ROOT / "configs" / "tiny" / "flow_grpo.yaml"
    settings = ["train.steps=2", "train.evaluate_every=0", f"output={tmp_path / 'run'}"]
    assert main(["train", str(config), *settings, *overrides]) == 2
    assert message in capsys.readouterr().err


def test_rules_for_stopping_choose_the_best_step_too(tmp_path):
    rules = ["train.stop={kl: {above: 9}}", "train.evaluate_every=1"]
    assert not small_config(tmp_path / "run").train.exports_best
    assert small_config(tmp_path / "run", *rules).train.exports_best
    assert load_config("configs/tiny/flow_grpo.yaml").train.export == "last"
