"""Trackers record a run while it trains: metrics as JSON lines, TensorBoard, and picture files."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol, Self

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from flowalign.files import to_json, write_file
from flowalign.reporting.images import save_grid

Metrics = Mapping[str, float]


class Tracker(Protocol):
    """A record of a run. Only the main process has trackers."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Record the metrics of a training step."""
        ...

    def images(self, step: int, name: str, images: Tensor, captions: Sequence[str]) -> None:
        """Record pictures (B, 3, H, W) in bytes, with one caption each. `name` names the series."""
        ...

    def close(self) -> None:
        """Write what is still in memory."""
        ...


class JsonLines:
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

    def images(self, step: int, name: str, images: Tensor, captions: Sequence[str]) -> None:
        """Record nothing: the file holds numbers only."""

    def close(self) -> None:
        """Do nothing: every line is written at once."""


class TensorBoard:
    """Write metrics and pictures to the event files in `tensorboard/`."""

    def __init__(self, run: Path, step: int):
        # Curves of a resumed run would double back without `purge_step`.
        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, metrics: Metrics) -> None:
        """Add one scalar per metric."""
        for name, value in metrics.items():
            if name != "step":
                self.writer.add_scalar(name, value, step)

    def images(self, step: int, name: str, images: Tensor, captions: Sequence[str]) -> None:
        """Add a grid of the pictures."""
        # TensorBoard has no captions; the grids in `pictures/` follow the order of the prompts.
        self.writer.add_images(name, images, step)

    def close(self) -> None:
        """Flush the event file."""
        self.writer.close()


class PictureFiles:
    """Save pictures as one grid per step: `pictures/step-000100.png` for the series "pictures"."""

    def __init__(self, run: Path):
        self.run = run

    def log(self, step: int, metrics: Metrics) -> None:
        """Record nothing."""

    def images(self, step: int, name: str, images: Tensor, captions: Sequence[str]) -> None:
        """Save the grid."""
        save_grid(images, self.run / name / f"step-{step:06d}.png", columns=6)

    def close(self) -> None:
        """Do nothing: every file is complete."""


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


def open_trackers(run: Path, step: int) -> Trackers:
    """Open the trackers of a run folder. Records of steps after `step` are dropped."""
    return Trackers([JsonLines(run, step), TensorBoard(run, step), PictureFiles(run)])


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
