"""The report of a run folder: while the run trains, after Ctrl-C, and with parts missing."""

import json
import os
import shutil
import signal

import pytest

from flowalign.config.changes import Changes
from flowalign.config.load import load_config
from flowalign.evaluation.results import EvaluationResult
from flowalign.reporting.trackers import read_metrics
from flowalign.runs.folder import AFTER, BEFORE, evaluation_file, PROMPTS
from flowalign.runs.report import read_record, write_report
from flowalign.training import finish, trainer
from tests.hostile import assert_harmless
from tests.runs.damage import STEPS
from tests.tiny import small_config

REWARDS = ["rewards={brightness: 1.0}", "evaluation.rewards={brightness: 1.0}"]
QUICK = [*REWARDS, "sampler.steps=2", "sampler.window.range=[0, 1]", "evaluation.sampler.steps=2"]

LAST = "evaluation/step-000004.safetensors"


def page_of(run):
    return assert_harmless((run / "report.html").read_text(encoding="utf-8"))


def test_the_folder_of_a_run_keeps_prompts_changes_and_pictures_with_their_scores(finished):
    record = read_record(finished)
    config = small_config(finished)
    assert record.objective == "flow_grpo"
    assert [prompt.metadata.get("tag") for prompt in record.prompts].count(None) == 0
    assert record.changes.parent == "configs/base/tiny-online.yaml"
    assert record.changes.settings["train.steps"][1] == "4"
    assert record.before.thumbnails.keys() == record.after.thumbnails.keys()
    assert len(record.before.thumbnails) == len(record.prompts)
    assert set(record.before.figures) == {"velocity_norm", "velocity_moved"}
    for name in config.evaluation.rewards:
        assert f"eval/{name}" in record.metrics_before
        assert f"selection/{name}" in record.metrics_before


def test_every_evaluation_and_ctrl_c_write_the_report(tmp_path, monkeypatch):
    folder, pages = tmp_path / "run", []
    config = small_config(folder, *QUICK, "train.evaluate_every=2", "train.steps=50")
    run = trainer.prepare(config)
    source, write = run.source, finish.write_report

    def interrupted(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return source(step)

    def noting(*arguments):
        write(*arguments)
        pages.append(page_of(folder))

    run.source = interrupted
    monkeypatch.setattr(finish, "write_report", noting)
    summary = trainer.execute(run)
    begin, evaluated, ended = pages
    assert "The trained weights have not been evaluated yet." in begin.text
    assert "Still training: 12 images" in evaluated.text
    assert "The figures are of step 2." in evaluated.text
    assert "Interrupted after 18 images" in ended.text
    # The summary of an interrupted run has no figures, and its report those of the evaluation.
    assert summary["after"] == {}
    mean = read_metrics(folder)[1]["eval/brightness"]
    assert f"to {mean:.3f}" in evaluated.text
    assert f"to {mean:.3f}" in ended.text
    prompts = len(EvaluationResult.load(folder / BEFORE).prompt)
    # The base and the trained side, and both again in the gallery.
    assert (begin.count("img"), evaluated.count("img")) == (prompts, 4 * prompts)


@pytest.mark.parametrize(
    "missing",
    [
        [BEFORE],
        [AFTER, LAST],
        ["evaluation"],
        ["metrics.jsonl", "environment.json", "config.yaml", "changes.json"],
    ],
)
def test_a_folder_that_lacks_files_still_has_a_report(missing, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    for name in missing:
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    summary = json.loads((run / "summary.json").read_text())
    write_report(run, {**summary, "after": {}, "difference": {}}, ("scene_match", 1))
    page = page_of(run)
    has_both = (run / BEFORE).exists() and missing[0] != AFTER
    assert ("have not been evaluated yet" in page.text) != has_both


def test_a_damaged_or_foreign_file_costs_its_part_of_the_report(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    for name in (BEFORE, PROMPTS, "changes.json", "config.yaml"):
        (run / name).write_bytes(b"\xff{")
    record = read_record(run)
    assert (record.before, record.prompts, record.changes, record.objective) == (None, [], None, "")
    write_report(run, json.loads((run / "summary.json").read_text()))
    assert "prompt 1" in page_of(run).text


def test_the_gallery_has_steps_spread_over_training_up_to_the_last(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    lines = []
    for step in range(1, 21):
        lines.append({"step": step, "images": step, "eval/scene_match": 0.5})
        shutil.copy(finished / LAST, evaluation_file(run, step))
    # A crash left an evaluation of a step that is made again.
    shutil.copy(finished / LAST, evaluation_file(run, 25))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(read_record(run).steps) == [2, 5, 7, 10, 12, 15, 17, 20]


def test_the_changes_of_a_run_outlive_its_resumption_from_its_own_file(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    before = Changes.load(run)
    config = trainer.prepare(small_config(run, *STEPS)).config
    assert config.changes == before
    again = trainer.prepare(load_config(run / "config.yaml"))
    assert again.config.changes is None
    assert Changes.load(run) == before
