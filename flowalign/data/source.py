"""The place of prompts or pairs, as a YAML file writes it: a path, or a mapping with details."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowalign.errors import UserError
from flowalign.models.hub import is_local
from flowalign.settings.types import build, Settings

Written = str | Mapping[str, Any]
"""A source as it is written."""


@dataclass
class DataSource(Settings):
    """A file or folder, or a data set of the Hugging Face hub."""

    path: str
    """A file, a folder, or owner/name of a data set on the hub."""
    split: str = ""
    """The split of a data set, such as train; may be left out if there is only one."""
    subset: str = ""
    """The subset of a data set (its configuration), if it has several."""
    revision: str | None = None
    """Commit, branch or tag of a data set on the hub; the newest if left out."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns under other names, as in {prompt: caption, chosen: better, rejected: worse}."""

    def __str__(self) -> str:
        return " ".join(filter(None, [self.path, self.subset, self.split]))

    @property
    def location(self) -> Path:
        """The path of a file or folder."""
        return Path(os.path.expanduser(self.path))

    @property
    def is_on_hub(self) -> bool:
        """True for owner/name, unless a file or folder has this name."""
        suffixes = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet")
        is_name = not is_local(self.path) and not self.path.endswith(suffixes)
        return is_name and not os.path.exists(self.location)

    @property
    def is_dataset(self) -> bool:
        """True if the library `datasets` finds the files: on the hub, or by a named split."""
        names = self.split or self.subset
        return self.is_on_hub or (bool(names) and os.path.isdir(self.location))

    def renamed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row under the names that flowalign knows."""
        theirs = {old: new for new, old in self.columns.items()}
        # A column that already has the new name gives way to the one that the user has chosen.
        kept = {n: v for n, v in row.items() if n not in self.columns or n in theirs}
        return {theirs.get(name, name): value for name, value in kept.items()}


def data_source(written: Written | Path, key: str) -> DataSource:
    """Return a source as it is written, checked.

    Raises:
        UserError: It is neither a text nor a mapping with a path, or a key is not known.
    """
    if isinstance(written, str | Path):
        return DataSource(path=str(written))
    if not isinstance(written, Mapping):
        raise UserError(
            f"{key} is {written!r}; it must be text, in quotes where it looks like a number: a "
            "file, a folder or owner/name. With details, write {path: owner/name, split: train}."
        )
    return build(DataSource, written, key)
