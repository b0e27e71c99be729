"""An example of preference data: a prompt and functions that read the bytes of its images."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flowalign.data.prompts import Prompt
from flowalign.errors import UserError

ReadBytes = Callable[[], bytes]


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt with its chosen image and, in a pair, its rejected one."""

    prompt: Prompt
    chosen: ReadBytes
    """Reads the bytes of the better image, or of the only one. Raises UserError if it cannot."""
    rejected: ReadBytes | None = None
    """Reads the bytes of the worse image; None for a single image."""
    gap: float = 1.0
    """Score of the chosen image minus that of the rejected one; 1 if only their order is known."""
    where: str = ""
    """The words that name this example in an error."""


def file_reader(file: Path, where: str) -> ReadBytes:
    """Return what reads an image file. Raises UserError if there is none."""
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
