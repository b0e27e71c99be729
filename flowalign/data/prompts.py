"""Read prompt files, and choose the prompts of a step as a pure function of the step."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

from flowalign.batch import NEGATIVE, negative_prompt
from flowalign.data import tables
from flowalign.data.source import data_source, Written
from flowalign.errors import UserError
from flowalign.files import read_text

Metadata = dict[str, Any]
"""The fields beside the prompt in a line of a prompt file. Values are what JSON holds."""


def negative_texts(prompts: Iterable["Prompt"], default: str) -> list[str]:
    """Return each negative prompt of the prompts once, without the empty one."""
    negative = dict.fromkeys(negative_prompt(prompt.metadata, default) for prompt in prompts)
    return [*filter(None, negative)]


@dataclass(frozen=True)
class Prompt:
    """A prompt with its metadata."""

    text: str
    metadata: Metadata = field(default_factory=dict)


def read_prompts(written: Written | Path, key: str = "data.prompts") -> list[Prompt]:
    """Read a `.txt` file (one prompt per line), a `.jsonl` file (objects), a table or a data set.

    Objects have a field `prompt`, and tables (`.csv`, `.tsv`, `.parquet`) and data sets a column
    `prompt`, `caption` or `text`. Other fields and columns become metadata.

    Raises UserError with `key`, the file and the line if the file cannot be used.
    """
    source = data_source(written, key)
    path = source.location
    if source.is_dataset:
        prompts = [_prompt(entry, where) for entry, where in tables.read_dataset(source, key)]
    elif path.suffix == ".txt":
        prompts = [Prompt(line.strip()) for line, _ in _lines(path, key)]
    elif path.suffix == ".jsonl":
        objects = read_objects(path, key)
        prompts = [_prompt(source.renamed(entry), where) for entry, where in objects]
    elif path.suffix in tables.SUFFIXES:
        prompts = [_prompt(entry, where) for entry, where in tables.read_rows(source, key)]
    else:
        raise UserError(
            f"{key}: {path} cannot be read as prompts. Give a .txt file with one prompt per line, "
            f"a .jsonl file, a table ({', '.join(tables.SUFFIXES)}), or a data set as "
            "{path: FOLDER, split: train}."
        )
    if not prompts:
        raise UserError(f"{key}: {path} has no prompts. Write one per line.")
    return prompts


def read_objects(path: Path, key: str) -> list[tuple[Metadata, str]]:
    """Read the objects of a `.jsonl` file, each with the words that name its line in an error.

    A line that holds another JSON value becomes an empty object, so that callers need to check
    for missing fields only.
    """
    objects = []
    for line, where in _lines(path, key):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON: {error}. Write one object per line.") from None
        objects.append((value if isinstance(value, dict) else {}, where))
    return objects


def read_array(path: Path, key: str) -> list[tuple[Metadata, str]]:
    """Read the objects of a `.json` file that holds one list, as `read_objects`."""
    try:
        values = json.loads(read_text(path, key))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{key}: {path} is not JSON: {error}. Write a list of objects.") from None
    if not isinstance(values, list):
        raise UserError(f"{key}: {path} does not hold a list. Write a list of objects.")
    return [
        (value if isinstance(value, dict) else {}, f"{key}: {path}, entry {number}")
        for number, value in enumerate(values, 1)
    ]


def _lines(path: Path, key: str) -> list[tuple[str, str]]:
    """Return the lines that are not empty, each with the words that name it in an error."""
    # Not `splitlines`: it also splits at characters that may stand inside a prompt (U+2028).
    lines = read_text(path, key).split("\n")
    numbered = enumerate(lines, 1)
    return [(line, f"{key}: {path}, line {number}") for number, line in numbered if line.strip()]


def _prompt(entry: Metadata, where: str) -> Prompt:
    if not isinstance(entry.get("prompt"), str):
        raise UserError(
            f'{where} has no text in the field "prompt". '
            'Write for example {"prompt": "a red circle"}.'
        )
    if not isinstance(entry.get(NEGATIVE), str | None):
        raise UserError(f"{where} has the {NEGATIVE} {entry[NEGATIVE]!r}. Write a text.")
    metadata = {name: value for name, value in entry.items() if name != "prompt"}
    return Prompt(entry["prompt"], metadata)


def prompts_of_step(count: int, step: int, size: int, seed: int) -> list[int]:
    """Return the indices of the `size` prompts of a step, out of `count` prompts.

    The prompts are shuffled anew for every epoch, and each occurs once per epoch. The result
    depends on the arguments only, so a resumed run sees the same prompts.
    """
    places = (divmod(position, count) for position in range(step * size, (step + 1) * size))
    return [_shuffled(count, epoch, seed)[offset] for epoch, offset in places]


@lru_cache(maxsize=2)
def _shuffled(count: int, epoch: int, seed: int) -> list[int]:
    # A string seed is hashed the same way in every process and Python version.
    return Random(f"{seed}/{epoch}").sample(range(count), count)
