"""Linear layers whose adapters compute in the layer's dtype, from float32 matrices.

Importing this module imports PEFT, which takes seconds.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class AdaptedLinear(Linear):
    """PEFT's layer y = W x + b + scaling · B A x, with less work and memory in half precision.

    PEFT computes B A x in the dtype of A and B, so it copies x to float32 and keeps that copy for
    the backward pass. Here A and B are rounded to the dtype of x instead, and x is kept as it is:
    all layers of one input share it. y has that dtype in both cases. Gradients of A and B are
    summed in float32. Where x is float32, PEFT's own layer computes. Dropout and a bias of the
    adapter are not supported.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return y (..., out) in the dtype of x (..., in)."""
        # In float32 there is nothing to save. Variants of LoRA, such as DoRA, are PEFT's too.
        half = x.dtype in (torch.bfloat16, torch.float16)
        if not half or self.disable_adapters or self.merged or self.lora_variant or args or kwargs:
            return super().forward(x, *args, **kwargs)
        y = self.base_layer(x)
        for name in self.active_adapters:
            if name in self.lora_A:
                a: Any = self.lora_A[name]
                b: Any = self.lora_B[name]
                y = y + low_rank(x, a.weight, b.weight) * self.scaling[name]
        return y


def low_rank(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return B A x (..., out) in the dtype of x (..., in), for A (rank, in) and B (out, rank)."""
    product: Tensor = _LowRank.apply(x, a, b)
    return product


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        hidden = F.linear(x, a.to(x.dtype))
        ctx.save_for_backward(x, hidden, a, b)
        return F.linear(hidden, b.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        (grad,), (x, hidden, a, b) = grads, ctx.saved_tensors
        of_x, of_a, of_b = ctx.needs_input_grad
        grad_hidden = grad @ b.to(grad.dtype)
        return (
            grad_hidden @ a.to(grad.dtype) if of_x else None,
            _outer(x, grad_hidden).T if of_a else None,
            _outer(hidden, grad).T if of_b else None,
        )


def _outer(rows: Tensor, grads: Tensor) -> Tensor:
    """Return the sum over all rows of row · gradᵀ, (rows' width, grads' width), in float32."""
    left, right = rows.reshape(-1, rows.shape[-1]).T, grads.reshape(-1, grads.shape[-1])
    # A sum that was rounded to float16 could overflow.
    exact = torch.promote_types(left.dtype, torch.float32)
    if left.is_cuda and left.dtype != exact:
        return torch.mm(left, right, out_dtype=exact)
    return left.to(exact) @ right.to(exact)
