"""Errors that end a command with one message and an exit status, and the hints in messages."""

import difflib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """The user's input cannot work: exit status 2. The message says what to write instead."""


class RunError(Exception):
    """The run failed while it was running, for example in a reward: exit status 1."""


class OutOfMemory(RunError):
    """The device ran out of memory."""


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Put the file's name in front of a UserError raised in the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def did_you_mean(word: object, choices: Iterable[object]) -> str:
    """Return " Did you mean 'NAME'?" for the choice that is most similar, or an empty string.

    Initials count as similar: `fg` stands for `flow_grpo`.
    """
    written = str(word).lower()
    names = {str(choice).lower(): str(choice) for choice in choices}
    similar = [name for name in names if "_" in name and written == _initials(name)]
    similar = similar or difflib.get_close_matches(written, names, n=1, cutoff=0.5)
    return f" Did you mean {names[similar[0]]!r}?" if similar else ""


def _initials(name: str) -> str:
    return "".join(part[:1] for part in name.split("_"))


def similar_file(path: str | Path) -> str:
    """Return a hint at the most similar name in the same folder, or an empty string."""
    folder, name = os.path.split(path)
    if not os.path.isdir(folder or "."):
        return ""
    return did_you_mean(name, os.listdir(folder or "."))
