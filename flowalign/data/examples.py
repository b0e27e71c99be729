"""Pictures to learn from: given files, and pictures that flowalign makes again from their keys."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from flowalign.data.prompts import Prompt
from flowalign.errors import UserError
from flowalign.settings.merging import Section

ReadBytes = Callable[[], bytes]


class ImageKey(NamedTuple):
    """The four numbers that all noise of a picture depends on."""

    seed: int
    step: int
    prompt: int
    image: int


@dataclass(frozen=True, kw_only=True)
class VoteSource:
    """How the pictures of a vote file were made."""

    model: str
    """Folder or repository of the model."""
    merge: list[str]
    """Adapters that were added to the model's weights."""
    weights: str
    """SHA-256 of the transformer's weights, with the merged adapters."""
    height: int
    width: int
    sampler: Section
    """The `sampler` section."""
    environment: dict[str, object]
    """Library versions and the device."""


@dataclass(frozen=True)
class Question:
    """A prompt and its pictures, which are sampled together in one batch."""

    prompt: Prompt
    keys: tuple[ImageKey, ...]
    source: VoteSource

    # Metadata and samplers are dictionaries, which have no hash.
    def __hash__(self) -> int:
        return hash((self.prompt.text, self.keys))


@dataclass(frozen=True)
class Drawn:
    """A picture that flowalign made, as one of the pictures of a question."""

    question: Question
    row: int
    """Its place among the keys of the question."""
    stored: ReadBytes | None = None
    """Reads the picture as it was shown, if it was stored."""


Picture = ReadBytes | Drawn
"""A file, or a picture to make again."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt with a picture, or with a chosen and a rejected one."""

    prompt: Prompt
    chosen: Picture
    """The better picture, or the only one. A file raises UserError if it cannot be read."""
    rejected: Picture | None = None
    """The worse picture; None for a single one."""
    liked: bool = True
    """False for a single picture that somebody disliked."""
    gap: float = 1.0
    """Score of the chosen picture minus that of the rejected one; 1 if only their order is known.
    For votes, the difference of their mean labels."""
    preference: float = 1.0
    """Share of the decided votes that prefer the chosen picture."""
    tie: float = 0.0
    """Share of all votes that are ties."""
    where: str = ""
    """The words that name this example in an error."""

    @property
    def pictures(self) -> list[Picture]:
        """Its one or two pictures."""
        return [self.chosen] if self.rejected is None else [self.chosen, self.rejected]


def picture_reader(file: Path, where: str) -> ReadBytes:
    """Return what reads a picture. Raises UserError if the file does not exist."""
    # Checked now, because a missing image should not end a run hours later. `os.path.isfile` is
    # False for a name that the file system refuses, where `Path.is_file` raises.
    if not os.path.isfile(file):
        raise UserError(f"{where}: the image {file} does not exist. Correct its name.")
    return partial(_file_bytes, file, where)


def _file_bytes(file: Path, where: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(
            f"{where}: the image {file} cannot be read: {error}. Restore the file."
        ) from error


def beside(listing: Path, name: str) -> Path:
    """Return the path of a picture: next to its listing, or in the home folder if it has a `~`."""
    return listing.parent / os.path.expanduser(name)
