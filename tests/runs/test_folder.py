"""Who may work in a run folder, and what a run may resume from."""

import shutil
import subprocess
import sys

import pytest

from flowalign.cli import main
from flowalign.config.resolved import resolve
from flowalign.errors import UserError
from flowalign.runs.lock import FolderLock
from flowalign.training import trainer
from tests.runs.damage import cut, same_adapter, tensors, train_again
from tests.tiny import SMALL, small_config, TINY


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


@pytest.mark.parametrize("damaged", [b"3", b"\xff\xfe{", b'{"step": 1, "lo', b"[]"])
def test_a_damaged_line_of_metrics_costs_no_other(damaged, run):
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    (run / "metrics.jsonl").write_bytes(b"\n".join([damaged, *lines[1:], b""]))
    assert train_again(run) == 0
    assert (run / "metrics.jsonl").read_bytes().splitlines() == lines[1:]


def test_a_damaged_evaluation_before_is_made_again_once_removed(run, capsys):
    before = run / "evaluation" / "before.safetensors"
    for damage in (cut, tensors(lambda content: content.pop("prompt"))):
        content = before.read_bytes()
        damage(before)
        assert train_again(run) == 2
        error = capsys.readouterr().err
        assert f"{before} is damaged" in error
        assert "Remove the file; the same command makes it again." in error
        before.write_bytes(content)
    before.unlink()
    assert train_again(run) == 0
    assert before.read_bytes() == content


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


@pytest.mark.parametrize("key", ["data.prompts", "evaluation.prompts"])
def test_prompts_that_changed_since_are_refused_when_a_run_resumes(key, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\na blue square\n")
    trainer.train(small_config(tmp_path / "run", f"{key}={file}", "train.steps=1"))
    file.write_text("a red circle\n")
    with pytest.raises(UserError, match=rf"^{key}: the file has changed since the run in .* began"):
        trainer.train(small_config(tmp_path / "run", f"{key}={file}"))
