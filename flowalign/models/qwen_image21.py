"""Qwen-Image 2.1 over diffusers' own classes."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, ClassVar

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from flowalign.errors import UserError
from flowalign.flow import Latent, PerImage
from flowalign.models.attention import use_native
from flowalign.models.base import Scheduler
from flowalign.models.config import ModelConfig
from flowalign.models.layer_names import in_blocks
from flowalign.models.pipeline import (
    channel_statistics,
    dtype_for_device,
    few_at_a_time,
    PipelineModel,
    set_times,
    shift_of_size,
)

LAYERS = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("img_mlp.proj", "img_mlp.gate_layer", "img_mlp.out"),
)
SIDE = 2048
"""Height and width of pictures where none are given, as published."""
NULL = " "
"""The text in place of an empty prompt, which has no token of its own in the template."""


@dataclass(kw_only=True)
class QwenImage21Config(ModelConfig):
    """Settings of Qwen-Image 2.1."""

    side_step: ClassVar[int] = 32

    name: str = "qwen-image-2.1"
    """Name of the family."""
    max_sequence_length: Annotated[int, Field(ge=16, le=1024)] = 512
    """The most tokens of a prompt, with those of the template. The pipeline knows no limit."""


class QwenImage21(PipelineModel[QwenImage21Config]):
    """Qwen-Image 2.1. Inputs: embeds (B, tokens, width), padded with zeros, and tokens (B,).

    One transformer reads text and picture in a row. The positions of the picture begin after the
    text, so that padding would change it: prompts of different lengths have calls of their own.
    """

    Config: ClassVar = QwenImage21Config
    kohya_layers: ClassVar = in_blocks(
        "transformer_blocks",
        "transformer_blocks",
        {layer.replace(".", "_"): [layer] for layer in LAYERS},
    )
    comfyui_prefix: ClassVar = "transformer."
    pipeline_name: ClassVar = "QwenImage21Pipeline"
    text_encoders: ClassVar = ["text_encoder"]
    lora_targets = LAYERS

    @classmethod
    def describe(cls, path: str, index: Mapping[str, object]) -> QwenImage21Config:
        """Return the published settings: bfloat16 on a GPU."""
        return QwenImage21Config(
            path=path, dtype=dtype_for_device("bfloat16"), height=SIDE, width=SIDE
        )

    @property
    def is_step_distilled(self) -> bool:
        """True for Turbo, which comes with the times of its few steps."""
        return self.pipe.config.sample_sigmas is not None

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(channels, height, width)."""
        scale = self.pipe.vae_scale_factor
        height, width = self.config.height // scale, self.config.width // scale
        return self.vae.config.z_dim, height, width

    def forward(self, x: Latent, t: PerImage, inputs: Mapping[str, Tensor]) -> Latent:
        """Return the velocity, from a call of the transformer for each length of a prompt."""
        embeds, lengths = inputs["embeds"].to(self.dtype), _lengths(inputs)
        groups = {
            length: [row for row, each in enumerate(lengths) if each == length]
            for length in sorted(set(lengths))
        }
        parts = [
            self._of_one_length(x[rows], t[rows], embeds[rows, :length])
            for length, rows in groups.items()
        ]
        order = torch.tensor(list(chain(*groups.values())), device=x.device).argsort()
        return torch.cat(parts)[order]

    def _of_one_length(self, x: Latent, t: PerImage, embeds: Tensor) -> Latent:
        """Return the velocity beside prompts of one length. Text comes first, then the picture."""
        height, width = x.shape[2:]
        # Which positions are the picture's decides shapes, so a plan needs the values too.
        device = "cpu" if x.is_meta else x.device
        # Here, four tokens of the picture count as one.
        places = torch.arange(embeds.shape[1] + height * width // 4, device=device)
        tokens = self.transformer(
            hidden_states=rearrange(x, "b c h w -> b (h w) c").to(self.dtype),
            timestep=t,
            encoder_hidden_states=embeds,
            img_shapes=[[(1, height, width)]] * len(x),
            img_mask=(places >= embeds.shape[1])[None],
            return_dict=False,
        )[0]
        v = tokens[:, embeds.shape[1] :].to(x.dtype)
        return rearrange(v, "b (h w) c -> b c h w", h=height)

    def scheduler(self, steps: int) -> Scheduler:
        """Return the scheduler; its shift of times grows with the number of latents.

        Raises UserError if the model has times of its own, and of another number.
        """
        own, (_, height, width) = self.pipe.config.sample_sigmas, self.latent_shape
        scheduler = self._copy_scheduler()
        shift = shift_of_size(scheduler, height * width)
        if own is None:
            return set_times(scheduler, steps, shift)
        if len(own) != steps:
            raise UserError(
                f"sampler.steps is {steps}, but this model was distilled to {len(own)} times of "
                f"its own. Set it to {len(own)}."
            )
        scheduler.set_timesteps(sigmas=own, mu=shift)
        return scheduler

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Return the states of the text encoder before its last norm, and the number of tokens."""
        parts = [self._encode(self._token_numbers(part)) for part in few_at_a_time(texts)]
        embeds, counts = (torch.cat(values) for values in zip(*parts, strict=True))
        return {"embeds": embeds, "tokens": counts}

    def _encode(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Return the embeddings of texts, given as their tokens, and their numbers of tokens."""
        # The template's instruction comes first, and is left out.
        start = self.pipe._drop_idx
        # The encoder is causal, so padding after a text changes nothing.
        tokens = self.pipe.processor.tokenizer.pad(
            {"input_ids": rows},
            padding="max_length",
            padding_side="right",
            max_length=start + self.config.max_sequence_length,
            return_tensors="pt",
        ).to(self.device)
        # The network below the head, which would compute a word's probability for each token.
        encoder = self.pipe.text_encoder.model
        with encoder.language_model.norm.register_forward_hook(_undone):
            found = encoder(input_ids=tokens.input_ids, use_cache=False).last_hidden_state
        mask = tokens.attention_mask[:, start:]
        return found[:, start:] * mask[..., None].to(found), mask.sum(1)

    def _token_numbers(self, texts: list[str]) -> list[list[int]]:
        """Return the tokens of texts in the template, whose end stays if a text is too long."""
        tokenizer, template = self.pipe.processor.tokenizer, self.pipe.prompt_template_t2i
        end = tokenizer(template.partition("{}")[2]).input_ids
        longest = self.pipe._drop_idx + self.config.max_sequence_length
        rows = tokenizer([template.format(text or NULL) for text in texts]).input_ids
        return [row if len(row) <= longest else [*row[: longest - len(end)], *end] for row in rows]

    def text_fingerprint(self) -> str:
        """Return a hash of the text encoder, with the length that all rows are padded to."""
        return f"{super().text_fingerprint()}/{self.config.max_sequence_length}"

    def normalise(self, z: Latent) -> Latent:
        """Return latents of about unit scale from those of the autoencoder."""
        mean, deviation = channel_statistics(self.vae, z)
        return (z - mean) / deviation

    def denormalise(self, x0: Latent) -> Latent:
        """Return the autoencoder's latents; the inverse of `normalise`."""
        mean, deviation = channel_statistics(self.vae, x0)
        return x0 * deviation + mean

    def decode(self, x0: Latent) -> Tensor:
        """Return pictures (B, 3, H, W) in [0, 1], without their transparency. Differentiable."""
        frames = self.vae.decode(self.denormalise(x0)[:, :, None], return_dict=False)[0]
        return (frames[:, :3, 0] / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Latent:
        """Return latents of pictures (B, 3, H, W) in [0, 1], which are opaque."""
        opaque = F.pad(images.to(self.device), (0, 0, 0, 0, 0, 1), value=1.0)
        frames = opaque[:, :, None] * 2 - 1
        return self.normalise(self.vae.encode(frames).latent_dist.mode()[:, :, 0])

    def use_attention(self, name: str) -> None:
        """Follow PyTorch's own choice. The transformer ignores other back ends in most calls."""
        use_native(self.transformer)

    def shard(self, device: torch.device) -> None:
        """Raise UserError: processes would make different numbers of calls of the transformer."""
        raise UserError(
            "distributed.shard is true, but Qwen-Image 2.1 has a call for each length of a prompt, "
            "and the weights are gathered in every call. Set it to false."
        )

    @classmethod
    def guidance_arguments(cls, guidance: float, embedded_guidance: float) -> dict[str, object]:
        """Return classifier-free guidance, which the pipeline has only with a negative prompt."""
        if guidance == 1:
            return {"true_cfg_scale": 1.0}
        return {"true_cfg_scale": guidance, "negative_prompt": NULL}

    @classmethod
    def text_arguments(cls, config: QwenImage21Config) -> dict[str, object]:
        """Return that texts are computed anew in each step, as in training."""
        return {"use_kv_cache": False}


def _undone(_module: object, inputs: tuple[Tensor], _output: Tensor) -> Tensor:
    """Return the input of a layer in place of its output."""
    return inputs[0]


def _lengths(inputs: Mapping[str, Tensor]) -> list[int]:
    """Return the number of tokens of each row."""
    tokens = inputs["tokens"]
    if tokens.is_meta:
        # A plan counts the longest prompts.
        return [inputs["embeds"].shape[1]] * len(tokens)
    return tokens.tolist()
