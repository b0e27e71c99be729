"""The family of a model: by name, alias, path or the model's own files, and named nowhere else."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flowalign.config.load import load_config
from flowalign.config.resolved import resolve
from flowalign.errors import UserError
from flowalign.models import ALIASES, MODELS, PIPELINES
from flowalign.models.families import describe, family_of, read_model_config
from flowalign.models.flux import Flux, FluxConfig
from flowalign.models.pipeline import PipelineModel
from flowalign.models.sd3 import SD3, SD3Config
from tests.tiny import ROOT

PACKAGE = ROOT / "flowalign"
SD3_FOLDER, FLUX_FOLDER = str(ROOT / "assets" / "tiny-sd3"), str(ROOT / "assets" / "tiny-flux")
OUTSIDE = [path for path in PACKAGE.rglob("*.py") if PACKAGE / "models" not in path.parents]
FAMILY = re.compile(r"sd ?3|stable.?diffusion|flux", re.IGNORECASE)
SHIPPED_FILE = re.compile(r"\b(assets|configs|base)/[\w./-]+")


def code_words(path: Path) -> list[tuple[int, str]]:
    """Line and text of all names and strings, without docstrings and names of shipped files."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    words = []
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in docstrings:
                words.append((node.lineno, SHIPPED_FILE.sub("", node.value)))
        names = [getattr(node, field, None) for field in ("id", "attr", "name", "arg", "module")]
        words += [(getattr(node, "lineno", 0), name) for name in names if isinstance(name, str)]
    return words


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_code_outside_of_models_names_a_family(path):
    named = [f"{path}:{line} {word!r}" for line, word in code_words(path) if FAMILY.search(word)]
    assert not named


def test_a_branch_on_a_family_would_be_seen(tmp_path):
    file = tmp_path / "branch.py"
    lines = [
        '"""Flux."""',
        'if model.name == "flux":',
        "    x = config.sd3",
        'help = "see configs/flux/crd.yaml"',
    ]
    file.write_text("\n".join(lines))
    named = [word for _, word in code_words(file) if FAMILY.search(word)]
    assert named == ["flux", "sd3"]


def test_reading_settings_imports_none_of_the_heavy_libraries():
    code = (
        "import sys, flowalign.policy, flowalign.models.families as families;"
        "families.read_model_config({'path': 'assets/tiny-sd3'});"
        "families.read_model_config({'path': 'assets/tiny-flux'});"
        "print({'diffusers', 'transformers', 'peft', 'safetensors'} & set(sys.modules))"
    )
    run = [sys.executable, "-c", code]
    result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize("name", MODELS)
def test_every_family_has_its_name_and_its_pipeline(name):
    family = family_of(name)
    assert issubclass(family, PipelineModel)
    assert PIPELINES[family.pipeline_name] == name
    assert family.Config(path="p").name == name


@pytest.mark.parametrize(
    ("name", "family"),
    [
        *(("sd3", SD3), ("SD3", SD3), ("sd3.5", SD3), ("SD3.5-Medium", SD3)),
        *(("flux", Flux), ("flux.1", Flux), ("FLUX.1-dev", Flux), ("flux-schnell", Flux)),
        ("flowalign.models.flux:Flux", Flux),
        (f"{PACKAGE}/models/../../tests/models/test_third_family.py:MaskedModel", None),
    ],
)
def test_a_family_has_names_aliases_and_paths(name, family):
    assert family_of(name) is family or family_of(name).__name__ == "MaskedModel"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("sd33", "sd3"), ("fluks", "flux"), ("flux.1-dew", "flux.1-dev"), ("sd-3.5", "sd3.5")],
)
def test_an_unknown_name_is_answered_with_the_nearest(name, nearest):
    with pytest.raises(UserError, match=f"model.name: .*Did you mean '{re.escape(nearest)}'"):
        read_model_config({"name": name, "path": SD3_FOLDER})


def test_an_unknown_name_is_answered_with_how_to_write_a_family():
    with pytest.raises(UserError, match=r"choose from sd3, flux, .*my_file\.py:unet"):
        read_model_config({"name": "unet", "path": SD3_FOLDER})


def test_a_class_that_is_not_a_family_is_refused():
    with pytest.raises(UserError, match="is not a model family"):
        read_model_config({"name": "flowalign.models.config:Lora", "path": "p"})


@pytest.mark.parametrize(
    ("folder", "config", "name"),
    [(SD3_FOLDER, SD3Config, "sd3"), (FLUX_FOLDER, FluxConfig, "flux")],
)
def test_a_name_that_is_left_out_is_read_from_the_model(folder, config, name):
    settings = read_model_config({"path": folder, "height": 64, "width": 64})
    assert type(settings) is config
    assert settings.name == name


def test_an_alias_is_written_out_as_the_name_that_it_stands_for():
    assert {read_model_config({"name": alias, "path": "p"}).name for alias in ALIASES} == set(
        MODELS
    )


@pytest.mark.parametrize("file", ["crd", "flow_grpo_flux"])
def test_a_resolved_configuration_has_a_name_and_loads_again(file, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = resolve(load_config(ROOT / "configs" / "tiny" / f"{file}.yaml"))
    path = tmp_path / "run.yaml"
    unnamed = {name: value for name, value in config["model"].items() if name != "name"}
    path.write_text(json.dumps({**config, "model": unnamed}))
    assert resolve(load_config(path)) == config
    path.write_text(json.dumps(config))
    assert resolve(load_config(path)) == config


def test_settings_of_another_family_are_not_known():
    with pytest.raises(UserError, match=r"Key model\.tokens is not known.*max_sequence_length"):
        read_model_config({"name": "sd3", "path": "p", "tokens": 3})
    with pytest.raises(UserError, match=r"model\.max_sequence_length is 0"):
        read_model_config({"name": "flux", "path": "p", "max_sequence_length": 0})
    assert read_model_config({"name": "sd3", "path": "p", "max_sequence_length": 0})


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({}, r"model\.path is missing"),
        ({"paht": "x"}, r"Key model\.paht is not known\. Did you mean 'path'"),
        ({"path": "./nowhere"}, r"model\.path: there is no folder \./nowhere"),
        ({"path": "assets/tiny-sd"}, "Did you mean 'tiny-sd3'"),
        ({"path": "assets/prompts"}, r"has no model_index\.json"),
        ({"path": "nobody/nothing"}, "the hub cannot be reached|no hub repository"),
        ({"path": 3}, r"model\.path is 3"),
        ({"name": 3, "path": "p"}, r"model\.name is 3"),
        ({"name": "sd3"}, r"model\.path is missing"),
    ],
)
def test_a_model_that_cannot_be_found_is_explained(section, expected, monkeypatch):
    monkeypatch.chdir(ROOT)
    # Where there is no network, the hub's client would try again for half a minute.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=expected):
        read_model_config(section)


@pytest.mark.parametrize("content", ["[]", "{", json.dumps({"_class_name": "KandinskyPipeline"})])
def test_a_folder_of_no_known_family_is_explained(content, tmp_path):
    (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(UserError, match=r"model\.path: .*(Save the model again|my_family\.py)"):
        read_model_config({"path": str(tmp_path)})


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        (SD3_FOLDER, SD3Config(path=SD3_FOLDER, height=64, width=64, max_sequence_length=0)),
        (FLUX_FOLDER, FluxConfig(path=FLUX_FOLDER, height=64, width=64, max_sequence_length=10)),
    ],
)
def test_a_folder_describes_itself(folder, expected, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert describe(folder) == expected
