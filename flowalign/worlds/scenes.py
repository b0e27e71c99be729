"""Coloured shapes on a plain ground: captions of GenEval's six kinds, a renderer, and a checker that reads a picture back.

The kinds and their rules follow GenEval (arXiv 2310.11513). A caption is a list of facts; a picture satisfies it
when every fact holds and nothing else is in the picture.
"""

import itertools
import re
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast, get_args, Literal

import numpy as np
import torch
from numpy.random import Generator
from scipy import ndimage
from torch import Tensor

Colour = Literal["red", "green", "blue", "yellow"]
Shape = Literal["circle", "square", "triangle"]
Relation = Literal["left of", "right of", "above", "below"]
Kind = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]

COLOURS: dict[Colour, tuple[int, int, int]] = {
    "red": (214, 48, 49),
    "green": (39, 156, 76),
    "blue": (45, 82, 214),
    "yellow": (241, 190, 30),
}
GROUND = (240, 240, 236)
SHAPES: tuple[Shape, ...] = get_args(Shape)
RELATIONS: tuple[Relation, ...] = get_args(Relation)
KINDS: tuple[Kind, ...] = get_args(Kind)
COUNTS = {"a": 1, "two": 2, "three": 3}
SIZE = 64
"""Pixels on a side; `read_picture` takes other sizes too."""

UNSEEN_PAIRS: frozenset[tuple[Colour, Shape]] = frozenset(
    {("blue", "circle"), ("yellow", "square"), ("green", "triangle")}
)
"""Kept out of the training prompts, to see what generalises."""

OPPOSITE: dict[Relation, Relation] = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}


@dataclass(frozen=True)
class Phrase:
    """`count` objects of one shape, of one colour where one is named."""

    shape: Shape
    colour: Colour | None = None
    count: int = 1

    @property
    def text(self) -> str:
        number = next(word for word, count in COUNTS.items() if count == self.count)
        return " ".join(filter(None, (number, self.colour, self.shape + "s" * (self.count > 1))))


@dataclass(frozen=True)
class Caption:
    """One phrase, or two of different shapes, the first perhaps standing in a `relation` to the second."""

    phrases: tuple[Phrase, ...]
    relation: Relation | None = None

    @property
    def text(self) -> str:
        return f" {self.relation or 'and'} ".join(phrase.text for phrase in self.phrases)

    @property
    def kind(self) -> Kind:
        first = self.phrases[0]
        if len(self.phrases) == 2:
            return "position" if self.relation else "color_attr" if first.colour else "two_object"
        return "counting" if first.count > 1 else "colors" if first.colour else "single_object"


@dataclass(frozen=True)
class Thing:
    """An object in a picture: centre and half-size as shares of the picture; `shape` is None for a blot."""

    colour: Colour
    shape: Shape | None
    x: float
    y: float
    size: float = 0.0


@dataclass(frozen=True)
class Match:
    """How many of a caption's facts hold in a picture, and how many objects nobody asked for are in it."""

    held: int
    facts: int
    extra: int

    @property
    def strict(self) -> float:
        return float(self.held == self.facts and not self.extra)

    @property
    def graded(self) -> float:
        """The share of facts that hold; every extra object takes one away."""
        return max(0, self.held - self.extra) / self.facts


@cache
def captions(kind: Kind) -> list[Caption]:
    """Every caption of a kind, in a fixed order."""
    colours = list(COLOURS)
    shape_pairs = list(itertools.permutations(SHAPES, 2))
    if kind == "single_object":
        return [Caption((Phrase(shape),)) for shape in SHAPES]
    if kind == "colors":
        return [Caption((Phrase(shape, colour),)) for shape in SHAPES for colour in colours]
    if kind == "counting":
        return [
            Caption((Phrase(s, c, n),)) for s in SHAPES for c in (None, *colours) for n in (2, 3)
        ]
    pairs = [(Phrase(a), Phrase(b)) for a, b in shape_pairs]
    coloured = [
        (Phrase(a, c), Phrase(b, d))
        for a, b in shape_pairs
        for c, d in itertools.permutations(colours, 2)
    ]
    if kind == "two_object":
        return [Caption(pair) for pair in pairs]
    if kind == "color_attr":
        return [Caption(pair) for pair in coloured]
    return [Caption(pair, relation) for pair in pairs + coloured for relation in RELATIONS]


@cache
def parse(text: str) -> Caption:
    """The caption behind a prompt such as "a red circle left of a square". Raises ValueError for any other text."""
    colour, shape = "|".join(COLOURS), "|".join(SHAPES)
    phrase = rf"({'|'.join(COUNTS)})(?: ({colour}))? ({shape})s?"
    text = text.strip().lower().rstrip(".")
    found = re.fullmatch(rf"{phrase}(?: (and|{'|'.join(RELATIONS)}) {phrase})?", text)
    if not found or found[3] == found[7]:
        raise ValueError(
            f"{text!r} is not a caption of the bundled world; write for example 'two red circles', "
            "'a circle and a square', or 'a red circle left of a blue square'."
        )
    count, colour, shape, joint, count2, colour2, shape2 = found.groups()
    phrases = [Phrase(cast(Shape, shape), cast(Colour | None, colour), COUNTS[count])]
    if shape2:
        phrases.append(Phrase(cast(Shape, shape2), cast(Colour | None, colour2), COUNTS[count2]))
    return Caption(tuple(phrases), None if joint in (None, "and") else cast(Relation, joint))


def draw_caption(rng: Generator, kind: Kind | None = None) -> Caption:
    """A caption at random: every kind equally often, and within a kind every caption."""
    choices = captions(kind or KINDS[rng.integers(len(KINDS))])
    return choices[rng.integers(len(choices))]


def misquote(caption: Caption, rng: Generator) -> Caption:
    """A caption of the same kind that is wrong in one fact: another shape, colour, number or place."""
    wrong = []
    for i, phrase in enumerate(caption.phrases):
        taken = {p.shape for p in caption.phrases}
        changed = [replace(phrase, shape=shape) for shape in SHAPES if shape not in taken]
        if phrase.colour:
            used = {p.colour for p in caption.phrases}
            changed += [replace(phrase, colour=colour) for colour in COLOURS if colour not in used]
        if phrase.count > 1:
            changed.append(replace(phrase, count=5 - phrase.count))
        wrong += [
            replace(caption, phrases=(*caption.phrases[:i], p, *caption.phrases[i + 1 :]))
            for p in changed
        ]
    if caption.relation:
        wrong += [
            replace(caption, relation=relation)
            for relation in RELATIONS
            if relation != caption.relation
        ]
    if caption.kind == "color_attr":
        first, second = caption.phrases
        swapped = (replace(first, colour=second.colour), replace(second, colour=first.colour))
        wrong.append(replace(caption, phrases=swapped))
    return wrong[rng.integers(len(wrong))]


def draw_scene(caption: Caption, rng: Generator) -> list[Thing]:
    """A scene in which the caption holds: whatever it leaves open is drawn at random."""
    colours: list[Colour] = list(COLOURS)
    things: list[tuple[Colour, Shape]] = []
    for phrase in caption.phrases:
        chosen = colours[rng.integers(len(colours))]
        colour: Colour = phrase.colour or chosen
        things += itertools.repeat((colour, phrase.shape), phrase.count)
    places = _places(len(things), caption.relation, rng)
    jitter = rng.uniform(-0.025, 0.025, (len(things), 2))
    sizes = rng.uniform(0.175, 0.2, len(things))
    return [
        Thing(colour, shape, x + dx, y + dy, size)
        for (colour, shape), (x, y), (dx, dy), size in zip(
            things, places, jitter, sizes, strict=True
        )
    ]


def _places(count: int, relation: Relation | None, rng: Generator) -> list[tuple[float, float]]:
    """Centres in different quarters of the picture, the first two standing in the relation."""
    near, far = 0.26, 0.74
    if relation is None:
        quarters = [(near, near), (far, near), (near, far), (far, far)]
        return [quarters[i] for i in rng.permutation(4)[:count]]
    across = (near, far)[rng.integers(2)]
    if relation in ("left of", "right of"):
        places = [(near, across), (far, across)]
    else:
        places = [(across, near), (across, far)]
    return places if relation in ("left of", "above") else places[::-1]


def render(scenes: list[list[Thing]], size: int = SIZE) -> Tensor:
    """Pictures of the scenes, with smooth edges. Returns (B, 3, size, size) in [0, 1]."""
    picture = torch.tensor(GROUND).view(1, 3, 1, 1).repeat(len(scenes), 1, size, size) / 255
    centres = (torch.arange(size) + 0.5) / size
    for layer in itertools.zip_longest(*scenes):
        index = [i for i, thing in enumerate(layer) if thing is not None]
        things = [layer[i] for i in index]
        if not things:
            continue
        x, y, half = torch.tensor([(t.x, t.y, t.size) for t in things], dtype=torch.float32).T[
            ..., None, None
        ]
        dx, dy = (centres.view(1, 1, -1) - x) / half, (centres.view(1, -1, 1) - y) / half
        distance = torch.stack(
            [_outside(thing.shape, dx[i], dy[i]) for i, thing in enumerate(things)]
        )
        cover = (0.5 - distance * half * size).clamp(0, 1).unsqueeze(1)
        colour = torch.tensor([COLOURS[thing.colour] for thing in things]).view(-1, 3, 1, 1) / 255
        picture[index] = picture[index] * (1 - cover) + colour * cover
    return picture


def _outside(shape: Shape | None, dx: Tensor, dy: Tensor) -> Tensor:
    """Signed distance to the outline, negative inside; the bounding box is about [-1, 1] (y points down)."""
    if shape == "circle":
        return (dx**2 + dy**2).sqrt() - 1
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - 0.9
    slope = (2 * dx.abs() - (dy + 1)) / 5**0.5
    return torch.maximum(slope, dy - 1)


def read_picture(image: Tensor) -> list[Thing]:
    """What is in a picture (3, H, W) in [0, 1]: connected regions of the nearest colour, named by their outline."""
    pixels = image.detach().float().permute(1, 2, 0).cpu().numpy() * 255
    palette = np.array([GROUND, *COLOURS.values()], dtype=np.float32)
    nearest = ((pixels[:, :, None] - palette) ** 2).sum(-1).argmin(-1)
    things = []
    for index, colour in enumerate(COLOURS, start=1):
        regions: Any = ndimage.label(nearest == index)
        for number, box in enumerate(ndimage.find_objects(regions[0]), start=1):
            region = regions[0][box] == number
            if region.sum() < 0.015 * nearest.size:
                continue
            y, x = (
                (side.start + side.stop) / 2 / n for side, n in zip(box, nearest.shape, strict=True)
            )
            size = max(region.shape) / 2 / nearest.shape[1]
            things.append(Thing(colour, _shape(region) if size > 0.1 else None, x, y, size))
    return things


def _shape(region: np.ndarray) -> Shape | None:
    """The shape whose outline in the same box overlaps the region best; None where that is under 80 %."""
    height, width = region.shape
    if not 0.7 < height / width < 1.4:
        return None
    filled: Any = ndimage.binary_fill_holes(region)
    overlaps: dict[Shape, float] = {
        shape: _overlap(filled, _outline(shape, height, width)) for shape in SHAPES
    }
    best = max(SHAPES, key=overlaps.__getitem__)
    return best if overlaps[best] >= 0.8 else None


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


@cache
def _outline(shape: Shape, height: int, width: int) -> np.ndarray:
    v, u = np.mgrid[:height, :width] + 0.5
    u, v = 2 * u / width - 1, 2 * v / height - 1
    return {
        "circle": u**2 + v**2 <= 1,
        "square": np.ones_like(u, dtype=bool),
        "triangle": 2 * np.abs(u) <= v + 1,
    }[shape]


def match(caption: Caption, things: list[Thing]) -> Match:
    """Which facts of the caption hold: every object asked for is one, its colour another, the relation a last one."""
    held = facts = 0
    for phrase in caption.phrases:
        found = [thing for thing in things if thing.shape == phrase.shape]
        facts += phrase.count
        held += min(phrase.count, len(found))
        if phrase.colour:
            facts += phrase.count
            held += min(phrase.count, sum(thing.colour == phrase.colour for thing in found))
    if caption.relation:
        facts += 1
        held += _related(caption, things)
    extra = max(0, len(things) - sum(phrase.count for phrase in caption.phrases))
    return Match(held, facts, extra)


def _related(caption: Caption, things: list[Thing]) -> bool:
    """Whether an object of the first shape stands in the relation to one of the second, by a tenth of the picture."""
    first, second = (
        [thing for thing in things if thing.shape == phrase.shape] for phrase in caption.phrases
    )
    relation = caption.relation
    if relation in ("right of", "below"):
        first, second, relation = second, first, OPPOSITE[relation]
    gaps = [b.x - a.x if relation == "left of" else b.y - a.y for a in first for b in second]
    return any(gap > 0.1 for gap in gaps)
