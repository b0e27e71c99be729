"""A model without its weights, to count with: networks that know shapes and nothing else, and a ledger of what they would take.

The networks are built from their configuration files on torch's device `meta`. Callers work on the CPU with small latents of
zeros, and every question is put to the networks at full size.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from math import prod
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn, Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from flowalign.batch import Cond
from flowalign.errors import UserError
from flowalign.flow import Latent, PerImage
from flowalign.models.base import ENCODE_AT_ONCE
from flowalign.models.config import ModelConfig
from flowalign.models.families import family_of
from flowalign.models.pipeline import PipelineModel

META, CPU = torch.device("meta"), torch.device("cpu")
SIDE = 8
"""Of the small latents, where the full ones are larger."""
CALLS = "forwards without gradient", "forwards with gradient", "backwards"
"""Of the transformer, as the ledger names them."""


@dataclass
class Cost:
    """What a part of the work took."""

    work: Counter[str] = field(default_factory=Counter)
    """FLOPs by precision, and calls of the transformer by kind."""
    peak: int = 0
    """Bytes at most, and"""
    kept: int = 0
    """bytes at its end, beyond those that were there before."""


class Ledger(TorchDispatchMode):
    """While it is active, the bytes in use on the meta device and the work done there; small latents count as full ones."""

    def __init__(self, small: tuple[int, ...], full: tuple[int, ...]) -> None:
        super().__init__()
        self.small, self.magnified = small, prod(full) // prod(small)
        self.bytes, self.peak, self.work = 0, 0, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = _tensors((args, kwargs))
        known = {tensor.untyped_storage()._cdata for tensor in given}
        for tensor in _tensors(made):
            storage = tensor.untyped_storage()
            if (size := self.size(tensor)) and storage._cdata not in known:
                known.add(storage._cdata)
                self._add(size)
                weakref.finalize(storage, self._add, -size)
        if flops := flop_registry.get(func._overloadpacket):
            self.work[_precision(func, given[0].dtype)] += flops(
                *args, **(kwargs or {}), out_val=made
            )
        return made

    def size(self, tensor: Tensor) -> int:
        """Bytes of all that its storage stands for."""
        times = (
            1 if tensor.device == META else self.magnified if tensor.shape[-3:] == self.small else 0
        )
        return times * tensor.untyped_storage().nbytes()

    def _add(self, size: int) -> None:
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    @contextmanager
    def part(self) -> Iterator[Cost]:
        """What is done inside."""
        cost, start, peak, work = Cost(), self.bytes, self.peak, self.work.copy()
        self.peak = start
        yield cost
        cost.work, cost.peak, cost.kept = self.work - work, self.peak - start, self.bytes - start
        self.peak = max(peak, self.peak)

    def again(self, cost: Cost) -> None:
        """The same once more."""
        self.work += cost.work
        self.peak = max(self.peak, self.bytes + cost.peak)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _precision(func: Any, dtype: torch.dtype) -> str:
    """Which units of a GPU do it. By default torch allows tf32 in float32's convolutions, not in its products."""
    if dtype in (torch.float16, torch.bfloat16):
        return "half"
    return "tf32" if "convolution" in str(func) else "float32"


@contextmanager
def attention_of_gpus() -> Iterator[None]:
    """Attention that keeps no (tokens × tokens) matrix, which torch would choose on GPUs and CPUs, but not on the meta device."""
    plain = F.scaled_dot_product_attention

    def fused(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *rest: Any,
        **settings: Any,
    ) -> Tensor:
        if attn_mask is not None:
            return plain(query, key, value, attn_mask, *rest, **settings)
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


class Across(torch.autograd.Function):
    """In the place of a tensor, zeros of another shape on another device; likewise of its gradient on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
        ctx.origin = x.shape, x.device
        return x.new_zeros(shape, device=device)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        shape, device = ctx.origin
        return gradients[0].new_zeros(shape, device=device), None, None


class Outline(PipelineModel):
    """Mixed with a family by `outline`; its ledger is told all that it is asked. Prompts are all alike."""

    def __init__(self, config: ModelConfig):
        super().__init__(config, "meta")
        self.full_shape = super().latent_shape
        self.ledger, self.costs = Ledger(self.latent_shape, self.full_shape), dict[Any, Cost]()
        networks = self.networks()
        self.parameters = {
            name: sum(p.numel() for p in part.parameters()) for name, part in networks.items()
        }
        self.weights = {
            name: sum(x.nbytes for x in [*p.parameters(), *p.buffers()])
            for name, p in networks.items()
        }
        with torch.no_grad(), self.ledger, self.ledger.part() as self.encoding:
            encoded = self.encode_texts([""] * ENCODE_AT_ONCE)
            self.texts = {name: rows[:1].clone() for name, rows in encoded.items()}
        self.device = CPU

    @property
    def latent_shape(self) -> tuple[int, ...]:
        *channels, height, width = super().latent_shape
        return *channels, min(SIDE, height), min(SIDE, width)

    def use_attention(self, name: str) -> None:
        """All of them keep the same."""

    def schedule(self, steps: int) -> list[float]:
        with CPU:
            return super().schedule(steps)

    def encode(self, prompts: list[str], embedded_guidance: float = 1.0) -> Cond:
        row = torch.zeros(1, 1).expand(len(prompts), 1)
        return Cond({"prompt": torch.zeros(len(prompts), 1)}, {"prompt": row})

    def velocity(self, x: Latent, t: PerImage, cond: Cond) -> Latent:
        family, gradient = super(), torch.is_grad_enabled()

        def ask() -> Tensor:
            texts = {name: row.expand(len(x), *row.shape[1:]) for name, row in self.texts.items()}
            with META:
                texts |= self.guidance_inputs(len(x), 1.0)
            full = replace(cond, inputs=texts, null=texts)
            return family.velocity(
                Across.apply(x, (len(x), *self.full_shape), META),
                Across.apply(t, t.shape, META),
                full,
            )

        self.ledger.work[CALLS[gradient]] += 1
        adapted = not next(
            m for m in self.transformer.modules() if isinstance(m, BaseTunerLayer)
        ).disable_adapters
        v = self._answer(("velocity", len(x), cond.guidance == 1, adapted), ask, tuple(x.shape))
        if gradient:
            v.register_hook(self._went_back)
        return v

    def _went_back(self, _: Tensor) -> None:
        self.ledger.work[CALLS[2]] += 1

    def decode(self, x0: Latent) -> Tensor:
        family = super()
        full = (len(x0), *self.full_shape)
        return self._answer(
            ("decode", len(x0)),
            lambda: family.decode(Across.apply(x0, full, META)),
            (len(x0), 3, 1, 1),
        )

    def _answer(self, question: Any, ask: Callable[[], Tensor], shape: tuple[int, ...]) -> Tensor:
        """Zeros. What is asked without gradient costs the same every time, and is worked out once."""
        if torch.is_grad_enabled():
            return Across.apply(ask(), shape, CPU)
        if question in self.costs:
            self.ledger.again(self.costs[question])
        else:
            with self.ledger.part() as cost:
                ask()
            self.costs[question] = cost
        return torch.zeros(shape)


def outline(config: ModelConfig) -> Outline:
    """The outline of a model. UserError where its files cannot be opened."""
    family = family_of(config.name)
    if not issubclass(family, PipelineModel):
        raise UserError(
            f"flowalign plan counts models that diffusers loads, and {config.name} is not one of "
            "them. Derive the family from flowalign.models.pipeline.PipelineModel."
        )
    pipeline: Any = family.pipeline_class()
    networks = [*family.text_encoders, "transformer", "vae"]

    def from_pretrained(
        path: str, revision: str | None, dtype: dict[str, torch.dtype], **absent: Any
    ) -> Any:
        index = pipeline.load_config(path, revision=revision)
        built = {
            part: _network(
                index[part],
                dtype.get(part, dtype["default"]),
                path,
                subfolder=part,
                revision=revision,
            )
            for part in networks
            if part in index and part not in absent
        }
        return pipeline.from_pretrained(path, revision=revision, **built, **absent)

    hollow = type(
        pipeline.__name__, (pipeline,), {"from_pretrained": staticmethod(from_pretrained)}
    )
    members = {"pipeline_class": classmethod(lambda _: hollow)}
    return cast(Outline, type("Outline", (Outline, family), members)(config))


def _network(kind: list[str], dtype: torch.dtype, path: str, **place: Any) -> nn.Module:
    """A network of diffusers or transformers from its configuration file, in the precision it is loaded in."""
    library, name = kind
    network: Any = getattr(import_module(library), name)
    with META:
        if library == "diffusers":
            return network.from_config(network.load_config(path, **place)).to(dtype)
        made = network._from_config(
            network.config_class.from_pretrained(path, **place), dtype=dtype
        )
        precise = made._get_dtype_plan(dtype)  # T5 keeps some layers in float32
    for place_in_it, module in made.named_modules():
        module.to(precise.get(place_in_it.rpartition(".")[2]))
    return made
