"""Print how readable the code is: sizes, density, comments, types and imports, as one table.

    python scripts/code_metrics.py                      # the package
    python scripts/code_metrics.py flowalign/rewards    # one folder

The targets in the right column are those of the style guide. With --where, the places that miss a target are listed.
"""

import argparse
import ast
import re
import statistics
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COLUMNS = 100
LONGEST_FUNCTION = 45
PREPOSITIONS = {"Of", "To", "As", "Where", "By", "With", "What", "Whether"}


class Row(NamedTuple):
    """One line of the table."""

    name: str
    value: str
    target: str
    places: list[str]


def main() -> None:
    """Read the folders named on the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="*", default=["flowalign"])
    parser.add_argument("--where", action="store_true", help="list the places that miss a target")
    options = parser.parse_args()
    files = sorted(file for folder in options.folders for file in Path(folder).rglob("*.py"))
    for row in table(files):
        print(f"{row.name:44}{row.value:>16}  {row.target}")
        if options.where:
            print("".join(f"    {place}\n" for place in row.places), end="")


def table(files: list[Path]) -> Iterator[Row]:
    """Measure the files."""
    texts = {file: file.read_text(encoding="utf-8") for file in files}
    trees = {file: ast.parse(text) for file, text in texts.items()}
    lines = sum(len(text.splitlines()) for text in texts.values())
    thousands = lines / 1000
    lengths = {place: length for file in files for place, length in functions(file, trees[file])}
    middle, most = statistics.median(lengths.values()), max(lengths.values())
    tenth = sorted(lengths.values())[round(0.9 * (len(lengths) - 1))]
    too_long = [f"{p} {n} lines" for p, n in lengths.items() if n > LONGEST_FUNCTION]
    wide = [
        f"{file}:{number}"
        for file, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        if len(line) > COLUMNS
    ]
    anys = [place for file, text in texts.items() for place in found(file, text, r"\bAny\b")]
    double = [p for file in files for p in comprehensions_with_two_loops(file, trees[file])]
    nested = [p for file in files for p in nested_conditionals(file, trees[file])]
    odd = [p for file in files for p in docstrings_with_odd_starts(file, trees[file])]
    comments = sum(whole_line_comments(file) for file in files)
    circles = import_circles({module(file): own_imports(trees[file]) for file in files})
    arrows = {
        (room(module(file)), room(name))
        for file in files
        for name in own_imports(trees[file])
        if room(module(file)) != room(name)
    }
    yield Row("files, folders", f"{len(files)}, {len({file.parent for file in files})}", "", [])
    yield Row("lines", f"{lines:,}", "", [])
    yield Row("longest file, lines", str(max(len(t.splitlines()) for t in texts.values())), "", [])
    yield Row("function lines: median, p90, max", f"{middle:g}, {tenth}, {most}", "max 45", too_long)
    yield Row("lines over 100 columns", str(len(wide)), "0", wide)
    yield Row("`Any` per 1,000 lines", f"{len(anys) / thousands:.1f}", "6 or less", anys)
    yield Row("two-loop comprehensions per 1,000", f"{len(double) / thousands:.1f}", "1", double)
    yield Row("conditional expressions inside another", str(len(nested)), "0", nested)
    yield Row("whole-line comments, share of lines", f"{comments / lines:.1%}", "2 % or more", [])
    yield Row("docstrings that begin with a preposition", str(len(odd)), "0", odd)
    yield Row("import circles", str(len(circles)), "0", circles)
    yield Row("arrows between folders", str(len(arrows)), "", [f"{a} -> {b}" for a, b in sorted(arrows)])


def functions(file: Path, tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield the place and the number of lines of every function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{file}:{node.lineno} {node.name}", (node.end_lineno or 0) - node.lineno + 1


def found(file: Path, text: str, pattern: str) -> Iterator[str]:
    """Yield the place of every match."""
    for match in re.finditer(pattern, text):
        yield f"{file}:{text.count(chr(10), 0, match.start()) + 1}"


def comprehensions_with_two_loops(file: Path, tree: ast.Module) -> Iterator[str]:
    """Yield the place of every comprehension with more than one `for`."""
    kinds = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
    for node in ast.walk(tree):
        if isinstance(node, kinds) and len(node.generators) > 1:
            yield f"{file}:{node.lineno}"


def nested_conditionals(file: Path, tree: ast.Module) -> Iterator[str]:
    """Yield the place of every conditional expression that holds another."""
    for node in ast.walk(tree):
        if isinstance(node, ast.IfExp):
            inner = [part for part in ast.walk(node) if isinstance(part, ast.IfExp)]
            if len(inner) > 1:
                yield f"{file}:{node.lineno}"


def docstrings_with_odd_starts(file: Path, tree: ast.Module) -> Iterator[str]:
    """Yield the place of every docstring that begins with a preposition or a relative word."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            words = (ast.get_docstring(node) or "").split()
            if words and words[0].strip(",:;") in PREPOSITIONS:
                yield f"{file}:{getattr(node, 'lineno', 1)} {words[0]}"


def whole_line_comments(file: Path) -> int:
    """Count the lines that hold a comment and nothing else."""
    with file.open("rb") as opened:
        tokens = [t for t in tokenize.tokenize(opened.readline) if t.type == tokenize.COMMENT]
    return sum(token.line.lstrip().startswith("#") for token in tokens)


def module(file: Path) -> str:
    """Return the dotted name of a file."""
    relative = file.resolve().relative_to(ROOT)
    return ".".join(relative.with_suffix("").parts).removesuffix(".__init__")


def room(name: str) -> str:
    """Return the folder, or the top-level module, that a dotted name lies in."""
    return ".".join(name.split(".")[:2])


def own_imports(tree: ast.Module) -> set[str]:
    """Return the modules of the package that a file imports at its top level."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flowalign."):
            names.add(node.module or "")
    return names


def import_circles(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules that import each other, directly or over others."""
    graph = {name: imported & set(graph) for name, imported in graph.items()}
    while leaves := {name for name, imported in graph.items() if not imported & set(graph)}:
        graph = {name: imported for name, imported in graph.items() if name not in leaves}
    return sorted(graph)


if __name__ == "__main__":
    main()
