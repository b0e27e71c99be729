"""The Python API: public names, and the examples of their docstrings, run as they are printed."""

import doctest
import inspect
import math
import shutil
import subprocess
import sys

import pytest
import torch

import flowalign
from flowalign import api, progress
from tests.tiny import ROOT

DOCUMENTED = [
    *(api.load_config, api.train, api.evaluate, api.sample, api.load_model),
    *(progress.task, progress.track),
    *(flowalign.load_reward, flowalign.traits, flowalign.Objective, flowalign.Policy),
    *(
        flowalign.Gaussian,
        flowalign.Sampler,
        flowalign.Decay,
        flowalign.Cond,
        flowalign.Keys,
        flowalign.Examples,
    ),
]
QUICK = [
    *("train.steps=1", "train.prompts_per_step=2", "train.images_per_prompt=2"),
    *("train.images_per_pass=4", "evaluation.prompts=tests/prompts.jsonl"),
    *("evaluation.images_per_prompt=1", "evaluation.sampler.steps=2", "sampler.steps=2"),
]


@pytest.fixture(autouse=True)
def in_a_copy_of_the_repository(tmp_path, monkeypatch):
    """Examples write to outputs/, so they run in an empty folder with links to the files."""
    for name in ("configs", "assets", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def crd(tmp_path):
    """A short run in outputs/crd, whose only checkpoint is called that of step 100."""
    flowalign.train("configs/tiny/crd.yaml", [*QUICK, "output=outputs/crd"])
    saved = tmp_path / "outputs" / "crd" / "checkpoints"
    (saved / "step-000001").rename(saved / "step-000100")


def run_example(text):
    """Run the lines of a docstring; where it shows a value, the value must be that."""
    examples = doctest.DocTestParser().get_examples(text)
    names = {"flowalign": flowalign, "torch": torch, "task": progress.task, "track": progress.track}
    for example in examples:
        if example.want:
            assert f"{eval(example.source, names)!r}\n" == example.want
        else:
            exec(example.source, names)
    return examples


@pytest.mark.parametrize("name", DOCUMENTED, ids=lambda name: name.__name__)
def test_an_example_gives_what_it_shows(name):
    assert run_example(inspect.getdoc(name))


def test_the_example_of_export_writes_the_adapter_of_a_step(crd):
    assert run_example(inspect.getdoc(api.export))


def test_the_example_of_compare_compares_two_runs(crd, tmp_path):
    shutil.copytree(tmp_path / "outputs" / "crd", tmp_path / "outputs" / "awm")
    assert run_example(inspect.getdoc(api.compare))


def test_the_lines_of_the_package_train_and_sample(tmp_path):
    text = inspect.getdoc(flowalign).partition("\n\n")[2].partition("\nImporting")[0]
    code = inspect.cleandoc(text)
    assert '["train.steps=20"]' in code
    exec(code.replace('["train.steps=20"]', repr([*QUICK, "output=outputs/crd"])), {})
    assert (tmp_path / "outputs" / "crd" / "report.html").exists()
    assert len(list((tmp_path / "samples" / "after").iterdir())) == 4


def test_every_public_name_is_documented_and_comes_from_its_module():
    for name in flowalign.__all__:
        value = getattr(flowalign, name)
        if name != "__version__":
            assert inspect.getdoc(value), name
            assert flowalign._HOMES[name] in value.__module__


def test_the_lists_of_public_names_agree():
    assert set(flowalign.__all__) == {*flowalign._HOMES, "__version__"}
    source = inspect.getsource(flowalign)
    imported = source.partition("if TYPE_CHECKING:")[2].partition("__version__ =")[0]
    for name in flowalign._HOMES:
        assert f" {name}" in imported, name


def test_names_are_listed_and_nothing_heavy_is_imported_for_it():
    code = (
        "import flowalign, sys; assert 'train' in dir(flowalign); flowalign.UserError; "
        "print({'torch', 'rich', 'pydantic'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout == "set()\n"


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        flowalign.trian  # noqa: B018 - the access is what is tested


def test_overrides_keep_their_types():
    overrides = {
        "train.steps": 3,
        "train.learning_rate": 1e-4,
        "train.drop_equal_groups": True,
        "rewards": {"brightness": 0.5},
        "model.revision": None,
        "output": "outputs/a b",
    }
    config = flowalign.load_config("configs/tiny/flow_grpo.yaml", overrides)
    assert (config.train.steps, config.train.learning_rate) == (3, 1e-4)
    assert config.train.drop_equal_groups is True
    assert config.rewards == {"brightness": 0.5}
    assert config.output == "outputs/a b"


def test_overrides_of_a_mapping_are_written_as_yaml(tmp_path):
    overrides = {
        "output": tmp_path,
        "a": "grün \U0001f600",
        "b": [float("inf"), -math.inf, (1, 2.5)],
        "c": {"d": math.nan, "e": None},
    }
    assert api._as_strings(overrides) == [
        f'output="{tmp_path}"',
        'a="grün \U0001f600"',
        "b=[.inf, -.inf, [1, 2.5]]",
        'c={"d": .nan, "e": null}',
    ]


def test_a_path_may_override_a_setting(tmp_path):
    config = flowalign.load_config("configs/tiny/crd.yaml", {"output": tmp_path / "run"})
    assert config.output == str(tmp_path / "run")


@pytest.mark.parametrize("overrides", [["train.steps=1"], {"train.steps": 1}])
def test_a_loaded_configuration_takes_no_overrides(overrides):
    config = flowalign.load_config("configs/tiny/crd.yaml")
    with pytest.raises(flowalign.UserError, match="Give the overrides to load_config"):
        flowalign.train(config, overrides)


def test_a_user_error_names_the_file():
    with pytest.raises(flowalign.UserError, match=r"^configs/tiny/crd\.yaml: .*stepz"):
        flowalign.train("configs/tiny/crd.yaml", {"train.stepz": 1})
