"""Read preference data: a chosen and a rejected image for each prompt, or single images.

Accepted are a `.jsonl` file, a folder with `metadata.jsonl`, a vote file (see `data/votes.py`), and
a Hugging Face dataset on disk (parquet, or `save_to_disk`) with the columns of Pick-a-Pic: caption,
jpg_0, jpg_1, label_0. An example holds functions that read the bytes of its images when they are
used. `check_pictures` reads and decodes all of them once.
"""

import math
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flowalign.data.examples import beside, Drawn, Example, picture_reader, ReadBytes
from flowalign.data.pictures import named_picture
from flowalign.data.prompts import Metadata, Prompt, read_objects
from flowalign.data.votes import is_vote_file, liked_examples, pair_examples, read_votes
from flowalign.errors import similar_file, UserError
from flowalign.progress import task

if TYPE_CHECKING:
    from datasets import Dataset

CHOSEN_FIELDS = ("chosen", "chosen_file_name", "image", "file_name")
REJECTED_FIELDS = ("rejected", "rejected_file_name")
LIKED_FIELDS = ("liked", "label")
PICK_A_PIC = ("caption", "jpg_0", "jpg_1", "label_0")
WINNERS = {1.0: ("jpg_0", "jpg_1"), 0.0: ("jpg_1", "jpg_0")}
"""The columns of the chosen and the rejected image, by the label of the first."""
TIE = 0.5
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words in names of files and folders by which datasets tells splits, and the split of each."""
OPENED_AT_ONCE = 256
FORMATS = "a .jsonl file, a folder with metadata.jsonl, parquet files, or a split saved by datasets"


@dataclass(frozen=True)
class Reading:
    """The kinds of examples that an objective learns from."""

    paired: bool = False
    """True if each example must have two pictures. Pairs whose scores are equal are left out."""
    likes: bool = False
    """True if single pictures that were liked or disliked are examples too."""
    ties: bool = False
    """True if pairs that voters call equal are examples too."""


PICTURES = Reading()
"""Pictures to imitate: single ones that are liked, and the chosen ones of pairs."""
PAIRS = Reading(paired=True)
ANY = Reading(likes=True)
"""Everything, for the prompts alone."""


def read_examples(path: str, key: str, reading: Reading = PICTURES) -> list[Example]:
    """Read the examples of a file or folder.

    Raises UserError with `key`, the file and the entry if the data cannot be used.
    """
    location = Path(path)
    if not os.path.exists(location):
        raise UserError(
            f"{key}: there is no file or folder {path}. Correct the path.{similar_file(path)}"
        )
    examples = _examples_of(location, key, reading)
    if reading.paired and not reading.likes:
        _require_pairs(examples, path, key)
    if reading.paired:
        examples = [example for example in examples if example.gap or example.tie]
    if not reading.likes:
        examples = [example for example in examples if example.liked]
    if not examples:
        raise UserError(
            f"{key}: {path} has no {'pairs' if reading.paired else 'images'}. Ties are left out of "
            "pairs."
        )
    return examples


def _examples_of(location: Path, key: str, reading: Reading) -> list[Example]:
    listing = location / "metadata.jsonl" if location.is_dir() else location
    if is_vote_file(listing):
        file = read_votes(listing, key)
        if reading.paired and not reading.likes:
            return pair_examples(file, reading.ties)
        return liked_examples(file)
    if listing.suffix == ".jsonl" and listing.is_file():
        objects = read_objects(listing, key)
        return [_example_of_object(entry, listing, where) for entry, where in objects]
    return _examples_of_dataset(location, key)


def _require_pairs(examples: list[Example], path: str, key: str) -> None:
    for number, example in enumerate(examples, 1):
        if example.rejected is None:
            raise UserError(
                f"{key}: {path}, entry {number} has a single image, but the objective learns from "
                "pairs. Add a rejected image, or choose an objective that learns from examples."
            )


def _example_of_object(entry: Metadata, listing: Path, where: str) -> Example:
    """Make an example from a line of a `.jsonl` file; images are relative to the file."""
    prompt, chosen = entry.get("prompt"), _first_field(entry, CHOSEN_FIELDS)
    rejected = _first_field(entry, REJECTED_FIELDS)
    if not isinstance(prompt, str) or not isinstance(chosen, str):
        raise UserError(
            f"{where} does not name a prompt and an image. "
            'Write {"prompt": "a red circle", "chosen": "a.png", "rejected": "b.png"} '
            'or {"prompt": ..., "image": "a.png"}.'
        )
    return Example(
        prompt=Prompt(prompt),
        chosen=picture_reader(beside(listing, chosen), where),
        rejected=picture_reader(beside(listing, str(rejected)), where) if rejected else None,
        liked=_is_liked(entry, where),
        gap=_gap(entry, where),
        where=where,
    )


def _is_liked(entry: Metadata, where: str) -> bool:
    """Return whether a single picture is liked. TRL's KTO calls the field `label`."""
    liked = _first_field(entry, LIKED_FIELDS)
    if liked is None:
        return True
    if not isinstance(liked, bool):
        raise UserError(f"{where} has liked: {liked!r}. Write true or false.")
    return liked


def _first_field(entry: Metadata, names: tuple[str, ...]) -> object:
    return next((entry[name] for name in names if name in entry), None)


def _gap(entry: Metadata, where: str) -> float:
    """Return the difference of the two scores of a line, or 1 if it has none."""
    if "score_chosen" not in entry and "score_rejected" not in entry:
        return 1.0
    better, worse = _score(entry.get("score_chosen")), _score(entry.get("score_rejected"))
    if not better >= worse:  # also if one is NaN
        raise UserError(
            f"{where} has score_chosen {entry.get('score_chosen')!r} and score_rejected "
            f"{entry.get('score_rejected')!r}. "
            "Write both as finite numbers, score_chosen not below score_rejected."
        )
    return better - worse


def _score(value: object) -> float:
    """Return a finite number as a float, and NaN for anything else."""
    # For isinstance, `True` is an int, but it is not a score.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if math.isfinite(value) else math.nan


def _examples_of_dataset(location: Path, key: str) -> list[Example]:
    """Make examples from a dataset with Pick-a-Pic's columns, without rows that have no winner."""
    table = _open_dataset(location, key)
    missing = sorted(set(PICK_A_PIC) - set(table.column_names))
    if missing:
        raise UserError(
            f"{key}: {location} has no column {', '.join(missing)}; "
            f"it has {', '.join(table.column_names)}. Rename its columns as in Pick-a-Pic."
        )
    # A column alone, because reading a row decodes all its columns.
    columns = {name: table.select_columns([name]) for name in ("jpg_0", "jpg_1")}
    examples = []
    for row, (label, caption) in enumerate(zip(table["label_0"], table["caption"], strict=True)):
        where = f"{key}: {location}, row {row + 1}"
        if not _has_winner(label, where):
            continue
        if not isinstance(caption, str):
            raise UserError(f"{where} has the caption {caption!r}. Write a text, or remove it.")
        chosen, rejected = WINNERS[label]
        examples.append(
            Example(
                prompt=Prompt(caption),
                chosen=partial(_cell_bytes, columns[chosen], row, where),
                rejected=partial(_cell_bytes, columns[rejected], row, where),
                where=where,
            )
        )
    return examples


def _has_winner(label: object, where: str) -> bool:
    """Return False for a tie or a row without a label. Raises UserError for another value."""
    # A float column holds NaN where the label is missing.
    if label is None or label == TIE or (isinstance(label, float) and math.isnan(label)):
        return False
    if not isinstance(label, int | float) or label not in WINNERS:
        raise UserError(
            f"{where} has label_0 {label!r}. Write 1 if jpg_0 is better, 0 if jpg_1 is, and 0.5 "
            "for a tie."
        )
    return True


def _open_dataset(location: Path, key: str) -> "Dataset":
    import datasets  # slow to import, and used here only

    datasets.disable_progress_bars()
    # `datasets` logs an error before it raises it, and the message below already says what failed.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        if (location / "state.json").is_file():
            table = datasets.load_from_disk(str(location))
        else:
            files = _parquet_files(location, key)
            table = datasets.load_dataset("parquet", data_files=files, split="train")
    except UserError:
        raise
    except Exception as error:
        # `datasets` raises many types here, some of them only in its dependencies.
        raise UserError(
            f"{key}: {location} cannot be opened as a dataset: {error}. Use {FORMATS}."
        ) from error
    assert isinstance(table, datasets.Dataset)
    for column in ("jpg_0", "jpg_1"):
        if isinstance(table.features.get(column), datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
    return table


def _parquet_files(location: Path, key: str) -> list[str]:
    """Return the files of a data set. Raises UserError if they belong to several splits."""
    if not location.is_dir():
        return [str(location)]
    files = sorted(location.rglob("*.parquet"))
    splits = {_split_of(file.relative_to(location)): file for file in files}
    if len(splits) > 1:
        names = " and ".join(str(file.relative_to(location)) for _, file in sorted(splits.items()))
        raise UserError(
            f"{key}: {location} holds files of several splits, such as {names}. Name one file, or "
            "move the files of one split into a folder of their own."
        )
    return [str(file) for file in files]


def _split_of(file: Path) -> str:
    """Return the split that a file belongs to by its path in the folder, or an empty string."""
    # A shard carries the name of its split, which may be any: validation_unique-00000-of-00001.
    shard = re.match(r"(.+)-\d+-of-\d+", file.name)
    words = re.split(r"[^a-z]+", file.with_suffix("").as_posix().lower())
    known = [SPLITS[word] for word in words if word in SPLITS]
    return shard[1] if shard else "".join(known[:1])


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


def check_pictures(examples: Sequence[Example]) -> None:
    """Read and decode every image of the examples, in threads.

    Raises UserError that names the first entry with an image that cannot be opened.
    """
    # Pictures that are made again are checked when they are.
    images = [
        (picture, example.where)
        for example in examples
        for picture in example.pictures
        if not isinstance(picture, Drawn)
    ]
    # Most runs have no pictures, and need no line about them.
    if not images:
        return
    with task("opening pictures", len(images)) as work, ThreadPoolExecutor() as threads:
        # In parts, because the threads would be given all images of the data set at once.
        for start in range(0, len(images), OPENED_AT_ONCE):
            part = images[start : start + OPENED_AT_ONCE]
            work.advance(len(list(threads.map(_open, part))))


def _open(image: tuple[ReadBytes, str]) -> None:
    read, where = image
    named_picture(read(), where)
