"""Exact rewards of the bundled world: a checker compares the image with its caption."""

import torch
from torch import Tensor

from flowalign.data.prompts import Metadata
from flowalign.flow import PerImage
from flowalign.rewards.base import traits
from flowalign.worlds import scenes


@traits(range=(0, 1))
def scene_match(images: Tensor, prompts: list[str], metadata: list[Metadata]) -> PerImage:
    """1 if every fact of the caption holds and nothing else is in the image, otherwise 0."""
    return torch.tensor([match.strict for match in _matches(images, prompts)])


@traits(range=(0, 1))
def scene_match_graded(images: Tensor, prompts: list[str], metadata: list[Metadata]) -> PerImage:
    """Share of the caption's facts that hold, in [0, 1], less one fact for every extra object."""
    return torch.tensor([match.graded for match in _matches(images, prompts)])


def _matches(images: Tensor, prompts: list[str]) -> list[scenes.Match]:
    pairs = zip(images, prompts, strict=True)
    return [
        scenes.match(scenes.parse(prompt), scenes.read_picture(image)) for image, prompt in pairs
    ]
