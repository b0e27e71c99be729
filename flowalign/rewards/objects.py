"""Objects in pictures: found by a detector of transformers, their colours named by CLIP."""

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
"""COCO's classes as GenEval spells them: three are longer there, and six have Pascal VOC's names in Mask2Former's checkpoint."""
SURE = 0.3
"""What the score of a detection must exceed."""
PER_PASS = 8
"""Pictures detected at a time."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Detection:
    """An object found in a picture."""

    name: str
    score: float
    box: Box  # x1, y1, x2, y2 in pixels
    mask: Tensor | None = None  # (H, W), true where the object is
    color: str | None = None  # None where nobody asked


class Detector:
    """Finds objects in pictures: Mask2Former, with masks, or any object detector of transformers, without."""

    def __init__(self, path: str, key: str) -> None:
        has_masks = pretrained(AutoConfig, key, path).model_type == "mask2former"
        kind = Mask2FormerForUniversalSegmentation if has_masks else AutoModelForObjectDetection
        self.model = pretrained(kind, key, path).eval().requires_grad_(False)
        self.processor = pretrained(AutoImageProcessor, key, path)
        self.names = {
            label: SPELLING.get(str(name), str(name))
            for label, name in self.model.config.id2label.items()
        }
        if has_masks:
            self.post_process = partial(
                self.processor.post_process_instance_segmentation, return_binary_maps=True
            )
        else:
            self.post_process = self.processor.post_process_object_detection
        self.read = read_segments if has_masks else read_boxes

    def __call__(self, pictures: list[Image.Image], device: torch.device) -> list[list[Detection]]:
        self.model.to(device)
        passes = [pictures[i : i + PER_PASS] for i in range(0, len(pictures), PER_PASS)]
        return [
            self.read(result, self.names)
            for some in passes
            for result in self._results(some, device)
        ]

    def _results(self, pictures: list[Image.Image], device: torch.device) -> list[dict[str, Any]]:
        outputs = self.model(**self.processor(images=pictures, return_tensors="pt").to(device))
        with device:  # where post-processing makes the tensor that it indexes with masks
            return self.post_process(
                outputs, threshold=SURE, target_sizes=[(p.height, p.width) for p in pictures]
            )


def read_segments(result: dict[str, Any], names: dict[int, str]) -> list[Detection]:
    """Detections of a result of instance segmentation; a box ends after the mask's last pixel, as in mmdet."""
    segments = result["segments_info"]
    masks = (
        result["segmentation"].bool().cpu() if segments else ()
    )  # without segments it is one map of -1
    boxes = [_around(mask.nonzero()) for mask in masks]
    found = zip(segments, masks, boxes, strict=True)
    return [
        Detection(names[segment["label_id"]], segment["score"], box, mask)
        for segment, mask, box in found
    ]


def _around(pixels: Tensor) -> Box:
    (top, left), (bottom, right) = pixels.min(0).values.tolist(), pixels.max(0).values.tolist()
    return left, top, right + 1, bottom + 1


def read_boxes(result: dict[str, Any], names: dict[int, str]) -> list[Detection]:
    """Detections of a result of object detection."""
    found = zip(*(result[key].tolist() for key in ("labels", "scores", "boxes")), strict=True)
    return [
        Detection(names[label], score, (x1, y1, x2, y2)) for label, score, (x1, y1, x2, y2) in found
    ]


def crop(picture: Image.Image, detection: Detection) -> Image.Image:
    """The box of a detection as far as it lies in the picture, grey (#999) outside the mask."""
    if detection.mask is not None:
        grey = Image.new("RGB", picture.size, "#999")
        picture = Image.composite(picture, grey, Image.fromarray(detection.mask.numpy()))
    limits = (*picture.size, *picture.size)
    left, top, right, bottom = (
        min(max(round(edge), 0), limit) for edge, limit in zip(detection.box, limits, strict=True)
    )
    return picture.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


class ColorNamer:
    """Names colours of objects: of ten the one whose sentences about the class are nearest to the crop in CLIP."""

    def __init__(self, path: str, key: str) -> None:
        self.model = pretrained(CLIPModel, key, path).eval().requires_grad_(False)
        self.tokenizer = pretrained(AutoTokenizer, key, path)
        self.processor = pretrained(CLIPImageProcessor, key, path)

    def __call__(
        self, crops: list[Image.Image], names: list[str], device: torch.device
    ) -> list[str]:
        if not crops:
            return []
        self.model.to(device)
        pixels = self.processor(images=crops, return_tensors="pt").pixel_values.to(device)
        pictures = self.model.get_image_features(pixels).pooler_output
        directions = {name: self.directions(name) for name in set(names)}
        return [
            COLORS[int((directions[name] @ picture).argmax())]
            for name, picture in zip(names, pictures, strict=True)
        ]

    def directions(self, name: str) -> Tensor:
        """Where CLIP puts each colour of a class: the mean over the templates, (10, D), of length 1."""
        texts = [
            template.format(color=color, name=name) for color in COLORS for template in TEMPLATES
        ]
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(
            self.model.device
        )
        sentences = normalize(self.model.get_text_features(**tokens).pooler_output, dim=1)
        return normalize(rearrange(sentences, "(c t) d -> c t d", c=len(COLORS)).mean(1), dim=1)
