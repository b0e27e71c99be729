"""Linear layers that are not trained: their weights in fewer bits, or in main memory."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn, Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from flowalign.models.config import Quantize

BLOCK = 64
"""Weights that share a scale. QLoRA's size; each scale is a float32 number."""
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The 16 values of 4-bit NormalFloat, from the code of QLoRA (arXiv 2305.14314, appendix E)."""


def _to_nf4(x: Tensor) -> Tensor:
    values = torch.tensor(NF4, device=x.device)
    nearest = torch.bucketize(x, (values[1:] + values[:-1]) / 2, out_int32=True).to(torch.uint8)
    return nearest[:, 0::2] * 16 + nearest[:, 1::2]


def _from_nf4(codes: Tensor, dtype: torch.dtype) -> Tensor:
    return F.embedding(codes.int(), _nf4_pairs(codes.device, dtype)).flatten(1)


@cache
def _nf4_pairs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the two values of each byte, (256, 2)."""
    values = torch.tensor(NF4, device=device, dtype=dtype)
    return torch.cartesian_prod(values, values)


Stored = dict[str, Tensor]
"""The tensors that a weight is stored as, by name."""


class Whole:
    """A weight that is stored as it is."""

    def encode(self, weight: Tensor) -> Stored:
        """Return what is stored for a weight (out, in)."""
        return {"whole": weight}

    def decode(self, stored: Stored, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return the weight again."""
        return stored["whole"]


@dataclass(frozen=True)
class Blocks:
    """A weight that is stored as codes, with a scale for each block of them."""

    largest: float
    """The largest number of a block, after division by its scale."""
    to_codes: Callable[[Tensor], Tensor]
    """From numbers (blocks, BLOCK) to codes."""
    to_numbers: Callable[[Tensor, torch.dtype], Tensor]
    """From codes to numbers (blocks, BLOCK) of a dtype, in memory of their own."""

    def encode(self, weight: Tensor) -> Stored:
        """Return the nearest codes, and the scales (blocks, 1) in float32."""
        numbers = weight.float().flatten()
        blocks = F.pad(numbers, (0, -len(numbers) % BLOCK)).view(-1, BLOCK)
        scale = blocks.abs().amax(1, keepdim=True) / self.largest
        # A block of zeros has no scale, and any will do.
        scale = scale + (scale == 0)
        return {"codes": self.to_codes(blocks / scale), "scale": scale}

    def decode(self, stored: Stored, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return the weight, rounded."""
        numbers = self.to_numbers(stored["codes"], dtype).mul_(stored["scale"])
        return numbers.flatten()[: shape.numel()].view(shape)


FORMATS: dict[Quantize, Whole | Blocks] = {
    "none": Whole(),
    "int8": Blocks(127, lambda x: x.round().to(torch.int8), lambda codes, dtype: codes.to(dtype)),
    "fp8": Blocks(448, lambda x: x.to(torch.float8_e4m3fn), lambda codes, dtype: codes.to(dtype)),
    "nf4": Blocks(1, _to_nf4, _from_nf4),
}
"""The values of `model.quantize`."""


class FrozenLinear(nn.Linear):
    """A linear layer whose weight is decoded whenever it is used, and never kept.

    Autograd would keep a decoded weight for the backward pass. Here that pass decodes it again. For
    other code, such as PEFT's, `weight` is a tensor of the original shape and dtype.
    """

    place: Tensor
    """An empty buffer, which follows the layer to its device."""

    def __init__(self, layer: nn.Linear, quantize: Quantize):
        # The weight of nn.Linear is a parameter, and here it is not one.
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.shape, self.dtype = layer.weight.shape, layer.weight.dtype
        self.format, self.bias = FORMATS[quantize], layer.bias
        stored = self.format.encode(layer.weight.detach())
        self._names, self._home = list(stored), Stored()
        for name, tensor in stored.items():
            self.register_buffer(name, tensor)
        self.register_buffer("place", torch.empty(0, device=layer.weight.device))

    def stay(self, pin: bool) -> None:
        """Keep the stored tensors where they are, when the layer moves. Each use copies them.

        Pages of main memory that are pinned are copied without the processor.
        """
        for name in self._names:
            tensor = self.get_buffer(name)
            delattr(self, name)
            self._home[name] = tensor.pin_memory() if pin else tensor

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The decoded weight (out, in), on the layer's device."""
        device = self.place.device
        stored = {
            name: tensor.to(device, non_blocking=True, copy=True)
            for name, tensor in self._home.items()
        } or {name: self.get_buffer(name) for name in self._names}
        return self.format.decode(stored, self.shape, self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Return W x + b, (..., out)."""
        product: Tensor = _Product.apply(input, self)
        return product


class _Product(torch.autograd.Function):
    """W x + b, whose gradient is that of x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight, layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return grads[0] @ ctx.layer.weight, None


def freeze_linears(
    network: nn.Module, quantize: Quantize, device: torch.device, offload: bool = False
) -> None:
    """Replace the linear layers of a network's repeated blocks by frozen ones.

    Layers outside of blocks are small, and what they round would reach every block: embeddings and
    output stay as they are.

    Args:
        network: The network, which need not fit on the device.
        quantize: The format of the weights.
        device: Where weights are encoded. Then they return to the network's device.
        offload: True to keep the weights on the network's device, wherever the network moves.
    """
    if quantize == "none" and not offload:
        return
    stacks = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    # A block may hold a stack of its own, so that its modules come twice.
    for parent in dict.fromkeys(module for stack in stacks for module in stack.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                home = layer.weight.device
                frozen = FrozenLinear(layer.to(device), quantize).to(home)
                if offload:
                    frozen.stay(pin=device.type == "cuda")
                setattr(parent, name, frozen)


def parameter_count(network: nn.Module) -> int:
    """Return the number of parameters, those that are stored as codes included."""
    frozen = [module for module in network.modules() if isinstance(module, FrozenLinear)]
    return sum(parameter.numel() for parameter in network.parameters()) + sum(
        layer.shape.numel() for layer in frozen
    )
