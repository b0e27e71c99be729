"""Read the section `tracking`, as YAML files and the command line write it.

Checking it imports neither torch nor a library nor a user's file.
"""

from collections.abc import Mapping
from typing import Any

from flowalign.errors import UserError
from flowalign.global_state import restored_state
from flowalign.settings.by_name import imported, refuse_standard_library, unknown_name
from flowalign.settings.types import configure, mapping
from flowalign.tracking import TRACKERS
from flowalign.tracking.base import Tracker
from flowalign.tracking.external import LibraryTracker

Section = dict[str, dict[str, Any]]
"""Trackers by name or path, with the settings of each."""
KEY = "tracking"


def checked_tracking(section: object) -> Section:
    """Return the settings of each tracker. None is imported but the built-in ones.

    Args:
        section: One name, a list of names, or a mapping of names to settings.

    Raises:
        UserError: A name is not known, or a setting of a built-in tracker is wrong.
    """
    trackers = {}
    for name, settings in _entries(section).items():
        key = f"{KEY}.{name}"
        trackers[name] = mapping({} if settings is None else settings, key)
        if name in TRACKERS:
            _make(name, trackers[name])
        elif ":" not in name:
            raise UserError(unknown_name(name, KEY, TRACKERS))
        else:
            refuse_standard_library(name, key)
    return trackers


def _entries(section: object) -> dict[str, object]:
    names = [section] if isinstance(section, str) else section
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return {name: {} for name in names}
    if not isinstance(names, dict):
        raise UserError(
            f"{KEY} is {section!r}. Write names, such as [wandb, mlflow], or names with settings, "
            "such as {wandb: {project: my_project}}."
        )
    return mapping(names, KEY)


def load_trackers(section: Mapping[str, dict[str, Any]]) -> dict[str, Tracker]:
    """Import and configure the trackers of a checked section.

    Raises:
        UserError: A library is not installed, or a tracker of the user cannot be made.
    """
    trackers = {name: _make(name, settings) for name, settings in section.items()}
    for tracker in trackers.values():
        if isinstance(tracker, LibraryTracker):
            tracker.require()
    return trackers


def _make(name: str, settings: Mapping[str, object]) -> Tracker:
    key = f"{KEY}.{name}"
    tracker = imported(TRACKERS.get(name, name), key, TRACKERS)
    if not isinstance(tracker, type) or not issubclass(tracker, Tracker):
        raise UserError(
            f"{key} is not a tracker. Write a subclass of flowalign.Tracker with a method log."
        )
    with restored_state():
        return configure(tracker, settings, key)
