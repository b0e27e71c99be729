"""Adapter files in the LoRA format of diffusers."""

import json
from pathlib import Path

from flowalign.files import read_matching_tensors
from flowalign.policy import Policy

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
PREFIX = "transformer."
"""Put by diffusers before the names of a transformer's adapter matrices."""


def save_adapter(policy: Policy, folder: Path, name: str = "policy") -> None:
    """Write an adapter so that diffusers' `load_lora_weights` reads it.

    The scale alpha travels in the metadata of the file. Equal adapters make equal files.

    Args:
        policy: The policy that owns the adapter.
        folder: The folder to write into.
        name: The adapter: "policy" or a snapshot.
    """
    # The pipeline class writes the file because the transformer's own writer loses alpha.
    policy.model.pipeline_class.save_lora_weights(
        folder,
        transformer_lora_layers={
            key: value.contiguous().cpu() for key, value in policy.state(name).items()
        },
        transformer_lora_adapter_metadata={
            **policy.lora.to_dict(),
            "target_modules": sorted(policy.lora.target_modules or []),
        },
    )
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
