"""Results of a run: the summary, the pictures, and adapters for other tools."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from flowalign.config.load import load_config
from flowalign.config.sections import Config
from flowalign.errors import UserError
from flowalign.files import to_json, write_file, write_folder
from flowalign.reporting.images import save_sheet
from flowalign.reporting.summary import Summary
from flowalign.runs.adapter import ADAPTER_FILE, export_weights
from flowalign.runs.adapter_card import adapter_card, CARD, card_results
from flowalign.runs.checkpoint import find_checkpoint, trained_weights, verify_checkpoint
from flowalign.runs.report import ADAPTER

PICTURES = Path("pictures") / "before-after.png"


def write_summary(run: Path, summary: Summary) -> None:
    """Write `summary.json`."""
    write_file(run / "summary.json", to_json(summary, indent=2).encode())


def write_results(
    run: Path, summary: Summary, pictures: Mapping[str, Tensor], captions: Sequence[str]
) -> None:
    """Write the sheet of pictures and `summary.json`.

    Args:
        run: The run folder.
        summary: The content of `summary.json`.
        pictures: Pictures (B, 3, H, W) in bytes by the label of their row.
        captions: One text per column of pictures.
    """
    save_sheet(pictures, captions, run / PICTURES)
    write_summary(run, summary)


def export_step(run: Path, step: int | None = None, folder: Path | None = None) -> Path:
    """Write the adapter of a step that a run keeps, as training does at its end.

    No weights of the model are loaded.

    Args:
        run: The run folder.
        step: The training step; the last one that is kept by default.
        folder: Where to write; `adapter-step-000100` in the run folder by default.

    Returns:
        The folder of the adapter.

    Raises:
        UserError: This is not a run, the step is not kept, its checkpoint is damaged, or the folder
            holds other files.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is not a run, because it has no config.yaml. Give a run folder.")
    checkpoint = find_checkpoint(run, step)
    verify_checkpoint(checkpoint)
    folder = folder or run / f"{ADAPTER}-{checkpoint.name}"
    _refuse_other_files(folder)
    export_adapter(checkpoint, folder, load_config(run / "config.yaml"))
    return folder


def export_adapter(
    checkpoint: Path, folder: Path, config: Config, summary: Summary | None = None
) -> None:
    """Write the trained weights of a checkpoint as a LoRA for other tools, with a README.

    Args:
        checkpoint: The folder of a checkpoint.
        folder: The target, which is replaced as a whole.
        config: The configuration of the run.
        summary: The results of this checkpoint, for the README.
    """
    # Built before anything is written: if it fails, the old export stays.
    card = adapter_card(config, folder) + (card_results(summary) if summary else "")

    def write(unfinished: Path) -> None:
        export_weights(trained_weights(checkpoint), unfinished)
        (unfinished / CARD).write_text(card, encoding="utf-8")

    write_folder(folder, write)


def _refuse_other_files(folder: Path) -> None:
    """Raise UserError if replacing the folder would remove more than an exported adapter."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    others = sorted(set(names) - {ADAPTER_FILE, CARD})
    if others or folder.is_file():
        what = f"holds {others[0]}" if others else "is a file"
        raise UserError(f"{folder} {what}. Choose a new folder for the adapter: --output FOLDER.")
