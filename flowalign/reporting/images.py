"""Sheets and grids of pictures."""

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import make_grid


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
    sheet = Image.new(
        "RGB", (margin + columns * (size[0] + gap), -(-len(prompts) // columns) * block), "white"
    )
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
