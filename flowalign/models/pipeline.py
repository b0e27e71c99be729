"""Models that a diffusers pipeline loads: components, autoencoder, scheduler and adapter files."""

import contextlib
import hashlib
import json
import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any, cast, ClassVar, Literal, TYPE_CHECKING

import numpy as np
import torch
from torch import nn, Tensor

from flowalign.errors import UserError
from flowalign.flow import Latent
from flowalign.models.base import C, FlowModel, PipelineCall, Scheduler
from flowalign.models.config import Dtype, ModelConfig
from flowalign.models.frozen_linear import freeze_linears
from flowalign.models.hub import explain_loading, read_index
from flowalign.models.loading import ABSENT, load_pipeline

if TYPE_CHECKING:
    from peft import LoraConfig

LARGE, HUGE = 512 * 512, 1536 * 1536
"""Pixels from which the autoencoder decodes image by image, and from which tile by tile."""
SHIFT_DEFAULTS = {
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
}
"""Defaults of pipelines for entries that a scheduler's configuration may lack, in order."""
ENCODED_TOGETHER = 4
"""Prompts in a call of a text encoder with a large output, see `few_at_a_time`."""


@contextlib.contextmanager
def visiting(networks: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Move frozen networks to a device while the block runs.

    Nothing is copied back: the tensors on the CPU stay in memory and are put in place again.
    """
    modules = [module for network in networks for module in network.modules()]
    owned = [
        (module, name, tensor, tensor.data)
        for module in modules
        for name, tensor in chain(
            module.named_parameters(recurse=False), module.named_buffers(recurse=False)
        )
    ]
    try:
        for network in networks:
            network.to(device)
        yield
    finally:
        for module, name, tensor, value in owned:
            tensor.data = value
            setattr(module, name, tensor)


class PipelineModel(FlowModel[C]):
    """A family over the classes of a diffusers pipeline. The autoencoder stays in float32."""

    pipeline_name: ClassVar[str]
    """Name of the pipeline class in diffusers."""
    text_encoders: ClassVar[Sequence[str]]
    """Names of the pipeline's text encoders."""
    optional_components: ClassVar[Sequence[str]] = ()
    """Components that the folder of a model may lack."""
    patch: ClassVar[int] = 2
    """Height and width, in latents, of what the transformer takes as one token."""

    def __init__(self, config: C, device: str = "cpu"):
        from flowalign.models.rms_norm import replace_norms

        super().__init__(config, device)
        self.pipe = load_pipeline(
            self.pipeline_class(), config, self.optional_components, self.unused_components(config)
        )
        self.transformer: Any = self.pipe.transformer
        self.vae: Any = self.pipe.vae
        for network in (self.transformer, self.vae, *self._text_encoders()):
            # Some encoders of transformers are built in training mode, with dropout.
            network.requires_grad_(False).eval()
        self.merge_adapters()
        freeze_linears(self.transformer, config.quantize, self.device, config.offload)
        for network in self._text_encoders():
            freeze_linears(network, config.quantize, self.device)
        replace_norms(self.transformer)
        self.transformer.to(self.device)
        self.vae.to(self.device)
        if config.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        if config.height * config.width >= LARGE:
            self.vae.enable_slicing()
        if config.height * config.width > HUGE:
            self.vae.enable_tiling()
        self.use_attention(config.attention)
        self._check_size()

    @classmethod
    def pipeline_class(cls) -> Any:
        """Return the pipeline class."""
        import diffusers  # takes seconds, and reading a YAML file does not need it

        return getattr(diffusers, cls.pipeline_name)

    @classmethod
    @abstractmethod
    def describe(cls, path: str, index: Mapping[str, object]) -> ModelConfig:
        """Return settings for making pictures with a model, from its own files.

        Args:
            path: Folder or repository.
            index: Content of its `model_index.json`.
        """

    @classmethod
    def unused_components(cls, config: C) -> Sequence[str]:
        """Return the components that are not loaded under these settings."""
        return ()

    @abstractmethod
    def use_attention(self, name: str) -> None:
        """Switch the attention back end. Raises UserError if it is not active afterwards."""

    @abstractmethod
    def scheduler(self, steps: int) -> Scheduler:
        """Return a scheduler with this many steps, set up as the family's pipeline does."""

    def schedule(self, steps: int) -> list[float]:
        """Return the times of the pipeline's scheduler."""
        return self.scheduler(steps).sigmas.tolist()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the transformer without its adapters."""
        # Its own `dtype` looks at every parameter, and this is asked for in every call.
        return next(self.transformer.parameters()).dtype

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(channels, height, width)."""
        scale = self.pipe.vae_scale_factor
        height, width = self.config.height // scale, self.config.width // scale
        return self.vae.config.latent_channels, height, width

    def normalise(self, z: Latent) -> Latent:
        """Return latents of about unit scale from those of the autoencoder."""
        return (z - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def denormalise(self, x0: Latent) -> Latent:
        """Return the autoencoder's latents; the inverse of `normalise`."""
        return x0 / self.vae.config.scaling_factor + self.vae.config.shift_factor

    def latent_fingerprint(self) -> str:
        """Return a hash of the autoencoder's weights and settings."""
        weights = hashlib.blake2b(digest_size=16)
        # Weights and not the path: fine-tuned models differ from their parents by weights alone.
        for tensor in self.vae.state_dict().values():
            weights.update(tensor.float().cpu().numpy().tobytes())
        # Names that begin so say where the model comes from.
        config = {key: value for key, value in self.vae.config.items() if key[0] != "_"}
        weights.update(json.dumps(config, sort_keys=True, default=str).encode())
        return weights.hexdigest()

    def text_fingerprint(self) -> str:
        """Return a hash of the text encoders' weights, and of what else decides embeddings."""
        weights = hashlib.blake2b(digest_size=16)
        for network in self._text_encoders():
            for tensor in network.state_dict().values():
                weights.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        settings = [type(self).__name__, *self.text_arguments(self.config).items()]
        return f"{weights.hexdigest()}/{settings}"

    def decode(self, x0: Latent) -> Tensor:
        """Return pictures (B, 3, H, W) in [0, 1]. Differentiable."""
        decoded = self.vae.decode(self.denormalise(x0), return_dict=False)[0]
        return (decoded / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Latent:
        """Return latents of pictures (B, 3, H, W) in [0, 1].

        They are the mode of the autoencoder's posterior, so that equal pictures have equal latents.
        """
        posterior = self.vae.encode(images.to(self.device) * 2 - 1).latent_dist
        return self.normalise(posterior.mode())

    def shard(self, device: torch.device) -> None:
        """Split the transformer over the processes. The autoencoder is whole on each of them."""
        self.vae.to(device)
        super().shard(device)

    @contextlib.contextmanager
    def text_encoders_on_device(self) -> Iterator[None]:
        """Keep the text encoders on the device while they encode, or from then on."""
        if self.config.keep_text_encoders:
            for network in self._text_encoders():
                network.to(self.device)
            yield
            return
        # They can be the largest part of a model, and training needs none of them.
        with visiting(self._text_encoders(), self.device):
            yield

    def networks(self) -> dict[str, nn.Module]:
        """Return all networks of the pipeline by their component names."""
        parts = self.pipe.components.items()
        return {name: part for name, part in parts if isinstance(part, nn.Module)}

    def add_adapter(self, lora: "LoraConfig", name: str) -> None:
        """Put an adapter on the transformer, in a way that diffusers knows of."""
        self.transformer.add_adapter(lora, name)

    def save_adapter(
        self, folder: Path, state: Mapping[str, Tensor], settings: Mapping[str, object]
    ) -> None:
        """Write an adapter in diffusers' LoRA format."""
        # A file of transformer.save_lora_adapter would load as nothing, with a log line only.
        self.pipeline_class().save_lora_weights(
            folder,
            transformer_lora_layers=dict(state),
            transformer_lora_adapter_metadata=dict(settings),
        )

    def load_adapter(self, folder: Path, name: str) -> None:
        """Load an adapter by `load_lora_weights`, as a user of diffusers does."""
        self.pipe.load_lora_weights(folder, adapter_name=name)

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter from the pipeline."""
        self.pipe.delete_adapters(name)

    @classmethod
    def pipeline_call(
        cls, config: C, steps: int, guidance: float, embedded_guidance: float
    ) -> PipelineCall:
        """Return how the pipeline is loaded and called, from the files of the model."""
        size = {"height": config.height, "width": config.width}
        scale = cls.guidance_arguments(guidance, embedded_guidance)
        return PipelineCall(
            cls.pipeline_name,
            loading=dict.fromkeys(cls.absent_components(config)),
            calling={"num_inference_steps": steps, **scale, **size, **cls.text_arguments(config)},
        )

    @classmethod
    def absent_components(cls, config: C) -> list[str]:
        """Return the optional components that the model lacks or that these settings leave out."""
        index, unused = read_index(config.path, config.revision), cls.unused_components(config)
        return [
            name for name in cls.optional_components if name in unused or index.get(name) == ABSENT
        ]

    @classmethod
    def empty_transformer(cls, config: C) -> nn.Module:
        """Return the transformer on the meta device, from its configuration file.

        Raises UserError if the file cannot be read.
        """
        import diffusers

        kind = read_index(config.path, config.revision).get("transformer")
        try:
            network: Any = getattr(diffusers, cast(list[str], kind)[1])
            path, revision = os.path.expanduser(config.path), config.revision
            settings = network.load_config(path, subfolder="transformer", revision=revision)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(explain_loading("model.path", config.path, error)) from error
        with torch.device("meta"):
            return network.from_config(settings)

    @classmethod
    def model_folder(cls, config: C) -> Path:
        """Return the folder of the pipeline, which is downloaded if it is on the hub."""
        path = Path(config.path).expanduser()
        if path.is_dir():
            return path
        read_index(config.path, config.revision)
        try:
            download = cls.pipeline_class().download
            return Path(download(config.path, revision=config.revision, use_safetensors=True))
        except (OSError, ValueError) as error:
            raise UserError(explain_loading("model.path", config.path, error)) from error

    @classmethod
    @abstractmethod
    def guidance_arguments(cls, guidance: float, embedded_guidance: float) -> dict[str, object]:
        """Return the arguments of a pipeline call that set the guidance."""

    @classmethod
    def text_arguments(cls, config: C) -> dict[str, object]:
        """Return the arguments of a pipeline call that say how prompts are encoded."""
        return {}

    def _text_encoders(self) -> list[nn.Module]:
        encoders = [getattr(self.pipe, name) for name in self.text_encoders]
        return [encoder for encoder in encoders if encoder is not None]

    def _copy_scheduler(self) -> Any:
        # A copy for every call: set_timesteps changes the scheduler in place.
        return deepcopy(self.pipe.scheduler)

    def _check_size(self) -> None:
        """Raise UserError if the transformer's patches would not tile the picture."""
        step = self.patch * self.pipe.vae_scale_factor
        sides = self.config.height, self.config.width
        if any(side % step or side < step for side in sides):
            height, width = (max(step, round(side / step) * step) for side in sides)
            raise UserError(
                f"model.height and model.width must be multiples of {step}; "
                f"nearest: {height} and {width}."
            )


def set_times(scheduler: Any, steps: int, mu: float | None = None) -> Any:
    """Give a scheduler `steps` even times, which it shifts: by `mu`, if its shift is not fixed.

    Raises UserError for one step if the last time is fixed too: the only one would be 0 over 0.
    """
    if steps < 2 and scheduler.config.get("shift_terminal"):
        raise UserError("sampler.steps is 1, but this model needs 2 or more.")
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler


def shift_of_size(scheduler: Any, patches: int) -> float:
    """Return the shift of times for pictures of a number of patches, which Flux.1 began with."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    limits = [scheduler.config.get(name, value) for name, value in SHIFT_DEFAULTS.items()]
    return calculate_shift(patches, *limits)


def channel_statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel of latents, each (C, 1, 1).

    Autoencoders of videos have them in their configuration, in place of one scale and shift.
    """
    mean, deviation = (
        like.new_tensor(values)[:, None, None]
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, deviation


def few_at_a_time(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yield texts a few at a time, for encoders that take much memory for each text.

    For Qwen3 it is 0.16 GB if a word's probability is computed per token.
    """
    for start in range(0, len(texts), ENCODED_TOGETHER):
        yield list(texts[start : start + ENCODED_TOGETHER])


def picture_side(path: str) -> int:
    """Return the side of the square pictures that an autoencoder was trained on, in pixels."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    config: Any = AutoencoderKL.load_config(path, subfolder="vae")
    return config["sample_size"]


def dtype_for_device(half: Literal["float16", "bfloat16"]) -> Dtype:
    """Return the half precision that a family is published in on a GPU, and float32 on a CPU."""
    # It imports accelerate, which takes seconds and which reading a YAML file does not need.
    from flowalign import distributed

    return half if distributed.uses_gpus() else "float32"
