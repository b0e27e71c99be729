"""A finished run that tests copy and damage."""

import os
import shutil

import pytest

from flowalign.training import trainer
from tests.runs.damage import STEPS
from tests.tiny import ROOT, small_config


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a run of four steps, with checkpoints of the last three."""
    os.chdir(ROOT)
    run = tmp_path_factory.mktemp("runs") / "whole"
    trainer.train(small_config(run, *STEPS))
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, without its exported adapter, to damage and train again."""
    copy = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(copy / "adapter")
    return copy


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
