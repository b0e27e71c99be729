"""The values that flow through a step: prompts, their embeddings, and what was made from them.

Every batch carries the keys its noise is drawn from, so that a draw depends on (seed, step, prompt, image) and its purpose,
never on processes, passes or history.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from flowalign.flow import Latent, PerImage


@dataclass(frozen=True)
class Cond:
    """What a velocity is conditioned on. Rows are images: every tensor is (B, ...).

    The names of the inputs are the model family's business; nothing else reads them.
    """

    inputs: dict[str, Tensor]
    """Inputs of the network that belong to the prompts, such as embeddings and masks, by name."""
    null: dict[str, Tensor]
    """The same inputs for the empty prompt, which classifier-free guidance starts from."""
    guidance: float = 1.0
    """Scale of classifier-free guidance. 1 means none, and the network runs on the prompts alone."""

    def guided(self, guidance: float) -> Self:
        """Return the same inputs under another guidance scale."""
        return replace(self, guidance=guidance)

    def unguided(self) -> Self:
        """Return the same inputs without guidance."""
        return self.guided(1.0)

    def twice(self) -> Self:
        """Return all rows and then all rows again, for a batch that is doubled in the same way."""
        return self.map(lambda rows: torch.cat([rows, rows]))

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Apply a function to every tensor, the null inputs included."""
        inputs = {name: function(rows) for name, rows in self.inputs.items()}
        null = {name: function(rows) for name, rows in self.null.items()}
        return replace(self, inputs=inputs, null=null)

    @classmethod
    def concatenate(cls, conds: "Sequence[Cond]") -> "Cond":
        """Join conditions of one family, which share their guidance, row after row."""
        first = conds[0]
        inputs, null = (
            {name: _join([getattr(cond, side)[name] for cond in conds]) for name in first.inputs}
            for side in ("inputs", "null")
        )
        return replace(first, inputs=inputs, null=null)

    @property
    def device(self) -> torch.device:
        """Device of the inputs."""
        return next(iter(self.inputs.values())).device

    def __getitem__(self, index: slice | list[int]) -> Self:
        return self.map(lambda rows: rows[index])

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))


def _join(parts: list[Tensor]) -> Tensor:
    # All images usually share the empty prompt as views of one row. Copies would double the
    # memory that embeddings take, so such views are joined into a longer view of that row.
    first = parts[0]
    shared = all(
        part.data_ptr() == first.data_ptr() and (len(part) == 1 or part.stride(0) == 0)
        for part in parts
    )
    if shared and first.numel():
        return first[:1].expand(sum(map(len, parts)), *first.shape[1:])
    return torch.cat(parts)


@dataclass
class Batch:
    """Images by prompt: a group is the images of one prompt and never crosses a process."""

    images_per_row: ClassVar[int] = 1
    prompts: list[str]
    metadata: list[dict[str, Any]]
    keys: Tensor  # (B, 4)  seed, step, prompt, image
    cond: Cond

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def device(self) -> torch.device:
        return self.cond.device

    @property
    def group(self) -> Tensor:
        """(B,) which prompt each image belongs to."""
        return self.keys[:, 2]

    def groups_fit(self, images_per_pass: int | None) -> bool:
        """Whether passes of that many images never part the images of a prompt, which stand side by side."""
        if images_per_pass is None:
            return True
        size = max(1, images_per_pass // self.images_per_row)
        return not any(
            self.group[cut] == self.group[cut - 1] for cut in range(size, len(self), size)
        )

    def __getitem__(self, index: slice | list[int]) -> Self:
        """The rows of a slice, or of these numbers."""
        chosen = {
            f.name: _take(getattr(self, f.name), index)
            for f in fields(self)
            if f.metadata.get("per", "image") == "image"
        }
        return replace(self, **chosen)

    def trainable_rows(self) -> Self:
        """The rows that something is learned from."""
        return self

    def pieces(self, size: int) -> list[Self]:
        """Consecutive pieces of `size` rows."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def passes(self, images_per_pass: int) -> list[Self]:
        """Consecutive pieces of at most `images_per_pass` images, one row at least."""
        return self.pieces(max(1, images_per_pass // self.images_per_row))

    def noise(
        self, purpose: str, draw: int, shape: tuple[int, ...], shared: bool = False
    ) -> Latent:
        """Standard normal (B, *shape), the same for the same keys, purpose and draw. On the CPU, in float32.

        `shared` leaves the image out of the key: the images of a group get the same noise.
        """
        noise = torch.empty(len(self), *shape)
        generator = torch.Generator()
        for row, seed in zip(noise, self._seeds(f"{purpose}/{draw}", shared), strict=True):
            generator.manual_seed(seed)
            torch.randn(shape, generator=generator, out=row)
        return noise

    def uniform(self, purpose: str, draw: int, shared: bool = False) -> PerImage:
        """Numbers in [0, 1), drawn like `noise`."""
        return torch.tensor(
            [seed / 2**63 for seed in self._seeds(f"{purpose}/{draw}", shared)], dtype=torch.float64
        ).float()

    def _seeds(self, purpose: str, shared: bool) -> list[int]:
        """63 bits an image, of its key and the purpose."""
        keys = (
            torch.cat([self.keys[:, :3], torch.zeros_like(self.keys[:, 3:])], 1)
            if shared
            else self.keys
        )
        digests = (
            hashlib.blake2b(f"{purpose}/{key}".encode(), digest_size=8).digest()
            for key in keys.tolist()
        )
        return [int.from_bytes(digest, "big") >> 1 for digest in digests]


def _take(values: Any, index: slice | list[int]) -> Any:
    if isinstance(index, list) and isinstance(values, list):
        return [values[i] for i in index]
    return values[index]


Scored = tuple[PerImage, dict[str, PerImage]]
"""A combined reward, and each by its name."""


def unrewarded(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Scored:
    raise RuntimeError("these prompts came without a reward")


@dataclass
class Prompts(Batch):
    """Prompts, each repeated for its group, before anything is made from them."""

    reward: Callable[[Tensor, list[str], list[dict[str, Any]]], Scored] = field(
        default=unrewarded, metadata={"per": "batch"}
    )
    """Images (B, 3, H, W) in [0, 1], prompts, metadata -> rewards that carry a gradient."""


@dataclass
class Examples(Batch):
    """Pictures to imitate."""

    x0: Latent  # (B, *latent)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return tuple(self.x0.shape[1:])


@dataclass
class Pairs(Batch):
    """Of every prompt a better and a worse image. A row is a pair."""

    images_per_row: ClassVar[int] = 2
    chosen: Latent  # (B, K + 1, *latent)  from noise to x0; (B, 1, *latent) where only x0 is known
    rejected: Latent  # likewise
    chosen_log_prob: Tensor  # (B, K)  under the weights that sampled
    rejected_log_prob: Tensor  # (B, K)
    gap: PerImage  # (B,)  reward of the chosen less that of the rejected; 1 where only the order is known
    weight: PerImage  # (B,)  how much the pair counts; 0 for a tie
    steps: range = field(default=range(0), metadata={"per": "batch"})
    """The stochastic steps of the paths."""
    prepared: Tensor = field(
        default_factory=lambda: torch.zeros(0, 0)
    )  # (B, n)  what the objective's `prepare` found

    def __post_init__(self) -> None:
        if not self.prepared.numel():
            self.prepared = torch.zeros(len(self), 0)

    def trainable_rows(self) -> Self:
        taught = self.weight.nonzero().flatten().tolist()
        return self if len(taught) == len(self) else self[taught]

    @property
    def x0(self) -> tuple[Latent, Latent]:
        """Chosen and rejected."""
        return self.chosen[:, -1], self.rejected[:, -1]

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return tuple(self.chosen.shape[2:])


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
    weight: PerImage = field(default_factory=lambda: torch.zeros(0))
    """(B,) 0 for images that teach nothing, by default 1."""
    prepared: Tensor = field(
        default_factory=lambda: torch.zeros(0, 0)
    )  # (B, n)  what the objective's `prepare` found

    def __post_init__(self) -> None:
        if not self.weight.numel():
            self.weight = torch.ones(len(self))
        if not self.prepared.numel():
            self.prepared = torch.zeros(len(self), 0)

    def trainable_rows(self) -> Self:
        taught = self.weight.nonzero().flatten().tolist()
        return self if len(taught) == len(self) else self[taught]

    @property
    def x0(self) -> Latent:
        return self.path[:, -1]

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return tuple(self.path.shape[2:])

    def step_noise(self, k: int) -> Latent:
        """What the sampler added in its stochastic step k, over the step's std."""
        return self.noise("rollout", k + 1, self.latent_shape).to(self.device)
