"""Read preference data: a chosen and a rejected image for each prompt, or single images.

Accepted are files that name pictures (`.jsonl`, `.json`, `.csv`, `.tsv`), a folder with
`metadata.jsonl`, a vote file (see `data/votes.py`), and data sets with the columns of a known
layout: parquet files, a split that was saved on disk, or a data set of the hub. An example holds
functions that read the bytes of its images when they are used. `check_pictures` reads and decodes
all of them once.
"""

import math
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from flowalign.data.examples import beside, Drawn, Example, picture_reader, ReadBytes
from flowalign.data.hub import folder_of, open_dataset, quiet_datasets, renamed_columns
from flowalign.data.layouts import examples_of
from flowalign.data.pictures import named_picture
from flowalign.data.prompts import Metadata, Prompt, read_array, read_objects
from flowalign.data.source import data_source, DataSource, Written
from flowalign.data.tables import read_rows, SEPARATORS
from flowalign.data.votes import is_vote_file, liked_examples, pair_examples, read_votes
from flowalign.errors import similar_file, UserError
from flowalign.progress import task

if TYPE_CHECKING:
    from datasets import Dataset

LISTINGS = (".jsonl", ".json", *SEPARATORS)
"""Files that name pictures, which are relative to the file."""
CHOSEN_FIELDS = ("chosen", "chosen_file_name", "path1", "image", "file_name")
"""The names of a chosen picture; path1 is that of HPDv3."""
REJECTED_FIELDS = ("rejected", "rejected_file_name", "path2")
LIKED_FIELDS = ("liked", "label")
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words in names of files and folders by which datasets tells splits, and the split of each."""
OPENED_AT_ONCE = 256
FORMATS = (
    "a .jsonl file, a folder with metadata.jsonl, parquet files, a split saved by datasets, or "
    "owner/name of the hub"
)


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


def read_examples(written: Written, key: str, reading: Reading = PICTURES) -> list[Example]:
    """Read the examples of a file, a folder or a data set.

    Raises UserError with `key`, the file and the entry if the data cannot be used.
    """
    source = data_source(written, key)
    if not source.is_on_hub and not os.path.exists(source.location):
        raise UserError(
            f"{key}: there is no file or folder {source.path}. Correct the path."
            f"{similar_file(source.location)}"
        )
    examples = _examples_of(source, key, reading)
    if reading.paired and not reading.likes:
        _require_pairs(examples, str(source), key)
    if reading.paired:
        examples = [example for example in examples if example.gap or example.tie]
    if not reading.likes:
        examples = [example for example in examples if example.liked]
    if not examples:
        raise UserError(
            f"{key}: {source} has no {'pairs' if reading.paired else 'images'}. Ties are left out "
            "of pairs."
        )
    return examples


def _examples_of(source: DataSource, key: str, reading: Reading) -> list[Example]:
    location = source.location
    listing = location / "metadata.jsonl" if location.is_dir() else location
    where = f"{key}: {source}"
    if source.is_dataset:
        return examples_of(open_dataset(source, key), where, folder_of(source))
    if is_vote_file(listing):
        file = read_votes(listing, key)
        if reading.paired and not reading.likes:
            return pair_examples(file, reading.ties)
        return liked_examples(file)
    if listing.suffix in LISTINGS and listing.is_file():
        rows = _listed(replace(source, path=str(listing)), key)
        return [_example_of_object(entry, listing, where) for entry, where in rows]
    return examples_of(_open_folder(source, key), where, folder_of(source))


def _listed(source: DataSource, key: str) -> list[tuple[Metadata, str]]:
    """Return the rows of a file that names pictures, each with the words that name it."""
    location = source.location
    if location.suffix in SEPARATORS:
        return [(_without_empty(row), where) for row, where in read_rows(source, key)]
    entries = read_array if location.suffix == ".json" else read_objects
    return [(source.renamed(entry), where) for entry, where in entries(location, key)]


def _without_empty(row: Metadata) -> Metadata:
    """Return a row of a table without its empty cells: a single picture has none to reject."""
    return {name: value for name, value in row.items() if value not in ("", None)}


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


def _open_folder(source: DataSource, key: str) -> "Dataset":
    """Open a split that `datasets` saved, a parquet file, or the parquet files of a folder."""
    datasets, location = quiet_datasets(), source.location
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
    return renamed_columns(table, source, key)


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
