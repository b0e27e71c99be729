"""The probability path of rectified flow (arXiv 2209.03003).

A straight line leads from data at t = 0 to noise at t = 1:
    xt = (1 - t) x0 + t noise        v = dx/dt = noise - x0
"""

from collections.abc import Iterable

import torch
from torch import Tensor

Latent = Tensor
"""(B, *latent)"""
PerImage = Tensor
"""(B,)"""


def over_latent(t: PerImage, x: Latent) -> Tensor:
    """Return t with trailing axes of length 1, so that it multiplies (B, *latent)."""
    return t.view(-1, *[1] * (x.dim() - 1))


def add_noise(x0: Latent, t: PerImage, noise: Latent) -> tuple[Latent, Latent]:
    """Return the noisy latent xt at t, and the velocity target there."""
    t = over_latent(t, x0)
    return (1 - t) * x0 + t * noise, noise - x0


def mean_square(x: Latent) -> PerImage:
    """Return the mean square over latent elements, in float32 at least."""
    # The one place that decides that losses are means over elements, not sums. Squares of half
    # precision would overflow or vanish.
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().flatten(1).mean(1)


def concatenate(tensors: Iterable[Tensor]) -> Tensor:
    """Return the rows of all tensors, in order."""
    return torch.cat(list(tensors))
