"""Captions in any script are drawn by a font that has their characters, or numbered."""

import matplotlib
import pytest
import torch
from PIL import Image

from flowalign.reporting import fonts
from flowalign.reporting.fonts import default_font, drawable, font_for
from flowalign.reporting.images import _wrap, save_sheet

CHINESE = ["红色的圆在蓝色的方块左边", "绿色的三角形"]
RUSSIAN = "красный круг"


@pytest.fixture
def own_fonts(monkeypatch):
    """Only the fonts that come with matplotlib: Cyrillic is among them, and Chinese is not."""
    own = tuple(f for f in fonts.installed_fonts() if f.startswith(matplotlib.get_data_path()))
    monkeypatch.setattr(fonts, "installed_fonts", lambda: own)


def sheet(folder, prompts):
    pictures = torch.zeros(len(prompts), 3, 64, 64, dtype=torch.uint8)
    save_sheet({"": pictures}, prompts, folder / "sheet.png")
    return Image.open(folder / "sheet.png").tobytes()


def glyph(font, character):
    return bytes(font.getmask(character))


def test_a_font_that_has_the_characters_is_taken(own_fonts):
    font = font_for([RUSSIAN, "a red circle"])
    # A font draws every character that it lacks as the same box.
    box = glyph(font, "\uffff")
    assert all(glyph(font, character) != box for character in "красныйaredi")
    assert font_for(["a red circle"]).getname() == default_font().getname()


def test_without_a_font_the_pictures_are_numbered_and_a_file_lists_the_prompts(own_fonts, tmp_path):
    assert font_for(CHINESE) is None
    assert sheet(tmp_path, CHINESE) == sheet(tmp_path, ["1", "2"])
    listed = (tmp_path / "sheet.txt").read_text(encoding="utf-8")
    assert listed == f"1  {CHINESE[0]}\n2  {CHINESE[1]}\n"


def test_the_prompts_of_a_sheet_with_text_are_in_no_other_file(own_fonts, tmp_path):
    assert sheet(tmp_path, [RUSSIAN]) != sheet(tmp_path, ["1"])
    assert not (tmp_path / "sheet.txt").exists()


def test_a_text_without_spaces_is_broken_into_lines_that_fit():
    font = default_font()
    text = "abcdefghijklmnopqrstuvwxyz" * 2
    lines = _wrap(f"red {text}", 128, font)
    assert "".join(lines) == f"red{text}"
    assert len(lines) > 2
    assert all(font.getlength(line) <= 128 for line in lines)


def test_characters_without_a_picture_are_not_drawn():
    assert drawable("a\u200d red\n\tcircle\x00") == "a red circle"
