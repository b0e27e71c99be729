"""Picture files: labelled sheets, grids, and single pictures. Pictures are bytes (B, 3, H, W)."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.utils import make_grid

from flowalign.files import write_file
from flowalign.reporting.fonts import default_font, drawable, Font, font_for

SHEET_COLUMNS = 6
CAPTION_LINES = 4
LINE_HEIGHT = 16
LABEL_WIDTH = 56
GAP = 8
ROW_GAP = 4
SMALLEST_SIDE = 128
"""Pixels. A sheet enlarges smaller pictures by a whole number, so that pixels stay square."""


def save_before_after(before: Tensor, after: Tensor, prompts: Sequence[str], path: Path) -> None:
    """Save a sheet that shows each prompt's picture before training above the one after it."""
    save_sheet({"before": before, "after": after}, prompts, path)


def save_sheet(rows: Mapping[str, Tensor], prompts: Sequence[str], path: Path) -> None:
    """Save a sheet with one block per prompt: its text, then its picture of every row.

    If no installed font has the characters of the prompts, the blocks have numbers. A text file of
    the same name then lists the prompts by number.

    Args:
        rows: Pictures (B, 3, H, W) in bytes by the label of their row. An empty label leaves out
            the margin for labels.
        prompts: One text per picture.
        path: The PNG file. Missing folders are created.
    """
    sheet, legend = draw_sheet(rows, prompts)
    if legend:
        write_file(path.with_suffix(".txt"), "".join(f"{line}\n" for line in legend).encode())
    _save(sheet, path)


def draw_sheet(rows: Mapping[str, Tensor], prompts: Sequence[str]) -> tuple[Image.Image, list[str]]:
    """Return the sheet of `save_sheet`, and the prompts by number if no font can draw them."""
    texts = [drawable(prompt) for prompt in prompts]
    font = font_for([*texts, *rows])
    if font is not None:
        return _draw_sheet(rows, texts, font), []
    numbers = [str(number) for number in range(1, len(texts) + 1)]
    legend = [f"{number}  {text}" for number, text in zip(numbers, texts, strict=True)]
    return _draw_sheet(rows, numbers, default_font()), legend


def _draw_sheet(rows: Mapping[str, Tensor], texts: Sequence[str], font: Font) -> Image.Image:
    """Draw the pictures of every row below the text of their block."""
    height, width = next(iter(rows.values())).shape[-2:]
    scale = max(1, round(SMALLEST_SIDE / width))
    size = width * scale, height * scale
    captions = [_wrap(text, size[0], font) for text in texts]
    margin = LABEL_WIDTH if any(rows) else GAP
    caption_height = LINE_HEIGHT * max(map(len, captions)) + 4
    columns = min(SHEET_COLUMNS, len(captions))
    block = caption_height + len(rows) * (size[1] + ROW_GAP) + 2 * GAP
    # All blocks have the height of the longest caption, so that rows of pictures are aligned.
    lines = -(-len(captions) // columns)
    sheet = Image.new("RGB", (margin + columns * (size[0] + GAP), lines * block), "white")
    draw = ImageDraw.Draw(sheet)
    for i, caption in enumerate(captions):
        x, y = margin + i % columns * (size[0] + GAP), i // columns * block
        draw.multiline_text((x, y + 2), "\n".join(caption), "black", font)
        for row, (label, pictures) in enumerate(rows.items()):
            top = y + caption_height + row * (size[1] + ROW_GAP)
            sheet.paste(to_pil(pictures[i]).resize(size, Image.Resampling.NEAREST), (x, top))
            if i % columns == 0:
                draw.text((6, top + size[1] // 2 - 8), label, "black", font)
    return sheet


def save_grid(images: Tensor, path: Path, columns: int = 8) -> None:
    """Save pictures as one grid without text."""
    grid = make_grid(images, nrow=columns, padding=2, pad_value=200)
    _save(to_pil(grid), path)


def save_picture(image: Tensor, path: Path) -> None:
    """Save one picture (3, H, W) in bytes at its own size."""
    _save(to_pil(image), path)


def to_pil(image: Tensor) -> Image.Image:
    """Convert a picture (3, H, W) in bytes."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def _save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def _wrap(text: str, width: int, font: Font) -> list[str]:
    """Break a text into lines that are at most `width` pixels wide; a long one is cut."""
    lines = [""]
    for part in chain.from_iterable(_parts(word, width, font) for word in text.split()):
        longer = f"{lines[-1]} {part}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        elif len(lines) < CAPTION_LINES:
            lines.append(part)
        else:
            break
    return lines


def _parts(word: str, width: int, font: Font) -> Iterator[str]:
    """Yield the parts of a word that fit a line. Chinese, for example, has no spaces."""
    start = 0
    for end in range(1, len(word)):
        if font.getlength(word[start : end + 1]) > width:
            yield word[start:end]
            start = end
    yield word[start:]
