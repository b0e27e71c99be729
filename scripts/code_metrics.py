"""Print how readable the code is: sizes, density, comments, types and imports, as one table.

    python scripts/code_metrics.py                           # the package
    python scripts/code_metrics.py flowalign/rewards tests   # some folders

The last column is the target of the style guide. With --where, the places that miss a target are
listed.
"""

import argparse
import ast
import re
import statistics
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COLUMNS = 100
LONGEST_FUNCTION = 45
PREPOSITIONS = {"Of", "To", "As", "Where", "By", "With", "What", "Whether"}
COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """A Python file."""

    path: Path

    @cached_property
    def text(self) -> str:
        """The text of the file."""
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def lines(self) -> list[str]:
        """The lines of the file."""
        return self.text.splitlines()

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.text)

    @property
    def module(self) -> str:
        """The dotted name."""
        relative = self.path.resolve().relative_to(ROOT)
        return ".".join(relative.with_suffix("").parts).removesuffix(".__init__")

    def place(self, line: int, name: str = "") -> str:
        """Return a line of the file as a reader looks it up."""
        return f"{self.path}:{line} {name}".rstrip()


class Row(NamedTuple):
    """A line of the table."""

    name: str
    value: str
    target: str = ""
    places: Iterable[str] = ()


def main() -> None:
    """Read the folders named on the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="*", default=["flowalign"])
    parser.add_argument("--where", action="store_true", help="list the places that miss a target")
    options = parser.parse_args()
    files = chain.from_iterable(Path(folder).rglob("*.py") for folder in options.folders)
    sources = [Source(file) for file in sorted(files)]
    for row in chain(sizes(sources), density(sources), imports(sources)):
        print(f"{row.name:44}{row.value:>16}  {row.target}".rstrip())
        if options.where:
            print("".join(f"    {place}\n" for place in row.places), end="")


def sizes(sources: list[Source]) -> Iterator[Row]:
    """Measure files and functions."""
    folders, longest = {s.path.parent for s in sources}, max(len(s.lines) for s in sources)
    lengths = dict(chain.from_iterable(map(function_lengths, sources)))
    ordered = sorted(lengths.values())
    middle, tenth = statistics.median(ordered), ordered[round(0.9 * (len(ordered) - 1))]
    too_long = [f"{place}, {n} lines" for place, n in lengths.items() if n > LONGEST_FUNCTION]
    wide = collect(wide_lines, sources)
    yield Row("files, folders", f"{len(sources)}, {len(folders)}")
    yield Row("lines", f"{count_lines(sources):,}")
    yield Row("longest file, lines", str(longest))
    value = f"{middle:g}, {tenth}, {ordered[-1]}"
    yield Row("function lines: median, p90, max", value, f"max {LONGEST_FUNCTION}", too_long)
    yield Row(f"lines over {COLUMNS} columns", str(len(wide)), "0", wide)


def density(sources: list[Source]) -> Iterator[Row]:
    """Count what makes code hard to read, and the comments that help."""
    lines = count_lines(sources)
    anys, loops = collect(uses_of_any, sources), collect(two_loops, sources)
    nested, odd = collect(nested_conditionals, sources), collect(odd_docstrings, sources)
    comments = sum(whole_line_comments(source) for source in sources)
    per_thousand = f"{1000 * len(anys) / lines:.1f}", f"{1000 * len(loops) / lines:.1f}"
    yield Row("`Any` per 1,000 lines", per_thousand[0], "6 or less", anys)
    yield Row("two-loop comprehensions per 1,000 lines", per_thousand[1], "1 or less", loops)
    yield Row("conditional expressions inside another", str(len(nested)), "0", nested)
    yield Row("whole-line comments, share of lines", f"{comments / lines:.1%}", "2 % or more")
    yield Row("docstrings that begin with a preposition", str(len(odd)), "0", odd)


def imports(sources: list[Source]) -> Iterator[Row]:
    """Count the imports between folders, and those that form a circle."""
    graph = {source.module: own_imports(source.tree) for source in sources}
    edges = chain.from_iterable(((a, b) for b in targets) for a, targets in graph.items())
    rooms = {(room(a), room(b)) for a, b in edges}
    arrows = sorted(f"{a} -> {b}" for a, b in rooms if a != b)
    circles = import_circles(graph)
    yield Row("import circles", str(len(circles)), "0", circles)
    yield Row("arrows between folders", str(len(arrows)), "", arrows)


def collect(places: Callable[[Source], Iterator[str]], sources: list[Source]) -> list[str]:
    """Return the places that a measure yields in all files."""
    return list(chain.from_iterable(map(places, sources)))


def count_lines(sources: list[Source]) -> int:
    """Return the number of lines of all files."""
    return sum(len(source.lines) for source in sources)


def function_lengths(source: Source) -> Iterator[tuple[str, int]]:
    """Yield the place and the number of lines of every function."""
    for node in ast.walk(source.tree):
        if isinstance(node, FUNCTIONS):
            yield source.place(node.lineno, node.name), (node.end_lineno or 0) - node.lineno + 1


def wide_lines(source: Source) -> Iterator[str]:
    """Yield the place of every line that is too wide."""
    for number, line in enumerate(source.lines, 1):
        if len(line) > COLUMNS:
            yield source.place(number)


def uses_of_any(source: Source) -> Iterator[str]:
    """Yield the place of every `Any`."""
    for number, line in enumerate(source.lines, 1):
        yield from [source.place(number)] * len(re.findall(r"\bAny\b", line))


def two_loops(source: Source) -> Iterator[str]:
    """Yield the place of every comprehension with more than one `for`."""
    for node in ast.walk(source.tree):
        if isinstance(node, COMPREHENSIONS) and len(node.generators) > 1:
            yield source.place(node.lineno)


def nested_conditionals(source: Source) -> Iterator[str]:
    """Yield the place of every conditional expression that holds another."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.IfExp):
            conditionals = [part for part in ast.walk(node) if isinstance(part, ast.IfExp)]
            if len(conditionals) > 1:
                yield source.place(node.lineno)


def odd_docstrings(source: Source) -> Iterator[str]:
    """Yield the place of every docstring that begins with a preposition or a relative word."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Module | ast.ClassDef | FUNCTIONS):
            words = (ast.get_docstring(node) or "").split()
            if words and words[0].strip(",:;") in PREPOSITIONS:
                yield source.place(getattr(node, "lineno", 1), words[0])


def whole_line_comments(source: Source) -> int:
    """Count the lines that hold a comment and nothing else."""
    # Tokens, not text: a line of a docstring may begin with "#" too.
    with source.path.open("rb") as file:
        tokens = [t for t in tokenize.tokenize(file.readline) if t.type == tokenize.COMMENT]
    return sum(token.line.lstrip().startswith("#") for token in tokens)


def room(name: str) -> str:
    """Return the folder, or the top-level module, that a dotted name lies in."""
    return ".".join(name.split(".")[:2])


def own_imports(tree: ast.Module) -> set[str]:
    """Return the modules of the package that a file imports at its top level."""
    imported = [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {name for name in imported if name.startswith("flowalign.")}


def import_circles(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules that import each other, directly or over others."""
    graph = {name: targets & set(graph) for name, targets in graph.items()}
    # Modules that import nothing of what is left are in no circle. Removing them frees others.
    while leaves := {name for name, targets in graph.items() if not targets & set(graph)}:
        graph = {name: targets for name, targets in graph.items() if name not in leaves}
    return sorted(graph)


if __name__ == "__main__":
    main()
