"""Preprocessing of images and prompts that several model rewards share; differentiable in images.

Images are (B, 3, H, W) in [0, 1] throughout. The functions do to tensors what the processors of
transformers do to PIL images, so that gradients pass.
"""

import html
import re
import unicodedata
import warnings
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import functional as vision
from torchvision.transforms import InterpolationMode
from transformers import BatchEncoding, PreTrainedTokenizerBase

Key = TypeVar("Key", bound=Hashable)

STRAIGHT_QUOTES = str.maketrans(
    dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f", '"')
)
WIDE = re.compile("[\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3\ufb00-\ufb06\u3000\uff01-\uffef]")
"""Ligatures, and characters of a full or half width."""
CONTROLS = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]")
"""Characters that show nothing."""


def plain_text(prompt: str) -> str:
    """Return a prompt with straight quotes, without HTML entities and ligatures, as open_clip.

    open_clip also repairs text that was decoded as the wrong encoding, and this does not.
    """
    # Twice: captions from the web are often escaped twice.
    text = html.unescape(html.unescape(prompt))
    text = WIDE.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text)
    text = CONTROLS.sub("", text.translate(STRAIGHT_QUOTES))
    return " ".join(unicodedata.normalize("NFC", text).split())


class PromptTokenizer:
    """Tokenizes prompts to a fixed length, and warns once if prompts are cut."""

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, limit: int):
        """`name` is the reward's in messages, `limit` the number of tokens the network reads."""
        self.name, self.tokenizer, self.limit, self.has_warned = name, tokenizer, limit, False

    def __call__(self, prompts: list[str]) -> BatchEncoding:
        """Return input ids and attention mask (B, limit)."""
        if not self.has_warned:
            self._warn_if_cut(prompts)
        return self.tokenizer(
            prompts,
            padding="max_length",
            max_length=self.limit,
            truncation=True,
            return_tensors="pt",
        )

    def _warn_if_cut(self, prompts: list[str]) -> None:
        whole = self.tokenizer(prompts, verbose=False).input_ids
        cut = sum(len(tokens) > self.limit for tokens in whole)
        if cut:
            self.has_warned = True
            warnings.warn(
                f"rewards.{self.name} reads {self.limit} tokens of a prompt; of {len(prompts)} "
                f"prompts {cut} ({cut / len(prompts):.0%}) are longer and are scored by their "
                "beginning.",
                stacklevel=3,
            )


class RowCache(Generic[Key]):
    """Caches the rows that a function returns for keys; the oldest rows are dropped first."""

    def __init__(self, function: Callable[[list[Key]], Tensor], size: int = 4096):
        """`function` returns one row per key, and `size` is the number of rows to keep."""
        self.function, self.size = function, size
        self.rows: dict[Key, Tensor] = {}

    def __call__(self, keys: list[Key], device: torch.device) -> Tensor:
        """Return the rows (len(keys), ...) on the device."""
        new = [key for key in dict.fromkeys(keys) if key not in self.rows]
        if new:
            self.rows.update(zip(new, self.function(new), strict=True))
        rows = torch.stack([self.rows[key].to(device) for key in keys])
        # Only now, because one call may need more rows than the cache holds.
        for key in list(self.rows)[: -self.size]:
            del self.rows[key]
        return rows


def unit(features: Tensor) -> Tensor:
    """Divide features (..., D) by their length, in float32 or more."""
    return F.normalize(at_least_float32(features), dim=-1)


def at_least_float32(values: Tensor) -> Tensor:
    """Convert half precision to float32, and keep float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def resize_and_crop(images: Tensor, size: int) -> Tensor:
    """Scale the shorter side to `size` and return the square in the center, as CLIP's processor.

    Where the margins differ by a pixel, the one before the square is the smaller.
    """
    images = resize_shorter(images, size)
    top, left = ((side - size) // 2 for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def resize_shorter(images: Tensor, size: int) -> Tensor:
    """Scale the shorter side to `size` with PIL's antialiased bicubic filter."""
    # Bicubic filters overshoot at edges, where PIL's bytes saturate.
    return resize(images, [size]).clamp(0, 1)


def resize_and_pad(images: Tensor, size: int) -> Tensor:
    """Scale the longer side to `size` and return a square with black margins, as HPSv2's package.

    That package resizes tensors, so values that overshoot [0, 1] at edges stay.
    """
    # The package's order of operations: another rounds some sides to one pixel less.
    scale = size / max(images.shape[-2:])
    images = resize(images, [round(side * scale) for side in images.shape[-2:]])
    height, width = (size - side for side in images.shape[-2:])
    return F.pad(images, (width // 2, width - width // 2, height // 2, height - height // 2))


def resize(images: Tensor, sides: list[int]) -> Tensor:
    """Resize with an antialiased bicubic filter. A single side is the shorter one."""
    return vision.resize(images, sides, InterpolationMode.BICUBIC, antialias=True)


def normalise(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """Normalise each channel by its mean and deviation."""
    channels = images.new_tensor([mean, std]).view(2, 3, 1, 1)
    return (images - channels[0]) / channels[1]
