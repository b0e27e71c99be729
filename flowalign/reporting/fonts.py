"""Find a font that has all characters of some captions, so that no caption becomes empty boxes."""

import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from io import BytesIO

from PIL import ImageFont

SIZE = 12
"""Pixels of a line of a caption, without the space between two lines."""
PLACEHOLDERS = "Last Resort"
"""Begins the names of fonts that have a picture of the script in the place of each character."""
REGULAR = (400, "normal", "regular", "book")
"""Weights of fonts that are neither light nor bold, as matplotlib names them."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def default_font() -> Font:
    """Return the font that comes with Pillow, which has Latin letters only."""
    return ImageFont.load_default(size=SIZE)


def font_for(texts: Iterable[str]) -> Font | None:
    """Return a font that has every character of the texts: Pillow's, or else an installed one.

    Returns None if no single font has them all.
    """
    wanted = {character for character in "".join(texts) if not character.isspace()}
    font = default_font()
    if wanted <= _characters_of(font):
        return font
    for file in installed_fonts():
        if wanted <= _characters(file):
            # Some fonts hold bitmaps of other sizes only, such as those of coloured emoji.
            with suppress(OSError):
                return ImageFont.truetype(file, SIZE)
    return None


def drawable(text: str) -> str:
    """Return a text on one line, without characters that have no picture of their own.

    Fonts lack such characters, for example the joiners inside of an emoji.
    """
    line = " ".join(text.split())
    return "".join(c for c in line if unicodedata.category(c) not in ("Cc", "Cf"))


@cache
def installed_fonts() -> tuple[str, ...]:
    """Return the files of installed fonts and of those that come with matplotlib, regular first."""
    from matplotlib.font_manager import fontManager

    entries = sorted(
        (entry for entry in fontManager.ttflist if not entry.name.startswith(PLACEHOLDERS)),
        key=lambda entry: (entry.style != "normal", entry.weight not in REGULAR, entry.fname),
    )
    return tuple(entry.fname for entry in entries)


def _characters_of(font: Font) -> frozenset[str]:
    if isinstance(font, ImageFont.FreeTypeFont):
        return _read_characters(BytesIO(font.font_bytes))
    # Pillow was built without FreeType, and has a font of bitmaps.
    return frozenset(map(chr, range(128)))


@cache
def _characters(file: str) -> frozenset[str]:
    return _read_characters(file)


def _read_characters(file: str | BytesIO) -> frozenset[str]:
    """Return the characters that a font has a glyph for."""
    from matplotlib.ft2font import FT2Font

    return frozenset(map(chr, FT2Font(file).get_charmap()))
