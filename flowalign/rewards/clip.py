"""Rewards of the CLIP family: the similarity of an image with its prompt or with another image.

All are differentiable. With e(·) a feature divided by its length,
    clip_score, hps = e(image) · e(prompt)
    pick_score      = exp(logit_scale) e(image) · e(prompt) / 26
    clip_image      = e(image) · e(reference)
    aesthetic       = w · e(image) + b
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

from flowalign.data.prompts import Metadata
from flowalign.errors import UserError
from flowalign.flow import PerImage
from flowalign.models.hub import pretrained
from flowalign.rewards.base import traits
from flowalign.rewards.features import Backbone, BUNDLED_CLIP, check_bundled_size
from flowalign.rewards.preprocessing import (
    normalise,
    plain_text,
    PromptTokenizer,
    resize_and_crop,
    resize_and_pad,
    RowCache,
    unit,
)
from flowalign.rewards.reference_pictures import as_images, read_reference, reference_file
from flowalign.rewards.weights import affine, from_open_clip, read_weights, with_weights

VIT_L = "openai/clip-vit-large-patch14"
VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
WEIGHT_FILES = (".pt", ".pth", ".bin", ".safetensors")
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass
class Clip:
    """The base of these rewards: image features with gradient, and prompt features from a cache."""

    path: str = BUNDLED_CLIP
    """A local folder or hub repository; by default the bundled CLIP for the bundled world."""
    processor: str = ""
    """The folder or repository of the tokenizer and image statistics; empty for `path`."""
    dtype: Dtype = "float32"
    """The dtype of the network. Features are compared in float32."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        network, processor_path = self._network(), self.processor or self.path
        # Read before the cast: in bfloat16 the scale has three digits.
        self.logit_scale: float = network.logit_scale.item()
        self.model: Any = network.to(getattr(torch, self.dtype)).eval().requires_grad_(False)
        config: Any = network.config
        self.size: int = config.vision_config.image_size
        processor = pretrained(CLIPImageProcessor, self._key("processor"), processor_path)
        self.mean, self.std = processor.image_mean, processor.image_std
        tokenizer = pretrained(AutoTokenizer, self._key("processor"), processor_path)
        limit = config.text_config.max_position_embeddings
        self.tokenize = PromptTokenizer(self.name, tokenizer, limit)
        self.prompt_features: RowCache[str] = RowCache(self._encode)

    def image_features(self, images: Tensor) -> Tensor:
        """Return features (B, D) of length 1."""
        check_bundled_size(self.path, images, self._key("path"))
        self.model.to(images.device)
        return unit(self.model.get_image_features(self._pixels(images)).pooler_output)

    def cosine(self, images: Tensor, prompts: list[str]) -> PerImage:
        """Return the cosine of each image and its prompt."""
        features = self.image_features(images)
        return (features * self.prompt_features(prompts, images.device)).sum(1)

    def _network(self) -> CLIPModel:
        return pretrained(CLIPModel, self._key("path"), self.path, dtype=torch.float32)

    def _key(self, setting: str) -> str:
        return f"rewards.{self.name}.{setting}"

    def _fit(self, images: Tensor) -> Tensor:
        return resize_and_crop(images, self.size)

    def _pixels(self, images: Tensor) -> Tensor:
        return normalise(self._fit(images), self.mean, self.std)

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Tensor:
        tokens = self.tokenize(prompts).to(self.model.device)
        return unit(self.model.get_text_features(**tokens).pooler_output)


@traits(range=(-1, 1))
@dataclass
class ClipScore(Clip):
    """Cosine of image and prompt, in [-1, 1]; about 0.2 to 0.35 with openai/clip-vit-large-patch14.

    That model takes 1.7 GB and has the MIT licence. The bundled CLIP, for images of up to 128
    pixels, takes little memory. The published CLIPScore (arXiv 2104.08718) is 2.5 max(0, cosine)
    with `{path: openai/clip-vit-base-patch32, prefix: "A photo depicts "}`.
    """

    prefix: str = ""
    """A text that is put before every prompt."""
    name: ClassVar[str] = "clip_score"

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> PerImage:
        return self.cosine(images, [self.prefix + prompt for prompt in prompts])


@dataclass
class PickScore(Clip):
    """Human choice between images (arXiv 2305.01569), divided by 26; about 0.65 to 0.95.

    The division is Flow-GRPO's. yuvalkirstain/PickScore_v1: 4 GB, licence: see its card; processor
    of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, MIT. Compare means at equal resolution only.
    """

    path: str = "yuvalkirstain/PickScore_v1"
    """A local folder or hub repository."""
    processor: str = VIT_H
    """The folder or repository of the tokenizer and image statistics."""
    name: ClassVar[str] = "pick_score"

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> PerImage:
        return math.exp(self.logit_scale) * self.cosine(images, prompts) / 26


@traits(range=(-1, 1))
@dataclass
class HPSv2(Clip):
    """Human preference score v2.1 (arXiv 2306.09341): a cosine, in [-1, 1]; about 0.2 to 0.35.

    xswu/HPSv2: 4 GB, Apache-2.0; processor of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, MIT. Images
    that are not square get black margins.
    """

    path: str = "xswu/HPSv2/HPS_v2.1_compressed.pt"
    """open_clip's weights in a local file or as owner/name/file on the hub, or a CLIPModel."""
    processor: str = VIT_H
    """The tokenizer and image statistics, and the network's size if `path` is a file of weights."""
    name: ClassVar[str] = "hps"

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> PerImage:
        return self.cosine(images, [plain_text(prompt) for prompt in prompts])

    def _network(self) -> CLIPModel:
        if not self.path.endswith(WEIGHT_FILES):
            return super()._network()
        config = pretrained(CLIPConfig, self._key("processor"), self.processor)
        state = from_open_clip(read_weights(self._key("path"), self.path))
        return with_weights(CLIPModel, config, state, self._key("path"))

    # HPSv2 was trained on whole images with margins, not on crops.
    def _fit(self, images: Tensor) -> Tensor:
        return resize_and_pad(images, self.size)


@dataclass
class Aesthetic(Clip):
    """LAION's aesthetic score v2, from 1 to 10, mostly 5 to 7. It ignores the prompt.

    It is easily hacked, so combine it with a reward that reads the prompt.
    openai/clip-vit-large-patch14, MIT, and sac+logos+ava1-l14-linearMSE.pth, Apache-2.0: 1.7 GB.
    """

    path: str = VIT_L
    """A local folder or hub repository; the published head belongs to the default."""
    head: str = "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth"
    """The published layers, in a local file or as owner/name/file on the hub."""
    name: ClassVar[str] = "aesthetic"

    def __post_init__(self) -> None:
        super().__post_init__()
        key = self._key("head")
        self.weight, self.bias = affine(read_weights(key, self.head), "layers.", key)
        width = self.model.config.projection_dim
        if width != len(self.weight):
            raise UserError(
                f"{key}: {self.head} takes {len(self.weight)} features, but {self.path} has "
                f"{width}. Use the published head with {VIT_L}."
            )

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> PerImage:
        features = self.image_features(images)
        return features @ self.weight.to(features) + self.bias


@traits(range=(-1, 1))
@dataclass
class ClipImage:
    """Cosine of image and reference image (CLIP-I), in [-1, 1], mostly 0.5 to 0.95.

    The prompt's field `ref_image` names the reference. With null, its images are not scored. For
    memory and licence see clip_score; facebook/dinov2-base (DINO-I): 0.35 GB, Apache-2.0.
    """

    path: str = BUNDLED_CLIP
    """The backbone: a local folder or hub repository; by default the bundled CLIP's image side."""

    def __post_init__(self) -> None:
        self.backbone = Backbone(self.path, "rewards.clip_image.path")
        self.references: RowCache[str | None] = RowCache(self._read_all)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> PerImage:
        pairs = zip(prompts, metadata, strict=True)
        files = [reference_file("clip_image", prompt, entry) for prompt, entry in pairs]
        references = self.references(files, self.backbone.device)
        return (self.backbone(images) * references).sum(1)

    def _read_all(self, files: list[str | None]) -> Tensor:
        return torch.stack([self._read(file) for file in files])

    @torch.no_grad()
    def _read(self, file: str | None) -> Tensor:
        """Return the feature of an image file, or NaN without a file."""
        if file is None:
            width, device = self.backbone.width, self.backbone.device
            return torch.full((width,), math.nan, device=device)
        return self.backbone(as_images(read_reference("clip_image", file)))[0]
