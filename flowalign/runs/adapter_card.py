"""The card of an adapter: its base model and its LoRA settings."""

import json
from collections.abc import Mapping
from pathlib import Path

import yaml
from safetensors import safe_open, SafetensorError

from flowalign.errors import UserError
from flowalign.models.config import Lora
from flowalign.models.lora import ADAPTER_FILE, METADATA_KEY, PREFIX
from flowalign.settings.yaml_files import parse_yaml


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
    _, _, rest = card.read_text(encoding="utf-8", errors="replace").partition("---\n")
    header, closing, _ = rest.partition("\n---")
    try:
        # The adapter may come from a stranger, so the limits of every YAML file hold here too.
        entries = parse_yaml(header, str(card)) if closing else None
    except UserError:
        return None
    model = entries.get("base_model") if isinstance(entries, dict) else None
    return model if isinstance(model, str) else None


def lora_settings(folder: Path) -> Lora:
    """Return rank, alpha and adapted layers, from the header and the shapes of the weights.

    Raises UserError if the file is missing or damaged, or if its layers differ in rank or scale.
    """
    file = folder / ADAPTER_FILE
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
    targets = sorted(n.removeprefix(PREFIX).removesuffix(".lora_A.weight") for n in names)
    return Lora(rank=rank, alpha=_alpha(file, metadata, rank), targets=targets)


def _alpha(file: Path, metadata: Mapping[str, object], rank: int) -> int:
    """Return the scale of an adapter from its PEFT settings.

    Raises UserError if the package cannot compute with it.
    """
    # Each of these gives layers a scale other than alpha / rank, which nothing else would show.
    for key in ("use_rslora", "alpha_pattern", "rank_pattern"):
        if metadata.get(PREFIX + key):
            raise UserError(
                f"{file} was made with {key}, but flowalign scales every layer by alpha / rank. "
                f"Use an adapter without {key}."
            )
    # Without metadata, diffusers computes with alpha = rank.
    alpha = metadata.get(f"{PREFIX}lora_alpha", rank)
    # Other tools write whole numbers as 16.0.
    if not isinstance(alpha, int | float) or not float(alpha).is_integer() or alpha < 1:
        raise UserError(
            f"{file} has lora_alpha {alpha!r}. Use an adapter whose alpha is a whole number from 1."
        )
    return int(alpha)
