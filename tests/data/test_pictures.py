"""Decoding image files: size, orientation, transparency, and files that are not images."""

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from flowalign.data.pictures import load_picture
from flowalign.errors import UserError
from tests.data.image_files import encoded, halves, plain


def corners(picture: Tensor) -> list[tuple[int, ...]]:
    """Colours of the four corners, as full or empty channels."""
    return [
        tuple(picture[:, y, x].round().int().tolist())
        for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1))
    ]


RED, GREEN, BLUE, WHITE = (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)


def test_an_image_is_scaled_to_the_size():
    picture = load_picture(encoded(halves((8, 8))), height=32, width=16)
    assert picture.shape == (3, 32, 16)
    assert picture.dtype == torch.float32
    assert picture.min() >= 0
    assert picture.max() <= 1
    assert corners(picture) == [RED, BLUE, RED, BLUE]


def test_the_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter clockwise
    picture = load_picture(encoded(halves((32, 32)), "JPEG", exif=exif, quality=95), 32, 32)
    assert corners(picture) == [RED, RED, BLUE, BLUE]


def test_transparency_becomes_white():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (4, 0, 8, 8))
    assert corners(load_picture(encoded(image), 8, 8)) == [RED, WHITE, RED, WHITE]
    half = load_picture(encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 128))), 8, 8)
    assert_close(half[:, 4, 4], torch.tensor([1.0, 0.5, 0.5]), atol=0.01, rtol=0)


def test_an_image_is_cropped_to_its_center():
    image = Image.new("RGB", (24, 8), "green")
    image.paste("red", (8, 0, 16, 8))
    inside = load_picture(encoded(image), 8, 8)[:, 1:-1, 1:-1].round()
    assert inside.flatten(1).unique(dim=1).flatten().tolist() == [1, 0, 0]


@pytest.mark.parametrize("mode", ["L", "P", "LA", "CMYK", "1"])
def test_an_image_of_any_mode_becomes_rgb(mode):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    picture = load_picture(encoded(Image.new("RGB", (8, 8), "white").convert(mode), kind), 8, 8)
    assert picture.shape == (3, 8, 8)
    assert picture.min() > 0.99


@pytest.mark.parametrize("data", [b"", b"hello", plain("red")[:20]])
def test_bytes_that_are_not_an_image_are_an_error(data):
    with pytest.raises(UserError, match=r"data\.pairs cannot be opened as an image"):
        load_picture(data, 8, 8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_truncated_image_is_an_error(kind):
    data = encoded(Image.effect_noise((64, 64), 50).convert("RGB"), kind)
    with pytest.raises(UserError, match=r"data\.pairs cannot be opened as an image"):
        load_picture(data[: len(data) // 2], 8, 8)
