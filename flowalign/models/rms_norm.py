"""Root-mean-square normalisation that keeps no float32 copy of its input.

Importing this module imports diffusers, which takes seconds.
"""

from typing import Any

import torch
from diffusers.models.normalization import RMSNorm
from torch import nn, Tensor
from torch.autograd.function import once_differentiable


def replace_norms(network: nn.Module) -> None:
    """Replace the `RMSNorm` layers of diffusers in a frozen network. Their weights stay."""
    for parent in list(network.modules()):
        for name, layer in parent.named_children():
            if type(layer) is RMSNorm and layer.bias is None:
                setattr(parent, name, FrozenRMSNorm(layer))


class FrozenRMSNorm(RMSNorm):
    """The layer of diffusers, x / rms(x) · weight, whose weight is not trained.

    In half precision the layer of diffusers copies its input to float32 and keeps the copy for the
    backward pass. This one keeps the input in its dtype and converts it again there. Results are
    those of diffusers to the last bit, and so are gradients in float32.
    """

    def __init__(self, layer: RMSNorm):
        affine = layer.weight is not None
        super().__init__(tuple(layer.dim), layer.eps, elementwise_affine=affine)
        self.weight = layer.weight
        self.train(layer.training)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the normalised input (..., width)."""
        dtype = hidden_states.dtype
        # With a weight of another dtype, diffusers rounds at other places.
        if dtype == torch.float32 or (self.weight is not None and self.weight.dtype != dtype):
            return super().forward(hidden_states)
        normalised: Tensor = _Normalise.apply(hidden_states, self.eps)
        return normalised if self.weight is None else normalised * self.weight


class _Normalise(torch.autograd.Function):
    """x / rms(x) in the dtype of x, computed in float32; keeps x and 1 / rms(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        inverse = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, inverse)
        return (x * inverse).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        x, inverse = ctx.saved_tensors
        # With y = x · inverse: dx = inverse · (dy - y · mean(y · dy)).
        y, dy = x * inverse, grads[0].float()
        return (inverse * (dy - y * (y * dy).mean(-1, keepdim=True))).to(x.dtype), None
