"""Dumps of updates that were skipped because something was not finite."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from flowalign import distributed
from flowalign.batch import Batch
from flowalign.files import save_tensors, to_json, write_folder
from flowalign.runs.checkpoint import Progress, TrainState, write_checkpoint

FAILURES = "failures"
"""Name of the folder of dumps in a run folder."""


@dataclass(frozen=True)
class SkippedUpdate:
    """An update that was not applied."""

    batch: Batch
    """The rows of this rank that it would have learned from."""
    update: int
    """Which update of the step, from 0."""
    reason: str
    """The number that was not finite."""


def write_failure(
    run: Path, state: TrainState, progress: Progress, skipped: SkippedUpdate, keep: int
) -> Path:
    """Dump what it takes to repeat a skipped update, and remove old dumps.

    The folder `failures/step-000012-update-0-process-0` is a checkpoint of the moment before the
    update, with the batch in `batch.safetensors` and the reason in `failure.json`.

    Args:
        run: The run folder.
        state: The weights, the optimizer and the learned rewards before the update.
        progress: How far the run had come.
        skipped: The update.
        keep: How many dumps of this rank stay.

    Returns:
        The folder of the dump.
    """
    rank = distributed.rank()
    name = f"step-{progress.step:06d}-update-{skipped.update}-process-{rank}"
    folder = run / FAILURES / name
    batch = skipped.batch
    facts = {"why": skipped.reason, "update": skipped.update, **asdict(progress)}

    def write(unfinished: Path) -> None:
        save_tensors(_copies(batch.tensors()), unfinished / "batch.safetensors")
        about = {"prompts": batch.prompts, "metadata": batch.metadata, **facts}
        text = to_json(about, indent=2)
        (unfinished / "failure.json").write_text(text, encoding="utf-8")
        write_checkpoint(state, progress, unfinished)

    # Written atomically, because a run that fails here may have filled the disk.
    write_folder(folder, write)
    for old in sorted(folder.parent.glob(f"step-*-process-{rank}"))[:-keep]:
        shutil.rmtree(old)
    return folder


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # Fields of a batch may share memory, which safetensors refuses to write; hence the clones.
    return {name: value.cpu().contiguous().clone() for name, value in tensors.items()}
