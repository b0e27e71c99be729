"""The README is short enough to read, and its commands name what exists."""

import re
import shlex
from pathlib import Path
from typing import Any

import flowalign
from flowalign.objectives import OBJECTIVES

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
MAX_LINES, MAX_WORDS = 120, 900
SMALL = [
    *("train.steps=1", "train.prompts_per_step=2", "train.images_per_prompt=2"),
    *("train.images_per_pass=4", "sampler.steps=2"),
    *("evaluation.images_per_prompt=1", "evaluation.sampler.steps=2"),
    "evaluation.guidance_sweep=[]",
]
SECTIONS = [
    "Install, and train on a CPU",
    "Sample before and after",
    "The same in Python",
    "Train a real model on a GPU",
    "Your own reward",
    "Your own votes",
    "Objectives",
    "Folders",
    "Links",
]


def code_blocks(language: str) -> list[str]:
    """The code of every block in this language; blocks of commands have none."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return [code for name, code in blocks if name == language]


def test_the_readme_can_be_read_in_a_few_minutes():
    assert len(TEXT.splitlines()) <= MAX_LINES
    assert len(TEXT.split()) <= MAX_WORDS


def test_the_sections_lead_from_the_first_run_to_the_reference():
    assert re.findall(r"^## (.+)$", TEXT, re.MULTILINE) == SECTIONS


def test_there_is_no_placeholder_to_fill_in():
    assert not re.findall(r"URL_OF|YOUR_|<[a-z_]+>|git clone", TEXT)


def test_every_objective_has_one_row_with_a_link_to_its_page():
    rows = [line for line in TEXT.splitlines() if line.startswith("| [`")]
    linked = [re.findall(r"\[`(\w+)`\]\(docs/objectives/(\w+)\.md\)", row) for row in rows]
    assert sorted(linked) == sorted([[(name, name)] for name in OBJECTIVES])


def test_commands_read_configurations_that_exist():
    commands = [
        shlex.split(line, comments=True)
        for block in code_blocks("")
        for line in block.splitlines()
        if ".yaml" in line
    ]
    assert commands
    for command in commands:
        files = [word for word in command if word.endswith(".yaml")]
        assert files
        assert all((ROOT / file).is_file() for file in files), command


def test_your_own_votes_are_measured_on_your_own_pairs():
    (line,) = [line for line in TEXT.splitlines() if "data.pairs=" in line]
    _, _, file, *overrides = shlex.split(line)
    # A file that names held-out pairs of the bundled world would keep any of yours from being held.
    assert flowalign.load_config(ROOT / file, overrides).evaluation.pairs == ""


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", TEXT):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_python_lines_train_and_sample(tmp_path):
    (code,) = [block for block in code_blocks("python") if "import flowalign" in block]
    overrides = '["output=outputs/python"]'
    assert overrides in code
    names: dict[str, Any] = {}
    exec(code.replace(overrides, repr([*SMALL, f"output={tmp_path / 'run'}"])), names)
    assert names["summary"]["stopped"] == "finished"
    assert names["pictures"].images.shape == (4, 3, 64, 64)


def test_the_python_page_names_what_the_package_offers():
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)\(", text, re.MULTILINE)
    base_types = re.findall(r"`(\w+)`", text.split("## Base types")[1].split("\n## ")[0])
    assert rows
    assert base_types
    assert {*rows, *base_types} <= set(flowalign.__all__)
