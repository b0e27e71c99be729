"""Features of prompts, for rewards on the image side of a backbone that may read texts too."""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer

from flowalign.models.hub import pretrained
from flowalign.rewards.features import Backbone
from flowalign.rewards.preprocessing import PromptTokenizer, RowCache


class PromptFeatures:
    """The elementwise product of unit vectors of pictures and prompts, whose sum is their cosine.

    Nothing for a backbone without a text side, such as DINOv2.
    """

    def __init__(self, path: str, backbone: Backbone):
        self.model = backbone.model
        self.reads_texts = "text_config" in self.model.config.sub_configs
        if not self.reads_texts:
            return
        tokenizer = pretrained(AutoTokenizer, backbone.key, path)
        limit = self.model.config.text_config.max_position_embeddings
        self.tokenize = PromptTokenizer("taste", tokenizer, limit)
        self.cache: RowCache[str] = RowCache(self._encode)

    def __call__(self, image: Tensor, prompts: list[str]) -> list[Tensor]:
        """Return a list with the product (B, W), or an empty one without a text side."""
        if not self.reads_texts:
            return []
        return [image * self.cache(prompts, image.device)]

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Tensor:
        tokens = self.tokenize(prompts).to(self.model.device)
        return F.normalize(self.model.get_text_features(**tokens).pooler_output, dim=1)
