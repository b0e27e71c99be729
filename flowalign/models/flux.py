"""Flux (dev: guidance embedded; schnell: none) over diffusers' own classes."""

from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, FluxPipeline
from einops import rearrange
from torch import Tensor

from flowalign.batch import Cond
from flowalign.errors import UserError
from flowalign.flow import Latent, PerImage
from flowalign.models.base import FlowModel


class Flux(FlowModel):
    """Latents are packed in 2 × 2 patches, times shifted by their number, all inside this file."""

    pipeline_class = FluxPipeline
    text_encoders: ClassVar = ["text_encoder", "text_encoder_2"]
    lora_targets: ClassVar = [
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    ]

    @property
    def has_distilled_guidance(self) -> bool:
        return bool(self.transformer.config.guidance_embeds)

    def forward(self, x: Latent, t: PerImage, cond: Cond) -> Latent:
        dtype = self.transformer.dtype
        height, width = x.shape[2] // 2, x.shape[3] // 2
        guidance = (
            x.new_full((len(x),), cond.embedded_guidance) if self.has_distilled_guidance else None
        )
        packed = self.transformer(
            hidden_states=rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2).to(dtype),
            timestep=t,
            guidance=guidance,
            encoder_hidden_states=cond.embeds.to(dtype),
            pooled_projections=cond.pooled.to(dtype),
            img_ids=_positions(height, width, x),
            txt_ids=x.new_zeros(cond.embeds.shape[1], 3),
            return_dict=False,
        )[0].to(x.dtype)
        return rearrange(packed, "b (h w) (c p q) -> b c (h p) (w q)", h=height, w=width, p=2, q=2)

    def scheduler(self, steps: int) -> Any:
        _, height, width = self.latent_shape
        limits = (
            ("base_image_seq_len", 256),
            ("max_image_seq_len", 4096),
            ("base_shift", 0.5),
            ("max_shift", 1.15),
        )
        config = self.pipe.scheduler.config
        mu = calculate_shift(
            height * width // 4, *(config.get(name, default) for name, default in limits)
        )
        return self._scheduler(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)

    def encode_texts(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        embeds, pooled, _ = self.pipe.encode_prompt(
            prompt=texts,
            prompt_2=texts,
            device=self.device,
            max_sequence_length=self.config.max_sequence_length,
        )
        return embeds, pooled

    def use_attention(self, name: str) -> None:
        if name == "native":
            return
        try:
            self.transformer.set_attention_backend(name)
        except (ImportError, ValueError, RuntimeError) as error:
            raise UserError(
                f"model.attention: {name!r} is not usable here ({error}). Use native."
            ) from error


def _positions(height: int, width: int, like: Tensor) -> Tensor:
    """(height · width, 3): 0, row and column of every packed patch."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).to(like)
