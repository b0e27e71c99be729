"""The bundled world: captions, the renderer, and the checker that reads a picture back."""

import numpy as np
import pytest
import torch

from flowalign.rewards.scene import scene_match, scene_match_graded
from flowalign.worlds.scenes import (
    captions,
    draw_caption,
    draw_scene,
    KINDS,
    match,
    misquote,
    parse,
    read_picture,
    render,
    Thing,
)

LEFT, RIGHT, BELOW = (0.26, 0.26), (0.74, 0.26), (0.26, 0.74)


def thing(colour, shape, place=LEFT):
    return Thing(colour, shape, *place, size=0.19)


@pytest.mark.parametrize("kind", KINDS)
def test_every_caption_parses_back_to_itself(kind):
    for caption in captions(kind):
        assert parse(caption.text) == caption
        assert caption.kind == kind


def test_captions_are_all_different():
    texts = [caption.text for kind in KINDS for caption in captions(kind)]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("kind", KINDS)
def test_the_checker_agrees_with_how_a_picture_was_made(kind):
    rng = np.random.default_rng(0)
    drawn = [draw_caption(rng, kind) for _ in range(100)]
    scenes = [draw_scene(caption, rng) for caption in drawn]
    read = [read_picture(picture) for picture in render(scenes)]
    pairs = zip(drawn, read, strict=True)
    assert np.mean([match(caption, things).strict for caption, things in pairs]) >= 0.98
    known = [sorted((t.colour, t.shape) for t in scene) for scene in scenes]
    seen = [sorted((t.colour, t.shape or "") for t in things) for things in read]
    assert np.mean([a == b for a, b in zip(known, seen, strict=True)]) >= 0.98


@pytest.mark.parametrize("kind", KINDS)
def test_a_misquoted_caption_is_wrong(kind):
    rng = np.random.default_rng(1)
    for _ in range(100):
        caption = draw_caption(rng, kind)
        wrong, scene = misquote(caption, rng), draw_scene(caption, rng)
        assert wrong.kind == kind
        assert match(caption, scene).strict == 1
        assert match(wrong, scene).strict == 0
        assert 0 <= match(wrong, scene).graded < 1


@pytest.mark.parametrize("size", [32, 128])
def test_pictures_of_other_sizes_are_read_too(size):
    scene = [
        thing("red", "circle"),
        thing("blue", "square", RIGHT),
        thing("green", "triangle", BELOW),
    ]
    read = read_picture(render([scene], size)[0])
    assert {(t.colour, t.shape) for t in read} == {
        ("red", "circle"),
        ("blue", "square"),
        ("green", "triangle"),
    }


def test_an_object_is_read_at_its_place_and_size():
    (read,) = read_picture(render([[Thing("yellow", "circle", 0.3, 0.7, 0.2)]])[0])
    assert (read.x, read.y, read.size) == pytest.approx((0.3, 0.7, 0.2), abs=0.02)


def test_a_long_region_has_no_shape():
    picture = torch.full((3, 64, 64), 240 / 255)
    picture[:, 30:34, 8:56] = torch.tensor([214, 48, 49]).view(3, 1, 1) / 255
    assert [(t.colour, t.shape) for t in read_picture(picture)] == [("red", None)]


def test_specks_are_ignored():
    picture = torch.full((3, 64, 64), 240 / 255)
    picture[:, 10:14, 10:14] = torch.tensor([214, 48, 49]).view(3, 1, 1) / 255
    assert read_picture(picture) == []


RED_CIRCLE, BLUE_SQUARE = thing("red", "circle"), thing("blue", "square", RIGHT)


@pytest.mark.parametrize(
    ("prompt", "things", "held", "facts"),
    [
        ("a circle", [RED_CIRCLE], 1, 1),
        ("a circle", [], 0, 1),
        ("a circle and a square", [RED_CIRCLE], 1, 2),
        ("a red circle", [thing("green", "circle")], 1, 2),
        ("a red circle", [thing("red", "square")], 0, 2),
        ("two circles", [RED_CIRCLE], 1, 2),
        ("two red circles", [RED_CIRCLE, thing("blue", "circle", RIGHT)], 3, 4),
        ("a circle left of a square", [RED_CIRCLE, BLUE_SQUARE], 3, 3),
        ("a circle right of a square", [RED_CIRCLE, BLUE_SQUARE], 2, 3),
        ("a circle above a square", [RED_CIRCLE, BLUE_SQUARE], 2, 3),
        ("a square right of a circle", [RED_CIRCLE, BLUE_SQUARE], 3, 3),
        ("a circle above a square", [RED_CIRCLE, thing("blue", "square", BELOW)], 3, 3),
        ("a square below a circle", [RED_CIRCLE, thing("blue", "square", BELOW)], 3, 3),
        ("a red circle and a blue square", [RED_CIRCLE, BLUE_SQUARE], 4, 4),
        ("a blue circle and a red square", [RED_CIRCLE, BLUE_SQUARE], 2, 4),
        ("a red circle left of a blue square", [BLUE_SQUARE], 2, 5),
    ],
)
def test_facts_that_hold_are_counted(prompt, things, held, facts):
    result = match(parse(prompt), things)
    assert (result.held, result.facts, result.extra) == (held, facts, 0)
    assert result.strict == float(held == facts)
    assert result.graded == held / facts


@pytest.mark.parametrize(
    ("prompt", "things", "graded"),
    [
        ("a circle", [RED_CIRCLE, BLUE_SQUARE], 0),
        ("a red circle", [RED_CIRCLE, thing("blue", None, RIGHT)], 1 / 2),
        (
            "two circles",
            [RED_CIRCLE, thing("red", "circle", RIGHT), thing("red", "circle", BELOW)],
            1 / 2,
        ),
        ("a square", [RED_CIRCLE, thing("red", "circle", RIGHT)], 0),
    ],
)
def test_an_extra_object_cancels_a_fact(prompt, things, graded):
    result = match(parse(prompt), things)
    assert (result.strict, result.graded) == (0, graded)


def test_the_rewards_are_the_strict_and_the_graded_share():
    pictures = render([[RED_CIRCLE, BLUE_SQUARE]]).repeat(3, 1, 1, 1)
    prompts = ["a red circle and a blue square", "a blue circle and a red square", "a red circle"]
    assert scene_match(pictures, prompts, [{}] * 3).tolist() == [1, 0, 0]
    assert scene_match_graded(pictures, prompts, [{}] * 3).tolist() == [1, 0.5, 0.5]


@pytest.mark.parametrize("text", ["A red circle.", "  a red circle ", "a red circle"])
def test_capitals_spaces_and_a_full_stop_do_not_matter(text):
    assert parse(text) == parse("a red circle")


@pytest.mark.parametrize(
    "text",
    ["", "a cat", "a purple circle", "four circles", "a circle near a square", "a circle and"],
)
def test_other_prompts_are_refused_with_examples(text):
    with pytest.raises(
        ValueError,
        match=r"is not a caption of the bundled world\. Write for example 'two red circles'",
    ):
        parse(text)
