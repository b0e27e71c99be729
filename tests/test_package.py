"""The wheel carries all that its commands need: an installed flowalign trains elsewhere."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
ONE_STEP = [
    *("train.steps=1", "train.prompts_per_step=2", "train.images_per_prompt=2"),
    *("train.images_per_pass=4", "evaluation.images_per_prompt=1", "evaluation.sampler.steps=2"),
    *("evaluation.prompts=two.txt", "evaluation.guidance_sweep=[]"),
]


def run(*command: str | Path, folder: Path) -> str:
    """The output of a command, which must succeed, with no path to this clone."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A virtual environment with the wheel, which sees this one's packages except flowalign."""
    folder = tmp_path_factory.mktemp("package")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--quiet", "--no-deps", "--no-index"]
    run(*pip, "wheel", *offline, "--no-build-isolation", "-w", folder, ROOT, folder=folder)
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    run(*pip, "--python", python, "install", *offline, wheel, folder=folder)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    # Python does not follow the .pth files of a folder that a .pth file names, so an editable
    # flowalign stays hidden.
    (packages / "present.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "venv"


def test_an_installed_wheel_trains_a_bundled_configuration_in_another_folder(installed, tmp_path):
    (tmp_path / "two.txt").write_text("a red circle\na blue square\n")
    run(installed / "bin" / "flowalign", "train", "tiny/crd.yaml", *ONE_STEP, folder=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"outputs", "two.txt"}
    config = yaml.safe_load((tmp_path / "outputs" / "crd" / "config.yaml").read_text())
    for path in (config["model"]["path"], config["data"]["prompts"]):
        assert Path(path).is_relative_to(installed)
    summary = json.loads((tmp_path / "outputs" / "crd" / "summary.json").read_text())
    assert summary["images"] == 4


@pytest.mark.slow
def test_an_installed_wheel_writes_the_schema_of_its_configurations(installed, tmp_path):
    schema = json.loads(run(installed / "bin" / "flowalign", "config", "schema", folder=tmp_path))
    assert {"model", "objective", "rewards", "train"} <= set(schema["properties"])


@pytest.mark.slow
def test_an_installed_wheel_scores_with_the_bundled_clip(installed, tmp_path):
    output = run(installed / "bin" / "flowalign", "reward", "test", "clip_score", folder=tmp_path)
    assert "clip_score" in output
