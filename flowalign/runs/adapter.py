"""Adapter files in the LoRA format of diffusers."""

import json
from pathlib import Path

from flowalign.files import read_matching_tensors
from flowalign.models.lora import ADAPTER_FILE, PREFIX
from flowalign.policy import Policy


def save_adapter(policy: Policy, folder: Path, name: str = "policy") -> None:
    """Write an adapter so that diffusers' `load_lora_weights` reads it.

    The scale alpha travels in the metadata of the file. Equal adapters make equal files.

    Args:
        policy: The policy that owns the adapter.
        folder: The folder to write into.
        name: The adapter: "policy" or a snapshot.
    """
    state = {key: value.contiguous().cpu() for key, value in policy.state(name).items()}
    targets = sorted(policy.lora.target_modules or [])
    policy.model.save_adapter(folder, state, {**policy.lora.to_dict(), "target_modules": targets})
    order_header(Path(folder) / ADAPTER_FILE)


def order_header(file: Path) -> None:
    """Sort the header of a safetensors file: the library writes its entries in any order."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True).encode()
    # The format wants the data to begin at a multiple of eight bytes.
    header += b" " * (-len(header) % 8)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])


def load_adapter(policy: Policy, folder: Path, name: str = "policy") -> None:
    """Load an adapter that `save_adapter` wrote.

    Raises:
        UserError: The file is missing or damaged, or belongs to another model or rank.
    """
    expected = {f"{PREFIX}{key}": value.shape for key, value in policy.state(name).items()}
    tensors = read_matching_tensors(folder / ADAPTER_FILE, expected)
    policy.load_state({key.removeprefix(PREFIX): value for key, value in tensors.items()}, name)
