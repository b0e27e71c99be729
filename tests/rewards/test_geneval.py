"""GenEval's rules on detections written by hand; detection and colours by small models."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    ResNetConfig,
    SwinConfig,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
)

from flowalign.errors import RunError, UserError
from flowalign.rewards import objects
from flowalign.rewards.adapters import make_reward, to_pil
from flowalign.rewards.features import BUNDLED_CLIP
from flowalign.rewards.geneval import (
    confident,
    correct,
    GenEval,
    GenEvalGraded,
    graded,
    read_spec,
    relations,
)
from flowalign.rewards.objects import (
    Box,
    ColorNamer,
    COLORS,
    crop,
    Detection,
    Detector,
    read_boxes,
    read_segments,
    SPELLING,
)
from flowalign.rewards.registry import load_rewards
from flowalign.worlds import scenes
from tests.tiny import random_clip

CPU = torch.device("cpu")


def an(  # noqa: PLR0913  rows of the tables below name what they change
    name: str,
    x: float = 50,
    y: float = 50,
    score: float = 0.95,
    color: str | None = None,
    size: float = 10,
) -> Detection:
    """A detection by the center of its box."""
    half = size / 2
    box = (x - half, y - half, x + half, y + half)
    return Detection(name=name, score=score, box=box, color=color)


def verdict(entry: dict[str, Any], detections: list[Detection]) -> tuple[float, float]:
    spec = read_spec("a prompt", entry)
    by_class = confident(detections, spec.counting)
    return correct(spec, by_class), graded(spec, by_class)


# counting and exclude

TWO_CUPS = {
    "tag": "counting",
    "include": [{"class": "cup", "count": 2}],
    "exclude": [{"class": "cup", "count": 3}],
}
ONE_DOG = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
DOG_AND_CUP = {
    "tag": "two_object",
    "include": [{"class": "dog", "count": 1}, {"class": "cup", "count": 1}],
}
NO_CAT = {**ONE_DOG, "exclude": [{"class": "cat", "count": 1}, {"class": "cup", "count": 2}]}


@pytest.mark.parametrize(
    ("entry", "detections", "expected"),
    [
        (TWO_CUPS, [an("cup"), an("cup")], (1, 1)),
        (TWO_CUPS, [an("cup")], (0, 0.5)),
        (TWO_CUPS, [], (0, 0)),
        (TWO_CUPS, [an("cup")] * 3, (0, 0.5)),
        (TWO_CUPS, [an("cup")] * 4, (0, 0)),
        (TWO_CUPS, [an("cup")] * 7, (0, -1.5)),
        (TWO_CUPS, [an("cup"), an("dog")], (0, 0.5)),
        (TWO_CUPS, [an("cup"), an("cup", score=0.89)], (0, 0.5)),
        (TWO_CUPS, [an("cup"), an("cup", score=0.9)], (0, 0.5)),
        (TWO_CUPS, [an("cup"), an("cup", score=0.901)], (1, 1)),
        (TWO_CUPS, [an("cup"), an("cup"), an("cup", score=0.89)], (1, 1)),
        ({**TWO_CUPS, "tag": "other"}, [an("cup"), an("cup", score=0.89)], (1, 1)),
        ({**TWO_CUPS, "tag": "other"}, [an("cup"), an("cup"), an("cup", score=0.4)], (0, 0.5)),
        (ONE_DOG, [an("dog", score=0.301)], (1, 1)),
        (ONE_DOG, [an("dog", score=0.3)], (0, 0)),
        (ONE_DOG, [an("dog"), an("cup"), an("cat")], (1, 1)),
        (ONE_DOG, [an("dog")] * 2, (1, 0)),
        (ONE_DOG, [an("dog")] * 3, (1, -1)),
        (ONE_DOG, [an("dog")] * 5, (1, -3)),
        (ONE_DOG, [an("dog")] * 20, (1, -14)),
        (ONE_DOG, [an("cat")], (0, 0)),
        (DOG_AND_CUP, [an("dog"), an("cup")], (1, 1)),
        (DOG_AND_CUP, [an("cup")], (0, 0.5)),
        (DOG_AND_CUP, [an("dog"), an("dog"), an("cup")], (1, 0.5)),
        (DOG_AND_CUP, [an("dog")] * 3 + [an("cup")], (1, 0)),
        (DOG_AND_CUP, [an("dog")] * 5 + [an("cup")], (1, -1)),
        (NO_CAT, [an("dog")], (1, 1)),
        (NO_CAT, [an("dog"), an("cat")], (0, 1)),
        (NO_CAT, [an("dog"), an("cat", score=0.3)], (1, 1)),
        (NO_CAT, [an("dog"), an("cup")], (1, 1)),
        (NO_CAT, [an("dog"), an("cup"), an("cup")], (0, 1)),
    ],
)
def test_counts_are_at_least_those_included_and_below_those_excluded(entry, detections, expected):
    assert verdict(entry, detections) == pytest.approx(expected)


def test_the_16_most_confident_objects_of_a_class_are_used():
    many = [an("cup", score=0.5 + i / 100) for i in range(20)]
    assert [d.score for d in confident(many, counting=False)["cup"]] == pytest.approx(
        [0.69 - i / 100 for i in range(16)]
    )
    entry = {"include": [{"class": "cup", "count": 16}], "exclude": [{"class": "cup", "count": 17}]}
    assert verdict(entry, many) == (1, 1)
    assert verdict(entry, [*many, an("dog")]) == (1, 1)
    assert verdict({"include": [{"class": "cup", "count": 20}]}, many) == pytest.approx(
        (0, 16 / 20)
    )


# colours

RED_CAR = {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}]}
TWO_RED_CARS = {"include": [{"class": "car", "count": 2, "color": "red"}]}
RED_CAR_BLUE_CUP = {
    "tag": "color_attr",
    "include": [
        {"class": "car", "count": 1, "color": "red"},
        {"class": "cup", "count": 1, "color": "blue"},
    ],
}
RED, BLUE = an("car", color="red"), an("car", color="blue")


@pytest.mark.parametrize(
    ("entry", "detections", "expected"),
    [
        (RED_CAR, [RED], (1, 1)),
        (RED_CAR, [BLUE], (0, 0.5)),
        (RED_CAR, [], (0, 0)),
        (RED_CAR, [an("car", score=0.9, color="red"), an("car", score=0.8, color="blue")], (1, 0)),
        (RED_CAR, [an("car", score=0.8, color="red"), an("car", score=0.9, color="blue")], (0, 0)),
        (TWO_RED_CARS, [RED, RED], (1, 1)),
        (TWO_RED_CARS, [RED, BLUE], (0, 0.75)),
        (TWO_RED_CARS, [BLUE, BLUE], (0, 0.5)),
        (TWO_RED_CARS, [RED], (0, 0.25)),
        (TWO_RED_CARS, [RED, RED, an("car", score=0.5)], (1, 0.25)),
        (TWO_RED_CARS, [RED, BLUE, an("car", score=0.5)], (0, 0.25)),
        (RED_CAR_BLUE_CUP, [RED, an("cup", color="blue")], (1, 1)),
        (RED_CAR_BLUE_CUP, [BLUE, an("cup", color="red")], (0, 0.5)),
        (RED_CAR_BLUE_CUP, [RED, an("cup", color="red")], (0, 0.75)),
        (RED_CAR_BLUE_CUP, [RED], (0, 0.5)),
        (RED_CAR_BLUE_CUP, [RED, *[an("cup", color="blue")] * 5], (1, -1 / 4)),
    ],
)
def test_colours_count_if_the_number_of_objects_is_right(entry, detections, expected):
    assert verdict(entry, detections) == pytest.approx(expected)


# positions


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 10, 10), (30, 0, 40, 10), {"left of"}),
        ((30, 0, 40, 10), (0, 0, 10, 10), {"right of"}),
        ((0, 0, 10, 10), (0, 30, 10, 40), {"above"}),
        ((0, 30, 10, 40), (0, 0, 10, 10), {"below"}),
        ((30, 30, 40, 40), (0, 0, 10, 10), {"right of", "below"}),
        ((0, 0, 10, 10), (30, 30, 40, 40), {"left of", "above"}),
        ((30, 30, 80, 80), (0, 0, 50, 50), set()),
        ((10, 0, 20, 10), (0, 40, 10, 50), {"above"}),
        ((0, 0, 10, 10), (0, 0, 10, 10), set()),
        ((0, 0, 10, 10), (-20, -20, 30, 30), set()),
        ((2, 0, 12, 10), (0, 0, 10, 10), set()),
        ((2.0005, 0, 12.0005, 10), (0, 0, 10, 10), set()),
        ((2.01, 0, 12.01, 10), (0, 0, 10, 10), set()),
        ((4, 0, 14, 10), (0, 0, 10, 10), set()),
        ((4.1, 0, 14.1, 10), (0, 0, 10, 10), {"right of"}),
        ((0, -4.1, 10, 5.9), (0, 0, 10, 10), {"above"}),
        ((4.1, 0, 14.1, 100), (0, 0, 10, 100), {"right of"}),
        ((4.1, 0, 104.1, 10), (0, 0, 100, 10), set()),
    ],
)
def test_positions_hold_beyond_the_dead_zone(a: Box, b: Box, expected):
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert relations(a, b) == expected
    assert relations(b, a) == {opposite[relation] for relation in expected}


CAT_BY_DOG = {
    "tag": "position",
    "include": [
        {"class": "dog", "count": 1},
        {"class": "cat", "count": 1, "position": ["left of", 0]},
    ],
}
TWO_CATS = {
    "include": [
        {"class": "dog", "count": 1},
        {"class": "cat", "count": 2, "position": ["left of", 0]},
    ]
}
TWO_DOGS = {
    "include": [
        {"class": "dog", "count": 2},
        {"class": "cat", "count": 1, "position": ["left of", 0]},
    ]
}
RED_BESIDE = {
    "include": [
        {"class": "dog", "count": 1},
        {"class": "car", "count": 1, "color": "red", "position": ["above", 0]},
    ],
}
ROW = {
    "include": [
        {"class": "dog", "count": 1},
        {"class": "cat", "count": 1, "position": ["left of", 0]},
        {"class": "cup", "count": 1, "position": ["above", 1]},
    ]
}


@pytest.mark.parametrize(
    ("entry", "detections", "expected"),
    [
        (CAT_BY_DOG, [an("dog", 60), an("cat", 20)], (1, 1)),
        (CAT_BY_DOG, [an("dog", 20), an("cat", 60)], (0, 2 / 3)),
        (CAT_BY_DOG, [an("dog", 53), an("cat", 50)], (0, 2 / 3)),
        (CAT_BY_DOG, [an("dog", 50, 60), an("cat", 50, 20)], (0, 2 / 3)),
        (CAT_BY_DOG, [an("cat", 20)], (0, 1 / 3)),
        (CAT_BY_DOG, [an("dog", 60)], (0, 1 / 3)),
        (CAT_BY_DOG, [], (0, 0)),
        (CAT_BY_DOG, [an("dog", 60), an("dog", 70, score=0.5), an("cat", 20)], (1, 1 / 3)),
        (CAT_BY_DOG, [an("dog", 60), an("cat", 20), an("cat", 90, score=0.5)], (1, 1 / 3)),
        (CAT_BY_DOG, [an("dog", 60), an("cat", 20, score=0.5), an("cat", 90)], (0, 1 / 3)),
        (TWO_CATS, [an("dog", 80), an("cat", 20), an("cat", 40)], (1, 1)),
        (TWO_CATS, [an("dog", 30), an("cat", 10), an("cat", 60)], (0, 2 / 3)),
        (TWO_CATS, [an("dog", 80), an("cat", 20)], (0, 0.5)),
        (TWO_DOGS, [an("dog", 60), an("dog", 80), an("cat", 20)], (1, 1)),
        (TWO_DOGS, [an("dog", 60), an("dog", 10), an("cat", 30)], (0, 2 / 3)),
        (RED_BESIDE, [an("dog", 50, 60), an("car", 50, 20, color="red")], (1, 1)),
        (RED_BESIDE, [an("dog", 50, 20), an("car", 50, 60, color="red")], (0, 3 / 4)),
        (RED_BESIDE, [an("dog", 50, 60), an("car", 50, 20, color="blue")], (0, 2 / 4)),
        (RED_BESIDE, [an("dog", 50, 60)], (0, 1 / 4)),
        (ROW, [an("dog", 60), an("cat", 20), an("cup", 20, 10)], (1, 1)),
        (ROW, [an("dog", 20), an("cat", 60), an("cup", 60, 10)], (0, 3 / 5)),
    ],
)
def test_a_position_must_hold_for_all_pairs_of_objects(entry, detections, expected):
    assert verdict(entry, detections) == pytest.approx(expected)


# metadata


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({}, 'no "include"'),
        ({"text": "OPEN"}, 'no "include"'),
        ({"include": []}, 'no "include"'),
        ({"include": [{"class": "cup"}]}, 'a clause without "count"'),
        ({"include": [{"count": 1}]}, 'a clause without "class"'),
        ({"include": [{"class": "cup", "count": 0}]}, "the count 0"),
        ({"include": [{"class": "cup", "count": "2"}]}, "the count '2'"),
        (
            {"include": [{"class": "cup", "count": 1, "color": "crimson"}]},
            "the color 'crimson', which is not one of red",
        ),
        (
            {"include": [{"class": "cup", "count": 1, "position": ["beside", 0]}]},
            "the position ['beside', 0], which is not one of left of",
        ),
        (
            {"include": [{"class": "cup", "count": 1, "position": ["above", 0]}]},
            "a position relative to clause 0, which is not an earlier one",
        ),
        (
            {"include": [{"class": "cup", "count": 1, "position": ["above"]}]},
            "the position ['above'], which is not one of",
        ),
        (
            {"include": ONE_DOG["include"], "exclude": [{"class": "cup"}]},
            'a clause without "count"',
        ),
    ],
)
def test_metadata_without_geneval_s_fields_is_an_error(entry, problem):
    with pytest.raises(RunError) as error:
        read_spec("two cups", entry)
    assert f"in the prompt file, 'two cups' has {problem}" in str(error.value)
    assert '"include": [{"class": "cup", "count": 2}]' in str(error.value)


def test_fields_that_are_null_are_ignored():
    clause = {"class": "dog", "count": 1, "color": None, "position": None}
    assert read_spec("a dog", {"include": [clause], "exclude": None}) == read_spec("a dog", ONE_DOG)


COCO = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra,
giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite,
baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup,
fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza,
donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote,
keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors,
teddy bear, hair drier, toothbrush
"""
VOC = {
    **{
        "motorcycle": "motorbike",
        "airplane": "aeroplane",
        "couch": "sofa",
        "potted plant": "pottedplant",
    },
    **{"dining table": "diningtable", "tv": "tvmonitor"},
}


def test_both_spellings_of_coco_classes_become_those_of_geneval():
    names = COCO.strip().replace("\n", " ").split(", ")
    longer = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
    expected = [longer.get(name, name) for name in names]
    assert len(set(expected)) == 80
    for spelled in (names, [VOC.get(name, name) for name in names]):
        assert [SPELLING.get(name, name) for name in spelled] == expected


# detection by small models of the real classes

NAMES = {0: "person", 1: "sofa", 2: "mouse", 3: "cup"}


def random_mask2former(folder: Path) -> str:
    """Sees a sofa with each of six queries, all with a score near a half."""
    torch.manual_seed(0)
    swin = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    sizes = {
        "feature_size": 32,
        "mask_feature_size": 32,
        "hidden_dim": 32,
        "dim_feedforward": 32,
        "encoder_feedforward_dim": 32,
    }
    layers = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 6}
    model = Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(backbone_config=swin, id2label=NAMES, **sizes, **layers)
    )
    model.class_predictor.bias.data[1] = 8
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return str(folder)


def random_yolos(folder: Path) -> str:
    """Sees five mice."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    config = YolosConfig(
        image_size=[64, 64], patch_size=16, num_detection_tokens=5, id2label=NAMES, **sizes
    )
    model = YolosForObjectDetection(config)
    model.class_labels_classifier.layers[-1].bias.data[2] = 8
    model.save_pretrained(folder)
    YolosImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}).save_pretrained(folder)
    return str(folder)


def random_detr(folder: Path) -> str:
    """Sees four people."""
    torch.manual_seed(0)
    resnet = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8] * 4,
        depths=[1] * 4,
        layer_type="basic",
        out_features=["stage4"],
    )
    heads = {
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
    }
    config = DetrConfig(
        backbone_config=resnet,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        num_queries=4,
        id2label=NAMES,
        **heads,
    )
    model = DetrForObjectDetection(config)
    model.class_labels_classifier.bias.data[0] = 8
    model.save_pretrained(folder)
    DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}).save_pretrained(folder)
    return str(folder)


def random_color_clip(folder: Path) -> str:
    """A CLIP that reads letters, enough of them for the sentences about colours."""
    torch.manual_seed(0)
    tokenizer, text = random_clip()
    tokenizer.model_max_length = text.max_position_embeddings = 77
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = CLIPConfig(
        text_config=text.to_dict(),
        vision_config={"image_size": 32, "patch_size": 8, **sizes},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    makers = {
        "mask2former": random_mask2former,
        "yolos": random_yolos,
        "detr": random_detr,
        "clip": random_color_clip,
    }
    return {name: make(folder / name) for name, make in makers.items()}


def noise(count: int, height: int = 80, width: int = 96) -> torch.Tensor:
    return (
        torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))
        .mul(255)
        .round()
        / 255
    )


@pytest.mark.parametrize(
    ("kind", "name", "count"),
    [("mask2former", "couch", 6), ("yolos", "computer mouse", 5), ("detr", "person", 4)],
)
def test_detectors_find_named_objects_in_pixels_of_the_picture(paths, kind, name, count):
    for detections in Detector(paths[kind], "key")(to_pil(noise(3)), CPU):
        assert [d.name for d in detections] == [name] * count
        for d in detections:
            x1, y1, x2, y2 = d.box
            assert -1 <= x1 < x2 <= 97
            assert -1 <= y1 < y2 <= 81
            assert 0.3 < d.score <= 1
            assert (d.mask is not None) == (kind == "mask2former")


@pytest.mark.parametrize("kind", ["mask2former", "yolos", "detr"])
def test_detections_do_not_depend_on_the_images_per_pass(paths, kind, monkeypatch):
    detect, pictures = Detector(paths[kind], "key"), to_pil(noise(5))
    together = detect(pictures, CPU)
    monkeypatch.setattr(objects, "IMAGES_PER_PASS", 2)
    for few, all_of_them in zip(detect(pictures, CPU), together, strict=True):
        for d, same in zip(few, all_of_them, strict=True):
            assert d.score == pytest.approx(same.score, abs=1e-4)
            assert d.box == pytest.approx(same.box, abs=1)


def test_a_mask_has_the_size_of_the_image_and_a_box_around_it(paths):
    for d in Detector(paths["mask2former"], "key")(to_pil(noise(1)), CPU)[0]:
        assert d.mask is not None
        assert (d.mask.shape, d.mask.dtype) == ((80, 96), torch.bool)
        rows, columns = d.mask.any(1).nonzero().flatten(), d.mask.any(0).nonzero().flatten()
        assert d.box == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)


def segments(*queries: tuple[int, tuple[int, int, int, int]]) -> list[Detection]:
    """Mask2Former's results for queries of a class and a rectangle on an 8 x 8 grid, at 64 x 64."""
    labels, masks = (
        torch.full((1, len(queries), 5), -10.0),
        torch.full((1, len(queries), 8, 8), -20.0),
    )
    for i, (label, (x1, y1, x2, y2)) in enumerate(queries):
        labels[0, i, label] = 10
        masks[0, i, y1:y2, x1:x2] = 20
    outputs = SimpleNamespace(class_queries_logits=labels, masks_queries_logits=masks)
    processor = Mask2FormerImageProcessor()
    result = processor.post_process_instance_segmentation(
        outputs, threshold=0.3, target_sizes=[(64, 64)], return_binary_maps=True
    )
    return read_segments(result[0], NAMES)


def test_masks_that_overlap_stay_whole():
    by_name = {d.name: d for d in segments((3, (2, 1, 6, 4)), (0, (0, 2, 8, 8)), (4, (0, 0, 8, 8)))}
    assert set(by_name) == {"cup", "person"}
    assert by_name["cup"].box == pytest.approx((16, 8, 48, 32), abs=1)
    assert by_name["person"].box == pytest.approx((0, 16, 64, 64), abs=1)
    for d in by_name.values():
        assert d.mask is not None
        assert d.mask[18:30, 18:46].all()  # where both are
        assert d.score > 0.95


def test_no_segments_are_no_detections():
    assert segments((4, (0, 0, 8, 8)), (4, (0, 0, 4, 4))) == []
    with_empty_mask = segments((3, (0, 0, 0, 0)), (0, (0, 0, 4, 4)))
    assert [d.name for d in with_empty_mask] == ["person"]


def test_boxes_are_read_with_their_names_and_scores():
    logits = torch.tensor([[[0.0, 0, 0, 9, 0], [9.0, 0, 0, 0, 0], [0.0, 0, 0, 0, 9]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.5, 0.25], [0.25, 0.25, 0.5, 0.5], [0.5, 0.5, 1, 1]]])
    outputs = SimpleNamespace(logits=logits, pred_boxes=boxes)
    result = DetrImageProcessor().post_process_object_detection(
        outputs, threshold=0.3, target_sizes=[(80, 96)]
    )[0]
    objects = read_boxes(result, NAMES)
    assert [d.name for d in objects] == ["cup", "person"]
    assert [d.box for d in objects] == [
        pytest.approx((24, 30, 72, 50)),
        pytest.approx((0, 0, 48, 40)),
    ]
    assert all(d.score > 0.99 and d.mask is None for d in objects)


# colours


def cup(box: Box, mask: torch.Tensor | None = None) -> Detection:
    """A detection where only the box and the mask matter."""
    return Detection(name="cup", score=1, box=box, mask=mask)


def test_a_crop_is_the_box_and_grey_outside_the_mask():
    picture = to_pil(noise(1, 20, 30))[0]
    mask = torch.zeros(20, 30, dtype=torch.bool)
    mask[4:10, 5:8] = mask[8:10, 5:15] = True
    pixels, cut = (
        np.asarray(picture)[4:10, 5:15],
        np.asarray(crop(picture, cup((5, 4, 15, 10), mask))),
    )
    inside = mask[4:10, 5:15].numpy()
    assert (cut[inside] == pixels[inside]).all()
    assert (cut[~inside] == 0x99).all()
    assert (np.asarray(crop(picture, cup((5, 4, 15, 10)))) == pixels).all()


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((4.6, 3.6, 15.4, 10.4), (5, 4, 15, 10)),
        ((-3, -2, 40, 50), (0, 0, 30, 20)),
        ((10, 5, 10.2, 5.3), (10, 5, 11, 6)),
    ],
)
def test_a_crop_is_whole_pixels_of_the_picture_at_least_one(box, expected):
    picture = to_pil(noise(1, 20, 30))[0]
    assert (np.asarray(crop(picture, cup(box))) == np.asarray(picture.crop(expected))).all()


def test_directions_of_colours_are_means_of_three_sentences(paths):
    namer = ColorNamer(paths["clip"], "key")
    directions = namer.directions("cup")
    assert directions.shape == (10, 16)
    for color, direction in zip(COLORS, directions, strict=True):
        sentences = [
            f"a photo of a {color} cup",
            f"a photo of a {color}-colored cup",
            f"a photo of a {color} object",
        ]
        tokens = [namer.tokenizer(sentence, return_tensors="pt") for sentence in sentences]
        features = [
            normalize(namer.model.get_text_features(**t).pooler_output[0], dim=0) for t in tokens
        ]
        torch.testing.assert_close(direction, normalize(sum(features), dim=0))
    assert not torch.allclose(directions, namer.directions("dog"))


def test_a_colour_is_the_direction_nearest_to_the_picture(paths):
    namer = ColorNamer(paths["clip"], "key")
    crops = [*to_pil(noise(2, 40, 24)), Image.new("RGB", (5, 60), "red")]
    colors = namer(crops, ["cup", "dog", "cup"], CPU)
    for picture, name, color in zip(crops, ["cup", "dog", "cup"], colors, strict=True):
        feature = namer.model.get_image_features(
            namer.processor(images=picture, return_tensors="pt").pixel_values
        ).pooler_output
        cosines = torch.nn.functional.cosine_similarity(namer.directions(name), feature)
        assert COLORS[cosines.argmax()] == color
    assert namer([], [], CPU) == []


def test_a_clip_of_four_colours_names_those_of_painted_shapes(monkeypatch):
    monkeypatch.setattr(objects, "COLORS", tuple(scenes.COLOURS))
    monkeypatch.setattr(objects, "TEMPLATES", ("a {color} {name}",))
    rng = np.random.default_rng(0)
    things = [scenes.draw_scene(scenes.draw_caption(rng, "colors"), rng)[0] for _ in range(20)]
    crops = []
    for thing, picture in zip(
        things, to_pil(scenes.render([[thing] for thing in things])), strict=True
    ):
        x, y, half = (64 * share for share in (thing.x, thing.y, thing.size))
        crops.append(
            crop(
                picture,
                cup((x - 2 * half, y - 2 * half, x + 2 * half, y + 2 * half)),
            )
        )
    named = ColorNamer(BUNDLED_CLIP, "key")(crops, [str(thing.shape) for thing in things], CPU)
    assert [thing.colour for thing in things] == named


# the rewards

SIX = {"include": [{"class": "couch", "count": 6}]}
FOUR = {"include": [{"class": "couch", "count": 4}]}


@pytest.fixture
def rewards(paths) -> tuple[GenEval, GenEvalGraded]:
    models = paths["mask2former"], paths["clip"]
    return GenEval(*models), GenEvalGraded(*models)


def passes(reward: GenEval) -> list[int]:
    """How many pictures each forward of the detector saw, from now on."""
    batch_sizes: list[int] = []
    reward.scorer.detector.model.register_forward_hook(
        lambda model, inputs, outputs: batch_sizes.append(len(outputs[0]))
    )
    return batch_sizes


def test_each_image_is_scored_by_its_own_metadata(rewards):
    metadata = [
        SIX,
        FOUR,
        {**SIX, "tag": "counting"},
        {**SIX, "exclude": [{"class": "couch", "count": 6}]},
    ]
    strict, dense = (reward(noise(4), ["couches"] * 4, metadata) for reward in rewards)
    assert strict.tolist() == [1, 1, 0, 0]
    assert dense.tolist() == [1, 0.5, 0, 1]


def test_colours_are_named_for_the_most_confident_objects_only(rewards):
    reward = rewards[0]
    spec = {"include": [{"class": "couch", "count": 2, "color": "red"}]}
    counts: list[int] = []
    reward.scorer.color_namer.model.vision_model.register_forward_hook(
        lambda model, inputs, out: counts.append(len(out[0]))
    )
    reward(noise(2) * 0.9, ["red couches", "couches"], [spec, SIX])
    assert counts == [2]
    named = ColorNamer(reward.clip, "key")
    picture = to_pil(noise(1) * 0.9)[0]
    surest = sorted(reward.scorer.detector([picture], CPU)[0], key=lambda d: -d.score)[:2]
    colors = named([crop(picture, d) for d in surest], ["couch"] * 2, CPU)
    of_this_color = {"include": [{"class": "couch", "count": 1, "color": colors[0]}]}
    other = {
        "include": [
            {"class": "couch", "count": 1, "color": next(c for c in COLORS if c != colors[0])}
        ]
    }
    scores = reward(noise(1).expand(2, -1, -1, -1) * 0.9, ["", ""], [of_this_color, other])
    assert scores.tolist() == [1, 0]


def test_two_rewards_share_their_models_and_detections(rewards):
    strict, dense = rewards
    assert strict.scorer is dense.scorer
    batch_sizes = passes(strict)
    images = noise(3, 64, 64)
    strict(images, [""] * 3, [SIX] * 3)
    dense(images, [""] * 3, [SIX] * 3)
    strict(images, [""] * 3, [SIX] * 3)
    assert batch_sizes == [3]
    dense(images, [""] * 3, [FOUR] * 3)
    assert batch_sizes == [3, 3]
    dense(images.flip(0), [""] * 3, [FOUR] * 3)
    assert batch_sizes == [3, 3, 3]


def test_a_failed_batch_is_not_cached(rewards):
    images = noise(1, 72, 64)
    with pytest.raises(RunError):
        rewards[0](images, ["a cup"], [{}])
    assert rewards[0](images, ["couches"], [SIX]).tolist() == [1]


def test_errors_of_the_prompt_file_reach_the_user(rewards):
    reward = make_reward("geneval", rewards[0])
    with pytest.raises(
        RunError, match=r"rewards\.geneval: in the prompt file, 'a red circle' has no .include."
    ):
        reward(noise(2), ["couches", "a red circle"], [SIX, {}])
    with pytest.raises(
        RunError,
        match=r"'mice' asks for 'computer mice', which the detector .* Write computer mouse",
    ):
        reward(noise(1), ["mice"], [{"include": [{"class": "computer mice", "count": 2}]}])
    with pytest.raises(
        RunError,
        match=r"'xyz', which the detector does not know\. Write one of COCO's classes",
    ):
        reward(noise(1), ["?"], [{**SIX, "exclude": [{"class": "xyz", "count": 2}]}])


def test_a_configuration_loads_both(paths):
    settings = {"detector": paths["yolos"], "clip": paths["clip"]}
    module = "flowalign.rewards.geneval"
    both = load_rewards(
        {f"{module}:GenEval": {"weight": 0.5, **settings}, f"{module}:GenEvalGraded": settings}
    )
    mice = {"tag": "counting", "include": [{"class": "computer mouse", "count": 4}]}
    assert [reward(noise(1), ["four mice"], [mice]).tolist() for reward in both] == [[1], [0.75]]
    assert [reward.traits.range for reward in both] == [(0, 1), (-14, 1)]


@pytest.mark.parametrize("key", ["detector", "clip"])
def test_a_missing_model_is_named_by_its_key(paths, key):
    models = {"detector": paths["yolos"], "clip": paths["clip"]} | {key: "./nowhere"}
    with pytest.raises(UserError, match=rf"rewards\.geneval\.{key}: there is no folder ./nowhere"):
        GenEval(**models)
