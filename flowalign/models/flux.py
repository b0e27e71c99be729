"""Flux.1 over diffusers' own classes: dev, with distilled guidance, and schnell, without."""

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
    dtype_for_device,
    picture_side,
    PipelineModel,
    set_times,
    shift_of_size,
)

KOHYA_LAYERS = {
    **in_blocks(
        "double_blocks",
        "transformer_blocks",
        {
            "img_attn_qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
            "img_attn_proj": ["attn.to_out.0"],
            "img_mlp_0": ["ff.net.0.proj"],
            "img_mlp_2": ["ff.net.2"],
            "img_mod_lin": ["norm1.linear"],
            "txt_attn_qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
            "txt_attn_proj": ["attn.to_add_out"],
            "txt_mlp_0": ["ff_context.net.0.proj"],
            "txt_mlp_2": ["ff_context.net.2"],
            "txt_mod_lin": ["norm1_context.linear"],
        },
    ),
    **in_blocks(
        "single_blocks",
        "single_transformer_blocks",
        {
            "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
            "linear2": ["proj_out"],
            "modulation_lin": ["norm.linear"],
        },
    ),
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    **{
        f"{name}_{part}": [f"time_text_embed.{embedder}.{layer}"]
        for name, embedder in {
            "time_in": "timestep_embedder",
            "vector_in": "text_embedder",
            "guidance_in": "guidance_embedder",
        }.items()
        for part, layer in {"in_layer": "linear_1", "out_layer": "linear_2"}.items()
    },
}


@dataclass(kw_only=True)
class FluxConfig(ModelConfig):
    """Settings of Flux.1."""

    embeds_guidance: ClassVar[bool] = True
    default_guidance: ClassVar[float] = 3.5

    name: str = "flux"
    """Name of the family."""
    max_sequence_length: Annotated[int, Field(ge=1, le=512)] = 256
    """T5 tokens per prompt. Flux.1-schnell takes at most 256."""

    @classmethod
    def attention_names(cls) -> Sequence[str]:
        """Return all attention back ends of the installed diffusers."""
        return backend_names()


class Flux(PipelineModel[FluxConfig]):
    """Flux.1. Inputs: embeds (B, tokens, width), pooled (B, width) and, for dev, guidance (B,).

    Latents are packed in patches of 2 x 2, and times are shifted by the number of patches.
    """

    Config: ClassVar = FluxConfig
    kohya_layers: ClassVar = KOHYA_LAYERS
    comfyui_prefix: ClassVar = "transformer."
    pipeline_name: ClassVar = "FluxPipeline"
    text_encoders: ClassVar = ["text_encoder", "text_encoder_2"]
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )

    @classmethod
    def describe(cls, path: str, index: Mapping[str, object]) -> FluxConfig:
        """Return the published settings: bfloat16 on a GPU, and all tokens that T5 may take."""
        from transformers import AutoTokenizer

        side = picture_side(path)
        tokenizer = AutoTokenizer.from_pretrained(path, subfolder="tokenizer_2")
        return FluxConfig(
            path=path,
            dtype=dtype_for_device("bfloat16"),
            height=side,
            width=side,
            max_sequence_length=tokenizer.model_max_length,
        )

    @property
    def has_distilled_guidance(self) -> bool:
        """True for dev, False for schnell."""
        return bool(self.transformer.config.guidance_embeds)

    def guidance_inputs(self, count: int, embedded_guidance: float) -> dict[str, Tensor]:
        """Return the scale that a distilled model takes as an input, (count,)."""
        if not self.has_distilled_guidance:
            return {}
        return {"guidance": torch.full((count,), embedded_guidance, device=self.device)}

    def forward(self, x: Latent, t: PerImage, inputs: Mapping[str, Tensor]) -> Latent:
        """Return the velocity. The transformer takes packed latents and their positions."""
        height, width = x.shape[2] // 2, x.shape[3] // 2
        # Unlike SD3's, this transformer takes times from 0 to 1 and scales them itself.
        packed = self.transformer(
            hidden_states=rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2).to(
                self.dtype
            ),
            timestep=t,
            guidance=inputs.get("guidance"),
            encoder_hidden_states=inputs["embeds"].to(self.dtype),
            pooled_projections=inputs["pooled"].to(self.dtype),
            img_ids=_positions(height, width, x),
            txt_ids=x.new_zeros(inputs["embeds"].shape[1], 3),
            return_dict=False,
        )[0].to(x.dtype)
        return rearrange(packed, "b (h w) (c p q) -> b c (h p) (w q)", h=height, w=width, p=2, q=2)

    def scheduler(self, steps: int) -> Scheduler:
        """Return the scheduler; its shift of times grows with the number of patches."""
        # The shift depends on the number of patches, so the scheduler needs the size of pictures.
        _, height, width = self.latent_shape
        scheduler = self._copy_scheduler()
        return set_times(scheduler, steps, shift_of_size(scheduler, height * width // 4))

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Return embeddings of T5 tokens, and the pooled vector of CLIP."""
        embeds, pooled, _ = self.pipe.encode_prompt(
            prompt=texts,
            prompt_2=texts,
            device=self.device,
            max_sequence_length=self.config.max_sequence_length,
        )
        return {"embeds": embeds, "pooled": pooled}

    def use_attention(self, name: str) -> None:
        """Switch to a back end of diffusers by name."""
        use_backend(self.transformer, self.dtype, name)

    @classmethod
    def guidance_arguments(cls, guidance: float, embedded_guidance: float) -> dict[str, object]:
        """Return the embedded guidance, and classifier-free guidance if there is any."""
        arguments: dict[str, object] = {"guidance_scale": embedded_guidance}
        # The pipeline guides by a negative prompt only if one is given, even an empty one.
        if guidance != 1:
            arguments |= {"true_cfg_scale": guidance, "negative_prompt": ""}
        return arguments

    @classmethod
    def text_arguments(cls, config: FluxConfig) -> dict[str, object]:
        """Return the number of T5 tokens; the pipeline's default would change the picture."""
        return {"max_sequence_length": config.max_sequence_length}


def _positions(height: int, width: int, like: Tensor) -> Tensor:
    """Return 0, row and column of every packed patch, (height * width, 3)."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).to(like)
