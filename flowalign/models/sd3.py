"""Stable Diffusion 3 and 3.5 over diffusers' own classes."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from flowalign.errors import UserError
from flowalign.flow import Latent, PerImage
from flowalign.models.base import Scheduler
from flowalign.models.config import ModelConfig
from flowalign.models.layer_names import last_block
from flowalign.models.loading import ABSENT
from flowalign.models.pipeline import dtype_for_device, picture_side, PipelineModel

T5 = ("text_encoder_3", "tokenizer_3")
KOHYA_LAYERS = {
    f"joint_blocks_{{}}_{name}": [f"transformer_blocks.{{}}.{layer}" for layer in layers]
    for name, layers in {
        "x_block_attn_qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
        "x_block_attn_proj": ["attn.to_out.0"],
        "x_block_attn2_qkv": ["attn2.to_q", "attn2.to_k", "attn2.to_v"],
        "x_block_attn2_proj": ["attn2.to_out.0"],
        "x_block_mlp_fc1": ["ff.net.0.proj"],
        "x_block_mlp_fc2": ["ff.net.2"],
        "context_block_attn_qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
        "context_block_attn_proj": ["attn.to_add_out"],
        "context_block_mlp_fc1": ["ff_context.net.0.proj"],
        "context_block_mlp_fc2": ["ff_context.net.2"],
        "x_block_adaLN_modulation_1": ["norm1.linear"],
        "context_block_adaLN_modulation_1": ["norm1_context.linear"],
    }.items()
} | {
    "t_embedder_mlp_0": ["time_text_embed.timestep_embedder.linear_1"],
    "t_embedder_mlp_2": ["time_text_embed.timestep_embedder.linear_2"],
    "y_embedder_mlp_0": ["time_text_embed.text_embedder.linear_1"],
    "y_embedder_mlp_2": ["time_text_embed.text_embedder.linear_2"],
    "context_embedder": ["context_embedder"],
    "final_layer_adaLN_modulation_1": ["norm_out.linear"],
    "final_layer_linear": ["proj_out"],
}


@dataclass(kw_only=True)
class SD3Config(ModelConfig):
    """Settings of Stable Diffusion 3 and 3.5."""

    default_guidance: ClassVar[float] = 4.5

    name: str = "sd3"
    """Name of the family."""
    max_sequence_length: Annotated[int, Field(ge=0, le=512)] = 256
    """T5 tokens per prompt. 0 leaves T5 out."""

    @classmethod
    def attention_names(cls) -> Sequence[str]:
        """Return PyTorch's attention and xformers."""
        # The attention processors of SD3 ignore set_attention_backend, without an error.
        return ["native", "xformers"]


class SD3(PipelineModel[SD3Config]):
    """Stable Diffusion 3 and 3.5. Inputs: embeds (B, tokens, width) and pooled (B, width).

    T5 is optional: a folder may lack it, and `max_sequence_length: 0` leaves it out.
    """

    Config: ClassVar = SD3Config
    kohya_layers: ClassVar = KOHYA_LAYERS
    comfyui_prefix: ClassVar = "transformer."
    pipeline_name: ClassVar = "StableDiffusion3Pipeline"
    text_encoders: ClassVar = ["text_encoder", "text_encoder_2", "text_encoder_3"]
    optional_components: ClassVar = T5
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )

    def __init__(self, config: SD3Config, device: str = "cpu"):
        super().__init__(config, device)
        parts = self.transformer.config
        largest = parts.pos_embed_max_size * parts.patch_size * self.pipe.vae_scale_factor
        if max(config.height, config.width) > largest:
            raise UserError(
                f"model.height and model.width may be at most {largest} for {config.path}."
            )

    @classmethod
    def describe(cls, path: str, index: Mapping[str, object]) -> SD3Config:
        """Return the published settings: float16 on a GPU, 256 T5 tokens if the model has T5."""
        side, has_t5 = picture_side(path), index.get("text_encoder_3", ABSENT) != ABSENT
        return SD3Config(
            path=path,
            dtype=dtype_for_device("float16"),
            height=side,
            width=side,
            max_sequence_length=256 if has_t5 else 0,
        )

    @classmethod
    def swapped(cls, layers: Collection[str]) -> Collection[str]:
        """Return the last modulations of both streams, which have two vectors and no gates."""
        return {"norm_out.linear", last_block(layers, ".norm1_context.linear")}

    @classmethod
    def unused_components(cls, config: SD3Config) -> Sequence[str]:
        """Return T5 if prompts have no T5 tokens."""
        # Without T5, diffusers appends max_sequence_length zero tokens at full cost.
        return () if config.max_sequence_length else T5

    def forward(self, x: Latent, t: PerImage, inputs: Mapping[str, Tensor]) -> Latent:
        """Return the velocity. The transformer takes times from 0 to 1000."""
        embeds, pooled = inputs["embeds"].to(self.dtype), inputs["pooled"].to(self.dtype)
        v = self.transformer(x.to(self.dtype), embeds, pooled, 1000 * t, return_dict=False)[0]
        return v.to(x.dtype)

    def scheduler(self, steps: int) -> Scheduler:
        """Return the scheduler; its shift of times is fixed."""
        scheduler = self._copy_scheduler()
        scheduler.set_timesteps(num_inference_steps=steps)
        return scheduler

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Return embeddings of CLIP and T5 tokens, and the pooled vectors of both CLIP models."""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompt=texts,
            prompt_2=texts,
            prompt_3=texts,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.config.max_sequence_length,
        )
        return {"embeds": embeds, "pooled": pooled}

    def use_attention(self, name: str) -> None:
        """Switch to xformers by its own method."""
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
        # diffusers can leave a processor in place without an error.
        processors = self.transformer.attn_processors.values()
        active = {type(processor).__name__ for processor in processors}
        if not all("XFormers" in name for name in active):
            raise UserError(
                f"model.attention is xformers, but {', '.join(active)} are active. Use native."
            )

    @classmethod
    def guidance_arguments(cls, guidance: float, embedded_guidance: float) -> dict[str, object]:
        """Return classifier-free guidance as the pipeline calls it."""
        return {"guidance_scale": guidance}

    @classmethod
    def text_arguments(cls, config: SD3Config) -> dict[str, object]:
        """Return the number of T5 tokens; the pipeline's default would change the picture."""
        return {"max_sequence_length": config.max_sequence_length}
