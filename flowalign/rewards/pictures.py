"""Rewards that need nothing but the pixels."""

import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flowalign.flow import PerImage


def brightness(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> PerImage:
    """Mean of all channels, in [0, 1]. Differentiable."""
    return images.mean((1, 2, 3))


def jpeg_size(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]], quality: int = 95) -> PerImage:
    """Kilobytes as a JPEG (DDPO, arXiv 2305.13301); a negative weight rewards pictures that compress well."""
    return torch.tensor([_kilobytes(image, quality) for image in images])


def _kilobytes(image: Tensor, quality: int) -> float:
    file = io.BytesIO()
    pixels = (image.permute(1, 2, 0) * 255).round().byte().cpu().numpy()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return file.tell() / 1000
