"""The two ways a run ends badly, which `cli.main` turns into one message and an exit status, and what was probably meant."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class UserError(Exception):
    """What the user wrote cannot work: exit status 2. The message says what to type instead."""


class RunError(Exception):
    """The run failed while running, by a reward for example: exit status 1."""


class OutOfMemory(RunError):
    """The device's memory did not do."""


def did_you_mean(word: Any, choices: Iterable[Any]) -> str:
    """The choice with these initials, or the nearest, as the end of a message, or nothing."""
    given, names = str(word).lower(), {str(choice).lower(): str(choice) for choice in choices}
    near = [
        name
        for name in names
        if "_" in name and given == "".join(part[:1] for part in name.split("_"))
    ]
    near = near or difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    return f" Did you mean {names[near[0]]!r}?" if near else ""


def similar_file(path: str | Path) -> str:
    """The nearest name in the same folder as the end of a message, or nothing."""
    folder, name = os.path.split(path)
    return did_you_mean(name, os.listdir(folder or ".")) if os.path.isdir(folder or ".") else ""
