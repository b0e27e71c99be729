"""How many votes does it take? A script votes in the bundled world, and objectives learn from it.

The voter prefers the picture that shows more of its prompt, and errs once in ten votes. Held-out
votes are 200 further ones of the same voter on other pictures. Each row is one run.

    PYTHONPATH=. python benchmarks/votes.py --output /tmp/votes
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import flowalign
from flowalign.labelling.label import LabelSettings, open_session
from scripts.make_votes import play

CONFIG = "configs/tiny/votes.yaml"
COUNTS = (20, 60, 200)
OBJECTIVES: Mapping[str, Mapping[str, object]] = {
    "d3po": {},
    "dpo": {"objective": {"name": "dpo"}, "train.learning_rate": 2e-4, "train.steps": 60},
    "kto": {"objective": {"name": "kto"}, "train.learning_rate": 2e-4, "train.steps": 60},
}


def vote(source: str, folder: Path, questions: int, seed: int) -> Path:
    """Vote on the pictures of a source, and return the vote file."""
    file = folder / "votes.jsonl"
    if not file.exists():
        settings = LabelSettings(questions=questions, votes=str(file), seed=seed)
        session = open_session(source, settings)
        play(session, "script", seed)
        session.close()
    return file


def train(votes: Path, held_out: Path, output: Path, settings: Mapping[str, object]) -> dict:
    """Train on votes, and return the summary."""
    if (output / "summary.json").exists():
        return json.loads((output / "summary.json").read_text())
    overrides = {
        "data.pairs": str(votes),
        "evaluation.pairs": str(held_out),
        "evaluation.guidance_sweep": [],
        "train.evaluate_every": 0,
        "output": str(output),
        **settings,
    }
    return dict(flowalign.train(CONFIG, overrides))


def row(name: str, count: int, summary: Mapping[str, dict]) -> str:
    """Return a row of the table."""
    cells = []
    for figure in ("chosen_preferred", "scene_match"):
        low, mean, high = summary["difference"][figure]
        after = summary["after"][figure]
        cells.append(f"{after:.3f} | {mean:+.3f} ({low:+.3f} to {high:+.3f})")
    return f"| {name} | {count} | {' | '.join(cells)} |"


def main() -> None:
    """Run everything that is missing in the output folder, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--counts", type=int, nargs="*", default=COUNTS)
    parser.add_argument("--objectives", nargs="*", default=list(OBJECTIVES))
    options = parser.parse_args()
    folder = options.output
    held_out = vote(CONFIG, folder / "held_out", 200, seed=1)
    rows = []
    for count in options.counts:
        votes = vote(CONFIG, folder / f"votes-{count}", count, seed=0)
        for name in options.objectives:
            run = folder / f"{name}-{count}"
            rows.append(row(name, count, train(votes, held_out, run, OBJECTIVES[name])))
            print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
