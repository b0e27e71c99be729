"""Image features: a frozen backbone of transformers behind a differentiable preprocessing."""

from pathlib import Path

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

BUNDLED_CLIP = str(ASSETS / "tiny-clip")
"""A CLIP that was trained on images of coloured shapes, 64 pixels on a side."""
BUNDLED_CLIP_LIMIT = 128
"""The largest side of images that the bundled CLIP scores, in pixels."""
IMAGES_PER_PASS = 32


def check_bundled_size(path: str, images: Tensor, key: str) -> None:
    """Raise RunError if the bundled CLIP is given images larger than those of its world.

    It would score photographs without complaint, and the scores would mean nothing.
    """
    height, width = images.shape[-2:]
    if path == BUNDLED_CLIP and max(height, width) > BUNDLED_CLIP_LIMIT:
        raise RunError(
            f"{key} is the bundled CLIP, which knows coloured shapes of 64 pixels; the images have "
            f"{width} x {height}. Use another model, for example "
            f"{key.rpartition('.')[2]}: openai/clip-vit-large-patch14."
        )


class Backbone:
    """An image model of AutoModel, in float32: DINOv2 or 3, SigLIP, ViT, a CLIP's image side."""

    def __init__(self, path: str, key: str, size: int = 0):
        """Load the model onto this rank's device.

        `size` is the side of the square that the backbone sees, for backbones that take several;
        0 uses the processor's. Raises UserError if the model cannot be loaded or has no features.
        """
        self.device = distributed.device()
        self.path, self.key, self.size = path, key, size
        self.processor = pretrained(AutoImageProcessor, key, path)
        settings = {"dtype": torch.float32, "output_loading_info": True}
        model, report = pretrained(AutoModel, key, path, **settings)
        missing = sorted(report["missing_keys"])
        if missing:
            raise UserError(
                f"{key}: {path} has no weights for {missing[0]}, which would be random. "
                "Choose another backbone."
            )
        self.model = model.eval().requires_grad_(False).to(self.device)
        has_text_side = "vision_config" in model.config.sub_configs
        # A CLIP's own call needs texts too.
        self.encode = model.get_image_features if has_text_side else model
        self.width = self._measure_width()

    def _measure_width(self) -> int:
        try:
            return self(torch.full((1, 3, 64, 64), 0.5)).shape[1]
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.key}: {self.path} does not turn an image into one vector ({error}). "
                "Choose another backbone."
            ) from error

    def __call__(self, images: Tensor) -> Tensor:
        """Return unit vectors (B, width) of images (B, 3, H, W) in [0, 1], with gradient."""
        check_bundled_size(self.path, images, self.key)
        pixels = self.pixels(images.to(self.device, self.model.dtype))
        return F.normalize(self.encode(pixel_values=pixels).pooler_output.flatten(1), dim=1)

    def pixels(self, images: Tensor) -> Tensor:
        """Resize, center-crop and normalise as the processor does, but with gradient."""
        processor = self.processor
        if self.size:
            resized = SizeDict(shortest_edge=self.size)
            cropped = SizeDict(height=self.size, width=self.size)
        else:
            resized = processor.size
            cropped = processor.crop_size if processor.do_center_crop else None
        # The processor's own methods, which take tensors of any range; its call would detach them.
        images = processor.resize(images, resized, processor.resample).clamp(0, 1)
        images = processor.center_crop(images, cropped) if cropped else images
        return processor.normalize(images, processor.image_mean, processor.image_std)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Return unit vectors (B, width), in passes and without gradient."""
        return torch.cat([self(part) for part in images.split(IMAGES_PER_PASS)])

    @torch.no_grad()
    def embed_files(self, files: list[Path], key: str) -> Tensor:
        """Return unit vectors of image files. Raises UserError if one is not an image."""
        return torch.cat([self(as_images(read_picture(file, key))) for file in files])
