"""Rewards of a prompt's images as a set: how far they are, together, from a set of exemplars, and how unlike each other.

The score of a set is equal for all its images, and images are only compared within their set: it would teach nothing. So
every image gets a share, the score's first variation at the image: a policy that climbs the shares climbs the score.

feature_distance, with unit features x of n images and y of m exemplars and k(a, b) = exp(-‖a - b‖² / 2σ²):
    MMD² = 1/(n(n-1)) Σ_{i≠j} k(xi, xj) - 2/(nm) Σ_{i,j} k(xi, yj) + const
    share_i = 1/m Σ_j k(xi, yj) - 1/(n-1) Σ_{j≠i} k(xi, xj)
Near the exemplars, and where the set is not already: repeating the nearest exemplar does not pay. (The unbiased estimate of
arXiv 0805.2368, and its witness function.) Exactly, by backpropagation and by policy gradient before a baseline:
    ∇ 1/n Σ_i share_i = -½ ∇ MMD², the second image of a pair held fixed;    E[1/n Σ_i share_i ∇log p(xi)] = -½ ∇ MMD²

vendi, with K the cosines of the images and A = K/n (arXiv 2210.02410):
    Vendi = exp(H), H = -tr(A log A), from 1 (all alike) to n (nothing in common)
    share_i = -n (A log A)_ii, from 0 to log n
The shares' mean is H, and an image that is like many has a small one. By backpropagation this too is exact; by policy gradient
up to the bias of an entropy that is estimated from n images.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flowalign.errors import UserError
from flowalign.flow import PerImage
from flowalign.rewards.base import traits
from flowalign.rewards.features import TINY, Tower
from flowalign.rewards.reference_pictures import picture_files


@traits(level="group", range=(-1, 1))
@dataclass
class FeatureDistance:
    """Share of minus the distance between a prompt's images and exemplars, in [-1, 1]; more is nearer. Differentiable.

    The exemplars are the same for all prompts: a look that all images should have. The bundled CLIP takes little memory; for
    pictures above 128 pixels, for example, facebook/dinov2-base: 0.35 GB, Apache-2.0.
    """

    pictures: Any
    """The exemplars: a folder, or a list of files."""
    path: str = TINY
    """The backbone: a local folder or a hub repository; the image side of the bundled CLIP for the bundled world."""
    bandwidth: float = 0.5
    """σ. Features are unit vectors: 0 apart where equal, √2 where they have nothing in common."""
    tower: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.bandwidth > 0:
            raise UserError(
                f"rewards.feature_distance.bandwidth is {self.bandwidth}; it must be above 0."
            )
        files = picture_files(self.pictures, "rewards.feature_distance.pictures")
        self.tower = Tower(self.path, "rewards.feature_distance.path")
        self.exemplars = self.tower.embed_files(files, "rewards.feature_distance.pictures")

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> PerImage:
        return distance_shares(self.tower(images), self.exemplars, self.bandwidth)


@traits(level="group", range=(0, math.inf))
@dataclass
class Vendi:
    """Share of the logarithm of the Vendi score of a prompt's images, in [0, log n]; more is more diverse. Differentiable.

    The exponential of its mean over a prompt is the score. It knows no quality: noise is diverse. The bundled CLIP takes little
    memory; for pictures above 128 pixels, for example, facebook/dinov2-base: 0.35 GB, Apache-2.0.
    """

    path: str = TINY
    """The backbone: a local folder or a hub repository; the image side of the bundled CLIP for the bundled world."""
    tower: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.tower = Tower(self.path, "rewards.vendi.path")

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> PerImage:
        return vendi_shares(self.tower(images))


def distance_shares(features: Tensor, exemplars: Tensor, bandwidth: float) -> PerImage:
    """Of unit vectors (n, d) and (m, d). The gradient of the shares' mean is that of -½ MMD²."""
    near = _kernel(features, exemplars, bandwidth).mean(1)
    if len(features) == 1:
        return near
    k = _kernel(features, features.detach(), bandwidth)
    return near - (k.sum(1) - k.diagonal()) / (len(features) - 1)


def squared_mmd(features: Tensor, exemplars: Tensor, bandwidth: float) -> Tensor:
    """Between unit vectors (n, d) and (m, d), unbiased: 0 in the mean where both are drawn alike."""
    cross = _kernel(features, exemplars, bandwidth).mean()
    kernels = (_kernel(x, x, bandwidth) for x in (features, exemplars))
    within = sum((k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in kernels)
    return within - 2 * cross


def vendi_score(features: Tensor) -> Tensor:
    """How many different images there are in effect, from unit vectors (n, d)."""
    return vendi_shares(features).mean().exp()


def vendi_shares(features: Tensor) -> PerImage:
    """Of unit vectors (n, d). The gradient of the shares' mean is that of H: dH = -tr(dA log A), since tr A is always 1."""
    a = features.double() @ features.double().T / len(features)
    values, vectors = torch.linalg.eigh(a.detach())
    log_a = vectors * values.clamp(min=1e-12).log() @ vectors.T
    return (-len(features) * (a * log_a).sum(1)).to(features.dtype)


def _kernel(a: Tensor, b: Tensor, bandwidth: float) -> Tensor:
    """K of unit vectors, for which ‖a - b‖² = 2 - 2 a·b."""
    return ((a @ b.T - 1) / bandwidth**2).exp()
