"""Dumps of updates that were skipped."""

import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from flowalign import distributed
from flowalign.batch import Batch
from flowalign.files import to_json, write_folder
from flowalign.runs.checkpoint import Progress, TrainState, write_checkpoint

FAILURES = "failures"


def write_failure(
    run: Path, learned: TrainState, state: Progress, batch: Batch, facts: dict[str, Any], keep: int
) -> Path:
    """failures/step-000012-update-0-process-0: all as before an update that is not applied, its batch, and why; `keep` stay."""
    folder = (
        run
        / FAILURES
        / f"step-{state.step:06d}-update-{facts['update']}-process-{distributed.rank()}"
    )
    tensors = {
        f.name: value
        for f in fields(batch)
        if isinstance(value := getattr(batch, f.name), torch.Tensor)
    }

    def write(beside: Path) -> None:
        save_file(
            {name: value.cpu().contiguous().clone() for name, value in tensors.items()},
            beside / "batch.safetensors",
        )
        about = {"prompts": batch.prompts, "metadata": batch.metadata, **facts}
        (beside / "failure.json").write_text(to_json(about, indent=2))
        write_checkpoint(learned, state, beside)

    write_folder(folder, write)
    for old in sorted(folder.parent.glob(f"step-*-process-{distributed.rank()}"))[:-keep]:
        shutil.rmtree(old)
    return folder
