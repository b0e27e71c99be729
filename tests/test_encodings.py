"""Files are UTF-8, whatever the locale of the machine is."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flowalign.reporting.trackers import read_metrics
from tests.tiny import ROOT, SMALL, TINY

FILES = sorted((ROOT / "flowalign").rglob("*.py"))
MODE = re.compile(r"[rwaxt+]{1,3}")
"""A mode of `open` for text."""
CAFE = "a caf\xe9 sign"


def opens_text(call: ast.Call) -> bool:
    """True for methods that decode or encode text."""
    if not isinstance(call.func, ast.Attribute):
        return False
    texts = [word.value for word in call.args if isinstance(word, ast.Constant)]
    has_mode = any(isinstance(text, str) and MODE.fullmatch(text) for text in texts)
    return call.func.attr in ("read_text", "write_text") or (call.func.attr == "open" and has_mode)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_text_file_is_opened_with_an_encoding(path: Path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not [
        f"{path.name}:{call.lineno}"
        for call in calls
        if opens_text(call) and "encoding" not in {word.arg for word in call.keywords}
    ]


@pytest.mark.slow
def test_a_run_in_an_ascii_locale_trains_and_samples_prompts_of_other_letters(tmp_path):
    locale = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    (tmp_path / "prompts.txt").write_text(f"{CAFE}\na red circle\n", encoding="utf-8")
    settings = [f"output={tmp_path}/run", f"data.prompts={tmp_path}/prompts.txt", "train.steps=1"]
    settings += ["evaluation.prompts=''", "rewards={brightness: 1.0}"]
    commands = (["train.py", str(TINY), *SMALL, *settings], ["sample.py", f"{tmp_path}/run", CAFE])
    for command in commands:
        ended = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, **locale},
            capture_output=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
    assert len(read_metrics(tmp_path / "run")) == 1
    assert CAFE in (tmp_path / "run" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert CAFE in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
