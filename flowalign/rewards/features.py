"""Features of pictures: a frozen image backbone of transformers, behind a preprocessing that gradients pass through."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor
from transformers import AutoImageProcessor, AutoModel
from transformers.image_utils import SizeDict

from flowalign import processes
from flowalign.errors import UserError
from flowalign.hub import pretrained

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
IMAGES_AT_ONCE = 32


class Tower:
    """What AutoModel opens that sees pictures: DINOv2 or 3, SigLIP, ViT, or the image side of a CLIP; in float32.

    A call takes images (B, 3, H, W) in [0, 1] of any size and returns unit vectors (B, width), on this process's device.
    """

    def __init__(self, path: str, key: str, size: int = 0):
        """`size`: the side of the square the backbone sees, for backbones that take several; 0 for what its processor says."""
        self.device = processes.device()
        self.size = size
        self.processor: Any = pretrained(AutoImageProcessor, key, path)
        settings = {"dtype": torch.float32, "output_loading_info": True}
        model, found = pretrained(AutoModel, key, path, **settings)
        if missing := sorted(found["missing_keys"]):
            raise UserError(f"{key}: {path} lacks {missing[0]}, which would be drawn at random; choose another backbone.")
        self.model: Any = model.eval().requires_grad_(False).to(self.device)
        has_text_too = "vision_config" in model.config.sub_configs
        self.encode = model.get_image_features if has_text_too else model
        try:
            self.width = self(torch.full((1, 3, 64, 64), 0.5)).shape[1]
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f"{key}: {path} does not make one vector of a picture: {error}") from error

    def __call__(self, images: Tensor) -> Tensor:
        """Differentiable."""
        pixels = self.pixels(images.to(self.device, self.model.dtype))
        return F.normalize(self.encode(pixel_values=pixels).pooler_output.flatten(1), dim=1)

    def pixels(self, images: Tensor) -> Tensor:
        """What the processor makes of a file: resized, cut to the middle, normalised. Its methods take tensors of any range."""
        processor = self.processor
        resized, cut = processor.size, processor.crop_size if processor.do_center_crop else None
        if self.size:
            resized, cut = SizeDict(shortest_edge=self.size), SizeDict(height=self.size, width=self.size)
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
        return torch.cat([self(read_picture(file, key)[None]) for file in files])


def picture_files(pictures: Any, key: str) -> list[Path]:
    """The pictures of a folder and its folders, by name, or those of a list. UserError when there are none."""
    named = [pictures] if isinstance(pictures, str) else pictures
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise UserError(f"{key} is {pictures!r}; write a folder, or a list of picture files.")
    files = []
    for place in map(Path, named):
        if not place.exists():
            raise UserError(f"{key}: there is no file or folder {place}.")
        files += sorted(f for f in place.rglob("*") if f.suffix.lower() in SUFFIXES) if place.is_dir() else [place]
    if not files:
        raise UserError(f"{key}: {pictures} has no pictures; their names end in {', '.join(sorted(SUFFIXES))}.")
    return files


def read_picture(file: Path, key: str) -> Tensor:
    """(3, H, W) in [0, 1], turned as its camera says."""
    try:
        return pil_to_tensor(ImageOps.exif_transpose(Image.open(file)).convert("RGB")) / 255
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{key}: {file} is no picture: {error}") from error
