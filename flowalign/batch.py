"""The values that flow through a step: prompts, their embeddings, and what was made from them.

Every batch carries the keys its noise is drawn from, so that a draw depends on (seed, step, prompt, image) and its purpose,
never on processes, passes or history.
"""

import hashlib
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from flowalign.flow import Latent, PerImage


@dataclass(frozen=True)
class Cond:
    """What a velocity is conditioned on. Rows are images."""

    embeds: Tensor  # (B, tokens, width)
    pooled: Tensor  # (B, width)
    null_embeds: Tensor  # (B, tokens, width)  of the empty prompt
    null_pooled: Tensor  # (B, width)
    guidance: float = 1.0
    """Classifier-free: v_null + guidance (v - v_null); 1 asks the model once."""
    embedded_guidance: float = 3.5
    """What a guidance-distilled model (Flux-dev) is told; others take no notice."""

    def guided(self, guidance: float) -> Self:
        return replace(self, guidance=guidance)

    def unguided(self) -> Self:
        return replace(self, guidance=1.0)

    def map(self, function: Any) -> Self:
        return replace(self, **{f.name: function(getattr(self, f.name)) for f in fields(self)[:4]})

    def __getitem__(self, index: Any) -> Self:
        return self.map(lambda tensor: tensor[index])

    def __len__(self) -> int:
        return len(self.embeds)


@dataclass
class Batch:
    """Images by prompt: a group is the images of one prompt and never crosses a process."""

    prompts: list[str]
    metadata: list[dict[str, Any]]
    keys: Tensor  # (B, 4)  seed, step, prompt, image
    cond: Cond

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def group(self) -> Tensor:
        """(B,) which prompt each image belongs to."""
        return self.keys[:, 2]

    def __getitem__(self, index: slice) -> Self:
        """The images in the slice."""
        chosen = {f.name: getattr(self, f.name)[index] for f in fields(self) if f.metadata.get("per", "image") == "image"}
        return replace(self, **chosen)

    def pieces(self, size: int) -> list[Self]:
        """Consecutive pieces of `size` images."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def noise(self, purpose: str, draw: int, shape: tuple[int, ...], shared: bool = False) -> Latent:
        """Standard normal (B, *shape), the same for the same keys, purpose and draw. On the CPU, in float32.

        `shared` leaves the image out of the key: the images of a group get the same noise.
        """
        keys = torch.cat([self.keys[:, :3], torch.zeros_like(self.keys[:, 3:])], 1) if shared else self.keys
        return draw_noise(keys, f"{purpose}/{draw}", shape)


def draw_noise(keys: Tensor, purpose: str, shape: tuple[int, ...]) -> Latent:
    """One generator an image, seeded by its key."""
    noise = torch.empty(len(keys), *shape)
    generator = torch.Generator()
    for row, key in zip(noise, keys.tolist(), strict=True):
        digest = hashlib.blake2b(f"{purpose}/{key}".encode(), digest_size=8).digest()
        generator.manual_seed(int.from_bytes(digest, "big") >> 1)
        torch.randn(shape, generator=generator, out=row)
    return noise


@dataclass
class Prompts(Batch):
    """Prompts, each repeated for its group, before anything is made from them."""


@dataclass
class Rollout(Batch):
    """Images the policy made, with everything an objective may ask about them."""

    path: Latent  # (B, K + 1, *latent)  from noise to x0
    log_prob: Tensor  # (B, K)  under the weights that sampled; 0 where the step is deterministic
    images: Tensor  # (B, 3, H, W)  bytes
    reward: PerImage  # (B,)  combined
    advantage: PerImage  # (B,)
    steps: range = field(metadata={"per": "batch"})
    """The stochastic steps of the path."""

    @property
    def x0(self) -> Latent:
        return self.path[:, -1]
