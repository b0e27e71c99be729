"""Adapters of networks that are not part of a diffusers pipeline, in the same file format."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TYPE_CHECKING

from torch import nn, Tensor

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
PREFIX = "transformer."
"""Comes before the names of matrices and settings in the file."""
KOHYA_PREFIX = "lora_unet_"
"""Comes before the names of layers in files of kohya's scripts."""
METADATA_KEY = "lora_adapter_metadata"


def add_lora(network: nn.Module, lora: "LoraConfig", name: str) -> None:
    """Put an adapter on the layers that the configuration targets. It is active afterwards."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(lora, network, name)


def save_lora(folder: Path, state: Mapping[str, Tensor], settings: Mapping[str, object]) -> None:
    """Write matrices and PEFT settings of an adapter as diffusers' `save_lora_weights` does."""
    from safetensors.torch import save_file

    # Without the settings in the file, alpha would be lost and the adapter loaded at another scale.
    prefixed = {PREFIX + key: value for key, value in settings.items()}
    metadata = {"format": "pt", METADATA_KEY: json.dumps(prefixed, indent=2, sort_keys=True)}
    tensors = {PREFIX + key: value for key, value in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / ADAPTER_FILE, metadata)


def load_lora(network: nn.Module, folder: Path, name: str) -> None:
    """Put an adapter that `save_lora` wrote on a network, under a new name."""
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(folder / ADAPTER_FILE, framework="pt") as file:
        settings = json.loads(file.metadata()[METADATA_KEY])
        state = {key.removeprefix(PREFIX): file.get_tensor(key) for key in file.keys()}
    add_lora(network, LoraConfig(**{k.removeprefix(PREFIX): v for k, v in settings.items()}), name)
    set_peft_model_state_dict(network, state, adapter_name=name)


def delete_lora(network: nn.Module, name: str) -> None:
    """Remove an adapter from every layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in network.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.delete_adapter(name)
    # PEFT keeps the settings of all adapters on the network itself.
    settings: Any = network.peft_config
    del settings[name]
