"""GenEval: objects, counts, colours and positions that a prompt asks for (arXiv 2310.11513).

The rules are the benchmark's. The detections come from models of transformers in place of mmdet's
Mask2Former, whose scores differ a little, so report results as "GenEval (transformers)". A prompt's
metadata is a line of GenEval's files:
    {"tag": "position", "include": [{"class": "dog", "count": 1},
                                    {"class": "cat", "count": 1, "position": ["left of", 0]}]}
"""

import math
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache
from hashlib import sha256

import torch
from PIL import Image
from torch import Tensor

from flowalign.data.prompts import Metadata
from flowalign.errors import RunError
from flowalign.flow import PerImage
from flowalign.rewards.adapters import to_pil
from flowalign.rewards.base import traits
from flowalign.rewards.objects import Box, ColorNamer, COLORS, crop, Detection, Detector, MIN_SCORE

RELATIONS = ("left of", "right of", "above", "below")
MIN_SCORE_COUNTING = 0.9
"""The score that a detection must exceed in prompts with the tag `counting`."""
MAX_PER_CLASS = 16
"""The number of detections of a class that are used."""
Detections = dict[str, list[Detection]]
"""Detections by class, those with the highest scores first."""
Groups = list[list[Detection] | None]
"""The objects of each clause so far; None if the clause does not hold."""


@dataclass(frozen=True, kw_only=True)
class Clause:
    """A number of objects of one class, with an optional colour and position.

    Raises ValueError if a value is not one of GenEval's.
    """

    name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None
    """A relation to all objects of an earlier clause, and that clause's number."""

    def __post_init__(self) -> None:
        if not isinstance(self.count, int) or self.count < 1:
            raise ValueError(f"the count {self.count!r}")
        if self.color not in (None, *COLORS):
            raise ValueError(f"the color {self.color!r}, which is not one of {', '.join(COLORS)}")
        if self.position and (len(self.position) != 2 or self.position[0] not in RELATIONS):
            raise ValueError(
                f"the position {list(self.position)}, which is not one of {', '.join(RELATIONS)} "
                "and a clause's number"
            )


@dataclass(frozen=True)
class PromptSpec:
    """The content that a prompt asks for."""

    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()
    counting: bool = False


@dataclass(frozen=True)
class Verdict:
    """The two scores of an image."""

    correct: float
    graded: float


def read_spec(prompt: str, entry: Metadata) -> PromptSpec:
    """Read a prompt's metadata. Raises RunError that shows what the prompt file must hold."""
    try:
        if not entry.get("include"):
            raise ValueError('no "include"')
        include = tuple(_read_clause(clause) for clause in entry["include"])
        exclude = tuple(_read_clause(clause) for clause in entry.get("exclude") or ())
        _check_order(include)
    except (TypeError, ValueError) as error:
        raise RunError(
            f"rewards.geneval: in the prompt file, {prompt!r} has {error}. Lines need GenEval's "
            'fields beside the prompt, like "tag": "counting", '
            '"include": [{"class": "cup", "count": 2}], "exclude": [{"class": "cup", "count": 3}].'
        ) from error
    return PromptSpec(include, exclude, entry.get("tag") == "counting")


def _read_clause(entry: Metadata) -> Clause:
    missing = {"class", "count"} - set(entry)
    if missing:
        raise ValueError(f'a clause without "{min(missing)}"')
    return Clause(
        name=entry["class"],
        count=entry["count"],
        color=entry.get("color"),
        # The clause checks that it is a relation and a number.
        position=tuple(entry.get("position") or ()) or None,  # pyright: ignore[reportArgumentType]
    )


def _check_order(clauses: tuple[Clause, ...]) -> None:
    for number, clause in enumerate(clauses):
        if clause.position and clause.position[1] not in range(number):
            raise ValueError(
                f"a position relative to clause {clause.position[1]}, which is not an earlier one"
            )


def confident(detections: list[Detection], counting: bool) -> Detections:
    """Return the detections with a sufficient score, by class."""
    least = MIN_SCORE_COUNTING if counting else MIN_SCORE
    by_class: Detections = {}
    for detection in sorted(detections, key=lambda d: d.score, reverse=True):
        if detection.score > least:
            by_class.setdefault(detection.name, []).append(detection)
    return {name: objects[:MAX_PER_CLASS] for name, objects in by_class.items()}


def relations(a: Box, b: Box) -> set[str]:
    """Return the positions of a relative to b.

    With o from b's center to a's, and r the part of o beyond a tenth of both sizes: right of if
    r_x > ‖o‖ / 2, and so on.
    """
    o = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    sizes = [a[i + 2] - a[i] + b[i + 2] - b[i] for i in (0, 1)]
    pairs = zip(o, sizes, strict=True)
    r = [math.copysign(max(abs(offset) - 0.1 * size, 0), offset) for offset, size in pairs]
    # Objects on top of each other have no relation, and o may be 0.
    if max(map(abs, r)) < 1e-3:
        return set()
    dx, dy = (beyond / math.hypot(*o) for beyond in r)
    holds = dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5
    return {relation for relation, held in zip(RELATIONS, holds, strict=True) if held}


def position_holds(clause: Clause, objects: list[Detection], groups: Groups) -> bool:
    """True if every object has the clause's relation to every object of the clause it names.

    False if that clause does not hold itself.
    """
    if clause.position is None:
        return True
    relation, target = clause.position
    others = groups[target]
    if others is None:
        return False
    return all(relation in relations(a.box, b.box) for a in objects for b in others)


def count_of_color(clause: Clause, objects: list[Detection]) -> int:
    """Count the objects of the clause's colour; all if it has none."""
    return sum(clause.color in (None, d.color) for d in objects)


def correct(spec: PromptSpec, detections: Detections) -> float:
    """Return the benchmark's score: 1 if the best objects of every clause match, else 0.

    More objects than asked for are a fault only if `exclude` says so, as in counting prompts.
    """
    groups: Groups = []
    for clause in spec.include:
        objects = detections.get(clause.name, [])[: clause.count]
        counts = len(objects) == count_of_color(clause, objects) == clause.count
        groups.append(objects if counts and position_holds(clause, objects, groups) else None)
    excluded = any(len(detections.get(c.name, [])) >= c.count for c in spec.exclude)
    return float(None not in groups and not excluded)


def graded(spec: PromptSpec, detections: Detections) -> float:
    """Return Flow-GRPO's dense reward (arXiv 2505.05470): the mean over all parts of the spec.

    A count or a colour gives 1 - |asked - present| / asked, a position 1 or 0. Colours and
    positions give 0 if the count is not exact. The mean is below 0 if there are far too many
    objects: three cats where one was asked for give -1.
    """
    # Flow-GRPO's server gives a failed position both 0 and 1, and leaves it out where the colours
    # are wrong. Here it always counts once. A wrong count gives one 0 there for a colour and a
    # position of one clause, and two here; GenEval's clauses never have both.
    values: list[float] = []
    groups: Groups = []
    for clause in spec.include:
        objects = detections.get(clause.name, [])
        exact, colored = len(objects) == clause.count, count_of_color(clause, objects)
        holds = exact and colored == clause.count and position_holds(clause, objects, groups)
        values.append(1 - abs(clause.count - len(objects)) / clause.count)
        if clause.color:
            values.append(1 - abs(clause.count - colored) / clause.count if exact else 0.0)
        if clause.position:
            values.append(float(holds))
        groups.append(objects if holds else None)
    return sum(values) / len(values)


class GenEvalScorer:
    """Compares images with the specs of their prompts.

    It keeps the verdicts of the last batch, because two rewards score each batch in turn.
    """

    def __init__(self, detector: str, clip: str) -> None:
        self.detector = Detector(detector, "rewards.geneval.detector")
        self.color_namer = ColorNamer(clip, "rewards.geneval.clip")
        self.last: tuple[str, list[Verdict]] = ("", [])

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata]
    ) -> list[Verdict]:
        """Return the verdict on each image. Raises RunError if metadata does not fit."""
        pairs = zip(prompts, metadata, strict=True)
        specs = [self._checked_spec(prompt, entry) for prompt, entry in pairs]
        pictures = to_pil(images)
        # Two rewards get copies of the same images, so only their content can identify a batch.
        pixels = b"".join(picture.tobytes() for picture in pictures)
        key = sha256(pixels + repr((images.shape, specs)).encode()).hexdigest()
        if key != self.last[0]:
            self.last = key, self._verdicts(pictures, specs, images.device)
        return self.last[1]

    def _checked_spec(self, prompt: str, entry: Metadata) -> PromptSpec:
        spec, classes = read_spec(prompt, entry), list(self.detector.names.values())
        for clause in (*spec.include, *spec.exclude):
            if clause.name not in classes:
                matches = get_close_matches(clause.name, classes)
                advice = " or ".join(matches) or "one of COCO's classes in GenEval's spelling"
                raise RunError(
                    f"rewards.geneval: {prompt!r} asks for {clause.name!r}, which the detector "
                    f"does not know. Write {advice}."
                )
        return spec

    def _verdicts(
        self, pictures: list[Image.Image], specs: list[PromptSpec], device: torch.device
    ) -> list[Verdict]:
        raw = zip(self.detector(pictures, device), specs, strict=True)
        detected = [confident(detections, spec.counting) for detections, spec in raw]
        self._name_colors(pictures, specs, detected, device)
        pairs = zip(specs, detected, strict=True)
        return [Verdict(correct(spec, objects), graded(spec, objects)) for spec, objects in pairs]

    def _name_colors(
        self,
        pictures: list[Image.Image],
        specs: list[PromptSpec],
        detected: list[Detections],
        device: torch.device,
    ) -> None:
        """Fill in the colours of the objects that a clause with a colour may use."""
        wanted: list[tuple[int, str, int]] = []  # image, class, rank by score
        for i, spec in enumerate(specs):
            for clause in (clause for clause in spec.include if clause.color):
                count = min(clause.count, len(detected[i].get(clause.name, [])))
                wanted += [(i, clause.name, rank) for rank in range(count)]
        # Two clauses of one class may want the same object.
        wanted = list(dict.fromkeys(wanted))
        crops = [crop(pictures[i], detected[i][name][rank]) for i, name, rank in wanted]
        colors = self.color_namer(crops, [name for _, name, _ in wanted], device)
        for (i, name, rank), color in zip(wanted, colors, strict=True):
            detected[i][name][rank] = replace(detected[i][name][rank], color=color)


shared_scorer = lru_cache(maxsize=1)(GenEvalScorer)
"""One scorer for all rewards with the same models, so that they load and detect once."""


@traits(range=(0, 1))
@dataclass
class GenEval:
    """GenEval's score of an image, 1 or 0; not differentiable.

    In float32: facebook/mask2former-swin-small-coco-instance, 0.3 GB, licence: see its card;
    openai/clip-vit-large-patch14, 1.7 GB, MIT.
    """

    detector: str = "facebook/mask2former-swin-small-coco-instance"
    """A folder or hub repository: Mask2Former, or any object detector with COCO's classes."""
    clip: str = "openai/clip-vit-large-patch14"
    """The CLIP that names colours."""

    def __post_init__(self) -> None:
        self.scorer = shared_scorer(self.detector, self.clip)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> PerImage:
        verdicts = self.scorer(images, prompts, metadata)
        return torch.tensor([verdict.correct for verdict in verdicts])


# The lowest score is that of 16 objects where one was asked for: 1 - 15.
@traits(range=(2 - MAX_PER_CLASS, 1))
class GenEvalGraded(GenEval):
    """Share of its prompt that an image shows, at most 1, as Flow-GRPO trains on.

    It is below 0 if an image shows far more objects than its prompt asks for. Models, weights and
    licences are those of geneval.
    """

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> PerImage:
        verdicts = self.scorer(images, prompts, metadata)
        return torch.tensor([verdict.graded for verdict in verdicts])
