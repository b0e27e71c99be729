"""The settings that a run changes in the YAML file that its own extends, for its report."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from flowalign.bundled import portable
from flowalign.settings.merging import Section

CHANGES = "changes.json"
"""Name of the file in a run folder."""


@dataclass(frozen=True, kw_only=True)
class Changes:
    """Settings of a run that differ from those of a YAML file."""

    parent: str
    """The file that the run's YAML extends, or the run's YAML if it extends none."""
    settings: dict[str, tuple[str, str]]
    """The value in that file and the value in the run, by dotted key. Empty if it is not set."""

    def to_json(self) -> bytes:
        """Return the content of `changes.json`."""
        return _CHANGES.dump_json(self, indent=2)

    @classmethod
    def load(cls, run: Path) -> "Changes | None":
        """Return the changes that a run folder holds, or None if they are missing or damaged."""
        try:
            return _CHANGES.validate_json((run / CHANGES).read_bytes())
        except (OSError, ValidationError):
            return None


_CHANGES = TypeAdapter(Changes)


def changes_from(parent: Path, theirs: Section, ours: Section) -> Changes:
    """Return what differs from a parent.

    Args:
        parent: The file.
        theirs: What it holds.
        ours: What the run's YAML holds, with its overrides.
    """
    before, after = _values(theirs), _values(ours)
    keys = [key for key in before | after if before.get(key) != after.get(key)]
    settings = {key: (before.get(key, ""), after.get(key, "")) for key in keys if key != "output"}
    return Changes(parent=portable(str(parent)), settings=settings)


def _values(section: Section, prefix: str = "") -> dict[str, str]:
    """Return every value that is not a section as text, by dotted key."""
    values = {}
    for key, value in section.items():
        if isinstance(value, dict) and value:
            values |= _values(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = str(value)
    return values
