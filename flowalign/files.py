"""Atomic writes, checksums, JSON and safetensors files."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flowalign.errors import UserError

SUMS = "sha256.json"
"""Of every file beside it, so that one changed bit is found."""


def write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder beside its place, flush it, then put it there under its name; what stood there stays until then."""
    beside, before = (folder.with_name(f".{folder.name}.{end}") for end in ("part", "before"))
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        write(beside)
        for path in (*beside.rglob("*"), beside):
            flush(path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    shutil.rmtree(before, ignore_errors=True)
    if folder.exists():
        folder.rename(before)
    beside.rename(folder)
    flush(folder.parent)
    shutil.rmtree(before, ignore_errors=True)


def write_file(file: Path, content: bytes) -> None:
    """As `write_whole`, one file; where it holds this already, nothing is written."""
    if file.exists() and file.read_bytes() == content:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.part")
    beside.write_bytes(content)
    flush(beside)
    beside.replace(file)
    flush(file.parent)


def flush(path: Path) -> None:
    """Onto the disk, a file or a folder's list of names."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def verify(folder: Path) -> None:
    """UserError that names the file unless every file is as `save_checkpoint` left it, and no other is there."""
    sums = read_json(folder / SUMS)
    for name in sorted(set(sums) ^ set(files_in(folder))):
        missing = f"{folder / name} is missing."
        raise UserError(
            missing if name in sums else f"{folder / SUMS} is damaged: it does not list {name}."
        )
    for name, expected in sums.items():
        if sha256(folder / name) != expected:
            raise UserError(f"{folder / name} is damaged: it is not what was written.")


def files_in(folder: Path) -> list[str]:
    """The names of all files in and below it that have a sum."""
    return sorted(
        str(file.relative_to(folder))
        for file in folder.rglob("*")
        if file.is_file() and file != folder / SUMS
    )


def read_json(file: Path) -> dict[str, Any]:
    """An object. UserError when it is missing or damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} is damaged: it holds no object.")
    return found


def read_fitting(file: Path, expected: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The tensors of a file. UserError unless they have these names and shapes."""
    found = read_tensors(file)
    shapes = {key: value.shape for key, value in found.items()}
    if differ := sorted(key for key in {*expected, *found} if shapes.get(key) != expected.get(key)):
        one, other = (
            str(tuple(table[differ[0]])) if differ[0] in table else "not there"
            for table in (shapes, expected)
        )
        raise UserError(
            f"{file} does not fit the model: {len(differ)} tensors differ; {differ[0]} is {one}, here {other}."
        )
    return found


def read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except FileNotFoundError:
        raise UserError(f"{file} is missing.") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged: {error}") from None


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that any reader takes: a number that is not finite is null."""

    def finite(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: finite(entry) for key, entry in part.items()}
        if isinstance(part, list | tuple):
            return [finite(entry) for entry in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), indent=indent, allow_nan=False)


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"
