"""Small pictures of an evaluation, as WebP files, which people see in the report."""

import io
import math

from PIL import Image
from torch import Tensor

MOST = 600
"""The most prompts of an evaluation that have a thumbnail, spread over all of them."""
FEW, LARGE, SMALL = 100, 512, 256
"""Pixels of the longer side: `LARGE` for up to `FEW` prompts, `SMALL` for more."""
LOSSLESS = 128
"""Pixels. Pictures whose sides are no longer are small files anyway, and keep every byte."""


def pictured_prompts(prompts: int, most: int = MOST) -> range:
    """Return the prompts that get a thumbnail: all of them, or every n-th."""
    return range(0, prompts, math.ceil(prompts / most)) if prompts and most else range(0)


def make_thumbnail(image: Tensor, prompts: int) -> bytes:
    """Return a picture (3, H, W) in bytes as a WebP file.

    Args:
        image: The picture.
        prompts: How many prompts the evaluation pictures. More of them have smaller thumbnails.
    """
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    side = LARGE if prompts <= FEW else SMALL
    picture.thumbnail((side, side))
    file = io.BytesIO()
    # The fastest method: a run waits for it, and files are little larger.
    picture.save(file, "WEBP", lossless=max(picture.size) <= LOSSLESS, quality=80, method=0)
    return file.getvalue()
