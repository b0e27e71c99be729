"""Z-Image and Z-Image-Turbo over diffusers' own classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from flowalign.flow import Latent, PerImage
from flowalign.models.attention import backend_names, use_backend
from flowalign.models.base import Scheduler
from flowalign.models.config import ModelConfig
from flowalign.models.layer_names import in_blocks
from flowalign.models.pipeline import dtype_for_device, picture_side, PipelineModel, set_times
from flowalign.settings.types import NonNegative, WrongSetting

BLOCKS = ("layers", "noise_refiner", "context_refiner")
ATTENTION = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
FEED_FORWARD = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
KOHYA_LAYERS = {
    name: layers
    for block in BLOCKS
    for name, layers in in_blocks(
        block,
        block,
        {layer.replace(".", "_"): [layer] for layer in (*ATTENTION, *FEED_FORWARD)},
    ).items()
}
TURBO_SHIFT = 3.0
"""The shift of times of Turbo. That of the base is 6, and no file names the kind of model."""


@dataclass(kw_only=True)
class ZImageConfig(ModelConfig):
    """Settings of Z-Image."""

    default_guidance: ClassVar[float] = 5.0

    name: str = "z-image"
    """Name of the family."""
    max_sequence_length: Annotated[int, Field(ge=1, le=512)] = 512
    """The most tokens of a prompt, with those of the chat template."""
    largest_norm: NonNegative = 0.0
    """The most that guidance may lengthen a velocity, published as 1; 0 for any length."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype == "float16":
            raise WrongSetting(
                "dtype is float16, in which this model's activations overflow. Set it to bfloat16."
            )

    @classmethod
    def attention_names(cls) -> Sequence[str]:
        """Return all attention back ends of the installed diffusers."""
        return backend_names()


class ZImage(PipelineModel[ZImageConfig]):
    """Z-Image. Inputs: embeds (B, tokens, width), padded with zeros, and tokens (B,).

    The transformer's times run from noise to data, and it returns minus the velocity.
    """

    Config: ClassVar = ZImageConfig
    kohya_layers: ClassVar = KOHYA_LAYERS
    comfyui_prefix: ClassVar = "transformer."
    pipeline_name: ClassVar = "ZImagePipeline"
    text_encoders: ClassVar = ["text_encoder"]
    lora_targets = (*ATTENTION, *FEED_FORWARD)

    @classmethod
    def describe(cls, path: str, index: Mapping[str, object]) -> ZImageConfig:
        """Return the published settings: bfloat16 on a GPU."""
        side = picture_side(path)
        return ZImageConfig(path=path, dtype=dtype_for_device("bfloat16"), height=side, width=side)

    @property
    def is_step_distilled(self) -> bool:
        """True for Turbo."""
        return self.pipe.scheduler.config.shift == TURBO_SHIFT

    def forward(self, x: Latent, t: PerImage, inputs: Mapping[str, Tensor]) -> Latent:
        """Return the velocity. Captions have different lengths, so the transformer takes lists."""
        embeds, counts = inputs["embeds"].to(self.dtype), _lengths(inputs)
        captions = [row[:count] for row, count in zip(embeds, counts, strict=True)]
        # A picture is a video of one frame. The time is rounded as the pipeline rounds it.
        frames: Any = x.to(self.dtype)[:, :, None].unbind(0)
        found = self.transformer(
            list(frames), (1000 - 1000 * t) / 1000, captions, return_dict=False
        )[0]
        return -torch.stack([each[:, 0].to(x.dtype) for each in found])

    def guide(self, v: Latent, v_null: Latent, guidance: float) -> Latent:
        """Return the guided velocity, not longer than `largest_norm` times that of the prompt."""
        guided = super().guide(v, v_null, guidance)
        if not self.config.largest_norm:
            return guided
        over = (1, 2, 3)
        length, limit = (torch.linalg.vector_norm(u, dim=over, keepdim=True) for u in (guided, v))
        return guided * (self.config.largest_norm * limit / length).clamp(max=1)

    def scheduler(self, steps: int) -> Scheduler:
        """Return the scheduler; its shift of times is fixed."""
        return set_times(self._copy_scheduler(), steps)

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Return a hidden state of the text encoder for each token, and the number of tokens."""
        tokenizer = self.pipe.tokenizer
        tokens = tokenizer(
            [self._in_template(text) for text in texts],
            padding="max_length",
            padding_side="right",
            max_length=self.config.max_sequence_length,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        mask = tokens.attention_mask
        found = self.pipe.text_encoder(
            input_ids=tokens.input_ids,
            attention_mask=mask,
            output_hidden_states=True,
            use_cache=False,
        )
        # The one before the last layer, with zeros for the padding.
        embeds = found.hidden_states[-2]
        return {"embeds": embeds * mask[..., None].to(embeds), "tokens": mask.sum(1)}

    def _in_template(self, text: str) -> str:
        """Return a text as a user's turn in the chat template."""
        return self.pipe.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=True,
        )

    def use_attention(self, name: str) -> None:
        """Switch to a back end of diffusers by name."""
        use_backend(self.transformer, self.dtype, name)

    @classmethod
    def guidance_arguments(cls, guidance: float, embedded_guidance: float) -> dict[str, object]:
        """Return classifier-free guidance as the pipeline counts it: from 0 for none."""
        return {"guidance_scale": guidance - 1}

    @classmethod
    def text_arguments(cls, config: ZImageConfig) -> dict[str, object]:
        """Return the number of tokens, and the limit of guided velocities."""
        return {
            "max_sequence_length": config.max_sequence_length,
            "cfg_normalization": config.largest_norm,
        }


def _lengths(inputs: Mapping[str, Tensor]) -> list[int]:
    """Return the number of tokens of each row."""
    tokens = inputs["tokens"]
    if tokens.is_meta:
        # A plan counts the longest prompts.
        return [inputs["embeds"].shape[1]] * len(tokens)
    return tokens.tolist()
