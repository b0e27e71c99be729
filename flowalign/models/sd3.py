"""Stable Diffusion 3 and 3.5 over diffusers' own classes."""

from typing import Any, ClassVar

from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    StableDiffusion3Pipeline,
)
from torch import Tensor

from flowalign.batch import Cond
from flowalign.errors import UserError
from flowalign.flow import Latent, PerImage
from flowalign.models.base import FlowModel
from flowalign.models.config import ModelConfig


class SD3(FlowModel):
    """T5 may be left out, by a folder without it or by `max_sequence_length: 0`."""

    pipeline_class = StableDiffusion3Pipeline
    text_encoders: ClassVar = ["text_encoder", "text_encoder_2", "text_encoder_3"]
    lora_targets: ClassVar = [
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    ]

    def __init__(self, config: ModelConfig, device: str = "cpu"):
        super().__init__(config, device)
        parts = self.transformer.config
        largest = parts.pos_embed_max_size * parts.patch_size * self.pipe.vae_scale_factor
        if max(config.height, config.width) > largest:
            raise UserError(
                f"model.height and model.width may be at most {largest} for {config.path}."
            )

    @staticmethod
    def optional_components(config: ModelConfig) -> list[str]:
        return [] if config.max_sequence_length else ["text_encoder_3", "tokenizer_3"]

    def forward(self, x: Latent, t: PerImage, cond: Cond) -> Latent:
        dtype = self.transformer.dtype
        inputs = (x.to(dtype), cond.embeds.to(dtype), cond.pooled.to(dtype), 1000 * t)
        return self.transformer(*inputs, return_dict=False)[0].to(x.dtype)

    def scheduler(self, steps: int) -> Any:
        return self._scheduler(num_inference_steps=steps)

    def encode_texts(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompt=texts,
            prompt_2=texts,
            prompt_3=texts,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.config.max_sequence_length,
        )
        return embeds, pooled

    def use_attention(self, name: str) -> None:
        if name == "native":
            return
        if name != "xformers":
            raise UserError(f"model.attention: SD3 knows native and xformers, not {name!r}.")
        try:
            self.transformer.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError, NotImplementedError) as error:
            raise UserError(
                f"model.attention: xformers is not usable here ({error}). Use native."
            ) from error
        kinds = {
            type(processor).__name__ for processor in self.transformer.attn_processors.values()
        }
        if not all("XFormers" in kind for kind in kinds):
            raise UserError(
                f"model.attention: xformers was asked for, but {kinds} are active. Use native."
            )
