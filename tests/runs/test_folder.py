"""Who may work in a run folder, and what a run may resume from."""

import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from flowalign.cli import main
from flowalign.config.load import load_config
from flowalign.config.paths import started_in
from flowalign.config.resolved import resolve
from flowalign.errors import UserError
from flowalign.files import with_checksum
from flowalign.reporting.trackers import read_metrics
from flowalign.runs.adapter_card import base_model
from flowalign.runs.checkpoint import checkpoints
from flowalign.runs.folder import input_checksums, read_config
from flowalign.runs.lock import FolderLock
from flowalign.sampling.sources import evaluation_prompts, find_source
from flowalign.settings.yaml_files import dump_yaml
from flowalign.training import trainer
from tests.runs.damage import cut, same_adapter, tensors, train_again
from tests.tiny import ROOT, SMALL, small_config, TINY


def test_a_folder_without_a_run_is_left_alone(tmp_path, capsys):
    texts = {"config.yaml": "mine: 1", "metrics.jsonl": "mine", "adapter/weights": "mine"}
    for name, text in texts.items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text(text)
    assert train_again(tmp_path / "run") == 2
    assert (
        f"{tmp_path}/run holds adapter, but not a run. Choose another folder: output="
        in capsys.readouterr().err
    )
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert {str(f.relative_to(tmp_path / "run")): f.read_text() for f in files} == texts


def test_a_run_that_had_no_checkpoint_yet_starts_again_in_its_folder(run, finished):
    shutil.rmtree(run / "checkpoints")
    assert train_again(run) == 0
    assert same_adapter(run, finished)


def test_two_runs_cannot_work_in_one_folder(run, capsys):
    hold = (
        "import sys; from pathlib import Path; from flowalign.runs.lock import FolderLock\n"
        "lock = FolderLock(Path(sys.argv[1])); lock.acquire(); print(); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, run], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline()
        assert train_again(run) == 2
        other.kill()
    assert (
        f"another run works in {run}. Wait until it ends, or choose another folder"
        in capsys.readouterr().err
    )
    assert train_again(run) == 0


def test_a_second_lock_is_refused_until_the_first_is_released(tmp_path):
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.acquire()
    with pytest.raises(UserError, match=f"another run works in {tmp_path}"):
        second.acquire()
    first.release()
    with second:
        second.acquire()
    first.acquire()
    first.release()


@pytest.mark.parametrize(
    "damaged",
    [
        b'{"step": 1, "lo',
        b"\xff\xfe{",
        *(pytest.param(line, marks=pytest.mark.slow) for line in (b"3", b"[]")),
    ],
)
def test_a_damaged_line_of_metrics_costs_no_other(damaged, run):
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    (run / "metrics.jsonl").write_bytes(b"\n".join([damaged, *lines[1:], b""]))
    assert train_again(run) == 0
    assert (run / "metrics.jsonl").read_bytes().splitlines() == lines[1:]


@pytest.mark.slow
def test_a_damaged_evaluation_before_is_made_again_once_removed(run, capsys):
    before = run / "evaluation" / "before.safetensors"
    for damage in (
        cut,
        tensors(lambda content: content.pop("prompt")),
        tensors(lambda content: content["reward/scene_match"].add_(0.1)),
        with_right_checksum(lambda content: content.pop("prompt")),
        with_right_checksum(lambda content: content.update(prompt=content["prompt"][:1])),
        with_right_checksum(lambda content: content.update(shown=content["shown"][0])),
    ):
        content = before.read_bytes()
        damage(before)
        assert train_again(run) == 2
        error = capsys.readouterr().err
        assert f"{before} is damaged" in error
        assert "Remove the file; training makes it again." in error
        before.write_bytes(content)
    before.unlink()
    assert train_again(run) == 0
    assert before.read_bytes() == content


def with_right_checksum(change):
    """Change a file as someone who knows the format would."""

    def damage(file):
        content = load_file(file)
        change(content)
        file.write_bytes(with_checksum(content))

    return damage


PLAIN = """
class Centred:
    def __init__(self, scale: float = 1.0):
        self._by = scale

    def __call__(self, rewards, group):
        return self._by * (rewards.combined - rewards.combined.mean())
"""


def test_settings_of_a_plain_class_are_kept(tmp_path):
    (tmp_path / "mine.py").write_text(PLAIN)
    mine = {"name": f"{tmp_path}/mine.py:Centred", "scale": 2.0}
    assert resolve(small_config(tmp_path, f"advantage={mine}"))["advantage"] == mine


@pytest.mark.parametrize("name", ["config.yaml", "evaluation/before.safetensors"])
def test_other_damaged_files_of_a_run_are_named(name, run, capsys):
    (run / name).write_bytes(b"\0\1")
    assert train_again(run) == 2
    assert f"{run / name} is" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named_before_training(tmp_path, capsys):
    (tmp_path / "taken").write_text("a file, not a folder")
    assert main(["train", str(TINY), *SMALL, f"output={tmp_path}/taken/run"]) == 2
    error = capsys.readouterr().err
    assert "output" in error
    assert f"{tmp_path}/taken" in error
    assert "Traceback" not in error


PROJECT = """
extends: tiny/flow_grpo.yaml
rewards: {"mine.py:brighter": 1.0}
data: {prompts: prompts.txt}
evaluation: {prompts: ""}
"""
REWARD = "def brighter(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n"

ONE_STEP = [
    *(
        setting
        for setting in SMALL
        if not setting.startswith(("train.steps", "evaluation.prompts"))
    ),
    *("train.steps=1", "output=outputs/run"),
]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with a YAML file, prompts and a reward, in which a run of one step was trained."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "mine.yaml").write_text(PROJECT)
    (folder / "mine.py").write_text(REWARD)
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(folder)
    assert main(["train", "mine.yaml", *ONE_STEP]) == 0
    return folder


def steps_of(run):
    return [folder.name for folder in checkpoints(run)]


def test_a_run_is_resumed_and_sampled_from_any_folder(project, monkeypatch, tmp_path):
    run = project / "outputs" / "run"
    monkeypatch.chdir(tmp_path / "elsewhere")
    # By its own file, by the file it came from, and then again from where it began.
    assert main(["train", str(run / "config.yaml"), "train.steps=2"]) == 0
    settings = [*ONE_STEP, "train.steps=3", f"output={run}"]
    assert main(["train", str(project / "mine.yaml"), *settings]) == 0
    assert [prompt.text for prompt in evaluation_prompts(find_source(str(run)).config)] == [
        "a red circle",
        "a blue square",
    ]
    assert not list((tmp_path / "elsewhere").iterdir())
    monkeypatch.chdir(project)
    assert main(["train", "mine.yaml", *ONE_STEP, "train.steps=4"]) == 0
    assert steps_of(run)[-1] == "step-000004"
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4]


def test_a_run_that_moved_with_its_project_is_resumed_where_it_is(project, monkeypatch, tmp_path):
    moved = project.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = moved / "outputs" / "run"
    assert main(["train", str(run / "config.yaml"), "train.steps=2"]) == 0
    assert steps_of(run) == ["step-000001", "step-000002"]
    # The adapter names the model as it is found on any machine, and no folder of this one.
    assert base_model(run / "adapter") == "assets/tiny-sd3"
    assert str(ROOT) not in (run / "adapter" / "README.md").read_text()


def test_another_file_of_the_same_name_is_refused_from_another_folder(
    project, monkeypatch, tmp_path, capsys
):
    run = project / "outputs" / "run"
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "mine.py").write_text(REWARD)
    rewards = f'rewards={{"{tmp_path}/elsewhere/mine.py:brighter": 1.0}}'
    settings = [*ONE_STEP, "train.steps=2", f"output={run}", rewards]
    assert main(["train", str(project / "mine.yaml"), *settings]) == 2
    assert "holds a run with another" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "{}", "[]", '{"started_in": 3}', "[" * 10_000, "\0"])
def test_a_run_that_does_not_say_where_it_began_has_no_such_folder(content, tmp_path):
    if content is not None:
        (tmp_path / "environment.json").write_text(content)
    assert started_in(tmp_path) == []


@pytest.mark.parametrize("text", ['"1e5"', '"0x10"', '"on"', '"null"', '"2026-01-02"', "\u7ea2"])
def test_the_name_of_a_folder_is_read_back_as_it_was_written(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written = resolve(load_config(TINY, [f"output={text}"]))
    (tmp_path / "config.yaml").write_text(dump_yaml(written), encoding="utf-8")
    assert read_config(tmp_path) == written
    assert load_config(tmp_path / "config.yaml").output == text.strip('"')


def test_the_configuration_of_a_stranger_s_run_is_measured_before_it_is_read(tmp_path):
    (tmp_path / "config.yaml").write_text("a: &a [1]\nb: [" + "*a, " * 9_000 + "]")
    with pytest.raises(UserError, match=r"config\.yaml is missing or damaged"):
        read_config(tmp_path)


@pytest.mark.parametrize("key", ["data.prompts", "evaluation.prompts"])
def test_prompts_that_changed_since_are_refused_when_a_run_resumes(key, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\na blue square\n")
    trainer.train(small_config(tmp_path / "run", f"{key}={file}", "train.steps=1"))
    file.write_text("a red circle\n")
    with pytest.raises(UserError, match=rf"^{key}: the file has changed since the run in .* began"):
        trainer.train(small_config(tmp_path / "run", f"{key}={file}"))


def test_more_votes_for_a_reward_are_another_run(tmp_path):
    file = tmp_path / "votes.jsonl"
    config = load_config(TINY, [f"rewards={{taste: {{votes: {file}}}}}"])
    sums = []
    for content in ("one", "one", "two"):
        file.write_text(content)
        sums.append(input_checksums(config)["rewards.taste.votes"])
    assert sums[0] == sums[1] != sums[2]
