"""A stranger's YAML file or run folder calls nothing, and loads no reward that nobody asked for."""

import pytest

from flowalign.cli import main
from flowalign.runs.adapter import save_adapter
from tests.tiny import make_policy, ROOT, small_config, TINY

SECTIONS = {
    "objective": "objective: {{name: {spec}, {settings}}}",
    "advantage": "advantage: {{name: {spec}, {settings}}}",
    "combine": "combine: {{name: {spec}, {settings}}}",
    "dynamics": "sampler: {{dynamics: {{name: {spec}, {settings}}}}}",
    "model": "model: {{name: {spec}, {settings}}}",
    "rewards": "rewards: {{{spec}: {{{settings}}}}}",
    "evaluation": "evaluation: {{rewards: {{{spec}: {{{settings}}}}}}}",
}
COMMANDS = ["train", "check", "plan", "sample"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The folder of an adapter that fits the quick start's model."""
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(make_policy(lora=small_config(folder).model.lora), folder)
    return folder


@pytest.fixture
def stranger(tmp_path, monkeypatch, adapter):
    """A run folder of somebody else. Its file is small, and more can be written at its end."""
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "stranger"
    folder.mkdir()
    (folder / "adapter").symlink_to(adapter)
    settings = "train: {steps: 1}\nsampler: {steps: 4}\nevaluation: {images_per_prompt: 1}\n"
    (folder / "config.yaml").write_text(f"extends: {TINY}\noutput: {tmp_path}/run\n{settings}")
    return folder


def run(command, folder):
    if command == "sample":
        return main(["sample", str(folder), "a red circle", "--output", str(folder / "pictures")])
    return main([command, str(folder / "config.yaml")])


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("section", SECTIONS)
def test_no_section_starts_a_program(section, command, stranger, tmp_path, capsys):
    made = tmp_path / "made"
    text = SECTIONS[section].format(spec="'subprocess:Popen'", settings=f"args: [touch, '{made}']")
    (stranger / "config.yaml").write_text(f"extends: {TINY}\noutput: {tmp_path}/run\n{text}\n")
    assert run(command, stranger) == 2
    assert not made.exists()
    assert "standard library" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["plan", "sample"])
def test_plan_and_sample_import_no_reward_of_the_file(command, stranger, tmp_path, capsys):
    (tmp_path / "theirs.py").write_text(
        f"open('{tmp_path}/imported', 'w')\n"
        "def score(images, prompts, metadata):\n    return [0.0] * len(images)\n"
    )
    with (stranger / "config.yaml").open("a") as file:
        file.write(f"rewards: {{'{tmp_path}/theirs.py:score': 1.0}}\n")
    assert run(command, stranger) == 0
    assert not (tmp_path / "imported").exists()
    if command == "sample":
        assert main(["sample", str(stranger), "a", "--reward", f"{tmp_path}/theirs.py:score"]) == 0
        assert (tmp_path / "imported").exists()
