"""Adapters in diffusers' LoRA format."""

import json
from pathlib import Path

from flowalign.files import read_fitting
from flowalign.policy import Policy

ADAPTER_FILE = "pytorch_lora_weights.safetensors"


def save_adapter(policy: Policy, folder: Path, name: str = "policy") -> None:
    """One adapter as diffusers' `load_lora_weights` reads it, its alpha in the metadata. Equal adapters are equal files."""
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
    """Safetensors writes the entries of its header in any order; sort them."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])


def load_adapter(policy: Policy, folder: Path, name: str = "policy") -> None:
    """The adapter of a folder that `save_adapter` wrote. UserError when it is damaged or does not fit."""
    expected = {f"transformer.{key}": value.shape for key, value in policy.state(name).items()}
    state = read_fitting(folder / ADAPTER_FILE, expected)
    policy.load_state(
        {key.removeprefix("transformer."): value for key, value in state.items()}, name
    )
