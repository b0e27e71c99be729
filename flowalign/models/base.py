"""What every model family shares: loading, prompt embeddings, guidance and the autoencoder."""

import contextlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowalign.batch import Cond
from flowalign.errors import UserError
from flowalign.flow import Latent, PerImage
from flowalign.models.config import ModelConfig
from flowalign.models.loading import load_pipeline

CACHE_BYTES = 2**30
ENCODE_AT_ONCE = 64


class FlowModel(ABC):
    """A flow-matching text-to-image model. t is in [0, 1]; latents are (B, channels, height, width) in float32."""

    pipeline_class: ClassVar[type]
    lora_targets: ClassVar[list[str]]
    text_encoders: ClassVar[list[str]]

    def __init__(self, config: ModelConfig, device: str = "cpu"):
        self.config, self.device = config, torch.device(device)
        self.pipe = load_pipeline(self.pipeline_class, config, self.optional_components(config))
        self.transformer = self.pipe.transformer.requires_grad_(False).eval().to(self.device)
        self.vae = self.pipe.vae.requires_grad_(False).eval().to(self.device)
        for name in self.text_encoders:
            if (encoder := getattr(self.pipe, name)) is not None:
                encoder.requires_grad_(False).eval()
        if config.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        if config.height * config.width >= 512 * 512:
            self.vae.enable_slicing()
        if config.height * config.width > 1536 * 1536:
            self.vae.enable_tiling()
        self.use_attention(config.attention)
        self._cache: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
        step = 2 * self.pipe.vae_scale_factor
        if config.height % step or config.width % step or min(config.height, config.width) < step:
            near = [max(step, round(side / step) * step) for side in (config.height, config.width)]
            raise UserError(
                f"model.height and model.width must be multiples of {step}; nearest: {near[0]} and {near[1]}."
            )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        scale = self.pipe.vae_scale_factor
        return (
            self.vae.config.latent_channels,
            self.config.height // scale,
            self.config.width // scale,
        )

    @property
    def has_distilled_guidance(self) -> bool:
        """Whether guidance is distilled into it and `Cond.embedded_guidance` is an input."""
        return False

    def velocity(self, x: Latent, t: PerImage, cond: Cond) -> Latent:
        """V at (x, t), guided as `cond` says: one forward, of a doubled batch where there is guidance."""
        if cond.guidance == 1:
            return self.forward(x, t, cond)
        embeds, pooled = (
            torch.cat([cond.null_embeds, cond.embeds]),
            torch.cat([cond.null_pooled, cond.pooled]),
        )
        both = replace(cond, embeds=embeds, pooled=pooled, guidance=1.0)
        v_null, v = self.forward(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return v_null + cond.guidance * (v - v_null)

    @abstractmethod
    def forward(self, x: Latent, t: PerImage, cond: Cond) -> Latent:
        """The transformer's velocity for these embeddings, in the dtype of x: float32."""

    @abstractmethod
    def scheduler(self, steps: int) -> Any:
        """A scheduler of diffusers, set to so many steps as the family's pipeline sets it."""

    def schedule(self, steps: int) -> list[float]:
        """Times from 1 to 0, `steps + 1` of them, as the family's pipeline chooses them."""
        return self.scheduler(steps).sigmas.tolist()

    @abstractmethod
    def encode_texts(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings (B, tokens, width) and pooled embeddings (B, width)."""

    @abstractmethod
    def use_attention(self, name: str) -> None:
        """Switch the attention implementation, or raise UserError when it is not active afterwards."""

    @staticmethod
    def optional_components(config: ModelConfig) -> list[str]:
        """Components of the pipeline that may be missing."""
        return []

    def encode(self, prompts: list[str]) -> Cond:
        """Embeddings of the prompts, on the model's device. Equal prompts are encoded once and remembered."""
        rows = self._rows(prompts)
        embeds, pooled = (
            torch.stack([rows[p][i] for p in prompts]).to(self.device) for i in (0, 1)
        )
        null_embeds, null_pooled = (
            rows[""][i].to(self.device).expand_as(e) for i, e in enumerate((embeds, pooled))
        )
        return Cond(embeds, pooled, null_embeds, null_pooled)

    def remember(self, prompts: list[str]) -> None:
        """Encode prompts ahead, in one visit of the text encoders to the device, as many as the cache holds."""
        self._rows(list(dict.fromkeys(prompts))[: self._room() - 1])

    def _room(self) -> int:
        return max(2, CACHE_BYTES // sum(tensor.nbytes for tensor in self._rows([])[""]))

    @torch.no_grad()
    def _rows(self, prompts: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """Embeddings and pooled embeddings of every prompt and of the empty one, on the CPU."""
        wanted = list(dict.fromkeys(["", *prompts]))
        rows = {text: self._cache[text] for text in wanted if text in self._cache}
        if missing := [text for text in wanted if text not in rows]:
            with self._encoders_on_device():
                for start in range(0, len(missing), ENCODE_AT_ONCE):
                    texts = missing[start : start + ENCODE_AT_ONCE]
                    rows |= zip(
                        texts,
                        zip(*(e.cpu() for e in self.encode_texts(texts)), strict=True),
                        strict=True,
                    )
        for text, row in rows.items():
            self._cache[text] = row
            self._cache.move_to_end(text)
        room = max(2, CACHE_BYTES // sum(tensor.nbytes for tensor in rows[""]))
        while len(self._cache) > room:
            self._cache.popitem(last=False)
        return rows

    @contextlib.contextmanager
    def _encoders_on_device(self) -> Iterator[None]:
        """The text encoders are the largest part of SD3 and Flux: on the device only while they work."""
        encoders = [
            encoder
            for name in self.text_encoders
            if (encoder := getattr(self.pipe, name)) is not None
        ]
        for encoder in encoders:
            encoder.to(self.device)
        try:
            yield
        finally:
            if self.device.type != "cpu":
                for encoder in encoders:
                    encoder.to("cpu")

    def decode(self, x0: Latent) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1]; differentiable."""
        z = x0 / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return (self.vae.decode(z, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Latent:
        """Latents of pictures (B, 3, H, W) in [0, 1]: the mode of the autoencoder's posterior."""
        z = self.vae.encode(images.to(self.device) * 2 - 1).latent_dist.mode()
        return (z - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def _scheduler(self, **arguments: Any) -> Any:
        scheduler = deepcopy(self.pipe.scheduler)
        scheduler.set_timesteps(**arguments)
        return scheduler
