"""How many votes does it take? A script votes in the bundled world, and objectives learn from it.

The voter prefers the picture that shows more of its prompt, and errs once in ten votes. Some
rows learn from the voted pictures, others from new ones by a reward that is fitted to the votes.
Held-out votes are 600 further ones of the same voter on other pictures. The second round votes on
the pictures of the first round's model and continues from it.

    PYTHONPATH=. python benchmarks/votes.py --output /tmp/votes [--workers 2]
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import flowalign
from flowalign.evaluation.statistics import paired_difference
from flowalign.labelling.label import LabelSettings, open_session
from scripts.make_votes import play

CONFIG = "configs/tiny/votes.yaml"
COUNTS = (20, 60, 200)
SECOND = 60
"""Questions of each of the two rounds."""
HELD_OUT = 600
DIRECT: Mapping[str, Mapping[str, object]] = {
    "d3po": {},
    "dpo": {"objective": {"name": "dpo"}, "train.steps": 150},
    "kto": {"objective": {"name": "kto", "beta": 300.0}, "train.steps": 100},
}
"""Rows that learn from the voted pictures alone, with their changes of `CONFIG`."""
TASTE: Mapping[str, tuple[str, Mapping[str, object]]] = {
    # The paths of held-out pictures are those of d3po, so the sampler must be that of the votes.
    "taste, d3po": (
        "configs/tiny/d3po.yaml",
        {"sampler.same_noise": True, "objective.beta": 100.0},
    ),
    "taste, dpo": ("configs/tiny/dpo_online.yaml", {}),
    "taste, kto": ("configs/tiny/kto_online.yaml", {}),
    "taste, crd": ("configs/tiny/crd.yaml", {"train.steps": 60, "train.cooldown": 30}),
}
"""Rows that learn from new pictures, which a reward scores that is fitted to the votes."""
ALWAYS = {"train.evaluate_every": 0, "evaluation.guidance_sweep": []}
FIGURES = ("chosen_preferred", "scene_match_graded", "scene_match")


def vote(source: str, folder: Path, questions: int, seed: int) -> Path:
    """Vote on the pictures of a source, and return the vote file."""
    file = folder / "votes.jsonl"
    if not file.exists():
        settings = LabelSettings(questions=questions, votes=str(file), seed=seed)
        session = open_session(source, settings)
        play(session, "script", seed)
        session.close()
    return file


def settings_of(row: str, votes: Path, held_out: Path) -> tuple[str, Mapping[str, object]]:
    """Return the file that a row trains, and what is changed in it."""
    pairs = {"evaluation.pairs": str(held_out)}
    if row in DIRECT:
        return CONFIG, {"data.pairs": str(votes), **pairs, **DIRECT[row]}
    file, changes = TASTE[row]
    checker = {"scene_match": 1.0, "scene_match_graded": 1.0}
    rewards = {"rewards": {"taste": {"votes": str(votes)}}, "evaluation.rewards": checker}
    return file, {**rewards, **pairs, **changes}


def train(row: str, votes: Path, held_out: Path, output: Path, start: Path | None = None) -> str:
    """Train on votes in a process of its own, and return the row's cells."""
    if not (output / "summary.json").exists():
        file, changes = settings_of(row, votes, held_out)
        merge = {"model.merge": [str(start / "adapter")]} if start else {}
        settings = {**ALWAYS, **changes, **merge, "output": str(output)}
        command = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        threads = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "train.py", file, *command],
            env=threads,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            return done.stderr.strip().splitlines()[-1]
    summary = json.loads((output / "summary.json").read_text())
    return " | ".join(cell(summary, figure) for figure in FIGURES)


def cell(summary: Mapping[str, dict], figure: str) -> str:
    """Return a figure after training, its rise and the rise's 95 % interval."""
    if figure not in summary["after"]:
        return "-"
    low, mean, high = summary["difference"][figure]
    return f"{summary['after'][figure]:.3f}, {mean:+.3f} ({low:+.3f} to {high:+.3f})"


def sides_with(adapter: Path, held_out: Path) -> str:
    """Return the cell of the held-out votes that a model sides with.

    It is for objectives that do not learn from pairs, whose evaluations have no such figure.
    """
    settings = {
        "objective": {"name": "dpo"},
        "evaluation.pairs": str(held_out),
        "evaluation.images_per_prompt": 1,
    }
    config = flowalign.load_config(CONFIG, settings)
    before, after = flowalign.evaluate(config), flowalign.evaluate(config, adapter)
    summary = {"after": after.means, "difference": paired_difference(before, after)}
    return cell(summary, "chosen_preferred")


def main() -> None:
    """Run everything that is missing in the output folder, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True)
    add("--counts", type=int, nargs="*", default=COUNTS)
    add("--rows", nargs="*", default=[*DIRECT, *TASTE])
    add("--workers", type=int, default=2, help="runs at a time, each with one thread")
    options = parser.parse_args()
    folder = options.output
    held_out = vote(CONFIG, folder / "held-out", HELD_OUT, seed=1)
    files = {count: vote(CONFIG, folder / f"votes-{count}", count, seed=0) for count in COUNTS}

    def first(job: tuple[int, str]) -> None:
        count, row = job
        cells = train(row, files[count], held_out, folder / f"{row}-{count}")
        print(f"| {row} | {count} | {cells} |", flush=True)

    def second(row: str) -> None:
        files = [folder / name / "votes.jsonl" for name in again(row)]
        cells = train(row, *files, folder / f"{row}-second", folder / f"{row}-{SECOND}")
        print(f"| {row}, second round | {SECOND} | {cells} |", flush=True)

    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(first, [(count, row) for count in options.counts for row in options.rows]))
        # Models are not loaded in threads.
        for row in options.rows:
            for (name, questions), seed in zip(again(row).items(), (2, 3), strict=True):
                vote(str(folder / f"{row}-{SECOND}"), folder / name, questions, seed)
        list(pool.map(second, options.rows))
    for adapter in sorted(folder.glob("taste, crd-[0-9]*/adapter")):
        print(f"| {adapter.parent.name} | {sides_with(adapter, held_out)} |", flush=True)


def again(row: str) -> dict[str, int]:
    """Return the folders of a second round's votes and held-out votes, with their questions."""
    # Votes that were held out in the first round are on the pictures of another model.
    return {f"votes-after-{row}": SECOND, f"held-out-after-{row}": HELD_OUT}


if __name__ == "__main__":
    main()
