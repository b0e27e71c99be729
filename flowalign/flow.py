"""Rectified flow (arXiv 2209.03003): a straight line from data at t = 0 to noise at t = 1.

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
    """(B,) shaped to multiply (B, *latent)."""
    return t.view(-1, *[1] * (x.dim() - 1))


def add_noise(x0: Latent, t: PerImage, noise: Latent) -> tuple[Latent, Latent]:
    """The noisy latent at t, and the velocity target there."""
    t = over_latent(t, x0)
    return (1 - t) * x0 + t * noise, noise - x0


def mean_square(x: Latent) -> PerImage:
    """Mean over latent elements; the one place that says losses are means, not sums."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().flatten(1).mean(1)


def concatenate(tensors: Iterable[Tensor]) -> Tensor:
    """Along the batch."""
    return torch.cat(list(tensors))
