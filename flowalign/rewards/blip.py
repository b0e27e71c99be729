"""ImageReward: human preference by a BLIP that attends to the image (arXiv 2304.05977).

    score = (w · h + b - mean) / std
with h the text encoder's [CLS] under cross-attention to the image.

The published file holds the weights under BLIP's own names. They are renamed for transformers.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.functional import center_crop
from transformers import (
    AutoTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
)
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from flowalign.data.prompts import Metadata
from flowalign.errors import UserError
from flowalign.flow import PerImage
from flowalign.models.hub import pretrained
from flowalign.rewards.clip import Dtype
from flowalign.rewards.preprocessing import (
    at_least_float32,
    normalise,
    PromptTokenizer,
    resize_shorter,
)
from flowalign.rewards.weights import affine, read_weights, renamed, with_weights

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Mean and deviation of the raw scores, as published."""
TOKENS = 35
HEAD_WIDTH = 64
"""The width of an attention head, in both encoders."""
VISION = {
    r"^cls_token$": "embeddings.class_embedding",
    r"^pos_embed$": "embeddings.position_embedding",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^norm\.": "post_layernorm.",
    r"^blocks\.": "encoder.layers.",
    r"\.norm(\d)\.": r".layer_norm\1.",
    r"\.attn\.qkv\.": ".self_attn.qkv.",
    r"\.attn\.proj\.": ".self_attn.projection.",
}
"""Names in the published image encoder, and in BlipVisionModel. The text encoder's are equal."""


@dataclass
class ImageReward:
    """ImageReward, about -2.3 to 2, typically 0 to 1. Differentiable.

    THUDM/ImageReward: 1.8 GB, Apache-2.0; vocabulary of google-bert/bert-base-uncased, Apache-2.0.
    It reads the first 35 tokens of a prompt.
    """

    path: str = "THUDM/ImageReward/ImageReward.pt"
    """The published weights, in a local file or as owner/name/file on the hub."""
    tokenizer: str = "google-bert/bert-base-uncased"
    """A local folder or hub repository with BERT's vocabulary."""
    dtype: Dtype = "float32"
    """The dtype of the encoders. The score is computed in float32."""

    def __post_init__(self) -> None:
        key, dtype = "rewards.image_reward.path", getattr(torch, self.dtype)
        state = read_weights(key, self.path)
        vision = renamed(tensors_below("blip.visual_encoder.", state, key), VISION)
        text = tensors_below("blip.text_encoder.", state, key)
        self.vision = with_weights(BlipVisionModel, vision_config(vision), vision, key)
        self.text = with_weights(
            BlipTextModel, text_config(text), text, key, add_pooling_layer=False
        )
        for encoder in (self.vision, self.text):
            encoder.to(dtype).eval().requires_grad_(False)
        self.weight, self.bias = affine(state, "mlp.layers.", key)
        tokenizer = pretrained(AutoTokenizer, "rewards.image_reward.tokenizer", self.tokenizer)
        self.tokenize = PromptTokenizer("image_reward", tokenizer, TOKENS)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> PerImage:
        for encoder in (self.vision, self.text):
            encoder.to(images.device)
        size = self.vision.config.image_size
        # torchvision's crop, as published: it rounds half a pixel to even, CLIP's processor down.
        square = center_crop(resize_shorter(images, size), [size, size])
        pixels = normalise(square, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        tokens = self.tokenize(prompts).to(images.device)
        outputs = self.text(
            tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=self.vision(pixels).last_hidden_state,
            is_decoder=False,
        )
        h = at_least_float32(outputs.last_hidden_state[:, 0])
        return (h @ self.weight.to(h) + self.bias - MEAN) / STD


def tensors_below(prefix: str, state: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    """Return the weights whose names begin with the prefix, without it.

    Raises UserError if there are none.
    """
    # Buffers of positions are computed by transformers.
    names = [
        name for name in state if name.startswith(prefix) and not name.endswith("position_ids")
    ]
    if not names:
        raise UserError(
            f"{key}: the file is not ImageReward's: no name begins with {prefix}; it has "
            f"{', '.join(list(state)[:3])}, …. Give the published file."
        )
    return {name.removeprefix(prefix): state[name] for name in names}


def vision_config(state: dict[str, Tensor]) -> BlipVisionConfig:
    """Infer the image encoder's configuration from the weights' shapes."""
    width, _, _, patch = state["embeddings.patch_embedding.weight"].shape
    patches = state["embeddings.position_embedding"].shape[1] - 1
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=state["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=sum(name.endswith("mlp.fc1.weight") for name in state),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=patch * math.isqrt(patches),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )


def text_config(state: dict[str, Tensor]) -> BlipTextConfig:
    """Infer the text encoder's configuration from the weights' shapes."""
    vocabulary, width = state["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=state["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=state["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=sum(name.endswith("intermediate.dense.weight") for name in state),
        num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=state["embeddings.position_embeddings.weight"].shape[0],
        # The defaults are ids of a larger vocabulary, which a smaller one would refuse.
        bos_token_id=None,
        sep_token_id=None,
    )
