"""The result of one evaluation, in memory and as a file."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from flowalign.errors import UserError
from flowalign.files import read_with_checksum, with_checksum, write_file
from flowalign.flow import PerImage

TENSORS = ("prompt", "images", "shown")
"""Names in the file of what is neither a reward nor a held-out figure."""


@dataclass
class EvaluationResult:
    """Scores of all evaluation images, ordered by prompt and image, and some of the images."""

    prompt: Tensor  # (N,)
    """Index of the prompt of each image."""
    rewards: dict[str, PerImage]
    """Scores (N,) by reward; NaN for an image that was not scored."""
    images: Tensor  # (n, 3, H, W)
    """Some of the images, in bytes, spread over the prompts."""
    shown: Tensor  # (n,)
    """Index of the prompt of each of these images."""
    held_out: dict[str, Tensor] = field(default_factory=dict)
    """Figures (M,) of each entry of `evaluation.pairs`, by name."""
    figures: dict[str, float] = field(default_factory=dict)
    """Signs of over-optimisation: `diversity`, `velocity_norm` and `velocity_moved`."""
    thumbnails: dict[int, bytes] = field(default_factory=dict)
    """Small pictures of the first image of prompts, as WebP files, by its row in `prompt`."""

    @property
    def means(self) -> dict[str, float]:
        """The mean of every reward and held-out figure, without images that were not scored."""
        scores = self.rewards | self.held_out
        return {name: values.double().nanmean().item() for name, values in scores.items()}

    @property
    def metrics(self) -> dict[str, float]:
        """The means and figures, by the names that are logged: `eval/NAME`."""
        return {f"eval/{name}": value for name, value in (self.means | self.figures).items()}

    @property
    def scored_prompts(self) -> int:
        """The number of prompts with a score; 0 without any reward."""
        return len(self.prompt[_scored(self.rewards, len(self.prompt))].unique())

    @property
    def scored_entries(self) -> int:
        """The number of held-out entries with a figure."""
        count = max(map(len, self.held_out.values()), default=0)
        return int(_scored(self.held_out, count).sum())

    @property
    def without_pictures(self) -> "EvaluationResult":
        """The same scores and thumbnails without the pictures at full size."""
        return replace(self, images=self.images[:0], shown=self.shown[:0])

    def save(self, path: Path) -> None:
        """Write the result into a safetensors file with a checksum."""
        tensors = {name: getattr(self, name) for name in TENSORS}
        for name, values in self.rewards.items():
            tensors[f"reward/{name}"] = values
        for name, values in self.held_out.items():
            tensors[f"held_out/{name}"] = values
        for name, value in self.figures.items():
            tensors[f"figure/{name}"] = torch.tensor(value, dtype=torch.float64)
        for row, file in self.thumbnails.items():
            tensors[f"thumbnail/{row}"] = torch.frombuffer(bytearray(file), dtype=torch.uint8)
        write_file(path, with_checksum(tensors))

    @classmethod
    def load(cls, path: Path) -> "EvaluationResult":
        """Read what `save` wrote. Raises UserError if the file is missing or damaged."""
        try:
            tensors = read_with_checksum(path)
            _require_rows(tensors, path)
        except UserError as error:
            raise UserError(f"{error} Remove the file; training makes it again.") from None
        return cls(
            prompt=tensors["prompt"],
            rewards=_with_prefix(tensors, "reward/"),
            images=tensors["images"],
            shown=tensors["shown"],
            held_out=_with_prefix(tensors, "held_out/"),
            figures=_figures(tensors),
            thumbnails=_thumbnails(tensors),
        )


def _require_rows(tensors: dict[str, Tensor], path: Path) -> None:
    """Raise UserError unless every image has one score of each reward, and every picture a prompt.

    A checksum says only that the file is as it was written, and other programs can write one.
    """
    missing = sorted(set(TENSORS) - set(tensors))
    if missing:
        raise UserError(f"{path} is damaged: the tensor {missing[0]} is missing.")
    shapes = {f"reward/{name}": tensors["prompt"] for name in _with_prefix(tensors, "reward/")}
    shapes["shown"] = tensors["images"]
    for name, rows in shapes.items():
        if tensors[name].shape != rows.shape[:1]:
            raise UserError(
                f"{path} is damaged: {name} has the shape {tuple(tensors[name].shape)} instead of "
                f"{tuple(rows.shape[:1])}."
            )
    prompt = tensors["prompt"]
    # Every prompt has at least one image.
    if len(prompt) and not 0 <= prompt.min() <= prompt.max() < len(prompt):
        raise UserError(f"{path} is damaged: prompt holds a number that no prompt has.")


def _figures(tensors: dict[str, Tensor]) -> dict[str, float]:
    figures = _with_prefix(tensors, "figure/")
    return {name: value.item() for name, value in figures.items() if value.numel() == 1}


def _thumbnails(tensors: dict[str, Tensor]) -> dict[int, bytes]:
    """Return the thumbnails of a file, by row; another program may have written odd names."""
    rows, thumbnails = len(tensors["prompt"]), _with_prefix(tensors, "thumbnail/")
    known = {
        int(row): bytes(file.numpy())
        for row, file in thumbnails.items()
        if row.isdecimal() and int(row) < rows and file.dtype == torch.uint8
    }
    # The names in a file are sorted as text.
    return dict(sorted(known.items()))


def _scored(scores: dict[str, Tensor], count: int) -> Tensor:
    """Return which of `count` rows have at least one score."""
    if not scores:
        return torch.zeros(count, dtype=torch.bool)
    return ~torch.stack(list(scores.values())).isnan().all(0).cpu()


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
