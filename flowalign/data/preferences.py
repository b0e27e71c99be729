"""Pictures from disk: pairs of a better and a worse one, or single ones, and their latents, encoded once.

Read are a `.jsonl` file, a folder with `metadata.jsonl`, and a Hugging Face dataset on disk (parquet, or `save_to_disk`) in
Pick-a-Pic's columns: caption, jpg_0, jpg_1, label_0.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowalign.data.prompts import Prompt, read_objects
from flowalign.errors import similar_file, UserError

ReadBytes = Callable[[], bytes]


@dataclass(frozen=True)
class Example:
    """A picture of a prompt, and where there is one a worse picture of it."""

    prompt: Prompt
    chosen: ReadBytes
    rejected: ReadBytes | None = None
    gap: float = 1.0
    """By how much better the chosen is; 1 where only the order is known."""
    where: str = ""
    """What a message calls it."""


def read_examples(path: str, key: str, paired: bool) -> list[Example]:
    """The examples of a file or folder; `paired` ones only, where a worse picture is needed. UserError names what is missing."""
    place = Path(path)
    if not os.path.exists(place):
        raise UserError(f"{key}: there is no file or folder {path}.{similar_file(path)}")
    metadata = place / "metadata.jsonl" if place.is_dir() else place
    if metadata.suffix == ".jsonl" and metadata.is_file():
        examples = [
            _from_object(entry, metadata, where) for entry, where in read_objects(metadata, key)
        ]
    else:
        examples = _from_dataset(place, key)
    if (
        paired
        and (
            single := next(
                (i for i, example in enumerate(examples) if example.rejected is None), None
            )
        )
        is not None
    ):
        raise UserError(
            f"{key}: {path}, entry {single + 1} has one picture only; the objective learns from pairs."
        )
    examples = [example for example in examples if example.gap or not paired]
    if not examples:
        raise UserError(f"{key}: {path} has no pairs (ties are left out).")
    return examples


NAMES = {
    "chosen": ("chosen", "chosen_file_name", "image", "file_name"),
    "rejected": ("rejected", "rejected_file_name"),
}


def _from_object(entry: dict[str, Any], file: Path, where: str) -> Example:
    found = {
        role: next((entry[name] for name in names if name in entry), None)
        for role, names in NAMES.items()
    }
    if not isinstance(entry.get("prompt"), str) or not isinstance(found["chosen"], str):
        wanted = '{"prompt": "a red circle", "chosen": "a.png", "rejected": "b.png"} or {"prompt": ..., "image": "a.png"}'
        raise UserError(f"{where}: write {wanted}.")
    for name in filter(None, found.values()):
        if not os.path.isfile(file.parent / str(name)):
            raise UserError(f"{where}: there is no picture {file.parent / str(name)}.")
    pictures = {
        role: (file.parent / name).read_bytes if name else None for role, name in found.items()
    }
    better, worse = entry.get("score_chosen", 1.0), entry.get("score_rejected", 0.0)
    scored = ("score_chosen" in entry) + ("score_rejected" in entry)
    if (
        scored == 1
        or not all(
            type(score) in (int, float) and math.isfinite(score) for score in (better, worse)
        )
        or better < worse
    ):
        raise UserError(
            f"{where}: score_chosen is {better!r} and score_rejected {worse!r}; write both, the first the larger."
        )
    gap = float(better - worse)
    return Example(Prompt(entry["prompt"]), pictures["chosen"], pictures["rejected"], gap, where)  # type: ignore[arg-type]


def _from_dataset(place: Path, key: str) -> list[Example]:
    import datasets  # slow to import, and only here

    datasets.disable_progress_bars()
    try:
        if place.is_dir() and (place / "state.json").is_file():
            table = datasets.load_from_disk(str(place))
        else:
            files = sorted(map(str, place.rglob("*.parquet"))) if place.is_dir() else [str(place)]
            table = datasets.load_dataset("parquet", data_files=files, split="train")
    except Exception as error:
        wanted = "a .jsonl file, a folder with metadata.jsonl, parquet files, or a split that datasets saved"
        raise UserError(f"{key}: {place} is not {wanted} ({error}).") from error
    assert isinstance(table, datasets.Dataset)
    if missing := {"caption", "jpg_0", "jpg_1", "label_0"} - set(table.column_names):
        raise UserError(
            f"{key}: {place} has no column {', '.join(sorted(missing))}; it has {', '.join(table.column_names)}."
        )
    for column in ("jpg_0", "jpg_1"):
        if isinstance(table.features[column], datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
    labels = table["label_0"]
    captions = table["caption"]

    def picture(row: int, column: str) -> ReadBytes:
        return lambda: _bytes_of(table[row][column])

    order = {1.0: ("jpg_0", "jpg_1"), 0.0: ("jpg_1", "jpg_0")}
    return [
        Example(
            Prompt(caption),
            picture(row, order[label][0]),
            picture(row, order[label][1]),
            where=f"{key}: {place}, row {row + 1}",
        )
        for row, (label, caption) in enumerate(zip(labels, captions, strict=True))
        if label in order
    ]


def _bytes_of(cell: Any) -> bytes:
    return cell["bytes"] if isinstance(cell, dict) else cell
