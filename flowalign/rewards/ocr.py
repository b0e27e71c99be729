"""Whether the text that a prompt asks for can be read in the picture, as Flow-GRPO scores it (arXiv 2505.05470).

With everything read in a picture as one string, spaces dropped and letters in lower case,
    distance = 0 where the text is part of what was read, else Levenshtein(read, text), at most |text|
    score    = 1 - distance / |text|
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from rapidfuzz.distance import Levenshtein

from flowalign.errors import UserError
from flowalign.flow import PerImage
from flowalign.rewards.base import traits

QUOTED = re.compile(r'["“”„]([^"“”„]+)["“”„]')


@traits(images="pil", range=(0, 1))
@dataclass
class OCR:
    """How much of the wanted text can be read in a picture, in [0, 1]; not differentiable.

    PP-OCRv4 of rapidocr-onnxruntime reads English and Chinese on the CPU, with as many threads as torch has. Its 15 MB of weights
    come inside the package, no hub is asked; licence Apache-2.0. Words it is less than half sure of are left out, as PaddleOCR,
    which Flow-GRPO reads with, leaves them out.

    The wanted text is `text` of the prompt's metadata (a string or a list), else what the prompt has in double quotes; of several
    the mean. A picture whose prompt wants no text is not scored.
    """

    strict: bool = False
    """Whether text beyond the wanted one counts against a picture: 1 - Levenshtein / the longer length, several texts as one."""

    def __post_init__(self) -> None:
        try:
            from rapidocr_onnxruntime import RapidOCR
        except ImportError as error:
            raise UserError(
                f"rewards.ocr cannot read pictures: {error}. Run: pip install 'flowalign[ocr]'"
            ) from error
        self.engine: Any = RapidOCR(use_cls=False, intra_op_num_threads=torch.get_num_threads())

    def __call__(
        self, images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]
    ) -> PerImage:
        wanted = [
            wanted_texts(prompt, entry) for prompt, entry in zip(prompts, metadata, strict=True)
        ]
        pairs = zip(images, wanted, strict=True)
        return torch.tensor(
            [self._score(image, texts) if texts else math.nan for image, texts in pairs]
        )

    def _score(self, image: Image.Image, texts: list[str]) -> float:
        read = self._read(image)
        if self.strict:
            return Levenshtein.normalized_similarity(read, "".join(texts))
        return sum(legibility(read, text) for text in texts) / len(texts)

    def _read(self, image: Image.Image) -> str:
        found, _ = self.engine(image)
        return plain("".join(text for _, text, confidence in found or [] if confidence > 0))


def legibility(read: str, text: str) -> float:
    """How much of a text was read, whatever else was; both plain."""
    distance = 0 if text in read else min(Levenshtein.distance(read, text), len(text))
    return 1 - distance / len(text)


def wanted_texts(prompt: str, entry: dict[str, Any]) -> list[str]:
    """What a picture should say, plain: by its metadata, else by the quotation marks of its prompt. Empty when neither says."""
    given = entry.get("text") or QUOTED.findall(prompt)
    texts = given if isinstance(given, list) else [given]
    return [text for text in map(plain, map(str, texts)) if text]


def plain(text: str) -> str:
    """Without spaces, in lower case."""
    return "".join(text.split()).lower()
