"""The card of an adapter: its base model and its LoRA settings."""

import json
from pathlib import Path

import yaml
from safetensors import safe_open, SafetensorError

from flowalign.errors import UserError
from flowalign.models.config import Lora
from flowalign.models.lora import ADAPTER_FILE, METADATA_KEY, PREFIX


def card_head(model: str) -> str:
    """Return the head of an adapter's README: the model card of the Hugging Face hub."""
    entries = {
        "base_model": model,
        "library_name": "diffusers",
        "tags": ["lora", "text-to-image", "flowalign"],
    }
    return f"---\n{yaml.safe_dump(entries, sort_keys=False)}---\n"


def base_model(folder: Path) -> str | None:
    """Return the model that the card of an adapter names as `base_model`, or None."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    # The card of the Hugging Face hub begins with YAML between two lines of dashes.
    _, _, rest = card.read_text(encoding="utf-8").partition("---\n")
    header, closing, _ = rest.partition("\n---")
    try:
        entries = yaml.safe_load(header) if closing else None
    except yaml.YAMLError:
        return None
    model = entries.get("base_model") if isinstance(entries, dict) else None
    return model if isinstance(model, str) else None


def lora_settings(folder: Path) -> Lora:
    """Return rank, alpha and adapted layers, from the header and the shapes of the weights.

    Raises UserError if the file is missing or damaged, or if its layers differ in rank.
    """
    file = folder / ADAPTER_FILE
    try:
        with safe_open(file, "pt") as weights:
            names = [name for name in weights.keys() if name.endswith(".lora_A.weight")]
            ranks = {weights.get_slice(name).get_shape()[0] for name in names}
            metadata = json.loads((weights.metadata() or {}).get(METADATA_KEY, "{}"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing. Give a folder that holds an adapter.") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}). Copy the adapter again.") from None
    # PEFT can give each layer a rank of its own; the package trains one rank.
    if len(ranks) != 1:
        raise UserError(f"{file} holds layers of {len(ranks)} ranks. Use an adapter of one rank.")
    (rank,) = ranks
    # Without metadata, diffusers computes with alpha = rank.
    alpha = metadata.get(f"{PREFIX}lora_alpha", rank)
    targets = sorted(n.removeprefix(PREFIX).removesuffix(".lora_A.weight") for n in names)
    return Lora(rank=rank, alpha=alpha, targets=targets)
