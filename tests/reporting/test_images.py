"""Picture files: sheets with captions, grids and single pictures."""

import torch
from PIL import Image

from flowalign.reporting.images import save_before_after, save_grid, save_picture, save_sheet


def picture(value, side=64):
    return torch.full((3, side, side), value).byte()


def test_a_single_picture_keeps_every_byte(tmp_path):
    image = torch.arange(3 * 4 * 5).view(3, 4, 5).byte()
    save_picture(image, tmp_path / "new folder" / "a.png")
    saved = Image.open(tmp_path / "new folder" / "a.png")
    assert saved.size == (5, 4)
    assert saved.getpixel((0, 0)) == (0, 20, 40)
    assert saved.getpixel((4, 3)) == (19, 39, 59)


def test_a_grid_has_the_asked_number_of_columns(tmp_path):
    save_grid(torch.stack([picture(9, side=8)] * 5), tmp_path / "grid.png", columns=4)
    assert Image.open(tmp_path / "grid.png").size == (4 * 10 + 2, 2 * 10 + 2)


def test_a_sheet_enlarges_small_pictures_and_shows_before_above_after(tmp_path):
    before, after = torch.stack([picture(0)] * 7), torch.stack([picture(200)] * 7)
    save_before_after(before, after, ["a red circle"] * 7, tmp_path / "sheet.png")
    sheet = Image.open(tmp_path / "sheet.png").convert("L")
    # Six columns of 128 pixels, a margin for the labels, and two blocks of prompts.
    assert sheet.width == 56 + 6 * (128 + 8)
    column = [sheet.getpixel((56 + 64, y)) for y in range(sheet.height // 2)]
    assert column.count(0) >= 128
    assert column.count(200) == 128
    assert column.index(200) > len(column) - 1 - column[::-1].index(0) - 128
    assert max(y for y, value in enumerate(column) if value == 0) < column.index(200)


def test_a_long_caption_is_wrapped_and_cut_after_four_lines(tmp_path):
    rows = {"": torch.stack([picture(0)])}
    save_sheet(rows, ["circle"], tmp_path / "short.png")
    save_sheet(rows, [" ".join(["circle"] * 200)], tmp_path / "long.png")
    short, long = (Image.open(tmp_path / f"{name}.png") for name in ("short", "long"))
    assert long.width == short.width == 8 + 128 + 8
    assert long.height == short.height + 3 * 16
