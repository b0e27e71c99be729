"""Rewards of pixels alone, without prompt, weights or memory. Images are (B, 3, H, W) in [0, 1]."""

import io
import math

import torch
from PIL import Image
from torch import Tensor

from flowalign.data.prompts import Metadata
from flowalign.flow import PerImage
from flowalign.rewards.adapters import to_pil
from flowalign.rewards.base import traits

FLAT = 1e-5
"""Added to the variance of the Laplacian, so that a flat image has a finite sharpness.

It is about the variance that rounding to 8 bits causes.
"""


@traits(range=(0, 1))
def brightness(images: Tensor, prompts: list[str], metadata: list[Metadata]) -> PerImage:
    """Mean of all channels, in [0, 1]. Differentiable."""
    return images.mean((1, 2, 3))


# The deviation of numbers in [0, 1] is at most one half.
@traits(range=(0, 0.5))
def contrast(images: Tensor, prompts: list[str], metadata: list[Metadata]) -> PerImage:
    """Standard deviation of the luma, in [0, ½]. Differentiable."""
    return luma(images).flatten(1).std(1, correction=0)


@traits(range=(0, 1))
def saturation(images: Tensor, prompts: list[str], metadata: list[Metadata]) -> PerImage:
    """Largest channel minus smallest, mean over pixels, in [0, 1]. Differentiable."""
    return (images.amax(1) - images.amin(1)).mean((1, 2))


@traits(range=(0, math.inf))
def colorfulness(images: Tensor, prompts: list[str], metadata: list[Metadata]) -> PerImage:
    """Colourfulness of Hasler and Süsstrunk (2003), from 0 (grey) to 109 (extreme). Differentiable.

    On their scale, 15 is slightly and 59 quite colourful. With rg = R - G and yb = (R + G)/2 - B
    of 8-bit channels: √(σ²_rg + σ²_yb) + 0.3 √(μ²_rg + μ²_yb).
    """
    red, green, blue = images.unbind(1)
    opponents = 255 * torch.stack([red - green, (red + green) / 2 - blue], 1).flatten(2)
    return opponents.std(2, correction=0).norm(dim=1) + 0.3 * opponents.mean(2).norm(dim=1)


# The Laplacian of values in [0, 1] lies in [-4, 4], so its variance is at most 16.
@traits(range=(math.log(FLAT), math.log(16 + FLAT)))
def sharpness(images: Tensor, prompts: list[str], metadata: list[Metadata]) -> PerImage:
    """Log-variance of the luma's 3×3 Laplacian, from -11.5 (flat) to 2.8. Differentiable.

    The highest value is that of a checkerboard.
    """
    y = luma(images)
    laplacian = (
        y[:, :-2, 1:-1] + y[:, 2:, 1:-1] + y[:, 1:-1, :-2] + y[:, 1:-1, 2:] - 4 * y[:, 1:-1, 1:-1]
    )
    return (laplacian.flatten(1).var(1, correction=0) + FLAT).log()


@traits(range=(0, math.inf))
def jpeg_size(
    images: Tensor, prompts: list[str], metadata: list[Metadata], quality: int = 95
) -> PerImage:
    """Kilobytes as a JPEG (DDPO, arXiv 2305.13301).

    A negative weight rewards images that compress well.
    """
    return torch.tensor([_kilobytes(picture, quality) for picture in to_pil(images)])


@traits(range=(-math.inf, 0))
def jpeg_compressibility(images: Tensor, prompts: list[str], metadata: list[Metadata]) -> PerImage:
    """Minus kilobytes as a JPEG / 500, on Flow-GRPO's scale (arXiv 2505.05470)."""
    return -jpeg_size(images, prompts, metadata) / 500


def luma(images: Tensor) -> Tensor:
    """Return the luma of Rec. 601 (B, H, W)."""
    # The weights of Rec. 601, which JPEG uses too.
    red, green, blue = images.unbind(1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _kilobytes(picture: Image.Image, quality: int) -> float:
    # In memory, because only the size is needed.
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return file.tell() / 1000
