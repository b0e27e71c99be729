"""Scenes of coloured shapes: captions, a renderer, and a checker that reads a picture back.

The bundled models are trained on these pictures, and the `scene_match` rewards score them. The six
kinds of captions follow GenEval (arXiv 2310.11513). A caption is a list of facts. A picture
satisfies its caption when every fact holds and the picture shows nothing else.
"""

import itertools
import re
from dataclasses import dataclass, replace
from functools import cache
from typing import cast, get_args, Literal

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
"""Colour of the background."""
SHAPES: tuple[Shape, ...] = get_args(Shape)
RELATIONS: tuple[Relation, ...] = get_args(Relation)
KINDS: tuple[Kind, ...] = get_args(Kind)
COUNTS = {"a": 1, "two": 2, "three": 3}
"""Number words of captions."""
SIZE = 64
"""Width and height of a picture in pixels. `read_picture` accepts other sizes too."""
SMALLEST_REGION = 0.015
"""Share of the picture below which a coloured region is ignored as a speck."""
MIN_OVERLAP = 0.8
"""Overlap with an ideal outline, as intersection over union, from which a shape is named."""
MIN_GAP = 0.1
"""Share of the picture by which two centres must differ for a relation to hold."""

UNSEEN_PAIRS: frozenset[tuple[Colour, Shape]] = frozenset(
    {("blue", "circle"), ("yellow", "square"), ("green", "triangle")}
)
"""Pairs that the training prompts leave out, so that evaluation shows what generalises."""

OPPOSITE: dict[Relation, Relation] = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}


@dataclass(frozen=True)
class Phrase:
    """A part of a caption: `count` objects of one shape, and of one colour if it is named."""

    shape: Shape
    colour: Colour | None = None
    count: int = 1

    @property
    def text(self) -> str:
        """The words of the phrase, such as "two red circles"."""
        number = next(word for word, count in COUNTS.items() if count == self.count)
        return " ".join(filter(None, (number, self.colour, self.shape + "s" * (self.count > 1))))


@dataclass(frozen=True)
class Caption:
    """One phrase, or two phrases of different shapes that may stand in a `relation`."""

    phrases: tuple[Phrase, ...]
    relation: Relation | None = None

    @property
    def text(self) -> str:
        """The caption as a prompt."""
        return f" {self.relation or 'and'} ".join(phrase.text for phrase in self.phrases)

    @property
    def kind(self) -> Kind:
        """The GenEval task that the caption belongs to."""
        first = self.phrases[0]
        if self.relation:
            return "position"
        if len(self.phrases) == 2:
            return "color_attr" if first.colour else "two_object"
        if first.count > 1:
            return "counting"
        return "colors" if first.colour else "single_object"


@dataclass(frozen=True)
class Thing:
    """An object in a picture.

    `x`, `y` (the centre) and `size` (half the longer side) are shares of the picture.
    `shape` is None for a region whose outline is not one of the known shapes.
    """

    colour: Colour
    shape: Shape | None
    x: float
    y: float
    size: float = 0.0


@dataclass(frozen=True)
class Match:
    """A comparison of a picture with a caption.

    `held` of the caption's `facts` hold. The picture shows `extra` objects too many.
    """

    held: int
    facts: int
    extra: int

    @property
    def strict(self) -> float:
        """1.0 if every fact holds and no object is extra, else 0.0."""
        return float(self.held == self.facts and not self.extra)

    @property
    def graded(self) -> float:
        """The share of facts that hold, where every extra object cancels one of them."""
        return max(0, self.held - self.extra) / self.facts


@cache
def captions(kind: Kind) -> list[Caption]:
    """Return every caption of a kind, in a fixed order."""
    # `draw_caption` picks by index: another order would change every prompt file and model.
    colours = list(COLOURS)
    if kind == "single_object":
        return [Caption((Phrase(shape),)) for shape in SHAPES]
    if kind == "colors":
        return [Caption((Phrase(*pair),)) for pair in itertools.product(SHAPES, colours)]
    if kind == "counting":
        counted = itertools.product(SHAPES, (None, *colours), (2, 3))
        return [Caption((Phrase(shape, colour, count),)) for shape, colour, count in counted]
    shape_pairs = list(itertools.permutations(SHAPES, 2))
    plain = [(Phrase(a), Phrase(b)) for a, b in shape_pairs]
    if kind == "two_object":
        return [Caption(pair) for pair in plain]
    choices = itertools.product(shape_pairs, itertools.permutations(colours, 2))
    coloured = [(Phrase(a, c), Phrase(b, d)) for (a, b), (c, d) in choices]
    if kind == "color_attr":
        return [Caption(pair) for pair in coloured]
    related = itertools.product(plain + coloured, RELATIONS)
    return [Caption(pair, relation) for pair, relation in related]


@cache
def parse(text: str) -> Caption:
    """Return the caption that a prompt such as "a red circle left of a square" stands for.

    Capitals, outer spaces and a final full stop do not matter.

    Raises:
        ValueError: The text is not a caption of the bundled world.
    """
    colour, shape = "|".join(COLOURS), "|".join(SHAPES)
    phrase = rf"({'|'.join(COUNTS)})(?: ({colour}))? ({shape})s?"
    text = text.strip().lower().rstrip(".")
    groups = re.fullmatch(rf"{phrase}(?: (and|{'|'.join(RELATIONS)}) {phrase})?", text)
    # Groups 3 and 7 are the two shapes. A checker could not tell "a circle and a circle" from two.
    if not groups or groups[3] == groups[7]:
        raise ValueError(
            f"{text!r} is not a caption of the bundled world. Write for example "
            "'two red circles', 'a circle and a square', or 'a red circle left of a blue square'."
        )
    count, colour, shape, joint, count2, colour2, shape2 = groups.groups()
    phrases = [Phrase(cast(Shape, shape), cast(Colour | None, colour), COUNTS[count])]
    if shape2:
        phrases.append(Phrase(cast(Shape, shape2), cast(Colour | None, colour2), COUNTS[count2]))
    return Caption(tuple(phrases), None if joint in (None, "and") else cast(Relation, joint))


def draw_caption(rng: Generator, kind: Kind | None = None) -> Caption:
    """Draw a caption. Every kind is equally likely, and within a kind every caption."""
    choices = captions(kind or KINDS[rng.integers(len(KINDS))])
    return choices[rng.integers(len(choices))]


def misquote(caption: Caption, rng: Generator) -> Caption:
    """Draw a caption of the same kind that is wrong in one fact."""
    wrong: list[Caption] = []
    for index, phrase in enumerate(caption.phrases):
        before, after = caption.phrases[:index], caption.phrases[index + 1 :]
        changed = _other_phrases(phrase, caption)
        wrong += [replace(caption, phrases=(*before, other, *after)) for other in changed]
    if caption.relation:
        others = [relation for relation in RELATIONS if relation != caption.relation]
        wrong += [replace(caption, relation=relation) for relation in others]
    if caption.kind == "color_attr":
        first, second = caption.phrases
        swapped = (replace(first, colour=second.colour), replace(second, colour=first.colour))
        wrong.append(replace(caption, phrases=swapped))
    return wrong[rng.integers(len(wrong))]


def _other_phrases(phrase: Phrase, caption: Caption) -> list[Phrase]:
    """Return the phrases that differ from a phrase of the caption in shape, colour or count."""
    # A shape or colour that the caption names elsewhere would make another fact wrong too.
    shapes = {other.shape for other in caption.phrases}
    changed = [replace(phrase, shape=shape) for shape in SHAPES if shape not in shapes]
    if phrase.colour:
        colours = {other.colour for other in caption.phrases}
        changed += [replace(phrase, colour=colour) for colour in COLOURS if colour not in colours]
    if phrase.count > 1:
        changed.append(replace(phrase, count=5 - phrase.count))
    return changed


def draw_scene(caption: Caption, rng: Generator) -> list[Thing]:
    """Draw a scene in which the caption holds. What the caption leaves open is random."""
    colours: list[Colour] = list(COLOURS)
    objects: list[tuple[Colour, Shape]] = []
    for phrase in caption.phrases:
        # Drawn even if the phrase names a colour, so that later draws do not depend on the caption.
        random_colour = colours[rng.integers(len(colours))]
        objects += itertools.repeat((phrase.colour or random_colour, phrase.shape), phrase.count)
    places = _places(len(objects), caption.relation, rng)
    jitter = rng.uniform(-0.025, 0.025, (len(objects), 2))
    sizes = rng.uniform(0.175, 0.2, len(objects))
    rows = zip(objects, places, jitter, sizes, strict=True)
    return [
        Thing(colour, shape, x=x + dx, y=y + dy, size=size)
        for (colour, shape), (x, y), (dx, dy), size in rows
    ]


def _places(count: int, relation: Relation | None, rng: Generator) -> list[tuple[float, float]]:
    """Draw centres in different quarters of the picture. A relation orders the first two."""
    # One object per quarter: two of one colour that touch would be read as one object.
    low, high = 0.26, 0.74
    if relation is None:
        quarters = [(low, low), (high, low), (low, high), (high, high)]
        return [quarters[i] for i in rng.permutation(4)[:count]]
    across = (low, high)[rng.integers(2)]
    if relation in ("left of", "right of"):
        places = [(low, across), (high, across)]
    else:
        places = [(across, low), (across, high)]
    return places if relation in ("left of", "above") else places[::-1]


def render(scenes: list[list[Thing]], size: int = SIZE) -> Tensor:
    """Draw the scenes with smooth edges, and return (B, 3, size, size) in [0, 1]."""
    pictures = torch.tensor(GROUND).view(1, 3, 1, 1).repeat(len(scenes), 1, size, size) / 255
    # The first object of every scene is drawn at once, then the second: few large operations.
    for layer in itertools.zip_longest(*scenes):
        rows = [row for row, thing in enumerate(layer) if thing is not None]
        if rows:
            pictures[rows] = _draw_objects([layer[row] for row in rows], pictures[rows])
    return pictures


def _draw_objects(things: list[Thing], pictures: Tensor) -> Tensor:
    """Return the pictures (B, 3, size, size) with one object drawn on each."""
    size = pictures.shape[-1]
    centres = (torch.arange(size) + 0.5) / size
    numbers = torch.tensor([(t.x, t.y, t.size) for t in things], dtype=torch.float32)
    x, y, half = numbers.T[..., None, None]
    dx, dy = (centres.view(1, 1, -1) - x) / half, (centres.view(1, -1, 1) - y) / half
    rows = zip(things, dx, dy, strict=True)
    distance = torch.stack([_signed_distance(thing.shape, u, v) for thing, u, v in rows])
    cover = (0.5 - distance * half * size).clamp(0, 1).unsqueeze(1)
    colours = torch.tensor([COLOURS[thing.colour] for thing in things]).view(-1, 3, 1, 1) / 255
    return pictures * (1 - cover) + colours * cover


def _signed_distance(shape: Shape | None, dx: Tensor, dy: Tensor) -> Tensor:
    """Return the distance to the outline, negative inside, in a box of [-1, 1]. y points down."""
    if shape == "circle":
        return (dx**2 + dy**2).sqrt() - 1
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - 0.9
    slope = (2 * dx.abs() - (dy + 1)) / 5**0.5
    return torch.maximum(slope, dy - 1)


def read_picture(image: Tensor) -> list[Thing]:
    """Return the objects in a picture (3, H, W) in [0, 1].

    An object is a connected region of pixels that are nearest to one colour. Its shape is the
    one whose outline fits best.
    """
    pixels = image.detach().float().permute(1, 2, 0).cpu().numpy() * 255
    palette = np.array([GROUND, *COLOURS.values()], dtype=np.float32)
    nearest = ((pixels[:, :, None] - palette) ** 2).sum(-1).argmin(-1)
    things = []
    for index, colour in enumerate(COLOURS, start=1):
        labels, _ = cast(tuple[np.ndarray, int], ndimage.label(nearest == index))
        for number, box in enumerate(ndimage.find_objects(labels), start=1):
            region = labels[box] == number
            if region.sum() >= SMALLEST_REGION * nearest.size:
                things.append(_thing(colour, region, box, nearest.shape))
    return things


def _thing(
    colour: Colour, region: np.ndarray, box: tuple[slice, slice], shape: tuple[int, ...]
) -> Thing:
    """Describe a region, given as a mask inside its box, of a picture of `shape` (H, W)."""
    sides = zip(box, shape, strict=True)
    y, x = ((side.start + side.stop) / 2 / length for side, length in sides)
    size = max(region.shape) / 2 / shape[1]
    return Thing(colour, _best_shape(region) if size > 0.1 else None, x=x, y=y, size=size)


def _best_shape(region: np.ndarray) -> Shape | None:
    """Return the shape whose outline overlaps the region best, or None if none fits well."""
    height, width = region.shape
    # Far from square: objects that touch, or a smear.
    if not 0.7 < height / width < 1.4:
        return None
    # Samplers leave single wrong pixels inside an object; they say nothing about its outline.
    filled = cast(np.ndarray, ndimage.binary_fill_holes(region))
    overlaps: dict[Shape, float] = {
        shape: _overlap(filled, _outline(shape, height, width)) for shape in SHAPES
    }
    best = max(SHAPES, key=overlaps.__getitem__)
    return best if overlaps[best] >= MIN_OVERLAP else None


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Return intersection over union of two masks."""
    return (a & b).sum() / (a | b).sum()


@cache
def _outline(shape: Shape, height: int, width: int) -> np.ndarray:
    """Return the mask of a shape that fills a box of (height, width) pixels."""
    v, u = np.mgrid[:height, :width] + 0.5
    u, v = 2 * u / width - 1, 2 * v / height - 1
    return {
        "circle": u**2 + v**2 <= 1,
        "square": np.ones_like(u, dtype=bool),
        "triangle": 2 * np.abs(u) <= v + 1,
    }[shape]


def match(caption: Caption, things: list[Thing]) -> Match:
    """Count the facts of a caption that hold in a picture.

    Every object of the caption is one fact, a named colour of it another, and the relation a last.
    """
    held = facts = 0
    for phrase in caption.phrases:
        of_shape = [thing for thing in things if thing.shape == phrase.shape]
        facts += phrase.count
        held += min(phrase.count, len(of_shape))
        if phrase.colour:
            facts += phrase.count
            held += min(phrase.count, sum(thing.colour == phrase.colour for thing in of_shape))
    if caption.relation:
        facts += 1
        held += _relation_holds(caption, things)
    extra = max(0, len(things) - sum(phrase.count for phrase in caption.phrases))
    return Match(held, facts, extra)


def _relation_holds(caption: Caption, things: list[Thing]) -> bool:
    """True if an object of the first shape stands in the relation to one of the second."""
    first, second = (
        [thing for thing in things if thing.shape == phrase.shape] for phrase in caption.phrases
    )
    relation = caption.relation
    if relation in ("right of", "below"):
        first, second, relation = second, first, OPPOSITE[relation]
    axis = "x" if relation == "left of" else "y"
    pairs = itertools.product(first, second)
    return any(getattr(b, axis) - getattr(a, axis) > MIN_GAP for a, b in pairs)
