"""Adapters that a run begins with: files in the formats of diffusers, PEFT and kohya's scripts."""

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import nn, Tensor

from flowalign.errors import UserError
from flowalign.models.layer_adapter import LayerAdapter
from flowalign.models.layer_names import Layers
from flowalign.models.lora import ADAPTER_FILE, KOHYA_PREFIX, METADATA_KEY, PREFIX

PEFT_FILE, PEFT_SETTINGS = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."
MAGNITUDE_ENDINGS = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")
A_ENDINGS = (".lora_A.weight", ".lora_down.weight", ".lora.down.weight")
B_ENDINGS = (".lora_B.weight", ".lora_up.weight", ".lora.up.weight")
ALPHA_ENDING = ".alpha"
ENDINGS = {
    "a": A_ENDINGS,
    "b": B_ENDINGS,
    "alpha": (ALPHA_ENDING,),
    "magnitude": MAGNITUDE_ENDINGS,
}
"""Endings of the names of a layer's tensors, by the part that each is."""
OTHER_KINDS = {
    "*dora_scale*": "DoRA",
    "*.lokr_*": "LoKr",
    "*.hada_*": "LoHa",
    "text_encoder*": "an adapter of text encoders",
    "lora_te*": "an adapter of text encoders",
}
"""Patterns of keys that say that a file holds more than a LoRA of the transformer."""


@dataclass
class _Part:
    """The matrices and the alpha of one layer, as far as a file holds them."""

    a: Tensor | None = None
    b: Tensor | None = None
    alpha: float | None = None
    magnitude: Tensor | None = None


def read_adapter(
    path: str, layers: Layers, key: str, dora: bool = False
) -> dict[str, LayerAdapter]:
    """Read the adapter of each layer by the layer's name.

    Args:
        path: A file, or a folder with a file of diffusers or PEFT.
        layers: The layers of the transformer, and how kohya's scripts name them.
        key: The key of the configuration, for messages.
        dora: True to read PEFT's DoRA too.

    Raises:
        UserError: The file is missing or damaged, is not a LoRA, or does not fit the layers.
    """
    # It imports safetensors, which reading a YAML file does not need.
    from flowalign.files import read_tensors

    file = find_file(path, key)
    tensors = read_tensors(file)
    refuse_other_kinds(tensors, file, key)
    if not tensors:
        raise UserError(f"{key}: {file} is empty. Give the file of an adapter.")
    settings = read_settings(file, key)
    adapters: dict[str, LayerAdapter] = {}
    for name, part in parts_of(tensors, file, key).items():
        if part.magnitude is not None and not dora:
            raise UserError(
                f"{key}: {file} holds DoRA, for example in {name}. Give a plain LoRA of the "
                "transformer."
            )
        a, b = part.a, part.b
        if a is None or b is None or a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1]:
            raise UserError(f"{key}: {file} is damaged: the matrices of {name} do not fit.")
        scale = part.alpha / len(a) if part.alpha is not None else settings.scale(name, len(a))
        adapter = LayerAdapter(a.float(), b.float(), scale, part.magnitude)
        adapters |= layers.from_file(name, adapter, key)
    return adapters


def find_file(path: str, key: str) -> Path:
    """Return the file of an adapter. Raises UserError if there is none."""
    place = Path(os.path.expanduser(path))
    if place.is_file():
        return place
    for name in (ADAPTER_FILE, PEFT_FILE):
        if (place / name).is_file():
            return place / name
    raise UserError(
        f"{key}: there is no adapter {path}. Give a .safetensors file, or a folder with "
        f"{ADAPTER_FILE} or {PEFT_FILE}."
    )


def refuse_other_kinds(keys: Iterable[str], file: Path, key: str) -> None:
    """Raise UserError if a key belongs to another kind of adapter."""
    for name in keys:
        for pattern, kind in OTHER_KINDS.items():
            if fnmatch(name.removeprefix(PEFT_PREFIX), pattern):
                raise UserError(
                    f"{key}: {file} holds {kind}, for example {name}. Give a plain LoRA of the "
                    "transformer."
                )


@dataclass(frozen=True)
class AdapterSettings:
    """PEFT's settings, as far as they decide the scale."""

    alpha: float | None = None
    alphas: Mapping[str, float] = field(default_factory=dict)
    """Alpha of layers that differ, by a pattern of their names."""
    square_root: bool = False
    """True for rsLoRA, whose scale is alpha over the square root of the rank."""

    @classmethod
    def from_peft(cls, values: Mapping[str, Any]) -> "AdapterSettings":
        """Return the settings of a PEFT configuration by its keys."""
        alpha, alphas = values.get("lora_alpha"), values.get("alpha_pattern") or {}
        return cls(
            alpha=None if alpha is None else float(alpha),
            alphas={name: float(value) for name, value in alphas.items()},
            square_root=bool(values.get("use_rslora")),
        )

    def scale(self, layer: str, rank: int) -> float:
        """Return the factor of B A; 1 if nothing is known."""
        matching = (alpha for key, alpha in self.alphas.items() if matches(key, layer))
        alpha = next(matching, self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.square_root else rank)


def matches(pattern: str, layer: str) -> bool:
    """True if a key of `rank_pattern` or `alpha_pattern` stands for a layer, as PEFT reads it."""
    return re.match(rf"(.*\.)?({pattern})$", layer) is not None


def read_settings(file: Path, key: str) -> AdapterSettings:
    """Return PEFT's settings: those of the file's metadata, or of the file beside it.

    Raises UserError if they cannot be read.
    """
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
    beside = file.with_name(PEFT_SETTINGS)
    if METADATA_KEY not in metadata and not beside.is_file():
        return AdapterSettings()
    try:
        written = json.loads(metadata.get(METADATA_KEY) or beside.read_text(encoding="utf-8"))
        values = {name.removeprefix(PREFIX): value for name, value in written.items()}
        return AdapterSettings.from_peft(values)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{key}: PEFT's settings of {file} cannot be read: {error}. Save the adapter again."
        ) from error


def parts_of(tensors: Mapping[str, Tensor], file: Path, key: str) -> dict[str, _Part]:
    """Return the matrices and the alpha of every layer, under the file's name of the layer."""
    parts: dict[str, _Part] = defaultdict(_Part)
    for name, tensor in tensors.items():
        short = name.removeprefix(PEFT_PREFIX).removeprefix(PREFIX).removeprefix(KOHYA_PREFIX)
        for entry, endings in ENDINGS.items():
            if ending := next((end for end in endings if short.endswith(end)), None):
                value = tensor.flatten()[0].item() if entry == "alpha" else tensor
                setattr(parts[short.removesuffix(ending)], entry, value)
                break
        else:
            raise UserError(
                f"{key}: {file} holds {name}, which does not belong to a LoRA. Give a file of "
                "diffusers, PEFT or kohya's scripts."
            )
    return parts


@torch.no_grad()
def merge(adapters: Mapping[str, LayerAdapter], layers: Mapping[str, nn.Linear]) -> None:
    """Add adapters to the weights of layers. Sums are rounded to the dtype of the weights."""
    for name, adapter in adapters.items():
        weight = layers[name].weight
        weight.copy_(weight.float() + adapter.change.to(weight.device))
