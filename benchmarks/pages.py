"""Write what the benchmarks measured into the documentation.

    PYTHONPATH=. python benchmarks/pages.py

`benchmarks/measured/TABLE.json` is the results.json of a table that benchmarks/objectives.py has
trained. Pages hold its rows between `<!-- table: TABLE -->` and `<!-- end of table -->`, the runs
of its only row between `<!-- seeds: TABLE -->` and `<!-- end of seeds -->`, and the curve of a row
of objectives.json between `<!-- curve: ROW -->` and `<!-- end of curve -->`. A test compares the
pages with what this script would write.
"""

import re
import statistics
from collections.abc import Callable
from pathlib import Path

from objectives import best_first, read_results, read_table, Result, ROOT, table_lines, TABLES

DOCS, MEASURED = ROOT / "docs", ROOT / "benchmarks" / "measured"
SCORE = "scene_match"


def main() -> None:
    """Write every page with a block again."""
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")


def pages() -> dict[Path, str]:
    """Return the text of every page of the documentation with its blocks filled in."""
    return {page: filled(page.read_text(encoding="utf-8")) for page in sorted(DOCS.rglob("*.md"))}


def filled(text: str) -> str:
    """Return a page with its tables and curves filled in."""
    for kind, lines_of in (("table", table), ("seeds", seeds), ("curve", curve)):
        text = with_blocks(text, kind, lines_of)
    return text


def with_blocks(text: str, kind: str, lines_of: Callable[[str], list[str]]) -> str:
    """Replace the content of all blocks of a kind by the lines for their names."""
    block = re.compile(rf"(<!-- {kind}: (\w+) -->\n).*?(<!-- end of {kind} -->)", re.DOTALL)

    def replaced(match: re.Match[str]) -> str:
        lines = "".join(f"{line}\n" for line in lines_of(match[2]))
        return f"{match[1]}{lines}{match[3]}"

    return block.sub(replaced, text)


def table(name: str) -> list[str]:
    """Return the lines of a table, the best row first."""
    score = read_table(TABLES / f"{name}.yaml").score
    return table_lines(best_first(read_results(MEASURED / f"{name}.json"), score))


def seeds(name: str) -> list[str]:
    """Return what each run of a table with one row gained, with 95 % intervals over prompts."""
    (runs,) = read_results(MEASURED / f"{name}.json").values()
    head = "| seed | base | guided base | trained | trained - base | trained - guided base |"
    return [head, "|---|---|---|---|---|---|", *(gains(seed, run) for seed, run in enumerate(runs))]


def gains(seed: int, run: Result) -> str:
    """Return the line of a run."""
    summary = run["summary"]
    guided = summary["baseline_guided"]
    means = [means[SCORE] for means in (summary["before"], guided["means"], summary["after"])]
    changes = [changes[SCORE] for changes in (summary["difference"], guided["difference"])]
    cells = [f"{mean:.3f}" for mean in means]
    cells += [f"{middle:+.3f} ± {high - middle:.3f}" for _, middle, high in changes]
    return f"| {seed} | {' | '.join(cells)} |"


def curve(row: str) -> list[str]:
    """Return images, and the median, lowest and highest strict score of a row's runs."""
    runs = read_results(MEASURED / "objectives.json")[row]
    lines = ["| images | strict score, median | lowest to highest |", "|---|---|---|"]
    # The last point repeats the evaluation of the last step.
    return lines + [point(runs, number) for number in range(len(runs[0]["points"]) - 1)]


def point(runs: list[Result], number: int) -> str:
    """Return the line of an evaluation."""
    points = [run["points"][number] for run in runs]
    scores = [point[SCORE] for point in points]
    spread = f"{min(scores):.3f} to {max(scores):.3f}"
    return f"| {points[0]['images']:,} | {statistics.median(scores):.3f} | {spread} |"


if __name__ == "__main__":
    main()
