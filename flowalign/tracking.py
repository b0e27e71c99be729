"""What a run writes down while it goes: metrics.jsonl, TensorBoard, pictures and a progress bar."""

import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid


class Tracker:
    """Appends a step's metrics to metrics.jsonl and TensorBoard. Lines after `step`, of a run cut off, are dropped."""

    def __init__(self, run: Path, step: int):
        self.file = run / "metrics.jsonl"
        kept = [line for line in read_metrics(run) if line["step"] <= step]
        self.file.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def log(self, metrics: dict[str, Any]) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        for name, value in metrics.items():
            if name != "step":
                self.board.add_scalar(name, value, metrics["step"])

    def close(self) -> None:
        self.board.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line cut off in the middle is left out."""
    file = run / "metrics.jsonl"
    lines = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def environment(device: torch.device, processes: int) -> dict[str, Any]:
    """Versions, machine and git state, for environment.json."""
    packages = ("flowalign", "torch", "torchvision", "diffusers", "transformers", "peft", "accelerate")
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "versions": {package: version(package) for package in packages},
        "python": platform.python_version(),
        "device": f"{device} ({name})",
        "processes": processes,
        "threads": torch.get_num_threads(),
        "git": git.stdout.strip() or None,
    }


def before_after(before: Tensor, after: Tensor, prompts: list[str], path: Path) -> None:
    """A labelled grid of byte pictures (B, 3, H, W): for every prompt before above after."""
    scale = max(1, 96 // before.shape[-1])
    side = before.shape[-1] * scale
    columns = min(6, len(prompts))
    rows = -(-len(prompts) // columns)
    font = ImageFont.load_default(size=12)
    text = 16 * max(len(_wrapped(prompt, side, font)) for prompt in prompts)
    margin, gap = 56, 8
    block = text + 2 * side + 4 + 2 * gap
    sheet = Image.new("RGB", (margin + columns * (side + gap), rows * block), "white")
    draw = ImageDraw.Draw(sheet)
    for i, prompt in enumerate(prompts):
        x, y = margin + i % columns * (side + gap), i // columns * block
        draw.multiline_text((x, y + 2), "\n".join(_wrapped(prompt, side, font)), "black", font)
        for row, (label, pictures) in enumerate((("before", before), ("after", after))):
            top = y + text + row * (side + 4)
            picture = Image.fromarray(pictures[i].permute(1, 2, 0).numpy())
            sheet.paste(picture.resize((side, before.shape[-2] * scale), Image.Resampling.NEAREST), (x, top))
            if i % columns == 0:
                draw.text((6, top + side // 2 - 8), label, "black", font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


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
