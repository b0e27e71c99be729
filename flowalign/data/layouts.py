"""The columns of known data sets of pairs, and the examples that are made of their rows."""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, TYPE_CHECKING

from flowalign.data.examples import Example, picture_reader, ReadBytes
from flowalign.data.prompts import Prompt
from flowalign.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

TIE = 0.5


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The columns of a pair. Without a label and scores, the first picture is the better one."""

    prompt: str
    first: str
    second: str = ""
    """Empty for a data set of single pictures."""
    label: str = ""
    """1 if the first picture is better, 0 if the second is, 0.5 for a tie."""
    scores: tuple[str, ...] = ()
    """The score of each picture; more is better."""

    @property
    def columns(self) -> list[str]:
        """All columns of the layout."""
        names = [self.prompt, self.first, self.second, self.label, *self.scores]
        return list(filter(None, names))


PICK_A_PIC = Layout(prompt="caption", first="jpg_0", second="jpg_1", label="label_0")
RAPIDATA = Layout(
    prompt="prompt",
    first="image1",
    second="image2",
    scores=("weighted_results_image1_preference", "weighted_results_image2_preference"),
)
HPD_V3 = Layout(prompt="prompt", first="path1", second="path2")
SCORED = Layout(
    prompt="prompt",
    first="chosen",
    second="rejected",
    scores=("score_chosen", "score_rejected"),
)
CHOSEN = Layout(prompt="prompt", first="chosen", second="rejected")
IMAGE_REWARD = ("prompt_id", "prompt", "rank")
"""Columns of ImageRewardDB: pictures by prompt, of which the smallest rank is the best."""
RANKED_IMAGES = ("image", "image_path")
LAYOUTS = (
    *(PICK_A_PIC, RAPIDATA, HPD_V3, SCORED, CHOSEN),
    *(Layout(prompt=text, first="image") for text in ("prompt", "caption", "text")),
)
"""The first layout whose columns a data set has counts."""


def examples_of(table: "Dataset", where: str, folder: Path | None) -> list[Example]:
    """Return the examples of a data set, without rows that have no winner.

    Args:
        table: A data set with the columns of a known layout.
        where: The words that name it in an error.
        folder: The folder of pictures that are given by name, or None if there is none.
    """
    pictures = Pictures(undecoded(table), where, folder)
    names = set(table.column_names)
    if names.issuperset(IMAGE_REWARD) and names.intersection(RANKED_IMAGES):
        return list(_ranked(table, pictures))
    layout = next((known for known in LAYOUTS if names.issuperset(known.columns)), None)
    if layout is None:
        nearest = max(LAYOUTS, key=lambda known: len(names.intersection(known.columns)))
        missing = sorted(set(nearest.columns) - names)
        raise UserError(
            f"{where} has no column {', '.join(missing)}; it has {', '.join(table.column_names)}. "
            "Say which are which: {path: ..., columns: {prompt: COLUMN, chosen: COLUMN, "
            "rejected: COLUMN}}, or rename them as in Pick-a-Pic."
        )
    return list(_pairs(table, layout, pictures))


def undecoded(table: "Dataset") -> "Dataset":
    """Return a data set whose pictures stay the bytes of their files."""
    import datasets

    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    return table


@dataclass(frozen=True)
class Pictures:
    """The pictures of a data set, read when they are used."""

    table: "Dataset"
    where: str
    folder: Path | None

    def row(self, row: int) -> str:
        """Return the words that name a row in an error."""
        return f"{self.where}, row {row + 1}"

    def column(self, name: str) -> Callable[[int], ReadBytes]:
        """Return a function from a row to what reads its picture."""
        # A column alone, because reading a row decodes all its columns.
        column = self.table.select_columns([name])
        kind = str(column.features.arrow_schema.field(name).type)
        if kind in ("string", "large_string"):
            return lambda row: self._named_file(column[row][name], name, self.row(row))
        return lambda row: partial(_cell_bytes, column, row, self.row(row))

    def _named_file(self, name: Any, column: str, where: str) -> ReadBytes:
        if self.folder is None or not isinstance(name, str):
            raise UserError(
                f"{where}: {column} holds {name!r}. Download the data set with its pictures, and "
                "give the folder."
            )
        return picture_reader(self.folder / os.path.expanduser(name), where)


def _cell_bytes(table: "Dataset", row: int, where: str) -> bytes:
    """Return the bytes of an image file in a table of one column."""
    (column,) = table.column_names
    # An image column holds {"bytes", "path"}; a binary column the bytes alone.
    cell = table[row][column]
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(content, bytes):
        held = "no bytes" if isinstance(cell, dict) else repr(cell)[:80]
        raise UserError(
            f"{where}: {column} holds {held}. Store the bytes of an image file there, or remove it."
        )
    return content


def _pairs(table: "Dataset", layout: Layout, pictures: Pictures) -> Iterator[Example]:
    captions = table[layout.prompt]
    first = pictures.column(layout.first)
    second = pictures.column(layout.second) if layout.second else None
    for row, gap in enumerate(_gaps(table, layout, pictures)):
        if gap is None:
            continue
        where = pictures.row(row)
        chosen, rejected = (first, second) if gap >= 0 else (second, first)
        assert chosen is not None
        yield Example(
            prompt=Prompt(_caption(captions[row], where)),
            chosen=chosen(row),
            rejected=rejected(row) if rejected else None,
            gap=abs(gap),
            where=where,
        )


def _gaps(table: "Dataset", layout: Layout, pictures: Pictures) -> Iterator[float | None]:
    """Yield for each row how much better the first picture is; None for a row without a winner."""
    if layout.label:
        for row, label in enumerate(table[layout.label]):
            yield _label_gap(label, layout, pictures.row(row))
    elif layout.scores:
        scores = zip(*(table[name] for name in layout.scores), strict=True)
        for row, (one, other) in enumerate(scores):
            yield _score_gap(one, other, layout, pictures.row(row))
    else:
        yield from [1.0] * len(table)


def _label_gap(label: object, layout: Layout, where: str) -> float | None:
    # A float column holds NaN where the label is missing.
    if label is None or label == TIE or (isinstance(label, float) and math.isnan(label)):
        return None
    if not isinstance(label, int | float) or label not in (0, 1):
        raise UserError(
            f"{where} has {layout.label} {label!r}. Write 1 if {layout.first} is better, 0 if "
            f"{layout.second} is, and 0.5 for a tie."
        )
    return 1.0 if label else -1.0


def _score_gap(one: object, other: object, layout: Layout, where: str) -> float | None:
    if one is None or other is None:
        return None
    if not isinstance(one, int | float) or not isinstance(other, int | float):
        raise UserError(
            f"{where} has {layout.scores[0]} {one!r} and {layout.scores[1]} {other!r}. "
            "Write both as numbers."
        )
    gap = float(one) - float(other)
    return gap if gap and math.isfinite(gap) else None


def _caption(caption: object, where: str) -> str:
    if not isinstance(caption, str):
        raise UserError(f"{where} has the caption {caption!r}. Write a text, or remove it.")
    return caption


def _ranked(table: "Dataset", pictures: Pictures) -> Iterator[Example]:
    """Yield a pair of every two pictures of a prompt with different ranks."""
    name = next(name for name in RANKED_IMAGES if name in table.column_names)
    read, ranks, captions = pictures.column(name), table["rank"], table["prompt"]
    rows_of: dict[object, list[int]] = {}
    for row, prompt in enumerate(table["prompt_id"]):
        rows_of.setdefault(prompt, []).append(row)
    for rows in rows_of.values():
        for one, other in combinations([row for row in rows if ranks[row] is not None], 2):
            if ranks[one] == ranks[other]:
                continue
            better, worse = (one, other) if ranks[one] < ranks[other] else (other, one)
            where = pictures.row(better)
            yield Example(
                prompt=Prompt(_caption(captions[better], where)),
                chosen=read(better),
                rejected=read(worse),
                where=where,
            )
