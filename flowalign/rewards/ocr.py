"""Legibility of the text that a prompt asks for, as Flow-GRPO scores it (arXiv 2505.05470).

All text that is read in an image is one string, without spaces and in lower case:
    distance = 0 if the text is part of what was read, else Levenshtein(read, text), at most |text|
    score    = 1 - distance / |text|
"""

import math
import re
from dataclasses import dataclass

import torch
from PIL import Image
from rapidfuzz.distance import Levenshtein

from flowalign.data.prompts import Metadata
from flowalign.errors import UserError
from flowalign.flow import PerImage
from flowalign.rewards.base import traits

QUOTED = re.compile(r'["“”„]([^"“”„]+)["“”„]')


@traits(images="pil", range=(0, 1))
@dataclass
class OCR:
    """Share of the wanted text that can be read in an image, in [0, 1]; not differentiable.

    The wanted text is `text` in the prompt's metadata (a string or a list), else what the prompt
    has in double quotes; with several texts, the mean. An image whose prompt has no wanted text is
    not scored.

    PP-OCRv4 of rapidocr-onnxruntime (Apache-2.0) reads English and Chinese on the CPU, with as many
    threads as torch has. Its 15 MB of weights are in the package. Words with a confidence below
    one half are left out, as by PaddleOCR, which Flow-GRPO uses.
    """

    strict: bool = False
    """True to count other text against an image: 1 - Levenshtein / the longer length."""

    def __post_init__(self) -> None:
        try:
            from rapidocr_onnxruntime import RapidOCR  # an optional dependency
        except ImportError as error:
            raise UserError(
                f"rewards.ocr cannot read images: {error}. Run: pip install 'flowalign[ocr]'"
            ) from error
        # Without the classifier of rotated text, as in Flow-GRPO.
        self.engine = RapidOCR(use_cls=False, intra_op_num_threads=torch.get_num_threads())

    def __call__(
        self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata]
    ) -> PerImage:
        scores = []
        for image, prompt, entry in zip(images, prompts, metadata, strict=True):
            texts = wanted_texts(prompt, entry)
            scores.append(self._score(image, texts) if texts else math.nan)
        return torch.tensor(scores)

    def _score(self, image: Image.Image, texts: list[str]) -> float:
        read = self._read(image)
        if self.strict:
            return Levenshtein.normalized_similarity(read, "".join(texts))
        return sum(legibility(read, text) for text in texts) / len(texts)

    def _read(self, image: Image.Image) -> str:
        # Its annotation leaves out that it takes PIL images.
        lines, _ = self.engine(image)  # pyright: ignore[reportArgumentType]
        # The library leaves out lines with a confidence below one half itself.
        return plain("".join(str(text) for _, text, _ in lines or []))


def legibility(read: str, text: str) -> float:
    """Return how much of a text was read, in [0, 1], whatever else was. Both must be plain."""
    distance = 0 if text in read else min(Levenshtein.distance(read, text), len(text))
    return 1 - distance / len(text)


def wanted_texts(prompt: str, entry: Metadata) -> list[str]:
    """Return the plain texts that an image should show; empty if the prompt asks for none."""
    wanted = entry.get("text") or QUOTED.findall(prompt)
    texts = wanted if isinstance(wanted, list) else [wanted]
    return [text for text in map(plain, map(str, texts)) if text]


def plain(text: str) -> str:
    """Remove spaces and lower the case."""
    return "".join(text.split()).lower()
