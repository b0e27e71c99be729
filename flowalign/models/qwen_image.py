"""Qwen-Image over diffusers' own classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor

from flowalign.flow import Latent, PerImage
from flowalign.models.attention import backend_names, use_backend
from flowalign.models.base import Scheduler
from flowalign.models.config import ModelConfig
from flowalign.models.layer_names import in_blocks
from flowalign.models.pipeline import (
    channel_statistics,
    dtype_for_device,
    PipelineModel,
    set_times,
    shift_of_size,
)

ATTENTION = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)
FEED_FORWARD = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")
SIDE = 1024
"""Height and width of pictures where none are given."""
NULL = " "
"""The text in place of an empty prompt, which has no token of its own in the template."""


@dataclass(kw_only=True)
class QwenImageConfig(ModelConfig):
    """Settings of Qwen-Image."""

    default_guidance: ClassVar[float] = 4.0

    name: str = "qwen-image"
    """Name of the family."""
    max_sequence_length: Annotated[int, Field(ge=1, le=1024)] = 512
    """The most tokens of a prompt."""

    @classmethod
    def attention_names(cls) -> Sequence[str]:
        """Return all attention back ends of the installed diffusers."""
        return backend_names()


class QwenImage(PipelineModel[QwenImageConfig]):
    """Qwen-Image. Inputs: embeds (B, tokens, width), padded with zeros, and mask (B, tokens).

    Latents are packed in patches of 2 x 2. The autoencoder is one of videos, with one frame here.
    """

    Config: ClassVar = QwenImageConfig
    kohya_layers: ClassVar = in_blocks(
        "transformer_blocks",
        "transformer_blocks",
        {layer.replace(".", "_"): [layer] for layer in (*ATTENTION, *FEED_FORWARD)},
    )
    comfyui_prefix: ClassVar = "transformer."
    pipeline_name: ClassVar = "QwenImagePipeline"
    text_encoders: ClassVar = ["text_encoder"]
    lora_targets = (*ATTENTION, *FEED_FORWARD)

    @classmethod
    def describe(cls, path: str, index: Mapping[str, object]) -> QwenImageConfig:
        """Return the published settings: bfloat16 on a GPU."""
        return QwenImageConfig(
            path=path, dtype=dtype_for_device("bfloat16"), height=SIDE, width=SIDE
        )

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(channels, height, width)."""
        scale = self.pipe.vae_scale_factor
        height, width = self.config.height // scale, self.config.width // scale
        return self.vae.config.z_dim, height, width

    def forward(self, x: Latent, t: PerImage, inputs: Mapping[str, Tensor]) -> Latent:
        """Return the velocity. The transformer takes packed latents, and a mask if rows differ."""
        height, width = x.shape[2] // 2, x.shape[3] // 2
        embeds, mask = _trimmed(inputs)
        packed = self.transformer(
            hidden_states=_packed(x).to(self.dtype),
            timestep=t,
            encoder_hidden_states=embeds.to(self.dtype),
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, height, width)]] * len(x),
            return_dict=False,
        )[0]
        return _unpacked(packed.to(x.dtype), height)

    def guide(self, v: Latent, v_null: Latent, guidance: float) -> Latent:
        """Return the guided velocity, with the length of the prompt's in each patch."""
        height = v.shape[2] // 2
        guided, own = _packed(super().guide(v, v_null, guidance)), _packed(v)
        length, own_length = (u.norm(dim=-1, keepdim=True) for u in (guided, own))
        return _unpacked(guided * (own_length / length), height)

    def scheduler(self, steps: int) -> Scheduler:
        """Return the scheduler; its shift of times grows with the number of patches."""
        _, height, width = self.latent_shape
        scheduler = self._copy_scheduler()
        return set_times(scheduler, steps, shift_of_size(scheduler, height * width // 4))

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Return the hidden states of the text encoder, and which tokens are the text's."""
        template, start = (
            self.pipe.prompt_template_encode,
            self.pipe.prompt_template_encode_start_idx,
        )
        tokens = self.pipe.tokenizer(
            [template.format(text or NULL) for text in texts],
            padding="max_length",
            padding_side="right",
            max_length=self.config.max_sequence_length + start,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        # The network below the head, which would compute a word's probability for each token.
        found = self.pipe.text_encoder.model(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=False
        )
        # The template's instruction comes first, and the padding becomes zeros.
        embeds, mask = found.last_hidden_state[:, start:], tokens.attention_mask[:, start:]
        return {"embeds": embeds * mask[..., None].to(embeds), "mask": mask.bool()}

    def normalise(self, z: Latent) -> Latent:
        """Return latents of about unit scale from those of the autoencoder."""
        mean, deviation = channel_statistics(self.vae, z)
        return (z - mean) / deviation

    def denormalise(self, x0: Latent) -> Latent:
        """Return the autoencoder's latents; the inverse of `normalise`."""
        mean, deviation = channel_statistics(self.vae, x0)
        return x0 * deviation + mean

    def decode(self, x0: Latent) -> Tensor:
        """Return pictures (B, 3, H, W) in [0, 1]. Differentiable."""
        frames = self.vae.decode(self.denormalise(x0)[:, :, None], return_dict=False)[0]
        return (frames[:, :, 0] / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Latent:
        """Return latents of pictures (B, 3, H, W) in [0, 1]."""
        frames = images.to(self.device)[:, :, None] * 2 - 1
        return self.normalise(self.vae.encode(frames).latent_dist.mode()[:, :, 0])

    def use_attention(self, name: str) -> None:
        """Switch to a back end of diffusers by name."""
        use_backend(self.transformer, self.dtype, name)

    @classmethod
    def guidance_arguments(cls, guidance: float, embedded_guidance: float) -> dict[str, object]:
        """Return classifier-free guidance, which the pipeline has only with a negative prompt."""
        if guidance == 1:
            return {"true_cfg_scale": 1.0}
        return {"true_cfg_scale": guidance, "negative_prompt": NULL}

    @classmethod
    def text_arguments(cls, config: QwenImageConfig) -> dict[str, object]:
        """Return the number of tokens."""
        return {"max_sequence_length": config.max_sequence_length}


def _packed(x: Latent) -> Tensor:
    """Return patches (B, H W / 4, 4 C) of latents (B, C, H, W)."""
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def _unpacked(tokens: Tensor, height: int) -> Latent:
    """Return latents of patches in `height` rows; the inverse of `_packed`."""
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=height, p=2, q=2)


def _trimmed(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return embeddings and mask as long as the longest row; None if all rows are as long."""
    embeds, mask = inputs["embeds"], inputs["mask"]
    if mask.is_meta:
        # A plan counts the longest prompts.
        return embeds, None
    counts = mask.sum(1)
    longest = int(counts.max())
    full = bool((counts == longest).all())
    return embeds[:, :longest], None if full else mask[:, :longest]
