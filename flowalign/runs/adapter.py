"""Adapter files in the LoRA format of diffusers: written, read, and exported at full strength."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open, SafetensorError
from torch import Tensor

from flowalign.errors import UserError
from flowalign.files import read_matching_tensors, read_tensors
from flowalign.models.config import Lora
from flowalign.models.lora import ADAPTER_FILE, METADATA_KEY, PREFIX, save_lora
from flowalign.policy import Policy


def save_adapter(policy: Policy, folder: Path, name: str = "policy") -> None:
    """Write an adapter as it trains, so that diffusers' `load_lora_weights` reads it.

    The scale alpha travels in the metadata of the file. Equal adapters make equal files.

    Args:
        policy: The policy that owns the adapter.
        folder: The folder to write into.
        name: The adapter: "policy" or a snapshot.
    """
    state = {key: value.contiguous().cpu() for key, value in policy.state(name).items()}
    targets = sorted(policy.lora.target_modules or [])
    policy.model.save_adapter(folder, state, {**policy.lora.to_dict(), "target_modules": targets})
    finish_file(Path(folder) / ADAPTER_FILE)


def export_weights(source: Path, folder: Path) -> None:
    """Write an adapter so that every loader applies it at full strength.

    The factor alpha / rank becomes part of the second matrix of each layer, and the metadata says
    alpha = rank. So the scale is 1 with the metadata and without it: ComfyUI and older versions of
    diffusers do not read the metadata.

    Args:
        source: The folder of an adapter.
        folder: The folder to write into.

    Raises:
        UserError: The adapter is missing or damaged, or its layers differ in rank or scale.
    """
    header = read_header(source / ADAPTER_FILE)
    tensors = scaled(read_tensors(source / ADAPTER_FILE), header.alpha / header.rank)
    state = {key.removeprefix(PREFIX): value for key, value in tensors.items()}
    settings = {"r": header.rank, "target_modules": header.layers, **header.settings}
    save_lora(folder, state, {**settings, "lora_alpha": header.rank})
    finish_file(folder / ADAPTER_FILE)


def finish_file(file: Path) -> None:
    """Sort the header of a safetensors file, and give the file the usual permissions.

    The library writes the entries of the header in any order.
    """
    content = with_sorted_header(file.read_bytes())
    # The library makes files that only their owner may read, and a file that is overwritten keeps
    # its permissions.
    file.unlink()
    file.write_bytes(content)


def with_sorted_header(content: bytes) -> bytes:
    """Return the content of a safetensors file with the entries of its header in order."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True).encode()
    # The format wants the data to begin at a multiple of eight bytes.
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]


def load_adapter(policy: Policy, folder: Path, name: str = "policy") -> None:
    """Load an adapter at the strength that its own file states, whatever alpha the policy has.

    Args:
        policy: The policy that owns the adapter.
        folder: The folder of a checkpoint, of a snapshot or of an exported adapter.
        name: The adapter to fill: "policy" or a snapshot.

    Raises:
        UserError: The file is missing or damaged, or belongs to another model or rank.
    """
    file = folder / ADAPTER_FILE
    expected = {f"{PREFIX}{key}": value.shape for key, value in policy.state(name).items()}
    tensors = read_matching_tensors(file, expected)
    tensors = scaled(tensors, read_header(file).alpha / policy.lora.lora_alpha)
    policy.load_state({key.removeprefix(PREFIX): value for key, value in tensors.items()}, name)


def scaled(tensors: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Return the matrices of an adapter whose effect is `factor` times as strong.

    Exact if the factor is a power of two.
    """
    return {
        key: value * factor if key.endswith(".lora_B.weight") else value
        for key, value in tensors.items()
    }


def lora_settings(folder: Path) -> Lora:
    """Return rank, alpha and adapted layers, from the header and the shapes of the weights.

    Raises UserError if the file is missing or damaged, or if its layers differ in rank or scale.
    """
    header = read_header(folder / ADAPTER_FILE)
    return Lora(rank=header.rank, alpha=header.alpha, targets=header.layers)


@dataclass(frozen=True, kw_only=True)
class Header:
    """The facts in the header of an adapter file."""

    rank: int
    alpha: int
    """The output of a layer is scaled by alpha / rank."""
    layers: list[str]
    """Names of the adapted layers, sorted."""
    settings: Mapping[str, object]
    """PEFT's settings from the metadata; empty if the file has none."""


def read_header(file: Path) -> Header:
    """Read the header of an adapter file.

    Raises UserError if the file is missing or damaged, or if its layers differ in rank or scale.
    """
    try:
        with safe_open(file, "pt") as weights:
            names = [name for name in weights.keys() if name.endswith(".lora_A.weight")]
            ranks = {weights.get_slice(name).get_shape()[0] for name in names}
            metadata = json.loads((weights.metadata() or {}).get(METADATA_KEY, "{}"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing. Give a folder that holds an adapter.") from None
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}). Copy the adapter again.") from None
    # PEFT can give each layer a rank of its own; the package trains one rank.
    if len(ranks) != 1:
        raise UserError(f"{file} holds layers of {len(ranks)} ranks. Use an adapter of one rank.")
    (rank,) = ranks
    settings = {key.removeprefix(PREFIX): value for key, value in metadata.items()}
    layers = sorted(n.removeprefix(PREFIX).removesuffix(".lora_A.weight") for n in names)
    alpha = _alpha(file, settings, rank)
    return Header(rank=rank, alpha=alpha, layers=layers, settings=settings)


def _alpha(file: Path, settings: Mapping[str, object], rank: int) -> int:
    """Return the scale of an adapter from its PEFT settings.

    Raises UserError if the package cannot compute with it.
    """
    # Each of these gives layers a scale other than alpha / rank, which nothing else would show.
    for key in ("use_rslora", "alpha_pattern", "rank_pattern"):
        if settings.get(key):
            raise UserError(
                f"{file} was made with {key}, but flowalign scales every layer by alpha / rank. "
                f"Use an adapter without {key}."
            )
    # Without metadata, diffusers computes with alpha = rank.
    alpha = settings.get("lora_alpha", rank)
    # Other tools write whole numbers as 16.0.
    if not isinstance(alpha, int | float) or not float(alpha).is_integer() or alpha < 1:
        raise UserError(
            f"{file} has lora_alpha {alpha!r}. Use an adapter whose alpha is a whole number from 1."
        )
    return int(alpha)
