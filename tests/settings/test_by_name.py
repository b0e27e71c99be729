"""Names in a YAML file: nothing is called before it is known to be what the section takes."""

import importlib
import pickle
import sys
from multiprocessing import get_context

import pytest

from flowalign.advantages import ADVANTAGES
from flowalign.errors import UserError
from flowalign.objectives import OBJECTIVES
from flowalign.objectives.base import Objective
from flowalign.rewards import REWARDS
from flowalign.rewards.adapters import check_form
from flowalign.rewards.registry import load_rewards
from flowalign.settings.by_name import build_named, imported

TEMPTING = """
from subprocess import Popen
from pathlib import Path


class Opener:
    def __init__(self, path="X"):
        Path(path).write_text("")


class Caller(Opener):
    def __call__(self, path):
        Path(path).write_text("")


def touch(path="X"):
    Path(path).write_text("")


def touch_two(path="X", mode="w"):
    Path(path).write_text("")
"""
NAMES = ["Opener", "Caller", "touch", "touch_two", "Popen"]


@pytest.fixture
def tempting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tempting.py").write_text(TEMPTING)
    return f"{tmp_path}/tempting.py:"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_of_the_section_is_refused_before_it_is_called(name, tempting, tmp_path):
    spec, settings = tempting + name, {"path": str(tmp_path / "made")}
    with pytest.raises(UserError):
        build_named(OBJECTIVES, {"name": spec, **settings}, "objective", Objective)
    with pytest.raises(UserError):
        load_rewards({spec: settings})
    with pytest.raises(UserError):
        build_named(ADVANTAGES, {"name": spec, **settings}, "advantage", ("rewards", "group"))
    assert [file.name for file in tmp_path.iterdir()] == ["tempting.py"]


@pytest.mark.parametrize(
    "spec",
    [
        *("subprocess:Popen", "os:system", "posix:system", "builtins:exec", "shutil:rmtree"),
        *("importlib.util:find_spec", "os.path:join"),
        *("flowalign.settings.by_name:partial", f"{importlib.__file__}:import_module"),
    ],
)
def test_the_standard_library_is_refused_under_every_name(spec):
    with pytest.raises(UserError, match=r"^rewards: .* belongs to Python's standard library.*Name"):
        imported(spec, "rewards", REWARDS)


def test_a_module_of_the_standard_library_is_not_even_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "this", raising=False)
    with pytest.raises(UserError, match="standard library"):
        imported("this:s", "objective.name", OBJECTIVES)
    assert "this" not in sys.modules


def test_every_built_in_reward_has_a_known_form():
    for name, place in REWARDS.items():
        check_form(name, imported(place, name, REWARDS))


def test_a_class_with_a_call_of_the_section_is_a_function_of_it(tmp_path):
    (tmp_path / "running.py").write_text(
        "class Running:\n"
        "    def __init__(self, decay: float = 0.5):\n"
        "        self.decay = decay\n"
        "    def __call__(self, rewards, group):\n"
        "        return rewards.combined * self.decay\n"
    )
    section = {"name": f"{tmp_path}/running.py:Running", "decay": 0.25}
    running = build_named(ADVANTAGES, section, "advantage", ("rewards", "group"))
    assert vars(running) == {"decay": 0.25}


def test_a_file_that_was_edited_is_imported_anew(tmp_path):
    file = tmp_path / "edited.py"
    file.write_text("import beside_edited\ndef value():\n    return beside_edited.VALUE\n")
    (tmp_path / "beside_edited.py").write_text("VALUE = 1\n")
    spec = f"{file}:value"
    first = imported(spec, "rewards", {})
    assert imported(spec, "rewards", {}) is first
    # Of the same size and within the same second: a cached file could not be told from it.
    file.write_text("import beside_edited\ndef value():\n    return beside_edited.OTHER\n")
    (tmp_path / "beside_edited.py").write_text("OTHER = 20\n")
    assert (first(), imported(spec, "rewards", {})()) == (1, 20)
    (tmp_path / "beside_edited.py").write_text("OTHER = 300\n")
    assert imported(spec, "rewards", {})() == 300


def test_a_module_that_was_edited_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "edited_module.py").write_text("def value():\n    return 1\n")
    assert imported("edited_module:value", "rewards", {})() == 1
    assert imported("edited_module:value", "rewards", {})() == 1
    assert capsys.readouterr().out == ""
    (tmp_path / "edited_module.py").write_text("def value():\n    return 2\n")
    assert imported("edited_module:value", "rewards", {})() == 1
    assert "edited_module.py has changed since it was imported" in capsys.readouterr().out


def test_two_files_of_one_name_are_two_modules(tmp_path):
    values = []
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "same_name.py").write_text(f"def value():\n    return {number}\n")
        values.append(imported(f"{folder}/same_name.py:value", "rewards", {}))
    assert [value() for value in values] == [1, 2]
    for value in values:
        assert pickle.loads(pickle.dumps(value)) is value


def test_a_file_hides_no_module_of_its_name(tmp_path):
    (tmp_path / "statistics.py").write_text("def mean():\n    return 'mine'\n")
    assert imported(f"{tmp_path}/statistics.py:mean", "rewards", {})() == "mine"
    assert importlib.import_module("statistics").mean([1, 3]) == 2


def test_another_process_finds_the_functions_of_a_file(tmp_path):
    (tmp_path / "in_processes.py").write_text("def double(x):\n    return 2 * x\n")
    double = imported(f"{tmp_path}/in_processes.py:double", "rewards", {})
    with get_context("fork").Pool(1) as pool:
        assert pool.map(double, [1, 2]) == [2, 4]
    # A spawned process has the path and imports the module by its name.
    assert double.__module__ == "in_processes"
    assert str(tmp_path) in sys.path


def test_what_a_file_changes_when_it_is_imported_is_restored_and_named(tmp_path, capsys):
    (tmp_path / "careless.py").write_text(
        "import torch\ntorch.set_default_dtype(torch.float64)\ntorch.set_grad_enabled(False)\n"
        "def value():\n    return torch.ones(1, requires_grad=True) * 2\n"
    )
    value = imported(f"{tmp_path}/careless.py:value", "rewards", {})()
    assert value.requires_grad
    assert str(value.dtype) == "torch.float32"
    assert "careless.py changed global state when it was imported" in capsys.readouterr().out


PROGRAM = """
import sys

at_import = list(sys.argv)


def main():
    # As the launchers of accelerate and PyTorch do, which execute the file that is named first.
    if sys.argv[1:]:
        exec(open(sys.argv[1]).read(), {})
"""
POLYGLOT = """
rewards: {"%s:main": 1.0}
output: open("hacked", "w").close()
"""


def test_a_program_that_a_file_names_does_not_execute_that_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM)
    spec = f"{tmp_path}/program.py"
    (tmp_path / "config.yaml").write_text(POLYGLOT % spec)
    arguments = ["train.py", "config.yaml"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(UserError, match="returned a NoneType"):
        load_rewards({f"{spec}:main": 1.0})
    assert not (tmp_path / "hacked").exists()
    assert imported(f"{spec}:at_import", "rewards", {}) == ["train.py"]
    assert sys.argv is arguments


def test_a_method_of_a_built_in_type_is_answered(tmp_path):
    (tmp_path / "mine.py").write_text("score = str.join\n")
    with pytest.raises(UserError, match="takes"):
        load_rewards({f"{tmp_path}/mine.py:score": 1.0})
