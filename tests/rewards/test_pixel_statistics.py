"""Rewards of pixels against values worked out by hand."""

import io
import math
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from flowalign.rewards import pixel_statistics as pictures
from flowalign.rewards.adapters import make_reward

SMOOTH = ["brightness", "contrast", "saturation", "colorfulness", "sharpness"]
RED, GREEN, BLUE, YELLOW = (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)


def score(name: str, images: Tensor) -> list[float]:
    """Through the checks of what a reward declares."""
    return make_reward(name, getattr(pictures, name))(
        images, [""] * len(images), [{}] * len(images)
    ).tolist()


def plain(*colours: tuple[float, float, float]) -> Tensor:
    """A picture of each colour."""
    return torch.tensor(colours).float()[:, :, None, None].expand(-1, 3, 8, 8)


def checkerboard() -> Tensor:
    rows, columns = torch.arange(8)[:, None], torch.arange(8)
    return ((rows + columns) % 2).float().expand(1, 3, 8, 8)


def halves(left: tuple[float, float, float], right: tuple[float, float, float]) -> Tensor:
    images = plain(left).clone()
    images[:, :, :, 4:] = plain(right)[:, :, :, 4:]
    return images


def test_the_size_is_that_of_pillows_own_file():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 24, 3), dtype=np.uint8)
    sizes = []
    for picture in pixels:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, format="JPEG", quality=95)
        sizes.append(len(file.getvalue()) / 1000)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    assert score("jpeg_size", images) == pytest.approx(sizes)
    assert score("jpeg_compressibility", images) == pytest.approx([-size / 500 for size in sizes])


def test_black_is_the_smallest_and_noise_the_largest():
    ramp = torch.linspace(0, 1, 64).expand(3, 64, 64)
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    black, shaded, loud = score("jpeg_size", torch.stack([torch.zeros(3, 64, 64), ramp, noise]))
    assert black < shaded < loud
    assert loud > 5 * black


def test_a_lower_quality_makes_a_smaller_file():
    noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    low = make_reward("jpeg_size", partial(pictures.jpeg_size, quality=50))(noise, [""], [{}])
    assert low.tolist() < score("jpeg_size", noise)


def test_sharpness_is_known_for_flat_striped_and_checkered_pictures():
    """Stripes have the Laplacian ±2, a checkerboard ±4."""
    stripes = (torch.arange(8) % 2).float().expand(1, 3, 8, 8)
    images = torch.cat([plain(YELLOW), stripes, checkerboard(), 0.5 * checkerboard()])
    assert score("sharpness", images) == pytest.approx(
        [math.log(v + 1e-5) for v in (0, 4, 16, 4)], abs=1e-4
    )


def test_colorfulness_is_known_for_plain_colours():
    """One colour has means only: red rg = 255 and yb = 127.5, blue yb = -255."""
    mixed, single = 0.3 * math.hypot(255, 127.5), 0.3 * 255
    scores = score("colorfulness", plain(RED, GREEN, BLUE, YELLOW, (0.5, 0.5, 0.5)))
    assert scores == pytest.approx([mixed, mixed, single, single, 0], abs=1e-3)


def test_colorfulness_is_known_for_two_colours():
    """Red and green: rg = ±255, so its deviation is 255 and its mean 0; yb = 127.5 everywhere."""
    assert score("colorfulness", halves(RED, GREEN)) == pytest.approx([255 + 0.3 * 127.5])


def test_brightness_contrast_and_saturation_are_known():
    images = torch.cat([plain(RED, (0.5, 0.5, 0.5), (1, 0.5, 0.75)), halves((0, 0, 0), (1, 1, 1))])
    assert score("brightness", images) == pytest.approx([1 / 3, 0.5, 0.75, 0.5])
    assert score("saturation", images) == pytest.approx([1, 0, 0.5, 0])
    assert score("contrast", images) == pytest.approx([0, 0, 0, 0.5], abs=1e-6)


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_are_those_of_finite_differences(name):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 6, 5, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda images: getattr(pictures, name)(images, ["", ""], [{}, {}]), images
    )


@pytest.mark.parametrize("name", SMOOTH)
def test_the_gradient_of_a_grey_picture_is_finite(name):
    images = plain((0.5, 0.5, 0.5)).clone().requires_grad_()
    getattr(pictures, name)(images, [""], [{}]).sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()


@pytest.mark.parametrize("name", [*SMOOTH, "jpeg_size", "jpeg_compressibility"])
def test_an_image_scores_the_same_alone_and_among_others(name):
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert [score(name, image[None])[0] for image in images] == pytest.approx(score(name, images))
