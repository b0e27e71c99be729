"""Rewards of a prompt's images as a set: their distance from exemplars, and their diversity.

The score of a set is equal for all its images, and images are only compared within their set, so
the score itself would give no signal. Every image therefore gets a share, the score's first
variation at the image: a policy that increases the shares increases the score.

feature_distance, with unit features x of n images and y of m exemplars and
k(a, b) = exp(-‖a - b‖² / 2σ²):
    MMD² = 1/(n(n-1)) Σ_{i≠j} k(xi, xj) - 2/(nm) Σ_{i,j} k(xi, yj) + const
    share_i = 1/m Σ_j k(xi, yj) - 1/(n-1) Σ_{j≠i} k(xi, xj)
The share is high near the exemplars and low near the other images of the set, so that repeating
the nearest exemplar does not pay.
(The unbiased estimate of arXiv 0805.2368, and its witness function.)
Its gradients are exact, by backpropagation and by policy gradient before a baseline:
    ∇ 1/n Σ_i share_i = -½ ∇ MMD², the second image of a pair held fixed
    E[1/n Σ_i share_i ∇log p(xi)] = -½ ∇ MMD²

vendi, with K the cosines of the images and A = K/n (arXiv 2210.02410):
    Vendi = exp(H), H = -tr(A log A), from 1 (all alike) to n (nothing in common)
    share_i = -n (A log A)_ii, from 0 to log n
The shares' mean is H, and an image that resembles many has a small one. By backpropagation this too
is exact; by policy gradient up to the bias of an entropy that is estimated from n images.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowalign.data.prompts import Metadata
from flowalign.errors import UserError
from flowalign.flow import PerImage
from flowalign.rewards.base import traits
from flowalign.rewards.features import Backbone, BUNDLED_CLIP
from flowalign.rewards.reference_pictures import picture_files


@traits(level="group", range=(-1, 1))
@dataclass
class FeatureDistance:
    """Nearness of a prompt's images to exemplars, as shares in [-1, 1]. Differentiable.

    The exemplars are the same for all prompts: a look that all images should have. The bundled CLIP
    takes little memory. For images above 128 pixels use for example facebook/dinov2-base: 0.35 GB,
    Apache-2.0.
    """

    pictures: object
    """The exemplars: a folder, or a list of files."""
    path: str = BUNDLED_CLIP
    """The backbone: a local folder or hub repository; by default the bundled CLIP's image side."""
    bandwidth: float = 0.5
    """σ. Unit vectors are 0 apart where they are equal, and √2 where they are orthogonal."""

    def __post_init__(self) -> None:
        key = "rewards.feature_distance"
        if not self.bandwidth > 0:
            raise UserError(f"{key}.bandwidth is {self.bandwidth}. Set it above 0.")
        files = picture_files(self.pictures, f"{key}.pictures")
        self.backbone = Backbone(self.path, f"{key}.path")
        self.exemplars = self.backbone.embed_files(files, f"{key}.pictures")

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> PerImage:
        return distance_shares(self.backbone(images), self.exemplars, self.bandwidth)


@traits(level="group", range=(0, math.inf))
@dataclass
class Vendi:
    """Diversity of a prompt's images: shares of the log of the Vendi score, in [0, log n].

    Differentiable. The exponential of the shares' mean is the score. Quality plays no part: noise
    is diverse. The bundled CLIP takes little memory. For images above 128 pixels use for example
    facebook/dinov2-base: 0.35 GB, Apache-2.0.
    """

    path: str = BUNDLED_CLIP
    """The backbone: a local folder or hub repository; by default the bundled CLIP's image side."""

    def __post_init__(self) -> None:
        self.backbone = Backbone(self.path, "rewards.vendi.path")

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> PerImage:
        return vendi_shares(self.backbone(images))


def distance_shares(features: Tensor, exemplars: Tensor, bandwidth: float) -> PerImage:
    """Return the shares (n,) of unit vectors (n, d), given those of exemplars (m, d).

    The gradient of the shares' mean is that of -½ MMD².
    """
    nearness = _kernel(features, exemplars, bandwidth).mean(1)
    if len(features) == 1:
        return nearness
    # Detached: each pair counts once per image, so both sides would double the gradient.
    k = _kernel(features, features.detach(), bandwidth)
    return nearness - (k.sum(1) - k.diagonal()) / (len(features) - 1)


def squared_mmd(features: Tensor, exemplars: Tensor, bandwidth: float) -> Tensor:
    """Return the unbiased MMD² of unit vectors (n, d) and (m, d); 0 on average if alike."""
    cross = _kernel(features, exemplars, bandwidth).mean()
    kernels = (_kernel(x, x, bandwidth) for x in (features, exemplars))
    within = sum((k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in kernels)
    return within - 2 * cross


def vendi_score(features: Tensor) -> Tensor:
    """Return the effective number of different images among unit vectors (n, d)."""
    return vendi_shares(features).mean().exp()


def vendi_shares(features: Tensor) -> PerImage:
    """Return the shares (n,) of unit vectors (n, d).

    The gradient of the shares' mean is that of H: dH = -tr(dA log A), since tr A is always 1.
    """
    # In float64: the eigenvalues of nearly equal images are too small for float32.
    a = features.double() @ features.double().T / len(features)
    # Equal images give eigenvalues of 0, whose logarithm is bounded instead.
    values, vectors = torch.linalg.eigh(a.detach())
    log_a = vectors * values.clamp(min=1e-12).log() @ vectors.T
    return (-len(features) * (a * log_a).sum(1)).to(features.dtype)


def _kernel(a: Tensor, b: Tensor, bandwidth: float) -> Tensor:
    """Return k of unit vectors, for which ‖a - b‖² = 2 - 2 a·b."""
    return ((a @ b.T - 1) / bandwidth**2).exp()
