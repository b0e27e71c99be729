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
from flowalign.runs.adapter_card import (
    adapter_card,
    CARD,
    card_results,
    MERGED_FOLDER,
    merged_names,
)
from flowalign.runs.checkpoint import find_checkpoint, trained_weights, verify_checkpoint
from flowalign.runs.formats import copy_merged, FORMATS
from flowalign.runs.report import ADAPTER

DIFFUSERS = "diffusers"
"""The format that training exports, and that is exported by default."""
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


def export_step(
    run: Path,
    step: int | None = None,
    output: Path | None = None,
    file_format: str = DIFFUSERS,
) -> Path:
    """Write the adapter of a step that a run keeps.

    No weights of the model are loaded, unless they are written with the adapter.

    Args:
        run: The run folder.
        step: The training step; the last one that is kept by default.
        output: Where to write; by default a name in the run folder with the step and the format.
        file_format: "diffusers", which training itself writes at its end, or one of `FORMATS`.

    Returns:
        The folder or file that was written.

    Raises:
        UserError: This is not a run, the step is not kept, its checkpoint is damaged, the output
            holds other files, or the format cannot hold the adapter.
    """
    if file_format not in (DIFFUSERS, *FORMATS):
        names = ", ".join([DIFFUSERS, *FORMATS])
        raise UserError(f"The format is {file_format!r}. Choose from {names}.")
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is not a run, because it has no config.yaml. Give a run folder.")
    checkpoint = find_checkpoint(run, step)
    verify_checkpoint(checkpoint)
    config = load_config(run / "config.yaml")
    if file_format != DIFFUSERS:
        chosen = FORMATS[file_format]
        output = output or run / chosen.default_name(checkpoint.name)
        chosen.write(trained_weights(checkpoint), output, config)
        return output
    output = output or run / f"{ADAPTER}-{checkpoint.name}"
    _refuse_other_files(output)
    export_adapter(checkpoint, output, config)
    return output


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
        copy_all_merged(config, unfinished)
        (unfinished / CARD).write_text(card, encoding="utf-8")

    write_folder(folder, write)


def copy_all_merged(config: Config, folder: Path) -> None:
    """Copy the adapters of `model.merge`, without which the exported one is not what was trained.

    Raises UserError if one is missing.
    """
    for path, name in zip(config.model.merge, merged_names(config), strict=True):
        (folder / name).mkdir(parents=True)
        copy_merged(path, folder / name / ADAPTER_FILE, config)


def _refuse_other_files(folder: Path) -> None:
    """Raise UserError if replacing the folder would remove more than an exported adapter."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    others = sorted(set(names) - {ADAPTER_FILE, CARD, MERGED_FOLDER})
    if others or folder.is_file():
        what = f"holds {others[0]}" if others else "is a file"
        raise UserError(f"{folder} {what}. Choose a new folder for the adapter: --output FOLDER.")
