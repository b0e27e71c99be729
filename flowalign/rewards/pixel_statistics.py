"""Rewards that need nothing but the pixels: no prompt, no weights, no memory. Images are (B, 3, H, W) in [0, 1]."""

import io
import math
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flowalign.flow import PerImage
from flowalign.rewards.adapters import to_pil
from flowalign.rewards.base import traits

FLAT = 1e-5
"""Added to the variance of the Laplacian, about that of rounding to 8 bits, so that a flat picture has a sharpness."""


@traits(range=(0, 1))
def brightness(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> PerImage:
    """Mean of all channels, in [0, 1]. Differentiable."""
    return images.mean((1, 2, 3))


@traits(range=(0, 0.5))
def contrast(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> PerImage:
    """Standard deviation of the luma, in [0, ½]. Differentiable."""
    return luma(images).flatten(1).std(1, correction=0)


@traits(range=(0, 1))
def saturation(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> PerImage:
    """By how much the largest channel exceeds the smallest, mean over pixels, in [0, 1]. Differentiable."""
    return (images.amax(1) - images.amin(1)).mean((1, 2))


@traits(range=(0, math.inf))
def colorfulness(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> PerImage:
    """Hasler and Süsstrunk's (2003), on their scale: 0 grey, 15 slightly, 59 quite, 109 extremely colourful. Differentiable.

    With rg = R - G and yb = (R + G)/2 - B of 8-bit channels: √(σ²_rg + σ²_yb) + 0.3 √(μ²_rg + μ²_yb).
    """
    red, green, blue = images.unbind(1)
    opponents = 255 * torch.stack([red - green, (red + green) / 2 - blue], 1).flatten(2)
    return opponents.std(2, correction=0).norm(dim=1) + 0.3 * opponents.mean(2).norm(dim=1)


@traits(range=(math.log(FLAT), math.log(16 + FLAT)))
def sharpness(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> PerImage:
    """Logarithm of the variance of the luma's 3×3 Laplacian, from -11.5 (flat) to 2.8 (a checkerboard). Differentiable."""
    y = luma(images)
    laplacian = (
        y[:, :-2, 1:-1] + y[:, 2:, 1:-1] + y[:, 1:-1, :-2] + y[:, 1:-1, 2:] - 4 * y[:, 1:-1, 1:-1]
    )
    return (laplacian.flatten(1).var(1, correction=0) + FLAT).log()


@traits(range=(0, math.inf))
def jpeg_size(
    images: Tensor, prompts: list[str], metadata: list[dict[str, Any]], quality: int = 95
) -> PerImage:
    """Kilobytes as a JPEG (DDPO, arXiv 2305.13301); a negative weight rewards pictures that compress well."""
    return torch.tensor([_kilobytes(picture, quality) for picture in to_pil(images)])


@traits(range=(-math.inf, 0))
def jpeg_compressibility(
    images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
) -> PerImage:
    """-kilobytes/500, on Flow-GRPO's scale (arXiv 2505.05470); 0 would be no file at all."""
    return -jpeg_size(images, prompts, metadata) / 500


def luma(images: Tensor) -> Tensor:
    """(B, H, W)"""
    red, green, blue = images.unbind(1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _kilobytes(picture: Image.Image, quality: int) -> float:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return file.tell() / 1000
