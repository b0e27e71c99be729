"""SANA and SANA 1.5 over diffusers' own classes."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import signature
from itertools import groupby
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from flowalign.errors import UserError
from flowalign.flow import Latent, PerImage
from flowalign.models.base import PipelineCall, Scheduler
from flowalign.models.config import ModelConfig
from flowalign.models.pipeline import dtype_for_device, PipelineModel, set_times
from flowalign.settings.types import WrongSetting

SCALE = 32
"""Pixels of a picture for each latent, on each side."""


@dataclass(kw_only=True)
class SanaConfig(ModelConfig):
    """Settings of SANA."""

    default_guidance: ClassVar[float] = 4.5
    side_step: ClassVar[int] = SCALE

    name: str = "sana"
    """Name of the family."""
    max_sequence_length: Annotated[int, Field(ge=2, le=300)] = 300
    """The most tokens of a prompt, without those of the instruction before it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype == "float16":
            raise WrongSetting(
                "dtype is float16, in which this model's activations overflow. Set it to bfloat16."
            )


class Sana(PipelineModel[SanaConfig]):
    """SANA. Inputs: embeds (B, tokens, width) and mask (B, tokens).

    The published scheduler's steps are of second order. Here they are Euler's, on times with the
    same shift.
    """

    Config: ClassVar = SanaConfig
    pipeline_name: ClassVar = "SanaPipeline"
    text_encoders: ClassVar = ["text_encoder"]
    patch: ClassVar = 1
    lora_targets = tuple(
        f"{attention}.{layer}"
        for attention in ("attn1", "attn2")
        for layer in ("to_q", "to_k", "to_v", "to_out.0")
    )

    def __init__(self, config: SanaConfig, device: str = "cpu"):
        super().__init__(config, device)
        kind = self.pipe.scheduler.config.get("prediction_type")
        if self.transformer.config.guidance_embeds or kind == "trigflow":
            raise UserError(
                f"model.path: {config.path} is a SANA-Sprint, whose network does not return a "
                "velocity. Use SANA or SANA 1.5."
            )

    @classmethod
    def describe(cls, path: str, index: Mapping[str, object]) -> SanaConfig:
        """Return the published settings: bfloat16 on a GPU, at the size of the training."""
        from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel

        parts: Any = SanaTransformer2DModel.load_config(path, subfolder="transformer")
        side = SCALE * parts["sample_size"]
        return SanaConfig(path=path, dtype=dtype_for_device("bfloat16"), height=side, width=side)

    def forward(self, x: Latent, t: PerImage, inputs: Mapping[str, Tensor]) -> Latent:
        """Return the velocity. The transformer takes times from 0 to 1000."""
        v = self.transformer(
            x.to(self.dtype),
            encoder_hidden_states=inputs["embeds"].to(self.dtype),
            encoder_attention_mask=inputs["mask"],
            timestep=1000 * t * self.transformer.config.timestep_scale,
            return_dict=False,
        )[0]
        return v.to(x.dtype)

    def scheduler(self, steps: int) -> Scheduler:
        """Return a scheduler of Euler steps with the shift of times of the model's own."""
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
            FlowMatchEulerDiscreteScheduler,
        )

        shift = _shift(self.pipe.scheduler.config)
        return set_times(FlowMatchEulerDiscreteScheduler(shift=shift), steps)

    @cached_property
    def instruction(self) -> list[str]:
        """The lines that the pipeline puts before each prompt."""
        return signature(type(self.pipe).__call__).parameters["complex_human_instruction"].default

    def prompt_text(self, prompt: str) -> str:
        """Return the instruction and the prompt."""
        return "\n".join(self.instruction) + prompt

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Return the hidden states of the text encoder, and which tokens are the text's."""
        start, parts = self.prompt_text(""), []
        for is_prompt, group in groupby(texts, lambda text: text.startswith(start)):
            # The pipeline adds the instruction again, after it made the prompt lower-case.
            embeds, mask, _, _ = self.pipe.encode_prompt(
                [text.removeprefix(start) for text in group],
                do_classifier_free_guidance=False,
                device=self.device,
                max_sequence_length=self.config.max_sequence_length,
                complex_human_instruction=self.instruction if is_prompt else None,
            )
            parts.append((embeds, mask))
        embeds, mask = (torch.cat(rows) for rows in zip(*parts, strict=True))
        return {"embeds": embeds, "mask": mask}

    def normalise(self, z: Latent) -> Latent:
        """Return latents of about unit scale from those of the autoencoder."""
        return z * self.vae.config.scaling_factor

    def denormalise(self, x0: Latent) -> Latent:
        """Return the autoencoder's latents; the inverse of `normalise`."""
        return x0 / self.vae.config.scaling_factor

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Latent:
        """Return latents of pictures (B, 3, H, W) in [0, 1]."""
        return self.normalise(self.vae.encode(images.to(self.device) * 2 - 1, return_dict=False)[0])

    def use_attention(self, name: str) -> None:
        """Keep PyTorch's attention: the network's processors ignore other back ends."""

    @classmethod
    def pipeline_call(
        cls, config: SanaConfig, steps: int, guidance: float, embedded_guidance: float
    ) -> PipelineCall:
        """Return how the pipeline is called, with Euler steps."""
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
            FlowMatchEulerDiscreteScheduler,
        )

        call = super().pipeline_call(config, steps, guidance, embedded_guidance)
        path, revision = os.path.expanduser(config.path), config.revision
        settings: Any = FlowMatchEulerDiscreteScheduler.load_config(
            path, subfolder="scheduler", revision=revision
        )
        # Without times of its own, the pipeline ends with a step of almost no length.
        times = {"sigmas": [(steps - k) / steps for k in range(steps)]}
        calling = {**call.calling, **times, "use_resolution_binning": False}
        return replace(call, calling=calling, scheduler={"shift": _shift(settings)})

    @classmethod
    def guidance_arguments(cls, guidance: float, embedded_guidance: float) -> dict[str, object]:
        """Return classifier-free guidance as the pipeline calls it."""
        return {"guidance_scale": guidance}

    @classmethod
    def text_arguments(cls, config: SanaConfig) -> dict[str, object]:
        """Return the number of tokens."""
        return {"max_sequence_length": config.max_sequence_length}


def _shift(scheduler: Mapping[str, Any]) -> float:
    """Return the shift of times in the settings of a scheduler of either kind."""
    return scheduler["shift"] if "shift" in scheduler else scheduler["flow_shift"]
