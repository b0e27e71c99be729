"""Atomic writes, checksums, JSON and safetensors files.

Everything that a run leaves on disk goes through this module, so that a power cut or a full disk
leaves either the old content or the new one, never half of it.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open, SafetensorError
from safetensors.torch import save
from torch import Tensor

from flowalign.errors import similar_file, UserError

CHECKSUMS = "sha256.json"
"""Name of the file that lists the SHA-256 of every other file in its folder."""
CACHE_VARIABLE = "FLOWALIGN_CACHE"
ANOTHER_CACHE = f"Set the environment variable {CACHE_VARIABLE} to a folder that can be written."
CHECKSUM = "sha256"
"""Name in the header of a safetensors file of the checksum of its tensors."""


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder atomically: build it next to the target, flush it to disk, rename it.

    Args:
        folder: The target. If it exists, its old content stays until the new one is complete.
        write: Fills the folder whose path it is given.
    """
    unfinished, old = (folder.with_name(f".{folder.name}.{end}") for end in ("part", "before"))
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        write(unfinished)
        for path in (*unfinished.rglob("*"), unfinished):
            flush(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    # A folder cannot be replaced in one call, so the old one is moved aside first.
    if folder.exists():
        folder.rename(old)
    unfinished.rename(folder)
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_file(file: Path, content: bytes) -> None:
    """Write a file atomically. If the file already has this content, nothing is written."""
    if file.exists() and file.read_bytes() == content:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.part")
    unfinished.write_bytes(content)
    flush(unfinished)
    unfinished.replace(file)
    flush(file.parent)


def flush(path: Path) -> None:
    """Force a file, or the list of names in a folder, onto the disk."""
    if path.is_dir():
        # Windows can neither open nor flush a folder; it writes renames through on its own.
        if os.name != "nt":
            _fsync(os.open(path, os.O_RDONLY))
        return
    # Windows flushes only what was opened for writing.
    _fsync(os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0)))


def _fsync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder() -> Path:
    """Return the folder of all caches: `$FLOWALIGN_CACHE`, or `~/.cache/flowalign`.

    Raises UserError if the home folder is needed and not known.
    """
    # A user of a cluster may have no home folder, and then sets the variable.
    folder = os.environ.get(CACHE_VARIABLE) or "~/.cache/flowalign"
    try:
        return Path(folder).expanduser()
    except RuntimeError as error:
        raise UserError(f"The cache {folder} cannot be found: {error} {ANOTHER_CACHE}") from None


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_checksums(folder: Path) -> None:
    """Write the checksums of all files in and below the folder into the folder."""
    checksums = {name: sha256(folder / name) for name in _files_below(folder)}
    (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=2), encoding="utf-8")


def verify_checksums(folder: Path, required: list[str]) -> None:
    """Compare the files of a folder with the checksums that `write_checksums` wrote there.

    A file that is not listed is allowed: a user may keep notes beside the weights.

    Args:
        folder: The folder to verify.
        required: Files that the checksums must list, relative to the folder.

    Raises:
        UserError: A file is missing or damaged. The message names it.
    """
    checksums = read_json(folder / CHECKSUMS)
    # Without this, a shortened list of checksums would hide a damaged file.
    for name in required:
        if name not in checksums:
            raise UserError(f"{folder / CHECKSUMS} is damaged: it does not list {name}.")
    for name, checksum in sorted(checksums.items()):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing.")
        if sha256(folder / name) != checksum:
            raise UserError(f"{folder / name} is damaged: its SHA-256 differs from {CHECKSUMS}.")


def _files_below(folder: Path) -> list[str]:
    # Names use forward slashes, so that a checkpoint verifies on another operating system.
    return sorted(
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.is_file() and file != folder / CHECKSUMS
    )


def read_text(file: Path, key: str) -> str:
    """Read a text file that a user named.

    Args:
        file: The file, in UTF-8, with or without a byte order mark.
        key: The configuration key that names the file, such as `data.prompts`.

    Raises:
        UserError: The file does not exist or cannot be read.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            f"{key}: there is no file {file}. Correct the path.{similar_file(file)}"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{key}: {file} cannot be read: {error}. Give a text file in UTF-8."
        ) from None


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object that this package wrote. Raises UserError if it is missing or damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {error}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is damaged: it does not hold a JSON object.")
    return content


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a safetensors file with the permissions of any other new file."""
    # The library's `save_file` makes files that only their owner may read.
    file.write_bytes(save(tensors))


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises UserError if it is missing or damaged."""
    return _tensors_and_metadata(file)[0]


def _tensors_and_metadata(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, "pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}
            return tensors, content.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"{file} is missing.") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged: {error}.") from None


def with_checksum(tensors: Mapping[str, Tensor]) -> bytes:
    """Return a safetensors file of some tensors, whose header holds their checksum."""
    whole = {name: value.contiguous() for name, value in tensors.items()}
    return save(whole, {CHECKSUM: tensor_checksum(whole)})


def read_with_checksum(file: Path) -> dict[str, Tensor]:
    """Read a file that `with_checksum` made.

    Raises UserError if it is missing or damaged, or if its tensors are not those of its checksum.
    """
    tensors, metadata = _tensors_and_metadata(file)
    if CHECKSUM not in metadata:
        raise UserError(f"{file} is damaged: its header holds no checksum.")
    if metadata[CHECKSUM] != tensor_checksum(tensors):
        raise UserError(f"{file} is damaged: its tensors are not those of its checksum.")
    return tensors


def tensor_checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and values, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        # Only flat tensors can be viewed as bytes. A copy, because one of a single value may
        # count as contiguous under a stride that no view accepts.
        flat = value.detach().cpu().clone(memory_format=torch.contiguous_format).flatten()
        values = flat.view(torch.uint8)
        digest.update(values.numpy().data)
    return digest.hexdigest()


def read_matching_tensors(file: Path, expected: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Read a safetensors file of weights, whose names and shapes are known.

    Raises:
        UserError: The file is missing or damaged, a name or a shape differs, or a value is not
            finite.
    """
    tensors = read_tensors(file)
    shapes = {name: str(tuple(value.shape)) for name, value in tensors.items()}
    wanted = {name: str(tuple(shape)) for name, shape in expected.items()}
    _require_equal(file, shapes, wanted)
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise UserError(f"{file} is damaged: {name} holds values that are not finite.")
    return tensors


def require_types(file: Path, expected: Mapping[str, torch.dtype] | None = None) -> None:
    """Raise UserError unless the tensors of a safetensors file have their types.

    Those that are not named must be float32.
    """
    types = {name: value.dtype for name, value in read_tensors(file).items()}
    wanted = dict.fromkeys(types, torch.float32) | {
        name: dtype for name, dtype in (expected or {}).items() if name in types
    }
    stored, expected_types = (
        {name: str(dtype).removeprefix("torch.") for name, dtype in each.items()}
        for each in (types, wanted)
    )
    _require_equal(file, stored, expected_types)


def _require_equal(file: Path, stored: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Raise UserError if the descriptions of the tensors of a file are not the expected ones."""
    names = {*stored, *expected}
    different = sorted(name for name in names if stored.get(name) != expected.get(name))
    if different:
        name = different[0]
        raise UserError(
            f"{file} does not fit the model: {len(different)} tensors differ. For example, {name} "
            f"is {stored.get(name, 'missing')} in the file and "
            f"{expected.get(name, 'missing')} in the model."
        )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return what an optimizer remembers, by names such as `0.exp_avg`: parameter and slot."""
    return {
        f"{index}.{slot}": value
        for index, parameter in enumerate(_parameters(optimizer))
        for slot, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore what `optimizer_tensors` returned. The optimizer must have the same parameters."""
    parameters = _parameters(optimizer)
    optimizer.state.clear()
    # The optimizer's own `load_state_dict` would turn codes of 8 bits into float32.
    for name, value in tensors.items():
        index, slot = name.split(".")
        parameter = parameters[int(index)]
        # Optimizers count their steps on the CPU.
        device = value.device if slot == "step" else parameter.device
        optimizer.state[parameter][slot] = value.to(device)


def tensors_after_a_step(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return what an optimizer of this class remembers after its first step, without values."""
    meta = torch.device("meta")
    twins = [parameter.detach().to(meta).requires_grad_() for parameter in _parameters(optimizer)]
    for twin in twins:
        twin.grad = torch.zeros_like(twin)
    copy: Any = type(optimizer)(twins)  # pyright: ignore
    copy.step()
    return optimizer_tensors(copy)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def to_json(value: Any, indent: int | None = None) -> str:
    """Return JSON that every reader accepts: a number that is not finite becomes null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_bytes(count: float) -> str:
    """Return a number of bytes in MB or GB, for people."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"
