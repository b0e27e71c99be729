"""Imports go down only, folder by folder, in the order that docs/how-it-works.md draws."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flowalign"
ORDER = [
    *("errors", "progress", "bundled", "files", "disk_cache", "distributed", "flow"),
    *("global_state", "settings"),
    *("dynamics", "advantages", "batch"),
    *("worlds", "models", "data", "rewards", "tracking"),
    "policy",
    *("objectives", "rollouts"),
    *("evaluation", "config", "reporting", "runs"),
    *("training", "diagnostics", "sampling"),
    "labelling",
    *("api", "commands", "cli"),
    *("train", "sample"),
]
"""Folders and top-level modules, lowest first. Nothing imports what stands to its right."""
LAYER = {name: number for number, name in enumerate(ORDER)}
HEAVY = {"torch", "diffusers", "transformers"}
WRAPPERS = {"models", "rewards"}

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
SCRIPTS = [ROOT / "train.py", ROOT / "sample.py"]
OBJECTIVES = sorted((PACKAGE / "objectives").glob("*.py"))
SHARED_BY_OBJECTIVES = {"objectives.base", "objectives.draws", "objectives.terms"}


def module_name(path: Path) -> str:
    """The dotted name below the package; a script's stem."""
    if path in SCRIPTS:
        return path.stem
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Full names of all that a file imports, also in functions: `from a import b` is a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(path: Path) -> set[str]:
    """Names below flowalign."""
    return {
        name.removeprefix("flowalign.") for name in imports(path) if name.startswith("flowalign.")
    }


def top(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize("path", [*FILES, *SCRIPTS], ids=module_name)
def test_imports_go_down_only(path):
    here = top(module_name(path))
    assert here in LAYER, f"{here} is in no layer; add it to ORDER here and in docs/how-it-works.md"
    for name in own_imports(path):
        there = top(name)
        if there in LAYER:
            assert LAYER[there] <= LAYER[here], f"{module_name(path)} imports {name}"


def test_no_two_files_import_each_other():
    modules = {module_name(path): own_imports(path) for path in FILES if path.stem != "__init__"}
    graph = {
        module: {name for name in modules for it in imported if f"{it}.".startswith(f"{name}.")}
        for module, imported in modules.items()
    }
    while graph:
        leaves = {module for module, imported in graph.items() if not imported & set(graph)}
        assert leaves, f"these import each other: {sorted(graph)}"
        graph = {
            module: imported - leaves for module, imported in graph.items() if module not in leaves
        }


@pytest.mark.parametrize("path", OBJECTIVES, ids=module_name)
def test_an_objective_imports_no_other_objective(path):
    if module_name(path) in SHARED_BY_OBJECTIVES:
        return
    for name in own_imports(path):
        if top(name) == "objectives":
            assert any(name.startswith(f"{shared}.") for shared in SHARED_BY_OBJECTIVES)


@pytest.mark.parametrize(
    "path", [path for path in FILES if top(module_name(path)) not in WRAPPERS], ids=module_name
)
def test_diffusers_and_transformers_stay_in_the_files_that_wrap_them(path):
    assert not {top(name) for name in imports(path)} & {"diffusers", "transformers"}


def test_importing_the_package_is_quick():
    code = f"import sys, flowalign; print({HEAVY!r} & set(sys.modules))"
    run = [sys.executable, "-c", code]
    result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
