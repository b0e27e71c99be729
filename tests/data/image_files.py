"""Image files for tests: plain colours, and two halves."""

import io
from typing import Any

from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    """The bytes of a picture as a file."""
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def plain(color: Any, size: tuple[int, int] = (8, 8)) -> bytes:
    """A PNG of one colour."""
    return encoded(Image.new("RGB", size, color))


def halves(size: tuple[int, int]) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, "red")
    image.paste("blue", (size[0] // 2, 0, *size))
    return image
