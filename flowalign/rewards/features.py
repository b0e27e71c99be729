"""Features of pictures: a frozen image backbone of transformers, behind a preprocessing that gradients pass through."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel
from transformers.image_utils import SizeDict

from flowalign import distributed
from flowalign.bundled import ASSETS
from flowalign.errors import RunError, UserError
from flowalign.models.hub import pretrained
from flowalign.rewards.reference_pictures import as_images, read_picture

TINY = str(ASSETS / "tiny-clip")
"""Trained on pictures of coloured shapes, 64 pixels on a side."""
LARGEST = 128
IMAGES_AT_ONCE = 32


def check_world(path: str, images: Tensor, key: str) -> None:
    """RunError where the bundled CLIP would judge pictures of another world than its own."""
    height, width = images.shape[-2:]
    if path == TINY and max(height, width) > LARGEST:
        raise RunError(
            f"{key} is the bundled CLIP, which knows coloured shapes of 64 pixels; the pictures have {width} x {height}. "
            f"Name another, for example {key.rpartition('.')[2]}: openai/clip-vit-large-patch14."
        )


class Tower:
    """What AutoModel opens that sees pictures: DINOv2 or 3, SigLIP, ViT, or the image side of a CLIP; in float32.

    A call takes images (B, 3, H, W) in [0, 1] of any size and returns unit vectors (B, width), on this process's device.
    """

    def __init__(self, path: str, key: str, size: int = 0):
        """`size`: the side of the square the backbone sees, for backbones that take several; 0 for what its processor says."""
        self.device = distributed.device()
        self.path, self.key, self.size = path, key, size
        self.processor: Any = pretrained(AutoImageProcessor, key, path)
        settings = {"dtype": torch.float32, "output_loading_info": True}
        model, found = pretrained(AutoModel, key, path, **settings)
        if missing := sorted(found["missing_keys"]):
            raise UserError(
                f"{key}: {path} lacks {missing[0]}, which would be drawn at random; choose another backbone."
            )
        self.model: Any = model.eval().requires_grad_(False).to(self.device)
        has_text_too = "vision_config" in model.config.sub_configs
        self.encode = model.get_image_features if has_text_too else model
        try:
            self.width = self(torch.full((1, 3, 64, 64), 0.5)).shape[1]
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(
                f"{key}: {path} does not make one vector of a picture: {error}"
            ) from error

    def __call__(self, images: Tensor) -> Tensor:
        """Differentiable. RunError where the bundled CLIP is shown large pictures."""
        check_world(self.path, images, self.key)
        pixels = self.pixels(images.to(self.device, self.model.dtype))
        return F.normalize(self.encode(pixel_values=pixels).pooler_output.flatten(1), dim=1)

    def pixels(self, images: Tensor) -> Tensor:
        """What the processor makes of a file: resized, cut to the middle, normalised. Its methods take tensors of any range."""
        processor = self.processor
        resized, cut = processor.size, processor.crop_size if processor.do_center_crop else None
        if self.size:
            resized, cut = (
                SizeDict(shortest_edge=self.size),
                SizeDict(height=self.size, width=self.size),
            )
        images = processor.resize(images, resized, processor.resample).clamp(0, 1)
        images = processor.center_crop(images, cut) if cut else images
        return processor.normalize(images, processor.image_mean, processor.image_std)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """As a call, a part at a time and without a gradient."""
        return torch.cat([self(part) for part in images.split(IMAGES_AT_ONCE)])

    @torch.no_grad()
    def embed_files(self, files: list[Path], key: str) -> Tensor:
        """Of pictures of any sizes. UserError names a file that is none."""
        return torch.cat([self(as_images(read_picture(file, key))) for file in files])
