"""Relative paths are found in the working directory, next to the file, and in the package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowalign.bundled import ASSETS, CONFIGS, locate, locate_spec, ROOT
from flowalign.config.load import load_config
from flowalign.config.resolved import resolve
from flowalign.errors import UserError
from flowalign.rewards.registry import load_reward, load_rewards

CONFIG = """
model: {name: sd3, path: assets/tiny-sd3}
objective: {name: nft}
rewards: {"mine.py:score": {weight: 1.0, table: scores/table.json}}
data: {prompts: prompts.txt}
"""
CODE = """
def score(images, prompts, metadata, table: str = ""):
    return [len(table)] * len(images)
"""


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A folder with a configuration and what it names; the working directory is another one."""
    folder = tmp_path / "project"
    (folder / "scores").mkdir(parents=True)
    (folder / "run.yaml").write_text(CONFIG)
    (folder / "mine.py").write_text(CODE)
    (folder / "prompts.txt").write_text("a red circle\n")
    (folder / "scores" / "table.json").write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return folder


def test_files_next_to_the_configuration_are_found_from_another_folder(project):
    config = load_config(project / "run.yaml")
    assert config.data.prompts == str(project / "prompts.txt")
    assert config.model.path == str(ASSETS / "tiny-sd3")
    name = f"{project}/mine.py:score"
    assert config.rewards == {
        name: {"weight": 1.0, "table": str(project / "scores" / "table.json")}
    }
    (reward,) = load_rewards(config.rewards)
    assert reward.name == "score"


def test_a_reward_of_the_command_line_is_found_at_home(project, monkeypatch):
    monkeypatch.setenv("HOME", str(project))
    reward = load_reward("{'~/mine.py:score': {table: ~/scores/table.json}}")
    scores = reward(torch.zeros(1, 3, 8, 8), ["a"], [{}])
    assert scores.tolist() == [len(str(project / "scores" / "table.json"))]


def test_the_working_directory_comes_first_and_stays_relative(project, monkeypatch):
    Path("prompts.txt").write_text("a blue square\n")
    assert load_config(project / "run.yaml").data.prompts == "prompts.txt"
    monkeypatch.chdir(ROOT)
    assert load_config(project / "run.yaml").model.path == "assets/tiny-sd3"


def test_files_next_to_a_parent_are_found_too(project, tmp_path):
    child = tmp_path / "child" / "child.yaml"
    child.parent.mkdir()
    child.write_text(f"extends: {project}/run.yaml\n")
    assert load_config(child).data.prompts == str(project / "prompts.txt")


def test_a_bundled_configuration_is_found_by_its_name(project):
    config = load_config("tiny/crd.yaml")
    assert config.output == "outputs/crd"
    assert config.data.prompts == str(ASSETS / "prompts" / "train.jsonl")
    assert load_config("configs/tiny/crd.yaml").objective == config.objective
    with pytest.raises(UserError, match=r"There is no file tiny/cdr.yaml.*Did you mean 'crd.yaml'"):
        load_config("tiny/cdr.yaml")


def test_home_is_expanded_everywhere(project, monkeypatch):
    monkeypatch.setenv("HOME", str(project))
    overrides = [
        *("model.path=~/scores", "data.prompts=~/prompts.txt", "evaluation.prompts=~/prompts.txt"),
        *("data.pairs=''", "evaluation.pairs=~/scores", "output=~/run"),
        "rewards={'~/mine.py:score': {table: ~/scores/table.json}}",
    ]
    config = load_config("~/run.yaml", overrides)
    assert config.model.path == config.evaluation.pairs == str(project / "scores")
    assert config.data.prompts == config.evaluation.prompts == str(project / "prompts.txt")
    assert config.output == str(project / "run")
    assert config.rewards == {
        f"{project}/mine.py:score": {"table": str(project / "scores" / "table.json")}
    }


def test_a_folder_that_looks_like_a_number_needs_quotes(project):
    with pytest.raises(
        UserError, match=r"output is 100000\.0; .* in quotes if it looks like a num"
    ):
        load_config(project / "run.yaml", ["output=1e5"])
    assert load_config(project / "run.yaml", ['output="1e5"']).output == "1e5"


def test_code_of_an_objective_is_found_next_to_the_configuration(project):
    code = "from flowalign.objectives.nft import NFT\n\n\nclass Mine(NFT):\n    pass\n"
    (project / "objective.py").write_text(code)
    config = load_config(project / "run.yaml", ["objective={name: 'objective.py:Mine'}"])
    assert type(config.objective).__name__ == "Mine"


def test_a_resolved_configuration_loads_again_as_the_same(project, tmp_path):
    import yaml

    resolved = resolve(load_config(project / "run.yaml"))
    again = tmp_path / "again" / "config.yaml"
    again.parent.mkdir()
    again.write_text(yaml.safe_dump(resolved))
    assert resolve(load_config(again)) == resolved


def test_a_name_that_exists_nowhere_stays_as_written():
    assert locate("stabilityai/stable-diffusion-3.5-medium") == (
        "stabilityai/stable-diffusion-3.5-medium"
    )
    assert locate("") == ""
    assert locate("models") == "models"
    assert locate_spec("package.module:name") == "package.module:name"


def test_the_script_of_a_clone_works_from_another_folder(tmp_path):
    command = [sys.executable, ROOT / "train.py", CONFIGS / "tiny" / "crd.yaml", "train.stepz=1"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "Key train.stepz is not known. Did you mean 'steps'?" in result.stderr


HEAVY = ("torch", "diffusers", "transformers", "peft", "matplotlib", "datasets")


def test_a_misspelt_key_is_answered_without_importing_torch(tmp_path):
    code = (
        "import sys\nfrom flowalign.cli import main\n"
        "for override in ('train.stepz=1', 'rewards={scene_mach: 1}', 'trian.steps=1'):\n"
        "    assert main(['train', 'tiny/crd.yaml', override]) == 2\n"
        f"print(sorted(set({HEAVY}) & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"


def test_a_run_keeps_its_files_in_a_folder_with_others_of_these_names(project, monkeypatch):
    run = project / "outputs" / "run"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(CONFIG)
    (run / "environment.json").write_text('{"started_in": "../.."}')
    for name in ("mine.py", "prompts.txt"):
        Path(name).write_text("other")
    config = load_config(run / "config.yaml")
    assert config.data.prompts == str(project / "prompts.txt")
    assert list(config.rewards) == [f"{project}/mine.py:score"]
    # An override belongs to the directory in which it is typed.
    assert (
        load_config(run / "config.yaml", ["data.prompts=prompts.txt"]).data.prompts == "prompts.txt"
    )
    monkeypatch.chdir(project)
    assert load_config(run / "config.yaml").data.prompts == "prompts.txt"
