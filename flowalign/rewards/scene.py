"""Whether a picture of coloured shapes shows what its caption says: exact, with nothing learned."""

from typing import Any

import torch
from torch import Tensor

from flowalign.flow import PerImage
from flowalign.rewards.base import traits
from flowalign.worlds import scenes


@traits(range=(0, 1))
def scene_match(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> PerImage:
    """1 where every fact of the caption holds and nothing else is in the picture, otherwise 0."""
    return torch.tensor([match.strict for match in _matches(images, prompts)])


@traits(range=(0, 1))
def scene_match_graded(
    images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
) -> PerImage:
    """The share of the caption's facts that hold, in [0, 1]; every extra object takes one away."""
    return torch.tensor([match.graded for match in _matches(images, prompts)])


def _matches(images: Tensor, prompts: list[str]) -> list[scenes.Match]:
    pairs = zip(images, prompts, strict=True)
    return [
        scenes.match(scenes.parse(prompt), scenes.read_picture(image)) for image, prompt in pairs
    ]
