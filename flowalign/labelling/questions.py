"""The order in which a voter is asked, and what each answer means."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from flowalign.data.votes import Labels

NEW_PER_REPEAT = 9
"""After this many new questions, an earlier one is asked again with its pictures reversed."""
LEAST_DISTANCE = 20
"""Questions between a question and its repetition, so that nobody answers from memory."""
PICTURES = {"pair": 2, "group": 4, "thumbs": 1}
"""Modes, and the pictures of a question in each."""

SKIP = "skip"
CHOICES: Mapping[str, Mapping[str, Labels | None]] = {
    "pair": {
        "left": (1.0, -1.0),
        "right": (-1.0, 1.0),
        "tie": (0.0, 0.0),
        "both_bad": (-1.0, -1.0),
        SKIP: None,
    },
    "thumbs": {"like": (1.0,), "dislike": (-1.0,), SKIP: None},
}
"""The labels of the pictures, as they are shown, for each choice. A skipped question has none."""


@dataclass(frozen=True)
class Place:
    """A question as it is shown to a voter."""

    question: int
    order: tuple[int, ...]
    """Which picture of the question stands at each position."""


@lru_cache(maxsize=16)
def places(questions: int, pictures: int, seed: int, voter: str) -> list[Place]:
    """Return all that a voter is asked: a function of these arguments alone.

    Pictures stand in a random order. One question in ten is repeated in the reverse order, to
    measure how often a voter agrees with themselves.
    """
    random = Random(f"label/{seed}/{voter}")
    asked: list[Place] = []
    unrepeated: list[Place] = []
    for question in range(questions):
        place = Place(question, tuple(random.sample(range(pictures), pictures)))
        asked.append(place)
        unrepeated.append(place)
        old = [one for one in unrepeated if one.question <= question - LEAST_DISTANCE]
        if old and (question + 1) % NEW_PER_REPEAT == 0:
            again = random.choice(old)
            unrepeated.remove(again)
            asked.append(Place(again.question, again.order[::-1]))
    return asked


def labels_of(mode: str, choice: str, pictures: int) -> Labels | None:
    """Return the labels of the shown pictures; None for a skipped question.

    In a group, a choice is "best,worst" as two positions. Raises ValueError for another choice.
    """
    if mode != "group":
        if choice not in CHOICES[mode]:
            raise ValueError(f"{choice!r} is not one of {', '.join(CHOICES[mode])}.")
        return CHOICES[mode][choice]
    if choice == SKIP:
        return None
    best, _, worst = choice.partition(",")
    positions = [int(text) for text in (best, worst) if text.isdecimal()]
    if len(positions) != 2 or best == worst or max(positions) >= pictures:
        raise ValueError(f"{choice!r} does not name the best and the worst of {pictures} pictures.")
    labels = [0.0] * pictures
    labels[positions[0]], labels[positions[1]] = 1.0, -1.0
    return tuple(labels)
