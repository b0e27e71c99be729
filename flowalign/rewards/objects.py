"""Detect objects in images with a detector of transformers, and name their colours with CLIP."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPModel,
    Mask2FormerForUniversalSegmentation,
)

from flowalign.models.hub import pretrained

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)
SPELLING = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
"""COCO's classes in GenEval's spelling.

Three are longer in GenEval, and six have the names of Pascal VOC in Mask2Former's checkpoint.
"""
MIN_SCORE = 0.3
"""The score that a detection must exceed."""
IMAGES_PER_PASS = 8

Box = tuple[float, float, float, float]
Result = dict[str, Any]
"""A processor's result for one image; its entries depend on the model."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Detection:
    """A detected object."""

    name: str
    score: float
    box: Box  # x1, y1, x2, y2 in pixels
    mask: Tensor | None = None  # (H, W), true where the object is
    color: str | None = None  # None if the prompt does not ask for a colour


class Detector:
    """Detects objects: Mask2Former, with masks, or any object detector of transformers, without."""

    def __init__(self, path: str, key: str) -> None:
        has_masks = pretrained(AutoConfig, key, path).model_type == "mask2former"
        kind = Mask2FormerForUniversalSegmentation if has_masks else AutoModelForObjectDetection
        self.model = pretrained(kind, key, path).eval().requires_grad_(False)
        self.processor = pretrained(AutoImageProcessor, key, path)
        labels = self.model.config.id2label.items()
        self.names = {label: SPELLING.get(str(name), str(name)) for label, name in labels}
        if has_masks:
            # One mask per object: in a single map, an object would hide those behind it.
            self.post_process = partial(
                self.processor.post_process_instance_segmentation, return_binary_maps=True
            )
        else:
            self.post_process = self.processor.post_process_object_detection
        self.read = read_segments if has_masks else read_boxes

    def __call__(self, pictures: list[Image.Image], device: torch.device) -> list[list[Detection]]:
        """Return the detections of each picture, in no particular order."""
        self.model.to(device)
        detections = []
        for start in range(0, len(pictures), IMAGES_PER_PASS):
            results = self._results(pictures[start : start + IMAGES_PER_PASS], device)
            detections += [self.read(result, self.names) for result in results]
        return detections

    def _results(self, pictures: list[Image.Image], device: torch.device) -> list[Result]:
        outputs = self.model(**self.processor(images=pictures, return_tensors="pt").to(device))
        sizes = [(picture.height, picture.width) for picture in pictures]
        # Post-processing makes a tensor on the default device and indexes it with masks.
        with device:
            return self.post_process(outputs, threshold=MIN_SCORE, target_sizes=sizes)


def read_segments(result: Result, names: dict[int, str]) -> list[Detection]:
    """Read a result of instance segmentation.

    A box ends after the mask's last pixel, as in mmdet.
    """
    segments = result["segments_info"]
    # Without segments, the result is one map of -1 instead of a stack of masks.
    masks = result["segmentation"].bool().cpu() if segments else ()
    boxes = [_around(mask.nonzero()) for mask in masks]
    rows = zip(segments, masks, boxes, strict=True)
    return [
        Detection(name=names[row["label_id"]], score=row["score"], box=box, mask=mask)
        for row, mask, box in rows
    ]


def _around(pixels: Tensor) -> Box:
    (top, left), (bottom, right) = pixels.min(0).values.tolist(), pixels.max(0).values.tolist()
    return left, top, right + 1, bottom + 1


def read_boxes(result: Result, names: dict[int, str]) -> list[Detection]:
    """Read a result of object detection."""
    columns = [result[key].tolist() for key in ("labels", "scores", "boxes")]
    rows = zip(*columns, strict=True)
    return [
        Detection(name=names[label], score=score, box=(x1, y1, x2, y2))
        for label, score, (x1, y1, x2, y2) in rows
    ]


def crop(picture: Image.Image, detection: Detection) -> Image.Image:
    """Cut out a detection's box, as far as it lies in the picture, with grey outside the mask."""
    if detection.mask is not None:
        # GenEval's grey, #999.
        grey = Image.new("RGB", picture.size, "#999")
        picture = Image.composite(picture, grey, Image.fromarray(detection.mask.numpy()))
    limits = (*picture.size, *picture.size)
    edges = zip(detection.box, limits, strict=True)
    left, top, right, bottom = (min(max(round(edge), 0), limit) for edge, limit in edges)
    return picture.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


class ColorNamer:
    """Names colours: the one of ten whose sentences are nearest to the crop in CLIP."""

    def __init__(self, path: str, key: str) -> None:
        self.model = pretrained(CLIPModel, key, path).eval().requires_grad_(False)
        self.tokenizer = pretrained(AutoTokenizer, key, path)
        self.processor = pretrained(CLIPImageProcessor, key, path)

    def __call__(
        self, crops: list[Image.Image], names: list[str], device: torch.device
    ) -> list[str]:
        """Return the colour of each crop of an object with that class name."""
        if not crops:
            return []
        self.model.to(device)
        pixels = self.processor(images=crops, return_tensors="pt").pixel_values.to(device)
        features = self.model.get_image_features(pixels).pooler_output
        directions = {name: self.directions(name) for name in set(names)}
        best = [
            (directions[name] @ feature).argmax()
            for name, feature in zip(names, features, strict=True)
        ]
        return [COLORS[int(index)] for index in best]

    def directions(self, name: str) -> Tensor:
        """Return unit vectors (10, D) of a class in each colour, averaged over the templates."""
        texts = []
        for color in COLORS:
            texts += [template.format(color=color, name=name) for template in TEMPLATES]
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        features = self.model.get_text_features(**tokens.to(self.model.device)).pooler_output
        sentences = rearrange(normalize(features, dim=1), "(c t) d -> c t d", c=len(COLORS))
        return normalize(sentences.mean(1), dim=1)
