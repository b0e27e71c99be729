"""Imports go down only, as the architecture draws them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flowalign"
LAYERS = [
    "flow errors",
    "settings",
    "batch dynamics advantage scenes processes hub data stopping named reading",
    "models",
    "policy pairs",
    "rewards",
    "experience search objectives reward_maps",
    "sources",
    "config trainer assembly folder checkpoint tracking evaluation report sampling check plan gradient",
    "cli train sample",
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names.split()}
LOOP = LAYER["trainer"]
"""Here and above, files of one layer may use each other."""
HEAVY = {"torch", "diffusers", "transformers"}
WRAPPERS = {"models", "rewards", "objectives", "hub"}

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
SCRIPTS = [ROOT / "train.py", ROOT / "sample.py"]
OBJECTIVES = sorted(path for path in (PACKAGE / "objectives").glob("*.py") if path.stem != "__init__")


def relative_name(path: Path) -> str:
    return (
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__") if path not in SCRIPTS else path.stem
    )


def imports(path: Path) -> set[str]:
    """Full names of everything a file imports, also inside functions: `from a import b` counts as a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(path: Path) -> set[str]:
    """Names below flowalign."""
    return {name.removeprefix("flowalign.") for name in imports(path) if name.startswith("flowalign.")}


def top(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize("path", [*FILES, *SCRIPTS], ids=relative_name)
def test_imports_go_down_only(path):
    here = top(relative_name(path))
    assert here in LAYER, f"{here} stands in no layer; give it one here and in the architecture"
    for name in own_imports(path):
        there = top(name)
        own_package = here == there
        peers = LAYER[here] == LAYER[there] >= LOOP
        assert own_package or peers or LAYER[there] < LAYER[here], f"{relative_name(path)} imports {name}"


def test_no_two_files_import_each_other():
    modules = {relative_name(path): own_imports(path) for path in FILES if path.stem != "__init__"}
    graph = {
        module: {name for name in modules for found in imported if f"{found}.".startswith(f"{name}.")}
        for module, imported in modules.items()
    }
    while graph:
        leaves = {module for module, found in graph.items() if not found & set(graph)}
        assert leaves, f"these import each other: {sorted(graph)}"
        graph = {module: found for module, found in graph.items() if module not in leaves}


@pytest.mark.parametrize("path", OBJECTIVES, ids=relative_name)
def test_an_objective_knows_no_other_objective_and_no_loop(path):
    for name in own_imports(path):
        if top(name) == "objectives":
            assert name.startswith("objectives.base."), f"{path.name} imports {name}"
        assert LAYER[top(name)] < LOOP


@pytest.mark.parametrize("path", [path for path in FILES if top(relative_name(path)) not in WRAPPERS], ids=relative_name)
def test_diffusers_and_transformers_stay_in_the_files_that_wrap_them(path):
    assert not {top(name) for name in imports(path)} & {"diffusers", "transformers"}


def test_importing_the_package_is_quick():
    code = f"import sys, flowalign; print({HEAVY!r} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
