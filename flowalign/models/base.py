"""The interface of a model family, which needs torch alone. `pipeline.py` builds on diffusers."""

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import ClassVar, Generic, Literal, Protocol, TYPE_CHECKING, TypeVar

import torch
from torch import nn, Tensor

from flowalign.batch import Cond, distinct, Rows
from flowalign.errors import UserError
from flowalign.flow import Latent, PerImage
from flowalign.models.config import ModelConfig
from flowalign.models.given_adapters import find_file, merge, read_adapter
from flowalign.models.layer_adapter import LayerAdapter
from flowalign.models.layer_names import FusedLayers, Layers, linear_layers
from flowalign.models.lora import ADAPTER_FILE, add_lora, delete_lora, load_lora, save_lora
from flowalign.models.sharding import shard
from flowalign.models.text_cache import ENCODE_AT_ONCE, Row, TextCache
from flowalign.progress import task

if TYPE_CHECKING:
    from peft import LoraConfig

    from flowalign.disk_cache import DiskCache

C = TypeVar("C", bound=ModelConfig)


class Scheduler(Protocol):
    """The part of a diffusers scheduler that the package uses."""

    sigmas: Tensor
    """(K + 1,) times from 1 to 0."""
    timesteps: Tensor
    """(K,) the same times in the scheduler's own unit."""

    def step(self, v: Latent, t: Tensor, x: Latent, /, *, return_dict: bool) -> Sequence[Latent]:
        """Return the latents after the step from t."""
        ...


@dataclass(frozen=True)
class PipelineCall:
    """How a user makes pictures with the model in diffusers, for the README of an adapter."""

    pipeline: str
    """Name of the pipeline class."""
    loading: Mapping[str, object]
    """Keyword arguments of `from_pretrained`, beyond path and dtype."""
    calling: Mapping[str, object]
    """Keyword arguments of the call, beyond the prompt."""
    scheduler: Mapping[str, object] | None = None
    """Settings of the Euler scheduler that replaces the model's own; None if none is needed."""


class FlowModel(ABC, Generic[C]):
    """A flow-matching text-to-image model.

    Conventions that hold everywhere else in the package, whatever the network wants:

    - Times are in [0, 1]: 0 is data, 1 is noise. A velocity is dx/dt, so its target is noise - x0.
    - Latents are (B, *latent_shape) in float32, normalised to about unit scale.
    - Pictures are (B, 3, H, W) in [0, 1].
    - Guidance 1 means none.

    A family sets `transformer`, the network that adapters are put on, and converts in its own file.
    """

    Config: ClassVar[type[ModelConfig]]
    """Settings of the family: the `model` section of a YAML file."""
    lora_targets: Sequence[str]
    """Endings of the names of the linear layers that adapters are put on by default."""
    kohya_layers: ClassVar[FusedLayers] = {}
    """How adapters of kohya's scripts name the layers of the transformer."""
    comfyui_prefix: ClassVar[str | None] = None
    """Prefix under which ComfyUI maps diffusers' names of layers; None if it does not map them."""
    transformer: nn.Module

    def __init__(self, config: C, device: str = "cpu"):
        self.config, self.device = config, torch.device(device)
        self._texts = TextCache()

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent; the last two dimensions are height and width."""

    @abstractmethod
    def forward(self, x: Latent, t: PerImage, inputs: Mapping[str, Tensor]) -> Latent:
        """Return the velocity at (x, t) in the dtype of x: one call of the transformer."""

    @abstractmethod
    def schedule(self, steps: int) -> list[float]:
        """Return the `steps + 1` times from 1 to 0 that the family samples with."""

    @abstractmethod
    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Return inputs of `forward` by name, each (B, ...), in one shape for all texts."""

    def prompt_text(self, prompt: str) -> str:
        """Return what `encode_texts` reads for a prompt. It reads negative prompts as they are."""
        return prompt

    @abstractmethod
    def decode(self, x0: Latent) -> Tensor:
        """Return pictures (B, 3, H, W) in [0, 1]. Differentiable."""

    def encode_images(self, images: Tensor) -> Latent:
        """Return latents of pictures (B, 3, H, W) in [0, 1]. Only `data.pairs` needs it."""
        raise UserError(
            f"{type(self).__name__} cannot encode pictures. Implement encode_images to use pairs."
        )

    def latent_fingerprint(self) -> str:
        """Return a key of the latent cache, which changes whenever latents of a picture do."""
        raise UserError(
            f"{type(self).__name__} has no key for its latents. "
            "Implement latent_fingerprint to use pairs."
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that the transformer computes in."""
        return getattr(torch, self.config.dtype)

    @property
    def has_distilled_guidance(self) -> bool:
        """True if guidance is distilled into this model, which takes its scale as an input."""
        return False

    @property
    def is_step_distilled(self) -> bool:
        """True if the model was distilled to few steps. It is then used without guidance."""
        return False

    @property
    def guidance_setting(self) -> Literal["guidance", "embedded_guidance"]:
        """The key of `sampler` that guides this model, as a user of its pipeline does."""
        return "embedded_guidance" if self.has_distilled_guidance else "guidance"

    def guide(self, v: Latent, v_null: Latent, guidance: float) -> Latent:
        """Return the guided velocity, from those of the prompt and of the empty prompt.

        `guidance` is 1 for none. A family that counts from 0 for none subtracts 1 in its own file.
        """
        return v_null + guidance * (v - v_null)

    def velocity(self, x: Latent, t: PerImage, cond: Cond) -> Latent:
        """Return v at (x, t) under the guidance of `cond`, in one call of `forward`.

        If `cond` treats the empty prompt's velocity as a constant, it has a call of its own, which
        keeps nothing for the backward pass.
        """
        if cond.guidance == 1:
            return self.forward(x, t, cond.inputs)
        if not cond.null_gradient:
            with torch.no_grad():
                v_null = self.forward(x, t, cond.null)
            return self.guide(self.forward(x, t, cond.inputs), v_null, cond.guidance)
        # The order of diffusers' pipelines, negative first: parity tests compare to the last bit.
        inputs = {name: torch.cat([cond.null[name], rows]) for name, rows in cond.inputs.items()}
        v_null, v = self.forward(torch.cat([x, x]), torch.cat([t, t]), inputs).chunk(2)
        return self.guide(v, v_null, cond.guidance)

    def guidance_inputs(self, count: int, embedded_guidance: float) -> dict[str, Tensor]:
        """Return inputs (count, ...) that carry an embedded guidance; none for most families."""
        return {}

    def encode(
        self,
        prompts: list[str],
        embedded_guidance: float = 1.0,
        upcoming: Iterable[str] = (),
        negative: Sequence[str] | None = None,
    ) -> Cond:
        """Return the inputs of the prompts on the model's device. Equal prompts are encoded once.

        Args:
            prompts: One prompt per image.
            embedded_guidance: Scale for a model with distilled guidance; other models ignore it.
            upcoming: Prompts that will be needed next, the soonest first. If prompts are missing,
                as many of these as fit are encoded in the same visit to the device.
            negative: What guidance leads away from, one text per image; the empty prompt if None.
        """
        negative = [""] * len(prompts) if negative is None else list(negative)
        positive = [self.prompt_text(prompt) for prompt in prompts]
        # The cache gives the empty prompt to every call.
        texts = [*positive, *filter(None, negative)]
        later = map(self.prompt_text, upcoming)
        rows = self._texts.rows(texts, self._encode_chunks, later)

        def table(texts: Iterable[str]) -> dict[str, Tensor]:
            chosen = [rows[text] for text in texts]
            stacked = {name: torch.stack([row[name] for row in chosen]) for name in chosen[0]}
            # The scale is an input of both halves of a guided batch, as in diffusers.
            scale = self.guidance_inputs(len(chosen), embedded_guidance)
            return {name: values.to(self.device) for name, values in stacked.items()} | scale

        def side(texts: Sequence[str]) -> Rows:
            different, places = distinct(texts)
            return Rows(table(different), places.to(self.device))

        return Cond(side(positive), side(negative))

    def remember(
        self,
        prompts: Iterable[str],
        together: int = ENCODE_AT_ONCE,
        negative: Iterable[str] = (),
    ) -> None:
        """Encode prompts in advance and keep them, if the cache holds all of them.

        The text encoders move to the device once for all of them, and encode `together` prompts in
        a call. Encoded alone (1), a prompt has the same embedding in every run.
        """
        texts = [*map(self.prompt_text, prompts), *negative]
        self._texts.keep(texts, self._encode_chunks, together)

    def weights_fingerprint(self) -> str:
        """Return the SHA-256 of the transformer's weights as they are, without adapters.

        Call it before adapters are put on the model. Merged adapters count.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.transformer.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def text_fingerprint(self) -> str:
        """Return a key of the text cache, which changes whenever embeddings of a text do."""
        raise UserError(
            f"{type(self).__name__} has no key for its embeddings. "
            "Implement text_fingerprint to use model.text_cache_gb."
        )

    @cached_property
    def _stored_texts(self) -> "DiskCache":
        """The rows of texts on disk."""
        # It imports safetensors, which reading a YAML file does not need.
        from flowalign.disk_cache import DiskCache

        limit = int(1e9 * self.config.text_cache_gb)
        return DiskCache("texts", self.text_fingerprint(), limit=limit)

    def _encode_chunks(self, chunks: Sequence[list[str]]) -> Iterator[tuple[str, Row]]:
        """Yield each text with its row, from the disk or from the encoders."""
        if not self.config.text_cache_gb:
            yield from self._encode_anew(chunks)
            return
        missing = []
        for text in chain.from_iterable(chunks):
            if row := self._stored_texts.read(text.encode()):
                yield text, row
            else:
                missing.append(text)
        if not missing:
            return
        # Each text alone, so that its row does not depend on which others were missing.
        for text, row in self._encode_anew([[text] for text in missing]):
            self._stored_texts.write(text.encode(), row)
            yield text, row
        self._stored_texts.trim()

    @torch.no_grad()
    def _encode_anew(self, chunks: Sequence[list[str]]) -> Iterator[tuple[str, Row]]:
        total = sum(map(len, chunks))
        # One visit to the device for all chunks: moving large encoders takes longer than they work.
        with task("encoding prompts", total) as work, self.text_encoders_on_device():
            for chunk in chunks:
                inputs = {name: rows.cpu() for name, rows in self.encode_texts(chunk).items()}
                for number, text in enumerate(chunk):
                    yield text, {name: rows[number] for name, rows in inputs.items()}
                work.advance(len(chunk))

    def text_encoders_on_device(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which `encode_texts` is called."""
        return contextlib.nullcontext()

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks that the transformer repeats: the entries of its lists of modules."""
        lists = [part for part in self.transformer.children() if isinstance(part, nn.ModuleList)]
        return [block for part in lists for block in part]

    def shard(self, device: torch.device) -> None:
        """Move the model to a device, with a part of the transformer's weights on each process.

        The model must be on the CPU, without adapters. Blocks are moved one by one (FSDP2), so that
        the whole transformer need not fit the device. All processes call this together, and must
        then make equally many forwards and backwards, in the same order. A family moves its other
        networks.
        """
        self.device = device
        shard(self.transformer, self.blocks, device)

    def networks(self) -> dict[str, nn.Module]:
        """Return all networks by name, to count their parameters and check their gradients."""
        return {"transformer": self.transformer}

    def read_adapter(self, path: str, key: str) -> dict[str, LayerAdapter]:
        """Read a LoRA of another training by the names of its layers.

        `key` is the key of the configuration. Raises UserError if the adapter does not fit.
        """
        return read_adapter(path, self.layers_of(self.transformer), key)

    def merge_adapters(self) -> None:
        """Add the adapters of `model.merge` to the weights, before these are quantised."""
        for path in self.config.merge:
            if find_file(path, "model.merge").name != ADAPTER_FILE:
                # The export will translate its names: a family that cannot do so says it now.
                self.empty_transformer(self.config)
            merge(self.read_adapter(path, "model.merge"), linear_layers(self.transformer))

    @classmethod
    def layers_of(cls, transformer: nn.Module) -> Layers:
        """Return the layers of a transformer without adapters, and their names elsewhere."""
        linears = linear_layers(transformer)
        return Layers(linears=linears, fused=cls.kohya_layers, swapped=cls.swapped(linears))

    @classmethod
    def empty_transformer(cls, config: C) -> nn.Module:
        """Return the transformer on the meta device, built without reading weights."""
        raise UserError(
            f"{cls.__name__} does not say how its layers are named elsewhere. Choose "
            "--format diffusers, or implement empty_transformer."
        )

    @classmethod
    def model_folder(cls, config: C) -> Path:
        """Return the folder with all weights of the model, which may be downloaded for it."""
        raise UserError(
            f"{cls.__name__} has no folder of a diffusers pipeline. Choose --format diffusers."
        )

    @classmethod
    def swapped(cls, layers: Collection[str]) -> Collection[str]:
        """Return the layers with a scale above a shift, if the original code has the shift first.

        `layers` are the names of all linear layers.
        """
        return ()

    def add_adapter(self, lora: "LoraConfig", name: str) -> None:
        """Put an adapter on the transformer."""
        add_lora(self.transformer, lora, name)

    def save_adapter(
        self, folder: Path, state: Mapping[str, Tensor], settings: Mapping[str, object]
    ) -> None:
        """Write the matrices and the PEFT settings of an adapter for the tools of the family."""
        save_lora(folder, state, settings)

    def load_adapter(self, folder: Path, name: str) -> None:
        """Load what `save_adapter` wrote as another adapter, as the tools of the family do."""
        load_lora(self.transformer, folder, name)

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter from the transformer."""
        delete_lora(self.transformer, name)

    def scheduler(self, steps: int) -> Scheduler | None:
        """Return the diffusers scheduler that `schedule` follows, or None if there is none."""
        return None

    @classmethod
    def pipeline_call(
        cls, config: C, steps: int, guidance: float, embedded_guidance: float
    ) -> PipelineCall | None:
        """Return how diffusers samples as the package does, or None if it cannot.

        No weights are loaded for it.
        """
        return None
