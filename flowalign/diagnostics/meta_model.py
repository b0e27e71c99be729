"""A model without weights, and a ledger that counts what the real one would allocate and compute.

The networks are built from their configuration files on torch's device `meta`, where tensors have a
shape but no values. The code that trains works on the CPU, with small latents of zeros. Every call
of a network is carried out on the meta device at full size, where the ledger counts it.
"""

import gc
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from math import prod
from typing import Any, cast, NamedTuple
from unittest.mock import patch

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn, Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from flowalign.batch import Cond, distinct, Rows
from flowalign.bundled import locate
from flowalign.errors import UserError
from flowalign.flow import Latent, PerImage
from flowalign.models.base import FlowModel
from flowalign.models.config import ModelConfig
from flowalign.models.families import family_of
from flowalign.models.frozen_linear import parameter_count
from flowalign.models.pipeline import PipelineModel
from flowalign.models.text_cache import ENCODE_AT_ONCE

META, CPU = torch.device("meta"), torch.device("cpu")
SIDE = 8
"""Largest height and width of the small latents."""
EMPTY = (torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty)
"""Operators that only allocate."""
CALLS = "forwards without gradient", "forwards with gradient", "backwards"
"""Names of the transformer's calls in a ledger."""


class Kernel(NamedTuple):
    """The work of a GPU for one operator."""

    unit: str
    """The unit that multiplies: "half", "tf32" or "float32"."""
    flops: int
    """Floating-point operations of products, convolutions and attention; 0 for others."""
    bytes: int
    """Bytes that are read and written."""


Work = Counter[Kernel | str]
"""How often each kernel runs, and how often the transformer is called, by kind of call.

A mean over the places of a window need not be a whole number.
"""


def flops(work: Work) -> int:
    """Return the floating-point operations of some work."""
    return round(sum(kernel.flops * count for kernel, count in kernels(work)))


def kernels(work: Work) -> Iterator[tuple[Kernel, int]]:
    """Yield every kernel of some work and how often it runs."""
    for kernel, count in work.items():
        if isinstance(kernel, Kernel):
            yield kernel, count


@dataclass
class Cost:
    """The cost of a part of the work."""

    work: Work = field(default_factory=Counter)
    peak: int = 0
    """The most bytes allocated, beyond those allocated before."""
    kept: int = 0
    """The bytes still allocated at the end, beyond those allocated before."""


class Ledger(TorchDispatchMode):
    """While active, counts the bytes in use and the work done on the meta device.

    Tensors on the CPU count only if they are latents of the shape `small`. They count as latents of
    the shape `full`.
    """

    def __init__(self, small: tuple[int, ...], full: tuple[int, ...]) -> None:
        super().__init__()
        self.small, self.magnification = small, prod(full) // prod(small)
        self.bytes, self.peak, self.work = 0, 0, Work()

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device == META:
            # A text encoder asks whether all tokens are text: a plan counts the longest prompts.
            return True
        if func is torch.ops.aten.where.self and args[0].device == CPU and args[1].device == META:
            # A mask that decides shapes has values even in a plan.
            args = (args[0].to(META), *args[1:])
        result = func(*args, **kwargs)
        inputs = _tensors((args, kwargs))
        # Views share the storage of an input, and the storage of a result must count once.
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        for tensor in _tensors(result):
            storage, size = tensor.untyped_storage(), self.size(tensor)
            if size and storage._cdata not in known:
                known.add(storage._cdata)
                self._add(size)
                weakref.finalize(storage, self._add, -size)
        if kernel := _kernel(func, args, kwargs, inputs, result):
            self.work[kernel] += 1
        return result

    def size(self, tensor: Tensor) -> int:
        """Return the bytes that the tensor's storage stands for."""
        size = tensor.untyped_storage().nbytes()
        if tensor.device == META:
            return size
        return self.magnification * size if tensor.shape[-3:] == self.small else 0

    def _add(self, size: int) -> None:
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    @contextmanager
    def part(self) -> Iterator[Cost]:
        """Measure what is done inside. The cost is filled in at the end."""
        # What is left in reference cycles would otherwise be freed, and counted, at any time.
        gc.collect()
        cost, start, peak, work = Cost(), self.bytes, self.peak, self.work.copy()
        self.peak = start
        yield cost
        gc.collect()
        cost.work, cost.peak, cost.kept = self.work - work, self.peak - start, self.bytes - start
        self.peak = max(peak, self.peak)

    def repeat(self, cost: Cost) -> None:
        """Count a cost again, without doing its work."""
        self.work += cost.work
        self.peak = max(self.peak, self.bytes + cost.peak)


@contextmanager
def older_objects_kept() -> Iterator[None]:
    """Let the garbage collector leave alone what exists already.

    Parts of a ledger collect garbage. To look at all objects of the imported libraries would take
    most of a plan's time.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _kernel(
    func: Any, args: tuple, kwargs: dict, inputs: list[Tensor], result: object
) -> Kernel | None:
    """Return the kernel of an operator on the meta device, or None if it moves no bytes."""
    outputs = _tensors(result)
    if not outputs or any(tensor.device != META for tensor in outputs):
        return None
    owned = {tensor.untyped_storage()._cdata for tensor in inputs}
    is_view = all(tensor.untyped_storage()._cdata in owned for tensor in outputs)
    if (is_view and not func._schema.is_mutable) or func._overloadpacket in EMPTY:
        return None
    moved = sum(map(_bytes, [*inputs, *outputs]))
    formula = flop_registry.get(func._overloadpacket)
    count = formula(*args, **kwargs, out_val=result) if formula else 0
    return Kernel(_unit(func, (inputs or outputs)[0].dtype), count, moved)


def _bytes(tensor: Tensor) -> int:
    """Return the bytes that a kernel moves for a tensor. A repeated row is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _unit(func: object, dtype: torch.dtype) -> str:
    """Return which unit of a GPU computes an operator."""
    if dtype in (torch.float16, torch.bfloat16):
        return "half"
    # By default torch allows tf32 for the convolutions of float32, but not for its products.
    return "tf32" if "convolution" in str(func) else "float32"


@contextmanager
def fused_attention() -> Iterator[None]:
    """Replace attention without a mask by a kernel that keeps no (tokens × tokens) matrix.

    Torch chooses such a kernel on GPUs and CPUs, but not on the meta device.
    """
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
        # Scale and causality change neither shapes nor counts.
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    # A TorchFunctionMode would not do: torch switches it off inside `backward`, where checkpointed
    # blocks run again.
    with patch.object(F, "scaled_dot_product_attention", fused):
        yield


class Exchange(torch.autograd.Function):
    """Replaces a tensor by zeros of another shape on another device, and its gradient likewise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Return zeros of the shape on the device, in the dtype of x."""
        ctx.origin = x.shape, x.device
        return x.new_zeros(shape, device=device)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return zeros of the shape and on the device of x."""
        shape, device = ctx.origin
        return gradients[0].new_zeros(shape, device=device), None, None


class MetaModel(FlowModel):
    """A family's model on the meta device, which looks like a small model on the CPU.

    All prompts are alike. Velocities and images are zeros.
    """

    def __init__(self, config: ModelConfig):
        """Build the networks. Raises UserError if their configuration files cannot be read."""
        super().__init__(config, "cpu")
        self.family = build_on_meta(config)
        self.transformer, self.lora_targets = self.family.transformer, self.family.lora_targets
        networks = self.networks().items()
        self.parameters = {name: parameter_count(network) for name, network in networks}
        self.weights = {name: _weight_bytes(network) for name, network in networks}
        self.ledger = Ledger(self.latent_shape, self.family.latent_shape)
        self.costs = dict[tuple, Cost]()
        with torch.no_grad(), self.ledger, self.ledger.part() as self.encoding:
            encoded = self.encode_texts([self.family.prompt_text("")] * ENCODE_AT_ONCE)
            # A copy: the views would keep all rows in use.
            self.texts = {name: rows[:1].clone() for name, rows in encoded.items()}

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of the small latents."""
        *channels, height, width = self.family.latent_shape
        return *channels, min(SIDE, height), min(SIDE, width)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that the transformer computes in."""
        return self.family.dtype

    def networks(self) -> dict[str, nn.Module]:
        """Return all networks by name."""
        return self.family.networks()

    def schedule(self, steps: int) -> list[float]:
        """Return the times of the family."""
        # On the meta device, times would have no values.
        with CPU:
            return self.family.schedule(steps)

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Return the embeddings of the family, on the meta device."""
        return self.family.encode_texts(texts)

    def encode(
        self,
        prompts: list[str],
        embedded_guidance: float = 1.0,
        upcoming: Iterable[str] = (),
        negative: Sequence[str] | None = None,
    ) -> Cond:
        """Return a number for each prompt, in place of its embeddings."""
        different, index = distinct(prompts)
        numbers = torch.zeros(len(different), 1)
        inputs = Rows({"prompt": numbers}, index)
        return Cond(inputs, Rows({"prompt": numbers[:1].clone()}, torch.zeros_like(index)))

    def forward(self, x: Latent, t: PerImage, inputs: Mapping[str, Tensor]) -> Latent:
        """Call the network of the family, on the meta device."""
        return self.family.forward(x, t, inputs)

    def velocity(self, x: Latent, t: PerImage, cond: Cond) -> Latent:
        """Return zeros, and count the family's velocity at full size."""
        gradient = torch.is_grad_enabled()

        def compute() -> Tensor:
            full = Exchange.apply(x, (len(x), *self.family.latent_shape), META)
            times = Exchange.apply(t, t.shape, META)
            return self.family.velocity(full, times, self._full_cond(cond, len(x)))

        self.ledger.work[CALLS[gradient]] += 1
        # The empty prompt has a call of its own if its velocity has no gradient.
        self.ledger.work[CALLS[0]] += cond.guidance != 1 and not cond.null_gradient
        question = "velocity", len(x), cond.guidance == 1, cond.null_gradient, self._adapted()
        v = self._count(question, compute, tuple(x.shape))
        if gradient:
            v.register_hook(self._count_backward)
        return v

    def _full_cond(self, cond: Cond, rows: int) -> Cond:
        """Return the condition with inputs of full size."""
        table = self.texts | self.family.guidance_inputs(1, 1.0)
        texts = Rows(table, torch.zeros(rows, dtype=torch.long, device=META))
        return replace(cond, inputs=texts, null=texts)

    def _adapted(self) -> bool:
        """True if an adapter is active."""
        layers = (m for m in self.transformer.modules() if isinstance(m, BaseTunerLayer))
        return not next(layers).disable_adapters

    def _count_backward(self, _: Tensor) -> None:
        self.ledger.work[CALLS[2]] += 1

    def decode(self, x0: Latent) -> Tensor:
        """Return zeros (B, 3, 1, 1), and count the family's decoder at full size."""
        shape = len(x0), *self.family.latent_shape
        return self._count(
            ("decode", len(x0)),
            lambda: self.family.decode(Exchange.apply(x0, shape, META)),
            (len(x0), 3, 1, 1),
        )

    def _count(
        self, question: tuple, compute: Callable[[], Tensor], shape: tuple[int, ...]
    ) -> Tensor:
        """Return zeros of a shape, and count a computation."""
        if torch.is_grad_enabled():
            return Exchange.apply(compute(), shape, CPU)
        # Without gradient nothing is kept, and equal questions cost the same: one is computed.
        if question in self.costs:
            self.ledger.repeat(self.costs[question])
        else:
            with self.ledger.part() as cost:
                compute()
            self.costs[question] = cost
        return torch.zeros(shape)


def _weight_bytes(network: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*network.parameters(), *network.buffers()])


def build_on_meta(config: ModelConfig) -> PipelineModel:
    """Build a family's model on the meta device, from configuration files alone.

    Raises:
        UserError: The family is not a pipeline of diffusers, or its files cannot be read.
    """
    family = family_of(config.name)
    if not issubclass(family, PipelineModel):
        raise UserError(
            f"flowalign plan counts models that diffusers loads, and {config.name} is not one of "
            "them. Derive the family from flowalign.models.pipeline.PipelineModel."
        )

    class Weightless(family):
        """The family, with a pipeline that loads no weights."""

        @classmethod
        def pipeline_class(cls) -> Any:
            return WeightlessPipeline(super().pipeline_class(), family.text_encoders)

        def use_attention(self, name: str) -> None:
            """Ignore the setting: all back ends keep the same for the backward pass."""

    # The cast is for type checkers, which take the class for abstract because `family` may be.
    return cast(type[PipelineModel], Weightless)(with_bundled_files(config), "meta")


def with_bundled_files(config: ModelConfig) -> ModelConfig:
    """Return the same settings with the package's copy of a published model's configuration.

    Models that it has no copy of stay as they are.
    """
    if os.path.isdir(os.path.expanduser(config.path)):
        return config
    copy = locate(f"assets/published/{config.path}")
    return replace(config, path=copy, revision=None) if os.path.isdir(copy) else config


class WeightlessPipeline:
    """Stands for a pipeline class, and builds its networks from configuration files."""

    def __init__(self, pipeline: Any, text_encoders: Sequence[str]) -> None:
        self.pipeline, self.__name__ = pipeline, pipeline.__name__
        self.networks = [*text_encoders, "transformer", "vae"]

    def from_pretrained(
        self, path: str, revision: str | None, dtype: dict[str, torch.dtype], **settings: object
    ) -> Any:
        """Return the pipeline with networks on the meta device. Other parts are loaded."""
        index = self.pipeline.load_config(path, revision=revision)
        networks = {
            part: _network(
                index[part],
                dtype.get(part, dtype["default"]),
                path,
                subfolder=part,
                revision=revision,
            )
            for part in self.networks
            if part in index and part not in settings
        }
        return self.pipeline.from_pretrained(path, revision=revision, **networks, **settings)


def _network(kind: list[str], dtype: torch.dtype, path: str, **location: object) -> nn.Module:
    """Build a network of diffusers or transformers in the precision that it is loaded in."""
    library, name = kind
    network: Any = getattr(import_module(library), name)
    with META:
        if library == "diffusers":
            return network.from_config(network.load_config(path, **location)).to(dtype)
        config = network.config_class.from_pretrained(path, **location)
        built = network._from_config(config, dtype=dtype)
        # T5 keeps some layers in float32 whatever the dtype of the model.
        precise = built._get_dtype_plan(dtype)
    for path_in_network, module in built.named_modules():
        module.to(precise.get(path_in_network.rpartition(".")[2]))
    return cast(nn.Module, built)
