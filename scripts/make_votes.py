"""Make the votes that come with the package: a script plays a voter.

The voter prefers the picture of which the checker of the bundled world confirms more facts of the
prompt, and errs once in ten votes. Run from the repository:

    python scripts/make_votes.py train.jsonl --questions 200 --seed 0
    python scripts/make_votes.py evaluation.jsonl --questions 200 --seed 1
"""

import argparse
import io
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image

from flowalign.bundled import locate
from flowalign.labelling.label import LabelSettings, open_session
from flowalign.labelling.session import Session
from flowalign.rewards.registry import load_reward

MISTAKES = 0.1
"""Share of votes for the worse picture, of those that are not ties."""


def choice_of(scores: list[float], random: Random) -> str:
    """Return the choice of a voter who sees these scores, left and right."""
    left, right = scores
    if left == right:
        return "tie" if left else "both_bad"
    prefers_left = (left > right) != (random.random() < MISTAKES)
    return "left" if prefers_left else "right"


def pixels(content: bytes) -> torch.Tensor:
    """Decode an image file into (3, H, W) in [0, 1]."""
    picture = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    return torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 255


def play(session: Session, voter: str, seed: int) -> None:
    """Answer all questions of a session."""
    checker, random = load_reward("scene_match_graded"), Random(seed)
    while shown := session.next(voter):
        pictures = [
            session.picture(voter, shown.place, position) for position in range(shown.pictures)
        ]
        images = torch.stack([pixels(content) for content in pictures])
        scores = checker(images, [shown.prompt] * len(images), [{}] * len(images))
        session.vote(voter, shown.place, choice_of(scores.tolist(), random), seconds=0)


def main() -> None:
    """Read the command line, and write a vote file in `assets/votes`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", default="configs/tiny/votes.yaml")
    options = parser.parse_args()
    settings = LabelSettings(
        questions=options.questions,
        votes=str(Path(locate("assets")) / "votes" / options.file),
        seed=options.seed,
        stores=False,
    )
    session = open_session(options.config, settings)
    play(session, "script", options.seed)
    session.close()


if __name__ == "__main__":
    main()
