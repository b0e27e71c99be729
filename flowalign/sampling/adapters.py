"""Adapters to make pictures with: where they are, and their strengths."""

import math
from dataclasses import dataclass
from pathlib import Path

from flowalign.bundled import locate
from flowalign.errors import UserError
from flowalign.models.lora import ADAPTER_FILE
from flowalign.runs.adapter_card import merged_adapters
from flowalign.runs.checkpoint import checkpoints, trained_weights


@dataclass(frozen=True)
class MixedAdapter:
    """An adapter and the factor of its effect."""

    path: str
    """A file, or a folder with an adapter of diffusers or PEFT."""
    strength: float = 1.0

    def __str__(self) -> str:
        return self.path if self.strength == 1 else f"{self.path} at {self.strength:g}"


def read_mixed(text: str | Path) -> MixedAdapter:
    """Return the adapter that `PATH` or `PATH:STRENGTH` names: a run, a folder or a file.

    Raises UserError if the adapter needs others, which were merged into its model.
    """
    path, colon, end = str(text).rpartition(":")
    try:
        strength = float(end) if colon else math.nan
    except ValueError:
        strength = math.nan
    # A path may have a colon of its own.
    if not math.isfinite(strength):
        path, strength = str(text), 1.0
    place = adapter_place(Path(locate(path)))
    if place.is_dir() and merged_adapters(place):
        raise UserError(
            f"{path} was trained on a model with other adapters in it. Sample it alone, as the "
            "first argument of sample.py."
        )
    return MixedAdapter(str(place), strength)


def adapter_place(place: Path) -> Path:
    """Return where the weights are that a run, a checkpoint or an adapter stands for."""
    if (place / "config.yaml").is_file():
        return run_adapter(place)
    return trained_weights(place) if (place / ADAPTER_FILE).is_file() else place


def run_adapter(run: Path) -> Path:
    """Return the exported adapter of a run, or that of its last checkpoint.

    Raises UserError if there is neither.
    """
    if (run / "adapter").is_dir():
        return run / "adapter"
    saved = checkpoints(run)
    if not saved:
        raise UserError(
            f"{run} has no adapter and no checkpoint yet. Train it first: python train.py CONFIG."
        )
    return trained_weights(saved[-1])


def merged_beside(folder: Path) -> list[str]:
    """Return the adapters that the card of an adapter says to merge first, which stand beside it.

    Cards of earlier versions name paths on the machine that trained.
    """
    paths = merged_adapters(folder)
    # Not by `locate` alone: the working directory may have a folder of the same name.
    return [
        str(folder / path) if (folder / path).exists() else locate(path, [folder]) for path in paths
    ]
