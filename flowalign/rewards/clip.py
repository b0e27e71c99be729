"""Rewards from the CLIP family, through transformers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from flowalign.errors import UserError
from flowalign.flow import PerImage

TINY = str(Path(__file__).parents[2] / "assets" / "tiny-clip")


@dataclass
class ClipScore:
    """Cosine of picture and prompt in a CLIP model, in [-1, 1] (CLIPScore, arXiv 2104.08718, unscaled). Differentiable."""

    path: str = TINY
    """A local folder or a hub repository; the bundled CLIP for the bundled world."""
    model: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        try:
            self.model = CLIPModel.from_pretrained(self.path).eval().requires_grad_(False)
            self.tokenizer = AutoTokenizer.from_pretrained(self.path)
            self.processor = CLIPImageProcessor.from_pretrained(self.path)
        except (OSError, ValueError) as error:
            raise UserError(f"rewards.clip_score.path: {self.path} cannot be opened as a CLIP model: {error}") from error

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> PerImage:
        self.model.to(images.device)
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").to(images.device)
        texts = self.model.get_text_features(**tokens).pooler_output
        pictures = self.model.get_image_features(self._pixels(images)).pooler_output
        return F.cosine_similarity(texts, pictures)

    def _pixels(self, images: Tensor) -> Tensor:
        """What the processor does to PIL images, on tensors, so that gradients pass."""
        size = self.model.config.vision_config.image_size
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (self.processor.image_mean, self.processor.image_std))
        return (images - mean) / std
