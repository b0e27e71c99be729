"""Trackers that every run has: metrics as JSON lines, TensorBoard, and picture files."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from flowalign.files import to_json, write_file
from flowalign.reporting.images import draw_sheet, save_grid
from flowalign.tracking.base import flat, Metrics, Tracker
from flowalign.tracking.named import start_trackers


class JsonLines(Tracker):
    """Append metrics to `metrics.jsonl`, one object per step. Pictures are not recorded."""

    def __init__(self, run: Path, step: int):
        self.file = run / "metrics.jsonl"
        # A run that was killed may have logged steps after its last checkpoint. They are repeated.
        lines = [line for line in read_metrics(run) if line["step"] <= step]
        write_file(self.file, "".join(to_json(line) + "\n" for line in lines).encode())

    def log(self, step: int, metrics: Metrics) -> None:
        """Append a line."""
        # Opened for every line: a process that is killed loses nothing that was logged.
        with self.file.open("a", encoding="utf-8") as file:
            file.write(to_json({"step": step, **metrics}) + "\n")


class TensorBoard(Tracker):
    """Write metrics, pictures and hyper-parameters to the event files in `tensorboard/`."""

    def __init__(self, run: Path, step: int, settings: Mapping[str, Any] | None = None):
        # Curves of a resumed run would double back without `purge_step`.
        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        # Not `add_hparams`, which would put them into a folder that looks like a run of its own.
        for summary in hparams(flat(settings), {}) if settings else ():
            self.writer._get_file_writer().add_summary(summary)

    def log(self, step: int, metrics: Metrics) -> None:
        """Add one scalar per metric."""
        for name, value in metrics.items():
            if name != "step":
                self.writer.add_scalar(name, value, step)

    def images(self, step: int, name: str, images: Tensor, captions: Sequence[str]) -> None:
        """Add a sheet of the pictures under their captions."""
        # Drawn into the picture, because TensorBoard has no captions.
        sheet, legend = draw_sheet({"": images}, captions)
        self.writer.add_image(name, np.asarray(sheet), step, dataformats="HWC")
        if legend:
            self.writer.add_text(name, "  \n".join(legend), step)

    def close(self) -> None:
        """Flush the event file."""
        self.writer.close()


class PictureFiles(Tracker):
    """Save pictures as one grid per step: `pictures/step-000100.png` for the series "pictures"."""

    def __init__(self, run: Path):
        self.run = run

    def log(self, step: int, metrics: Metrics) -> None:
        """Record nothing."""

    def images(self, step: int, name: str, images: Tensor, captions: Sequence[str]) -> None:
        """Save the grid."""
        save_grid(images, self.run / name / f"step-{step:06d}.png", columns=6)


class Trackers:
    """Several trackers as one. The context closes them."""

    def __init__(self, trackers: Sequence[Tracker] = ()):
        self.trackers = list(trackers)

    def log(self, step: int, metrics: Metrics) -> None:
        """Record the metrics of a training step everywhere."""
        for tracker in self.trackers:
            tracker.log(step, metrics)

    def images(self, step: int, name: str, images: Tensor, captions: Sequence[str]) -> None:
        """Record pictures everywhere."""
        for tracker in self.trackers:
            tracker.images(step, name, images, captions)

    def close(self) -> None:
        """Close all trackers."""
        for tracker in self.trackers:
            tracker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_trackers(
    run: Path,
    step: int,
    settings: dict[str, Any] | None = None,
    named: Mapping[str, Tracker] | None = None,
) -> Trackers:
    """Open the trackers of a run folder. Records of steps after `step` are dropped.

    Args:
        run: The run folder.
        step: The step that the run resumes from; 0 for a new one.
        settings: The configuration with every default.
        named: The trackers of the section `tracking`. They cannot drop steps that they have
            recorded. A resumed run repeats these exactly, so they are not recorded again.
    """
    last = max((int(line["step"]) for line in read_metrics(run)), default=0)
    own = [JsonLines(run, step), TensorBoard(run, step, settings), PictureFiles(run)]
    recorded = range(step, max(step, last) + 1)
    return Trackers([*own, *start_trackers(named or {}, run, recorded, settings or {})])


def read_metrics(run: Path) -> list[dict[str, float]]:
    """Return the lines of `metrics.jsonl` without damaged ones and those that lack a step."""
    file = run / "metrics.jsonl"
    entries = []
    for line in file.read_bytes().splitlines() if file.exists() else []:
        # A process that was killed while writing leaves half a line.
        with suppress(ValueError, RecursionError):
            entries.append(json.loads(line))
    return [
        entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("step"), int)
    ]
