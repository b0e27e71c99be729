"""The prompts of a page: one card each, with a picture and scores of every side."""

import base64
import io
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from flowalign.data.prompts import Prompt
from flowalign.evaluation.results import EvaluationResult
from flowalign.reporting.record import Side
from flowalign.reporting.tags import format_score, tag_of

PICTURE_BYTES = 24_000_000
"""The most that the pictures of all cards take. Beyond that, every n-th prompt keeps its own."""
PIXELATED = 128
"""Pixels. Pictures whose sides are no longer are enlarged with square pixels."""


class Picture(NamedTuple):
    """A picture inside the page."""

    address: str
    """A data URI."""
    width: int
    height: int

    @property
    def is_small(self) -> bool:
        """True if the page enlarges it with square pixels."""
        return max(self.width, self.height) <= PIXELATED


class Score(NamedTuple):
    """The score of one reward on one side of a card, as text."""

    picture: str
    """That of the picture that is shown."""
    mean: str
    """The mean of all pictures of the prompt; empty if there is one."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """One evaluated prompt."""

    number: int
    text: str
    tag: str
    pictures: Sequence[Picture | None]
    """The picture of each side, or None for sides without one; empty if there are no pictures."""
    scores: Sequence[tuple[str, Sequence[Score]]]
    """Reward, and its score on each side."""
    means: Sequence[Sequence[float | None]]
    """The mean score of each reward on each side, by which the page sorts: [side][reward]."""


def make_cards(sides: Sequence[Side], prompts: Sequence[Prompt]) -> list[Card]:
    """Return a card for every evaluated prompt, in the order of the file.

    Args:
        sides: What is compared, on the same prompts and noise.
        prompts: The prompts, or fewer if they are not known.
    """
    if not sides:
        return []
    known = [_prompt_means(side.result) for side in sides]
    count = max(map(len, known))
    shown = _affordable(sides, count)
    return [_card(sides, known, _prompt(prompts, number), number, shown) for number in range(count)]


def picture_of(file: bytes | None) -> Picture | None:
    """Return a WebP file as a picture of the page, or None if there is none or it is damaged."""
    if file:
        with suppress(OSError, ValueError, Image.DecompressionBombError):
            with Image.open(io.BytesIO(file), formats=["WEBP"]) as image:
                width, height = image.size
            address = f"data:image/webp;base64,{base64.b64encode(file).decode()}"
            return Picture(address, width, height)
    return None


def _prompt(prompts: Sequence[Prompt], number: int) -> Prompt:
    return prompts[number] if number < len(prompts) else Prompt(f"prompt {number + 1}")


def _prompt_means(result: EvaluationResult) -> list[dict[str, float]]:
    """Return the mean of every reward of each prompt; NaN if none of its images has a score."""
    count = int(result.prompt.max()) + 1 if len(result.prompt) else 0
    means = {}
    for name, values in result.rewards.items():
        scored = ~values.isnan()
        index, numbers = result.prompt[scored], values[scored].double()
        total = torch.zeros(count, dtype=torch.float64).index_add_(0, index, numbers)
        means[name] = (total / torch.bincount(index, minlength=count)).tolist()
    return [{name: column[row] for name, column in means.items()} for row in range(count)]


def _affordable(sides: Sequence[Side], prompts: int) -> set[int]:
    """Return the prompts whose pictures the page has room for, spread over all of them."""
    sizes = dict.fromkeys(range(prompts), 0)
    for side in sides:
        for row, file in side.result.thumbnails.items():
            sizes[int(side.result.prompt[row])] += len(file)
    pictured = [number for number, size in sizes.items() if size]
    every = max(1, math.ceil(sum(sizes.values()) / PICTURE_BYTES))
    return set(pictured[::every])


def _card(
    sides: Sequence[Side],
    known: Sequence[Sequence[dict[str, float]]],
    prompt: Prompt,
    number: int,
    shown: set[int],
) -> Card:
    rewards = sides[-1].result.rewards
    means = [own[number] if number < len(own) else {} for own in known]
    rows = [_rows_of(side.result, number) for side in sides]
    pictures = [
        picture_of(side.result.thumbnails.get(int(own[0]))) if len(own) else None
        for side, own in zip(sides, rows, strict=True)
    ]
    return Card(
        number=number + 1,
        text=prompt.text,
        tag=tag_of(prompt),
        pictures=pictures if number in shown and any(pictures) else [],
        scores=[
            (
                name,
                [
                    _score(side.result, own, mean, name)
                    for side, own, mean in zip(sides, rows, means, strict=True)
                ],
            )
            for name in rewards
        ],
        means=[[_finite(mean.get(name)) for name in rewards] for mean in means],
    )


def _rows_of(result: EvaluationResult, prompt: int) -> Tensor:
    """Return the rows of the images of a prompt, which are adjacent."""
    bounds = torch.tensor([prompt, prompt + 1])
    start, end = torch.searchsorted(result.prompt, bounds).tolist()
    return torch.arange(start, end)


def _score(result: EvaluationResult, rows: Tensor, mean: dict[str, float], name: str) -> Score:
    values = result.rewards.get(name)
    if values is None or not len(rows):
        return Score("-", "")
    return Score(
        format_score(values[rows[0]].item()),
        format_score(mean.get(name, math.nan)) if len(rows) > 1 else "",
    )


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 6)
