"""The git state in `environment.json`: that of a clone, and never that of somebody's project."""

import shutil
import subprocess

import pytest

from flowalign.runs import environment

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with one commit and a folder `flowalign`, which stands for the package."""
    package = tmp_path / "flowalign"
    package.mkdir()
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], [*author, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(environment, "PACKAGE", package)
    return tmp_path


def test_a_clone_gives_its_commit(repository):
    words = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(words, cwd=repository, capture_output=True, text=True, check=True)
    state = environment._git_state()
    assert state
    assert commit.stdout.startswith(state)


def test_a_package_installed_inside_another_repository_has_no_commit(repository, monkeypatch):
    package = repository / "venv" / "site-packages" / "flowalign"
    package.mkdir(parents=True)
    monkeypatch.setattr(environment, "PACKAGE", package)
    assert environment._git_state() is None
