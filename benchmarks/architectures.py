"""Build published networks with random weights and random prompt embeddings.

They cost what the published models cost, and need no download. Their pictures are noise.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    StableDiffusion3Pipeline,
)
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from flowalign.models.base import FlowModel
from flowalign.models.config import ModelConfig
from flowalign.models.flux import Flux
from flowalign.models.sd3 import SD3

Dtypes = dict[str, torch.dtype]

SD35_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
SD3_SMALL = SD35_MEDIUM | {
    "num_layers": 12,
    "num_attention_heads": 8,
    "caption_projection_dim": 512,
    "joint_attention_dim": 768,
    "dual_attention_layers": (),
}
"""118 million parameters, for a CPU."""
FLUX_DEV = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
AUTOENCODER = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


class RandomSD35MediumPipeline(StableDiffusion3Pipeline):
    """A pipeline of SD3.5 medium's shapes without text encoders."""

    transformer_config: ClassVar[dict[str, Any]] = SD35_MEDIUM
    vae_config: ClassVar[dict[str, Any]] = AUTOENCODER

    @classmethod
    def from_pretrained(cls, *_: object, dtype: Dtypes, **__: object) -> Self:
        """Build the networks, where the package would load them."""
        with _building(dtype["default"]):
            transformer = SD3Transformer2DModel(**cls.transformer_config)
        with _building(dtype["vae"]):
            vae = AutoencoderKL(**cls.vae_config, scaling_factor=1.5305, shift_factor=0.0609)
        # The pipeline is typed as if text encoders could not be missing.
        texts: Any = [None] * 6
        return cls(transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae, *texts)


class RandomSD3SmallPipeline(RandomSD35MediumPipeline):
    """A pipeline of SD3's shapes that a CPU can train."""

    transformer_config = SD3_SMALL
    vae_config = AUTOENCODER | {"block_out_channels": (32, 64, 128, 128)}


class RandomFluxDevPipeline(FluxPipeline):
    """A pipeline of Flux-dev's shapes without text encoders."""

    @classmethod
    def from_pretrained(cls, *_: object, dtype: Dtypes, **__: object) -> Self:
        """Build the networks, where the package would load them."""
        with _building(dtype["default"]):
            transformer = FluxTransformer2DModel(**FLUX_DEV)
        with _building(dtype["vae"]):
            vae = AutoencoderKL(**AUTOENCODER, scaling_factor=0.3611, shift_factor=0.1159)
        # Flux-dev shifts its times by the number of image tokens.
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        # See above.
        texts: Any = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        return cls(scheduler=scheduler, vae=vae, transformer=transformer, **texts)


@contextmanager
def _building(dtype: torch.dtype) -> Iterator[None]:
    """Create modules in a dtype, and on the GPU if there is one, where random weights are fast."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            yield
    finally:
        torch.set_default_dtype(default)


class RandomSD35Medium(SD3):
    """Stable Diffusion 3.5 medium with random weights and embeddings."""

    @classmethod
    def pipeline_class(cls) -> type[StableDiffusion3Pipeline]:
        """Return the pipeline that builds random networks."""
        return RandomSD35MediumPipeline

    @classmethod
    def absent_components(cls, config: ModelConfig) -> list[str]:
        """Return none: there is no folder to look into."""
        return []

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Return random embeddings of the published shapes."""
        # 77 tokens of the two CLIPs, then those of T5.
        width: int = self.transformer.config["joint_attention_dim"]
        embeds = torch.randn(len(texts), 77 + self.config.max_sequence_length, width)
        return {"embeds": embeds, "pooled": torch.randn(len(texts), 2048)}


class RandomSD3Small(RandomSD35Medium):
    """SD3 in a size that a CPU can train, with random weights and embeddings."""

    @classmethod
    def pipeline_class(cls) -> type[StableDiffusion3Pipeline]:
        """Return the pipeline that builds random networks."""
        return RandomSD3SmallPipeline


class RandomFluxDev(Flux):
    """Flux-dev with random weights and embeddings."""

    @classmethod
    def pipeline_class(cls) -> type[FluxPipeline]:
        """Return the pipeline that builds random networks."""
        return RandomFluxDevPipeline

    @classmethod
    def absent_components(cls, config: ModelConfig) -> list[str]:
        """Return none: there is no folder to look into."""
        return []

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Return random embeddings of the published shapes."""
        embeds = torch.randn(len(texts), self.config.max_sequence_length, 4096)
        return {"embeds": embeds, "pooled": torch.randn(len(texts), 768)}


ARCHITECTURES: dict[str, tuple[str, type[FlowModel]]] = {
    "sd3-small": ("sd3", RandomSD3Small),
    "sd3.5-medium": ("sd3", RandomSD35Medium),
    "flux-dev": ("flux", RandomFluxDev),
}
"""For each architecture, the family's name in a configuration and the class."""
