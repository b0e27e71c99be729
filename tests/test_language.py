"""The mechanical part of plain English: how docstrings begin, and phrases that were misread."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ODD_STARTS = {"Of", "To", "As", "Where", "By", "With", "What", "Whether"}
UNCLEAR = re.compile(
    r"\b(taught|teach(es)? nothing|handed over|hands? over|judged by|mend(ed|s)?|lacking|by itself"
    r"|goes on|going on from|told apart|(is|are|was|were) told|takes? no notice|at hand|of yours"
    r"|of theirs|so many|where there (is|are) none"
    r"|(is|are|as) no \w+ (file|folder|picture|number))\b"
    r"|\b(?<!there )(is|was|are) no "
    r"(?!longer\b|more\b|less\b|better\b|worse\b|fewer\b|larger\b|smaller\b)",
    re.IGNORECASE,
)
"""Sentences with these were misread: write "X is not a file". "There is no file X" is fine."""

PACKAGE = sorted((ROOT / "flowalign").rglob("*.py"))
TEXTS = sorted(
    [
        *(ROOT / "configs").rglob("*.yaml"),
        *(file for file in (ROOT / "docs").rglob("*.md")),
        *ROOT.glob("*.md"),
    ]
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def docstrings(path: Path) -> list[tuple[int, str]]:
    """Line and text of every docstring of a module, class, function or field."""
    found = []
    blocks = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for statement in node.body if isinstance(node, blocks) else []:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                if isinstance(statement.value.value, str):
                    found.append((statement.lineno, statement.value.value))
    return found


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_docstrings_begin_with_a_verb_or_a_noun(path):
    odd = [
        f"{name(path)}:{line} {text.split()[0]}"
        for line, text in docstrings(path)
        if text.split() and text.split()[0].strip(",:;.") in ODD_STARTS
    ]
    assert not odd


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_docstrings_and_messages_avoid_unclear_phrases(path):
    texts = [
        (node.lineno, node.value)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    unclear = [
        f"{name(path)}:{line} {match.group()!r}"
        for line, text in texts
        for match in UNCLEAR.finditer(text)
    ]
    assert not unclear


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_pages_and_configurations_avoid_unclear_phrases(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".yaml":
        lines = [line.partition("#")[2] for line in lines]
    unclear = [
        f"{name(path)}:{number} {match.group()!r}"
        for number, line in enumerate(lines, 1)
        for match in UNCLEAR.finditer(line)
    ]
    assert not unclear
