"""What a run writes down while it goes: metrics.jsonl, TensorBoard, pictures and a progress bar."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from torch.utils.tensorboard import SummaryWriter

from flowalign.files import to_json, write_file


class Tracker:
    """Appends a step's metrics to metrics.jsonl and TensorBoard. Lines after `step`, of a run cut off, are dropped."""

    def __init__(self, run: Path, step: int):
        self.file = run / "metrics.jsonl"
        kept = [line for line in read_metrics(run) if line["step"] <= step]
        write_file(self.file, "".join(to_json(line) + "\n" for line in kept).encode())
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def log(self, metrics: dict[str, Any]) -> None:
        with self.file.open("a") as file:
            file.write(to_json(metrics) + "\n")
        for name, value in metrics.items():
            if name != "step":
                self.board.add_scalar(name, value, metrics["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.board.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; those cut off or damaged are left out."""
    file = run / "metrics.jsonl"
    found = []
    for line in file.read_bytes().splitlines() if file.exists() else []:
        with suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict) and isinstance(line.get("step"), int)]


def print_differences(
    before: dict[str, float],
    after: dict[str, float],
    difference: dict[str, tuple[float, float, float]],
) -> None:
    """A table of every reward before, after, and the interval of the difference."""
    print(f"{'':24}{'before':>8}{'after':>8}  difference, 95 % interval")
    for name, (low, mean, high) in difference.items():
        print(
            f"{name:24}{before[name]:8.3f}{after[name]:8.3f}  {mean:+.3f}, {low:+.3f} to {high:+.3f}"
        )
