"""A disk that is full at any write costs at most the step that was being written."""

import errno
import itertools
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from flowalign import files
from flowalign.cli import main
from flowalign.files import verify_checksums
from flowalign.reporting.trackers import JsonLines, read_metrics
from flowalign.runs.checkpoint import checkpoints
from flowalign.training import setup
from tests.processes import ENVIRONMENT
from tests.runs.damage import (
    FILES,
    same_adapter,
    STEPS,
    train_again,
)
from tests.tiny import ROOT, SMALL, TINY


class Failing:
    """A disk that is full from the n-th write on, when half of the file is written."""

    def __init__(self, monkeypatch, first):
        self.calls, self.first = 0, first
        for owner, name, file_of in (
            (Path, "write_text", lambda file, *_: file),
            (Path, "write_bytes", lambda file, *_: file),
            (Image.Image, "save", lambda image, file: file),
            (JsonLines, "log", lambda tracker, step, metrics: tracker.file),
            (files, "flush", None),
            (Path, "rename", None),
            (Path, "replace", None),
        ):
            monkeypatch.setattr(owner, name, self.before(getattr(owner, name), file_of))

    def before(self, function, file_of):
        def write(*arguments, **settings):
            self.calls += 1
            if self.calls < self.first:
                return function(*arguments, **settings)
            if file_of:
                file = file_of(*arguments)
                kept = file.stat().st_size if function.__name__ == "log" and file.exists() else 0
                function(*arguments, **settings)
                os.truncate(file, (kept + file.stat().st_size) // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))

        return write


QUICK = [
    *(
        "rewards={brightness: 1.0}",
        "evaluation.rewards={brightness: 1.0}",
        "train.save_every=1",
        "train.ema.decay=0.5",
    ),
    *("sampler.steps=2", "sampler.window.range=[0, 1]", "evaluation.sampler.steps=2"),
]


def quick(run, steps):
    return main(["train", str(TINY), *SMALL, *QUICK, f"train.steps={steps}", f"output={run}"])


@pytest.mark.slow
def test_a_full_disk_at_any_write_loses_no_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(setup, "score_noise", lambda *_, **__: None)
    assert quick(tmp_path / "begun", 1) == quick(tmp_path / "whole", 2) == 0
    for first in itertools.count(1):
        run = shutil.copytree(tmp_path / "begun", tmp_path / f"run-{first}")
        capsys.readouterr()
        with monkeypatch.context() as patched:
            failing = Failing(patched, first)
            status = quick(run, 2)
        error = capsys.readouterr().err
        if failing.calls < first:
            break
        assert status in (1, 2), first
        assert "No space left on device" in error
        assert "Traceback" not in error
        assert (run / "checkpoints" / "step-000001").is_dir()
        for saved in checkpoints(run):
            verify_checksums(saved, FILES[:-1])
        assert quick(run, 2) == 0, first
        assert same_adapter(run, tmp_path / "whole")
        assert [line["step"] for line in read_metrics(run)] == [1, 2]
    assert first > 30


@pytest.mark.slow
def test_a_file_that_may_grow_no_larger_is_named_and_the_run_resumes_afterwards(run, finished):
    """A real failing write: the system refuses bytes beyond a limit, as a quota does."""
    shutil.rmtree(run / "checkpoints" / "step-000004")
    command = [sys.executable, "train.py", str(TINY), *SMALL, *STEPS, f"output={run}"]
    limited = ["bash", "-c", 'ulimit -f 1000; trap "" XFSZ; exec "$@"', "bash", *command]
    ended = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "File too large" in ended.stderr
    assert f"The finished steps are in {run / 'checkpoints' / 'step-000003'}" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert train_again(run) == 0
    assert same_adapter(run, finished)


@pytest.fixture
def disk(tmp_path):
    """A small file system of its own, in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_in_mid_run_loses_no_checkpoint_and_the_run_resumes(disk, tmp_path):
    run, filler = disk / "run", disk / "filler"
    long = [*SMALL, *STEPS, "train.steps=12"]
    command = [sys.executable, "train.py", str(TINY), *long]
    with subprocess.Popen(
        [*command, f"output={run}"],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while len(checkpoints(run)) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        # Another program takes what is left.
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "No space left on device" in error
    assert "Traceback" not in error
    for saved in checkpoints(run):
        verify_checksums(saved, FILES[:-1])
    filler.unlink()
    for folder in (run, tmp_path / "whole"):
        subprocess.run(
            [*command, f"output={folder}"],
            cwd=ROOT,
            env=ENVIRONMENT,
            check=True,
            capture_output=True,
        )
    assert same_adapter(run, tmp_path / "whole")
