"""FLUX.2 over diffusers' own classes: klein, with true or with no guidance, and dev."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, cast, ClassVar

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
    few_at_a_time,
    picture_side,
    PipelineModel,
    set_times,
)

KOHYA_LAYERS = in_blocks(
    "double_blocks",
    "transformer_blocks",
    {
        "img_attn_qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
        "img_attn_proj": ["attn.to_out.0"],
        "img_mlp_0": ["ff.linear_in"],
        "img_mlp_2": ["ff.linear_out"],
        "txt_attn_qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
        "txt_attn_proj": ["attn.to_add_out"],
        "txt_mlp_0": ["ff_context.linear_in"],
        "txt_mlp_2": ["ff_context.linear_out"],
    },
) | in_blocks(
    "single_blocks",
    "single_transformer_blocks",
    {"linear1": ["attn.to_qkv_mlp_proj"], "linear2": ["attn.to_out"]},
)


@dataclass(kw_only=True)
class Flux2KleinConfig(ModelConfig):
    """Settings of FLUX.2 klein."""

    default_guidance: ClassVar[float] = 4.0

    name: str = "flux2-klein"
    """Name of the family."""
    max_sequence_length: Annotated[int, Field(ge=1, le=512)] = 512
    """Tokens per prompt. The model sees the padding, so other lengths are other models."""

    @classmethod
    def attention_names(cls) -> Sequence[str]:
        """Return all attention back ends of the installed diffusers."""
        return backend_names()


@dataclass(kw_only=True)
class Flux2DevConfig(Flux2KleinConfig):
    """Settings of FLUX.2 dev."""

    embeds_guidance: ClassVar[bool] = True

    name: str = "flux2-dev"
    """Name of the family."""


class Flux2Klein(PipelineModel[Flux2KleinConfig]):
    """FLUX.2 klein. Inputs: embeds (B, tokens, width).

    Latents are patches of 2 x 2 of the autoencoder's, normalised by the statistics of its batch
    norm. Times are shifted by the number of patches and by the number of steps, so rollouts and
    evaluations of other lengths lie on different grids.
    """

    Config: ClassVar = Flux2KleinConfig
    kohya_layers: ClassVar = KOHYA_LAYERS
    comfyui_prefix: ClassVar = "transformer."
    pipeline_name: ClassVar = "Flux2KleinPipeline"
    text_encoders: ClassVar = ["text_encoder"]
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
        *("attn.to_qkv_mlp_proj", "attn.to_out"),
    )

    @classmethod
    def describe(cls, path: str, index: Mapping[str, object]) -> Flux2KleinConfig:
        """Return the published settings: bfloat16 on a GPU."""
        side = picture_side(path)
        # The cast is for type checkers: each of the two models has settings of its own.
        settings = cast(type[Flux2KleinConfig], cls.Config)
        return settings(path=path, dtype=dtype_for_device("bfloat16"), height=side, width=side)

    @property
    def is_step_distilled(self) -> bool:
        """True for the distilled klein, which the pipeline never guides."""
        return bool(self.pipe.config.get("is_distilled"))

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(channels of a patch, height, width)."""
        scale = 2 * self.pipe.vae_scale_factor
        return self.transformer.config.in_channels, *(
            side // scale for side in (self.config.height, self.config.width)
        )

    def forward(self, x: Latent, t: PerImage, inputs: Mapping[str, Tensor]) -> Latent:
        """Return the velocity. The transformer takes patches and positions of four axes."""
        embeds, (height, width) = inputs["embeds"].to(self.dtype), x.shape[2:]
        v = self.transformer(
            hidden_states=rearrange(x, "b c h w -> b (h w) c").to(self.dtype),
            timestep=t,
            guidance=inputs.get("guidance"),
            encoder_hidden_states=embeds,
            img_ids=_positions(height, width, 1, x),
            txt_ids=_positions(1, 1, embeds.shape[1], x),
            return_dict=False,
        )[0].to(x.dtype)
        return rearrange(v, "b (h w) c -> b c h w", h=height)

    def scheduler(self, steps: int) -> Scheduler:
        """Return the scheduler; its shift depends on the number of patches and of steps."""
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        _, height, width = self.latent_shape
        shift = compute_empirical_mu(height * width, steps)
        return set_times(self._copy_scheduler(), steps, shift)

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Return three hidden states of the text encoder, side by side, for each token."""
        length = self.config.max_sequence_length
        parts = [
            self.pipe.encode_prompt(prompt=part, device=self.device, max_sequence_length=length)[0]
            for part in few_at_a_time(texts)
        ]
        return {"embeds": torch.cat(parts)}

    def normalise(self, z: Latent) -> Latent:
        """Return patches (B, 4 C, H/2, W/2) of the autoencoder's latents (B, C, H, W)."""
        mean, deviation = self._statistics()
        patches = rearrange(z, "b c (h p) (w q) -> b (c p q) h w", p=2, q=2)
        return (patches - mean) / deviation

    def denormalise(self, x0: Latent) -> Latent:
        """Return the autoencoder's latents; the inverse of `normalise`."""
        mean, deviation = self._statistics()
        return rearrange(x0 * deviation + mean, "b (c p q) h w -> b c (h p) (w q)", p=2, q=2)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of each channel of a patch, each (1, 4 C, 1, 1)."""
        norm = self.vae.bn
        variance = norm.running_var + self.vae.config.batch_norm_eps
        return norm.running_mean.view(1, -1, 1, 1), variance.sqrt().view(1, -1, 1, 1)

    def use_attention(self, name: str) -> None:
        """Switch to a back end of diffusers by name."""
        use_backend(self.transformer, self.dtype, name)

    @classmethod
    def guidance_arguments(cls, guidance: float, embedded_guidance: float) -> dict[str, object]:
        """Return classifier-free guidance as the pipeline calls it."""
        return {"guidance_scale": guidance}

    @classmethod
    def text_arguments(cls, config: Flux2KleinConfig) -> dict[str, object]:
        """Return the number of tokens."""
        return {"max_sequence_length": config.max_sequence_length}


class Flux2Dev(Flux2Klein):
    """FLUX.2 dev. Inputs: embeds (B, tokens, width) and guidance (B,)."""

    Config: ClassVar = Flux2DevConfig
    pipeline_name: ClassVar = "Flux2Pipeline"

    @property
    def has_distilled_guidance(self) -> bool:
        """True: the scale of guidance is an input."""
        return True

    def guidance_inputs(self, count: int, embedded_guidance: float) -> dict[str, Tensor]:
        """Return the scale, (count,)."""
        return {"guidance": torch.full((count,), embedded_guidance, device=self.device)}

    @classmethod
    def guidance_arguments(cls, guidance: float, embedded_guidance: float) -> dict[str, object]:
        """Return the embedded guidance, the only one that the pipeline has."""
        return {"guidance_scale": embedded_guidance}


def _positions(height: int, width: int, tokens: int, like: Tensor) -> Tensor:
    """Return 0, row, column and token of each position, (1, height * width * tokens, 4)."""
    axes = [torch.arange(count, device=like.device) for count in (1, height, width, tokens)]
    return torch.cartesian_prod(*axes)[None]
