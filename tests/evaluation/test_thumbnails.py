"""Thumbnails of evaluations: which prompts have one, their size, and their way through a file."""

import io

import numpy as np
import torch
from PIL import Image

from flowalign.evaluation.results import EvaluationResult
from flowalign.evaluation.thumbnails import make_thumbnail, MOST, pictured_prompts


def opened(file):
    return Image.open(io.BytesIO(file), formats=["WEBP"])


def test_small_pictures_keep_every_byte_and_large_ones_shrink_with_the_number_of_prompts():
    small = torch.arange(3 * 64 * 48).view(3, 64, 48).byte()
    pixels = torch.from_numpy(np.array(opened(make_thumbnail(small, 1000))))
    assert torch.equal(pixels.permute(2, 0, 1), small)
    large = torch.zeros(3, 1024, 768).byte()
    assert opened(make_thumbnail(large, 100)).size == (384, 512)
    assert opened(make_thumbnail(large, 101)).size == (192, 256)


def test_every_prompt_has_a_thumbnail_up_to_a_bound_and_beyond_it_every_nth():
    assert pictured_prompts(MOST) == range(MOST)
    assert list(pictured_prompts(MOST + 2, MOST))[:3] == [0, 2, 4]
    assert len(pictured_prompts(10 * MOST)) == MOST
    assert not pictured_prompts(3, 0)
    assert not pictured_prompts(0)


def test_a_file_keeps_thumbnails_and_figures_and_drops_what_belongs_to_no_image(tmp_path):
    scores, nothing = {"r": torch.tensor([0.5, 0.25] * 6)}, torch.zeros(0)
    thumbnails = {row: b"picture %d" % row for row in range(12)}
    result = EvaluationResult(
        prompt=torch.arange(12),
        rewards=scores,
        images=nothing,
        shown=nothing.long(),
        figures={"diversity": 0.125},
        thumbnails={**thumbnails, 12: b"of another evaluation"},
    )
    result.save(tmp_path / "result.safetensors")
    loaded = EvaluationResult.load(tmp_path / "result.safetensors")
    assert list(loaded.thumbnails.items()) == list(thumbnails.items())
    assert loaded.metrics == {"eval/r": 0.375, "eval/diversity": 0.125}
