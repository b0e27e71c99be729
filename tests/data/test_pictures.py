"""Decoding image files: size, orientation, transparency, and files that are not images."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from flowalign.data.pictures import load_picture, open_picture
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


RAMP = np.arange(65536).reshape(256, 256)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (RAMP.astype(np.uint16), "PNG"),
        (RAMP.astype(np.uint16), "TIFF"),
        (RAMP.astype(">u2"), "TIFF"),
        ((RAMP / 65535).astype(np.float32), "TIFF"),
    ],
)
def test_grey_values_of_more_than_8_bits_are_scaled(values, kind):
    picture = open_picture(encoded(Image.fromarray(values), kind))
    expected = (RAMP / 257).round().astype(np.uint8)
    assert (np.asarray(picture) == expected[..., None]).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (RAMP.astype(np.int32), "its values are 32-bit integers, whose range is not known"),
        (RAMP.astype(np.float32), "its floating-point values reach from 0 to 65535"),
        (np.array([[0.5, np.nan]], np.float32), "its floating-point values reach from nan"),
    ],
)
def test_values_of_an_unknown_range_are_refused_by_name(values, message):
    with pytest.raises(UserError, match=rf"^p\.jsonl, line 3 cannot be opened .*: {message}"):
        load_picture(encoded(Image.fromarray(values), "TIFF"), 8, 8, "p.jsonl, line 3")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP", "TGA", "ICO"])
def test_a_damaged_image_is_decoded_or_refused_but_raises_nothing_else(kind):
    """Pillow's decoders raise many types."""
    whole = encoded(Image.effect_noise((40, 40), 50).convert("RGB"), kind)
    refused = 0
    for position in range(0, min(len(whole), 600), 3):
        for damaged in (whole[:position], whole[:position] + b"\xff" * 4 + whole[position + 4 :]):
            try:
                open_picture(damaged)
            except ValueError:
                refused += 1
    assert refused
