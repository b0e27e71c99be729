"""The values that flow through a training step: prompts, embeddings, and the images made of them.

Every batch carries keys. A random draw depends on these keys and on its purpose alone, never on
processes, passes or earlier draws.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from flowalign.flow import concatenate, Latent, PerImage

Metadata = dict[str, Any]
"""The extra fields of a prompt file's entry, as the user wrote them."""

NEGATIVE = "negative_prompt"
"""The field of a prompt that guidance leads away from."""

EVALUATION_STEP = -1
"""The step in evaluation keys, so that evaluation noise is never training noise."""

PER_BATCH = {"per": "batch"}
"""Metadata of the fields that belong to a whole batch and not to its rows."""


def negative_prompt(metadata: Mapping[str, Any], default: str) -> str:
    """Return the negative prompt in some metadata, or the default without one."""
    own = metadata.get(NEGATIVE)
    return default if own is None else own


class Rows(Mapping[str, Tensor]):
    """Tensors (B, ...) by name, whose equal rows are held once.

    Row i of a tensor is row `index[i]` of the tensor (P, ...) in `table`. It is copied from there
    whenever it is read, so that a pass copies its own rows and a step holds each prompt once.
    """

    def __init__(self, table: Mapping[str, Tensor], index: Tensor | None = None):
        """Without an index, every row of the table is a row."""
        self.table = table
        self.index = _all_rows(table) if index is None else index

    def __getitem__(self, name: str) -> Tensor:
        return self.table[name][self.index]

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)

    def take(self, rows: slice | list[int]) -> "Rows":
        """Return some of the rows."""
        return Rows(self.table, self.index[rows])

    @classmethod
    def concatenate(cls, parts: "Sequence[Rows]") -> "Rows":
        """Join rows with the same names, part after part. Parts of one table copy no rows."""
        tables = list({id(part.table): part.table for part in parts}.values())
        if len(tables) == 1:
            return cls(tables[0], torch.cat([part.index for part in parts]))
        indices, start = list[Tensor](), 0
        for part in parts:
            indices.append(part.index + start)
            start += len(_all_rows(part.table))
        table = {name: torch.cat([part.table[name] for part in parts]) for name in parts[0]}
        return cls(table, torch.cat(indices))


def distinct(texts: Sequence[str]) -> tuple[list[str], Tensor]:
    """Return each text once, in order, and the place (B,) of every text among them."""
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    return list(places), torch.tensor([places[text] for text in texts])


def _all_rows(table: Mapping[str, Tensor]) -> Tensor:
    first = next(iter(table.values()), torch.empty(0))
    return torch.arange(len(first), device=first.device)


@dataclass(frozen=True, eq=False)
class Cond:
    """The condition of a velocity. Rows are images: every tensor is (B, ...).

    The names of the inputs are the model family's business; nothing else reads them.

    Example:
        >>> rows = torch.ones(2, 4, 8)
        >>> cond = flowalign.Cond(inputs={"embeds": rows}, null={"embeds": 0 * rows})
        >>> len(cond), len(cond[:1]), cond.guided(4.5).guidance
        (2, 1, 4.5)
    """

    inputs: Mapping[str, Tensor]
    """Inputs of the network that belong to the prompts, such as embeddings and masks, by name."""
    null: Mapping[str, Tensor]
    """The same inputs for the empty or the negative prompt, which guidance leads away from."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1 means none, and the null inputs are not used."""
    null_gradient: bool = True
    """False to treat the velocity of the empty prompt as a constant in the backward pass."""

    @property
    def rows(self) -> tuple[Rows, Rows]:
        """The inputs, and those of the empty prompt, as rows of tables."""
        inputs, null = (
            side if isinstance(side, Rows) else Rows(side) for side in (self.inputs, self.null)
        )
        return inputs, null

    def guided(self, guidance: float) -> Self:
        """Return the same inputs under another guidance scale."""
        return replace(self, guidance=guidance)

    def unguided(self) -> Self:
        """Return the same inputs without guidance."""
        return self.guided(1.0)

    def twice(self) -> "Cond":
        """Return all rows and then all rows again, for a batch that is doubled in the same way."""
        return self.concatenate([self, self])

    def without_inputs(self) -> Self:
        """Return as many rows without their values, which take no memory."""
        index = torch.zeros_like(self.rows[0].index)
        nothing = Rows({"nothing": torch.empty(1, 0, device=self.device)}, index)
        return replace(self, inputs=nothing, null=nothing)

    @classmethod
    def concatenate(cls, conds: "Sequence[Cond]") -> "Cond":
        """Join conditions of one family, which share their guidance, row after row."""
        inputs, null = zip(*(cond.rows for cond in conds), strict=True)
        return replace(conds[0], inputs=Rows.concatenate(inputs), null=Rows.concatenate(null))

    @property
    def device(self) -> torch.device:
        """Device of the inputs."""
        return self.rows[0].index.device

    def __getitem__(self, index: slice | list[int]) -> Self:
        inputs, null = self.rows
        return replace(self, inputs=inputs.take(index), null=null.take(index))

    def __len__(self) -> int:
        return len(self.rows[0].index)


@dataclass(frozen=True, eq=False)
class Keys:
    """The four integers that all random draws of an image depend on.

    Example:
        >>> keys = flowalign.Keys.training(seed=0, step=7, members=[(0, 0), (0, 1), (1, 0)])
        >>> keys.prompt.tolist(), keys.image.tolist()
        ([0, 0, 1], [0, 1, 0])
    """

    seed: Tensor  # (B,)
    step: Tensor  # (B,)  training step, or EVALUATION_STEP
    prompt: Tensor  # (B,)  position of the prompt in its step; equal for the images of a group
    image: Tensor  # (B,)  position of the image in its group

    @classmethod
    def training(cls, seed: int, step: int, members: Sequence[tuple[int, int]]) -> Self:
        """Return the keys of a training step's images, each given as (prompt, image)."""
        return cls.of_rows([(seed, step, prompt, image) for prompt, image in members])

    @classmethod
    def evaluation(cls, seed: int, members: Sequence[tuple[int, int]]) -> Self:
        """Return the keys of evaluation images, each given as (prompt, image)."""
        return cls.training(seed, EVALUATION_STEP, members)

    @classmethod
    def of_rows(cls, rows: Sequence[tuple[int, int, int, int]]) -> Self:
        """Return the keys with these (seed, step, prompt, image)."""
        return cls(*torch.tensor(rows, dtype=torch.int64).view(-1, 4).unbind(1))

    @property
    def of_step(self) -> list[int]:
        """[seed, step], which all images of a training step share."""
        return [int(self.seed[0]), int(self.step[0])]

    def table(self) -> Tensor:
        """Return the keys as (B, 4) integers."""
        return torch.stack([self.seed, self.step, self.prompt, self.image], 1)

    def of_group(self) -> Self:
        """Return the same keys without the image, so that the images of a group draw alike."""
        return replace(self, image=torch.zeros_like(self.image))

    def seeds(self, purpose: str) -> list[int]:
        """Return 63 random bits for each image, a hash of its key and the purpose."""
        # The text that is hashed decides every random number of a run: changing it changes results.
        digests = (
            hashlib.blake2b(f"{purpose}/{key}".encode(), digest_size=8).digest()
            for key in self.table().tolist()
        )
        return [int.from_bytes(digest, "big") >> 1 for digest in digests]

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Return the keys of all parts, in order."""
        return cls(*torch.cat([part.table() for part in parts]).unbind(1))

    def __getitem__(self, index: slice | list[int]) -> Self:
        return replace(self, **{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def __len__(self) -> int:
        return len(self.seed)


@dataclass(kw_only=True)
class Batch:
    """Rows to learn from. A group is the images of one prompt."""

    images_per_row: ClassVar[int] = 1
    prompts: list[str]
    metadata: list[Metadata]
    keys: Keys
    cond: Cond
    weight: PerImage  # (B,)
    """How much each row counts; rows of weight 0 are not trained on."""
    terms: dict[str, Tensor] = field(default_factory=dict)
    """Rows of what the objective's `group_terms` returned for one draw."""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def device(self) -> torch.device:
        """Device of the embeddings."""
        return self.cond.device

    @property
    def group(self) -> Tensor:
        """The prompt that each image belongs to, (B,) integers."""
        return self.keys.prompt

    def groups_fit(self, images_per_pass: int) -> bool:
        """True if no pass of that many images cuts a group, whose rows are adjacent."""
        size = self.rows_per_pass(images_per_pass)
        return not any(
            self.group[cut] == self.group[cut - 1] for cut in range(size, len(self), size)
        )

    def __getitem__(self, index: slice | list[int]) -> Self:
        """Return the rows of a slice, or the rows with these numbers."""
        return replace(
            self, **{name: _take(getattr(self, name), index) for name in self.row_fields()}
        )

    @classmethod
    def row_fields(cls) -> list[str]:
        """Names of the fields that hold one entry for each row."""
        return [f.name for f in fields(cls) if f.metadata != PER_BATCH]

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Return one batch of all rows; fields of the whole batch are those of the first part."""
        if len(parts) == 1:
            return parts[0]
        names = cls.row_fields()
        rows = {name: _concatenate([getattr(part, name) for part in parts]) for name in names}
        return replace(parts[0], **rows)

    def trainable_rows(self) -> Self:
        """Return the rows whose weight is not 0."""
        rows = self.weight.nonzero().flatten().tolist()
        return self if len(rows) == len(self) else self[rows]

    def padding(self, count: int) -> Self:
        """Return `count` rows of a group of their own, for passes of weight 0.

        Their loss must be finite, since 0 times NaN is NaN.
        """
        rows = self[[row % len(self) for row in range(count)]]
        return replace(rows, keys=replace(rows.keys, prompt=torch.full_like(rows.keys.prompt, -1)))

    def pieces(self, size: int) -> list[Self]:
        """Return consecutive pieces of `size` rows; the last may be smaller."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def rows_per_pass(self, images_per_pass: int) -> int:
        """Return how many rows a pass of that many images holds, at least one."""
        return max(1, images_per_pass // self.images_per_row)

    def term(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """Return a row-wise term: as `group_terms` stored it, or else computed from these rows."""
        return self.terms[name] if name in self.terms else compute()

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields that are tensors, by name; the keys as (B, 4)."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"keys": self.keys.table()} | {
            name: value for name, value in values.items() if isinstance(value, Tensor)
        }

    def noise(
        self, purpose: str, draw: int, shape: tuple[int, ...], shared: bool = False
    ) -> Latent:
        """Draw standard normal noise (B, *shape) in float32 on the CPU.

        Equal keys, purpose and draw give equal noise. With `shared` the images of a group get the
        same noise.
        """
        noise = torch.empty(len(self), *shape)
        generator, drawn = torch.Generator(), dict[int, Tensor]()
        for row, seed in zip(noise, self._seeds(purpose, draw, shared), strict=True):
            # Rows of a group may share their noise, which is drawn once.
            if seed in drawn:
                row.copy_(drawn[seed])
            else:
                torch.randn(shape, generator=generator.manual_seed(seed), out=row)
                drawn[seed] = row
        return noise

    def uniform(self, purpose: str, draw: int, shared: bool = False) -> PerImage:
        """Draw numbers (B,) in [0, 1) as `noise` draws its noise."""
        shares = [seed / 2**63 for seed in self._seeds(purpose, draw, shared)]
        return torch.tensor(shares, dtype=torch.float64).float()

    def _seeds(self, purpose: str, draw: int, shared: bool) -> list[int]:
        return (self.keys.of_group() if shared else self.keys).seeds(f"{purpose}/{draw}")


class Transition(NamedTuple):
    """A stochastic step of the sampler."""

    before: Latent  # (B, *latent)
    after: Latent  # (B, *latent)
    log_prob: PerImage  # (B,)
    """Its log-probability under the weights that sampled."""


def _transition(path: Latent, log_prob: Tensor, steps: range, k: int) -> Transition:
    if k not in steps:
        raise IndexError(
            f"Step {k} is not among the stochastic steps, which are {[*steps]}. "
            "Paths are kept for objectives with needs_stochastic_steps = True."
        )
    place = steps.index(k)
    return Transition(path[:, place], path[:, place + 1], log_prob[:, place])


def _take(values: Any, index: slice | list[int]) -> Any:
    if isinstance(values, dict):
        return {name: _take(entry, index) for name, entry in values.items()}
    if isinstance(index, list) and isinstance(values, list):
        return [values[i] for i in index]
    return values[index]


def _concatenate(parts: list[Any]) -> Any:
    first = parts[0]
    if isinstance(first, dict):
        return {name: _concatenate([part[name] for part in parts]) for name in first}
    if isinstance(first, list):
        return [entry for part in parts for entry in part]
    return concatenate(parts) if isinstance(first, Tensor) else type(first).concatenate(parts)


DifferentiableReward = Callable[
    [Tensor, list[str], list[Metadata]], tuple[PerImage, dict[str, PerImage]]
]
"""Images (B, 3, H, W) in [0, 1], prompts, metadata -> the combined reward and each by its name."""


def no_reward(
    images: Tensor, prompts: list[str], metadata: list[Metadata]
) -> tuple[PerImage, dict[str, PerImage]]:
    """Raise RuntimeError, in place of a reward that was never set."""
    raise RuntimeError("The batch has no reward with a gradient. Make it by a source of a run.")


@dataclass(kw_only=True)
class Prompts(Batch):
    """Prompts, each repeated for the images of its group, from which nothing is sampled yet."""

    reward: DifferentiableReward = field(default=no_reward, metadata=PER_BATCH)
    """The rewards that carry a gradient to the images."""


@dataclass(kw_only=True)
class Examples(Batch):
    """Pictures to imitate.

    Example:
        >>> keys = flowalign.Keys.training(seed=0, step=0, members=[(0, 0), (1, 0)])
        >>> rows = torch.ones(2, 4, 8)
        >>> batch = flowalign.Examples(
        ...     prompts=["a red circle", "a blue square"],
        ...     metadata=[{}, {}],
        ...     keys=keys,
        ...     cond=flowalign.Cond({"embeds": rows}, {"embeds": 0 * rows}),
        ...     weight=torch.ones(2),
        ...     x0=torch.zeros(2, 16, 8, 8),
        ... )
        >>> batch[:1].prompts, batch.noise("loss", 0, batch.latent_shape).shape
        (['a red circle'], torch.Size([2, 16, 8, 8]))
    """

    x0: Latent  # (B, *latent)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one latent."""
        return tuple(self.x0.shape[1:])


@dataclass(kw_only=True)
class Pairs(Batch):
    """A chosen and a rejected image for each prompt. A row is a pair."""

    images_per_row: ClassVar[int] = 2
    chosen: Latent  # (B, *latent)
    rejected: Latent  # (B, *latent)
    chosen_path: Latent  # (B, S + 1, *latent)  before and after each of the S stochastic steps
    rejected_path: Latent  # like `chosen_path`; (B, 0, *latent) for given pictures
    chosen_log_prob: Tensor  # (B, S)  under the weights that sampled
    rejected_log_prob: Tensor  # (B, S)
    gap: PerImage  # (B,)
    """The reward of the chosen minus that of the rejected image; 1 if only their order is known."""
    preference: PerImage  # (B,)
    """Share of the decided votes that prefer the chosen image; 1 without votes."""
    tie: PerImage  # (B,)
    """Share of all votes that are ties; 0 without votes."""
    voted: Tensor  # (B, 2)  bool
    """False for the image that is missing where a single one was liked (chosen) or disliked."""
    steps: range = field(default=range(0), metadata=PER_BATCH)
    """The stochastic steps of the paths."""

    @property
    def votes(self) -> tuple[PerImage, PerImage]:
        """Share of voters for whom each image, chosen and rejected, is at least as good."""
        won = (1 - self.tie) * self.preference + self.tie
        lost = (1 - self.tie) * (1 - self.preference) + self.tie
        return won, lost

    def padding(self, count: int) -> Self:
        """Return `count` rows for passes of weight 0, with a finite gap."""
        rows = super().padding(count)
        return replace(rows, gap=rows.gap.nan_to_num())

    @property
    def x0(self) -> tuple[Latent, Latent]:
        """The chosen and the rejected latents."""
        return self.chosen, self.rejected

    def transition(self, k: int) -> Transition:
        """Return the sampler's step k of the chosen and then of the rejected images (2 B rows).

        Raises IndexError if the step is not stochastic.
        """
        chosen = _transition(self.chosen_path, self.chosen_log_prob, self.steps, k)
        rejected = _transition(self.rejected_path, self.rejected_log_prob, self.steps, k)
        return Transition(*(torch.cat(sides) for sides in zip(chosen, rejected, strict=True)))

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one latent."""
        return tuple(self.chosen.shape[1:])


@dataclass(kw_only=True)
class Rollout(Batch):
    """Images that the policy made, with everything an objective may need about them."""

    x0: Latent  # (B, *latent)
    path: Latent  # (B, S + 1, *latent)  before and after each of the S stochastic steps
    log_prob: Tensor  # (B, S)  under the weights that sampled
    images: Tensor  # (B, 3, H, W)  bytes
    reward: PerImage  # (B,)  combined; NaN if the image was not scored
    advantage: PerImage  # (B,)
    steps: range = field(metadata=PER_BATCH)
    """The stochastic steps of the path."""
    rewards: dict[str, PerImage] = field(default_factory=dict)
    """Weight · score (B,) of each reward by its name; NaN if the image was not scored."""
    states: dict[int, Latent] = field(default_factory=dict)
    """Latents (B, *latent) on the way to x0, by the sampler's step that begins there.

    They are those of the objective's `kept_steps`.
    """
    reward_with_gradient: DifferentiableReward = field(default=no_reward, metadata=PER_BATCH)
    """The rewards again, if they carry a gradient to the images."""

    def padding(self, count: int) -> Self:
        """Return `count` rows for passes of weight 0, with finite rewards."""
        rows = super().padding(count)
        return replace(rows, reward=rows.reward.nan_to_num())

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one latent."""
        return tuple(self.x0.shape[1:])

    def without_path(self) -> Self:
        """Return the images alone, without the stochastic steps that led to them."""
        path = self.path.new_empty(len(self), 0, *self.latent_shape)
        log_prob = self.log_prob.new_empty(len(self), 0)
        return replace(self, path=path, log_prob=log_prob, steps=range(0))

    def transition(self, k: int) -> Transition:
        """Return the sampler's stochastic step k. Raises IndexError for another step."""
        return _transition(self.path, self.log_prob, self.steps, k)

    def step_noise(self, k: int) -> Latent:
        """Return the noise of the sampler's stochastic step k, before scaling by its std."""
        # `Policy.generate` draws its start as draw 0 and the noise of step k as draw k + 1.
        return self.noise("rollout", k + 1, self.latent_shape).to(self.device)
