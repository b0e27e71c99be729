"""What a run writes down while it goes: metrics.jsonl, TensorBoard, pictures and a progress bar."""

import json
import math
import platform
import shutil
import subprocess
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid

import flowalign
from flowalign.checkpoint import write_file


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


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that any reader takes: a number that is not finite is null."""

    def finite(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: finite(entry) for key, entry in part.items()}
        if isinstance(part, list | tuple):
            return [finite(entry) for entry in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), indent=indent, allow_nan=False)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; those cut off or damaged are left out."""
    file = run / "metrics.jsonl"
    found = []
    for line in file.read_bytes().splitlines() if file.exists() else []:
        with suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict) and isinstance(line.get("step"), int)]


def environment(device: torch.device, processes: int) -> dict[str, Any]:
    """Versions, machine and git state, for environment.json."""
    packages = ("torch", "torchvision", "diffusers", "transformers", "peft", "accelerate")
    git = ""
    if shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty"]
        git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout.strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "versions": {"flowalign": flowalign.__version__} | {package: version(package) for package in packages},
        "python": platform.python_version(),
        "device": f"{device} ({name})",
        "processes": processes,
        "threads": torch.get_num_threads(),
        "git": git or None,
    }


def before_after(before: Tensor, after: Tensor, prompts: list[str], path: Path) -> None:
    """A labelled grid of byte pictures (B, 3, H, W): for every prompt before above after."""
    labelled({"before": before, "after": after}, prompts, path)


def labelled(rows: dict[str, Tensor], prompts: list[str], path: Path) -> None:
    """A sheet of byte pictures (B, 3, H, W): under every prompt its picture of each row."""
    height, width = next(iter(rows.values())).shape[-2:]
    scale = max(1, round(128 / width))
    size = width * scale, height * scale
    font = ImageFont.load_default(size=12)
    titles = [_wrapped(prompt, size[0], font) for prompt in prompts]
    margin, gap, text = 56 if any(rows) else 8, 8, 16 * max(map(len, titles)) + 4
    columns = min(6, len(prompts))
    block = text + len(rows) * (size[1] + 4) + 2 * gap
    sheet = Image.new("RGB", (margin + columns * (size[0] + gap), -(-len(prompts) // columns) * block), "white")
    draw = ImageDraw.Draw(sheet)
    for i, title in enumerate(titles):
        x, y = margin + i % columns * (size[0] + gap), i // columns * block
        draw.multiline_text((x, y + 2), "\n".join(title), "black", font)
        for row, (label, pictures) in enumerate(rows.items()):
            top = y + text + row * (size[1] + 4)
            picture = Image.fromarray(pictures[i].permute(1, 2, 0).numpy())
            sheet.paste(picture.resize(size, Image.Resampling.NEAREST), (x, top))
            if i % columns == 0:
                draw.text((6, top + size[1] // 2 - 8), label, "black", font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def print_differences(
    before: dict[str, float], after: dict[str, float], difference: dict[str, tuple[float, float, float]]
) -> None:
    """A table of every reward before, after, and the interval of the difference."""
    print(f"{'':24}{'before':>8}{'after':>8}  difference, 95 % interval")
    for name, (low, mean, high) in difference.items():
        print(f"{name:24}{before[name]:8.3f}{after[name]:8.3f}  {mean:+.3f}, {low:+.3f} to {high:+.3f}")


def _wrapped(prompt: str, width: int, font: Any) -> list[str]:
    lines = [""]
    for word in prompt.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines[:4]


def save_grid(images: Tensor, path: Path, columns: int = 8) -> None:
    """Byte pictures (B, 3, H, W) as one PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = make_grid(images, nrow=columns, padding=2, pad_value=200)
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path)
