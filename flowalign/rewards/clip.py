"""Rewards of the CLIP family: what a picture has in common with its prompt, or with another picture. Differentiable.

With e(·) a feature divided by its length,
    clip_score, hps = e(picture) · e(prompt)           pick_score = exp(logit_scale) e(picture) · e(prompt) / 26
    clip_image      = e(picture) · e(reference)        aesthetic  = w · e(picture) + b
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import functional as vision
from torchvision.transforms import InterpolationMode
from transformers import AutoTokenizer, BatchEncoding, CLIPConfig, CLIPImageProcessor, CLIPModel

from flowalign.errors import UserError
from flowalign.flow import PerImage
from flowalign.models.hub import pretrained
from flowalign.rewards.base import traits
from flowalign.rewards.features import check_world, TINY, Tower
from flowalign.rewards.reference_pictures import as_images, read_reference, reference_file
from flowalign.rewards.weights import affine, from_open_clip, read_weights, with_weights

VIT_L = "openai/clip-vit-large-patch14"
VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
WEIGHTS = (".pt", ".pth", ".bin", ".safetensors")
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass
class Clip:
    """What the rewards of this family share: features of pictures, with gradient, and of prompts, each encoded once."""

    path: str = TINY
    """A local folder or a hub repository; the bundled CLIP for pictures of the bundled world."""
    processor: str = ""
    """Where the tokenizer and the pictures' mean and deviation lie; with the model when empty."""
    dtype: Dtype = "float32"
    """Of the network; features are compared in float32."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        network, beside = self._network(), self.processor or self.path
        self.logit_scale: float = network.logit_scale.item()
        self.model: Any = network.to(getattr(torch, self.dtype)).eval().requires_grad_(False)
        self.size: int = network.config.vision_config.image_size
        processor = pretrained(CLIPImageProcessor, self._key("processor"), beside)
        self.mean, self.std = processor.image_mean, processor.image_std
        tokenizer = pretrained(AutoTokenizer, self._key("processor"), beside)
        self.tokens = Tokens(
            self.name, tokenizer, network.config.text_config.max_position_embeddings
        )
        self.texts = Remembered(self._encode)

    def pictures(self, images: Tensor) -> Tensor:
        """Features of length 1, (B, D)."""
        check_world(self.path, images, self._key("path"))
        self.model.to(images.device)
        return unit(self.model.get_image_features(self._pixels(images)).pooler_output)

    def cosine(self, images: Tensor, prompts: list[str]) -> PerImage:
        """Of every picture and its own prompt."""
        pictures = self.pictures(images)
        return (pictures * self.texts(prompts, images.device)).sum(1)

    def _network(self) -> Any:
        return pretrained(CLIPModel, self._key("path"), self.path, dtype=torch.float32)

    def _key(self, setting: str) -> str:
        return f"rewards.{self.name}.{setting}"

    def _fit(self, images: Tensor) -> Tensor:
        return crop(images, self.size)

    def _pixels(self, images: Tensor) -> Tensor:
        """What the processor does to PIL pictures, on tensors, so that gradients pass."""
        return normalised(self._fit(images), self.mean, self.std)

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Tensor:
        return unit(
            self.model.get_text_features(**self.tokens(prompts).to(self.model.device)).pooler_output
        )


@traits(range=(-1, 1))
@dataclass
class ClipScore(Clip):
    """Cosine of picture and prompt, in [-1, 1]; about 0.2 to 0.35 by openai/clip-vit-large-patch14.

    That model: 1.7 GB, MIT; the bundled CLIP, for pictures up to 128 pixels, takes little memory. The figure published
    as CLIPScore (arXiv 2104.08718) is 2.5 max(it, 0) of `{path: openai/clip-vit-base-patch32, prefix: "A photo depicts "}`.
    """

    prefix: str = ""
    """Written before every prompt."""
    name: ClassVar[str] = "clip_score"

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> PerImage:
        return self.cosine(images, [self.prefix + prompt for prompt in prompts])


@dataclass
class PickScore(Clip):
    """Which picture people pick (arXiv 2305.01569), divided by 26 as RL does; about 0.65 to 0.95.

    yuvalkirstain/PickScore_v1: 4 GB, licence: see its card; processor of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, MIT. Compare
    means only at equal resolution.
    """

    path: str = "yuvalkirstain/PickScore_v1"
    processor: str = VIT_H
    name: ClassVar[str] = "pick_score"

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> PerImage:
        return math.exp(self.logit_scale) * self.cosine(images, prompts) / 26


@traits(range=(-1, 1))
@dataclass
class HPSv2(Clip):
    """Human preference score v2.1 (arXiv 2306.09341): a cosine, in [-1, 1]; about 0.2 to 0.35.

    xswu/HPSv2: 4 GB, Apache-2.0; processor of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, MIT. Pictures are shown whole, on black
    where they are not square.
    """

    path: str = "xswu/HPSv2/HPS_v2.1_compressed.pt"
    """open_clip's weights in a local file or as owner/name/file on the hub, or a folder or repository of transformers."""
    processor: str = VIT_H
    """Also says how large the network is, when `path` is a file of weights."""
    name: ClassVar[str] = "hps"

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> PerImage:
        return self.cosine(images, prompts)

    def _network(self) -> Any:
        if not self.path.endswith(WEIGHTS):
            return super()._network()
        config = pretrained(CLIPConfig, self._key("processor"), self.processor)
        return with_weights(
            CLIPModel,
            config,
            from_open_clip(read_weights(self._key("path"), self.path)),
            self._key("path"),
        )

    def _fit(self, images: Tensor) -> Tensor:
        return pad(images, self.size)


@dataclass
class Aesthetic(Clip):
    """LAION's aesthetic score v2, from 1 to 10, mostly 5 to 7; the prompt plays no part, and it is easily hacked.

    openai/clip-vit-large-patch14, MIT, and sac+logos+ava1-l14-linearMSE.pth, Apache-2.0: 1.7 GB.
    """

    path: str = VIT_L
    head: str = "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth"
    """The published layers, in a local file or as owner/name/file on the hub."""
    name: ClassVar[str] = "aesthetic"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.weight, self.bias = affine(
            read_weights(self._key("head"), self.head), "layers.", self._key("head")
        )
        if (width := self.model.config.projection_dim) != len(self.weight):
            raise UserError(
                f"{self._key('head')}: {self.head} reads {len(self.weight)} numbers, and {self.path} makes {width} of a picture; "
                f"the published head belongs to {VIT_L}."
            )

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> PerImage:
        pictures = self.pictures(images)
        return pictures @ self.weight.to(pictures) + self.bias


@traits(range=(-1, 1))
@dataclass
class ClipImage:
    """Cosine of picture and reference picture (CLIP-I), in [-1, 1], mostly 0.5 to 0.95; not scored where that is null.

    The reference is the file that the prompt's field `ref_image` names. Memory and licence as of clip_score; facebook/dinov2-base
    (DINO-I): 0.35 GB, Apache-2.0.
    """

    path: str = TINY
    """The backbone: a local folder or a hub repository; the image side of the bundled CLIP for pictures of the bundled world."""

    def __post_init__(self) -> None:
        self.tower = Tower(self.path, "rewards.clip_image.path")
        self.references = Remembered(
            lambda files: torch.stack([self._read(file) for file in files])
        )

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> PerImage:
        files = [
            reference_file("clip_image", prompt, entry)
            for prompt, entry in zip(prompts, metadata, strict=True)
        ]
        return (self.tower(images) * self.references(files, self.tower.device)).sum(1)

    @torch.no_grad()
    def _read(self, file: str | None) -> Tensor:
        """The feature of the picture in a file; NaN without a file."""
        if file is None:
            return torch.full((self.tower.width,), math.nan, device=self.tower.device)
        return self.tower(as_images(read_reference("clip_image", file)))[0]


class Tokens:
    """Prompts as tokens, as many of each as the network reads; warns once when prompts are cut."""

    def __init__(self, name: str, tokenizer: Any, limit: int):
        self.name, self.tokenizer, self.limit, self.warned = name, tokenizer, limit, False

    def __call__(self, prompts: list[str]) -> BatchEncoding:
        whole = self.tokenizer(prompts, verbose=False).input_ids
        cut = sum(len(tokens) > self.limit for tokens in whole)
        if cut and not self.warned:
            self.warned = True
            warnings.warn(
                f"rewards.{self.name} reads {self.limit} tokens of a prompt; of {len(prompts)} prompts {cut} "
                f"({cut / len(prompts):.0%}) are longer and are judged by their beginning.",
                stacklevel=2,
            )
        return self.tokenizer(
            prompts,
            padding="max_length",
            max_length=self.limit,
            truncation=True,
            return_tensors="pt",
        )


class Remembered:
    """A function of many keys that is asked once about each, as long as it is among the last few thousand."""

    def __init__(self, function: Callable[[list[Any]], Tensor], room: int = 4096):
        self.function, self.room = function, room
        self.rows: dict[Any, Tensor] = {}

    def __call__(self, keys: list[Any], device: torch.device) -> Tensor:
        new = [key for key in dict.fromkeys(keys) if key not in self.rows]
        if new:
            self.rows.update(zip(new, self.function(new), strict=True))
        found = torch.stack([self.rows[key].to(device) for key in keys])
        for key in list(self.rows)[: -self.room]:
            del self.rows[key]
        return found


def unit(features: Tensor) -> Tensor:
    """Divided by their length, in float32 at least."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def crop(images: Tensor, size: int) -> Tensor:
    """The square in the middle, after scaling the shorter side to `size`."""
    images = resize(images, [size])
    top, left = ((side - size) // 2 for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def pad(images: Tensor, size: int) -> Tensor:
    """On a black square, after scaling the longer side to `size`."""
    images = resize(
        images, [round(size * side / max(images.shape[-2:])) for side in images.shape[-2:]]
    )
    height, width = (size - side for side in images.shape[-2:])
    return F.pad(images, (width // 2, width - width // 2, height // 2, height - height // 2))


def resize(images: Tensor, sides: list[int]) -> Tensor:
    """Bicubic without aliasing, as PIL does it. One side is the shorter."""
    return vision.resize(images, sides, InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)


def normalised(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """By the mean and the deviation of every channel."""
    channels = images.new_tensor([mean, std]).view(2, 3, 1, 1)
    return (images - channels[0]) / channels[1]
