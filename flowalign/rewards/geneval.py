"""GenEval: whether a picture shows the objects, numbers, colours and positions that its prompt asks for (arXiv 2310.11513).

The benchmark's rules, on detections by models of transformers in place of mmdet's Mask2Former: their scores differ a little, so a
result is one of "GenEval (transformers)". A prompt's metadata is a line of GenEval's files:
    {"tag": "position", "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}]}
"""

import math
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache
from hashlib import sha256
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flowalign.errors import RunError
from flowalign.flow import PerImage
from flowalign.rewards.adapters import to_pil
from flowalign.rewards.base import traits
from flowalign.rewards.objects import Box, ColorNamer, COLORS, crop, Detection, Detector, SURE

RELATIONS = ("left of", "right of", "above", "below")
SURE_TO_COUNT = 0.9
"""What the score of a detection must exceed in prompts of the tag counting."""
MOST = 16
"""Detections of a class that are looked at."""
Found = dict[str, list[Detection]]
"""By class, the surest first."""


@dataclass(frozen=True)
class Clause:
    """So many objects of a class, perhaps of a colour, perhaps placed relative to those of an earlier clause."""

    name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.count, int) or self.count < 1:
            raise ValueError(f"the count {self.count!r}")
        if self.color not in (None, *COLORS):
            raise ValueError(f"the color {self.color!r}, which is none of {', '.join(COLORS)}")
        if self.position and (len(self.position) != 2 or self.position[0] not in RELATIONS):
            raise ValueError(
                f"the position {list(self.position)}, not one of {', '.join(RELATIONS)} and a clause's number"
            )


@dataclass(frozen=True)
class Wish:
    """What a prompt asks for."""

    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()
    counting: bool = False


@dataclass(frozen=True)
class Verdict:
    """How far a picture is as wished."""

    correct: float
    graded: float


def read_wish(prompt: str, entry: dict[str, Any]) -> Wish:
    """The wish in a prompt's metadata. RunError says what the prompt file must hold."""
    try:
        if not entry.get("include"):
            raise ValueError('no "include"')
        include, exclude = (
            tuple(map(_read_clause, entry.get(key) or ())) for key in ("include", "exclude")
        )
        for number, clause in enumerate(include):
            if clause.position and clause.position[1] not in range(number):
                raise ValueError(
                    f"a position relative to clause {clause.position[1]}, which is not an earlier one"
                )
    except (TypeError, ValueError) as error:
        raise RunError(
            f"rewards.geneval: in the prompt file, {prompt!r} has {error}. Lines need GenEval's fields beside the prompt, like "
            '"tag": "counting", "include": [{"class": "cup", "count": 2}], "exclude": [{"class": "cup", "count": 3}].'
        ) from error
    return Wish(include, exclude, entry.get("tag") == "counting")


def _read_clause(entry: dict[str, Any]) -> Clause:
    if missing := {"class", "count"} - set(entry):
        raise ValueError(f'a clause without "{min(missing)}"')
    position: Any = tuple(entry.get("position") or ()) or None
    return Clause(entry["class"], entry["count"], entry.get("color"), position)


def kept(detections: list[Detection], counting: bool) -> Found:
    """The detections that count."""
    sure = [d for d in detections if d.score > (SURE_TO_COUNT if counting else SURE)]
    sure.sort(key=lambda d: d.score, reverse=True)
    return {name: [d for d in sure if d.name == name][:MOST] for name in {d.name for d in sure}}


def relations(a: Box, b: Box) -> set[str]:
    """Where a is from b.

    With o from b's centre to a's, and r what of o goes beyond a tenth of both sizes: right of if r_x > ‖o‖ / 2, and so on.
    """
    o = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    sizes = [a[i + 2] - a[i] + b[i + 2] - b[i] for i in (0, 1)]
    r = [
        math.copysign(max(abs(offset) - 0.1 * size, 0), offset)
        for offset, size in zip(o, sizes, strict=True)
    ]
    if max(map(abs, r)) < 1e-3:
        return set()
    dx, dy = (beyond / math.hypot(*o) for beyond in r)
    holds = dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5
    return {relation for relation, held in zip(RELATIONS, holds, strict=True) if held}


def in_place(
    clause: Clause, objects: list[Detection], groups: list[list[Detection] | None]
) -> bool:
    """Whether all objects stand as the clause says to all of the group it names; not where that group is not as wished itself."""
    if clause.position is None:
        return True
    relation, target = clause.position
    others = groups[target]
    return others is not None and all(
        relation in relations(a.box, b.box) for a in objects for b in others
    )


def of_color(clause: Clause, objects: list[Detection]) -> int:
    """How many have the colour of the clause; all where it names none."""
    return sum(clause.color in (None, d.color) for d in objects)


def correct(wish: Wish, found: Found) -> float:
    """The benchmark's verdict: 1 if the surest objects of every clause are as wished and nothing is excluded, else 0.

    More objects than wished are a fault only where `exclude` says so, as it does in counting prompts.
    """
    groups: list[list[Detection] | None] = []
    for clause in wish.include:
        objects = found.get(clause.name, [])[: clause.count]
        met = len(objects) == of_color(clause, objects) == clause.count and in_place(
            clause, objects, groups
        )
        groups.append(objects if met else None)
    excluded = any(len(found.get(clause.name, [])) >= clause.count for clause in wish.exclude)
    return float(None not in groups and not excluded)


def graded(wish: Wish, found: Found) -> float:
    """Flow-GRPO's dense reward (arXiv 2505.05470): the mean over every count, colour and position of the wish, not below 0.

    A count or a colour gives 1 - |wished - found| / wished, a position 1 or 0; colours and positions give 0 where the count is
    not exact. (Flow-GRPO's server gives a failed position both 0 and 1, and leaves it out where the colours are wrong.)
    """
    values: list[float] = []
    groups: list[list[Detection] | None] = []
    for clause in wish.include:
        objects = found.get(clause.name, [])
        exact, colored = len(objects) == clause.count, of_color(clause, objects)
        met = exact and colored == clause.count and in_place(clause, objects, groups)
        values.append(1 - abs(clause.count - len(objects)) / clause.count)
        if clause.color:
            values.append(1 - abs(clause.count - colored) / clause.count if exact else 0.0)
        if clause.position:
            values.append(float(met))
        groups.append(objects if met else None)
    return max(sum(values) / len(values), 0.0)


class Examiner:
    """Compares pictures with what their prompts ask for. It remembers the last batch, which two rewards ask about in turn."""

    def __init__(self, detector: str, clip: str) -> None:
        self.detect = Detector(detector, "rewards.geneval.detector")
        self.name_colors = ColorNamer(clip, "rewards.geneval.clip")
        self.last: tuple[str, list[Verdict]] = ("", [])

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> list[Verdict]:
        wishes = [
            self._findable(prompt, read_wish(prompt, entry))
            for prompt, entry in zip(prompts, metadata, strict=True)
        ]
        pictures = to_pil(images)
        pixels = b"".join(picture.tobytes() for picture in pictures)
        key = sha256(pixels + repr((images.shape, wishes)).encode()).hexdigest()
        if key != self.last[0]:
            seen = self._look(pictures, wishes, images.device)
            self.last = (
                key,
                [
                    Verdict(correct(wish, found), graded(wish, found))
                    for wish, found in zip(wishes, seen, strict=True)
                ],
            )
        return self.last[1]

    def _findable(self, prompt: str, wish: Wish) -> Wish:
        known = list(self.detect.names.values())
        for clause in (*wish.include, *wish.exclude):
            if clause.name not in known:
                near = (
                    " or ".join(get_close_matches(clause.name, known))
                    or "one of COCO's classes in GenEval's spelling"
                )
                raise RunError(
                    f"rewards.geneval: {prompt!r} asks for {clause.name!r}, which is not detected; write {near}."
                )
        return wish

    def _look(
        self, pictures: list[Image.Image], wishes: list[Wish], device: torch.device
    ) -> list[Found]:
        seen = [
            kept(found, wish.counting)
            for found, wish in zip(self.detect(pictures, device), wishes, strict=True)
        ]
        colored = {
            (i, clause.name, k): crop(pictures[i], seen[i][clause.name][k])
            for i, wish in enumerate(wishes)
            for clause in wish.include
            for k in range(min(clause.count, len(seen[i].get(clause.name, []))))
            if clause.color
        }
        colors = self.name_colors(list(colored.values()), [name for _, name, _ in colored], device)
        for (i, name, k), color in zip(colored, colors, strict=True):
            seen[i][name][k] = replace(seen[i][name][k], color=color)
        return seen


open_examiner = lru_cache(maxsize=1)(Examiner)
"""One for all rewards with the same models: nothing is loaded and no picture examined twice."""


@traits(range=(0, 1))
@dataclass
class GenEval:
    """GenEval's verdict on a picture, 1 or 0; not differentiable.

    In float32: facebook/mask2former-swin-small-coco-instance, 0.3 GB, licence: see its card; openai/clip-vit-large-patch14,
    1.7 GB, MIT.
    """

    detector: str = "facebook/mask2former-swin-small-coco-instance"
    """A folder or hub repository: Mask2Former, or any object detector of transformers that knows COCO's classes."""
    clip: str = "openai/clip-vit-large-patch14"
    """The CLIP that names colours."""

    def __post_init__(self) -> None:
        self.examine = open_examiner(self.detector, self.clip)

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> PerImage:
        return torch.tensor(
            [verdict.correct for verdict in self.examine(images, prompts, metadata)]
        )


class GenEvalGraded(GenEval):
    """How much of its prompt a picture shows, in [0, 1], as Flow-GRPO trains on; models, weights and licences as of GenEval."""

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> PerImage:
        return torch.tensor([verdict.graded for verdict in self.examine(images, prompts, metadata)])
