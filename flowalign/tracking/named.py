"""The trackers that a YAML file names: each gets every step once, and none can end a run."""

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any, TYPE_CHECKING

from flowalign.files import write_file
from flowalign.progress import say
from flowalign.tracking.base import Metrics, TrackedRun, Tracker

if TYPE_CHECKING:
    from torch import Tensor

IDS = "tracking.json"
"""The file of a run folder with the id of the run in each tracker."""
REST = 600.0
"""Seconds in which a tracker that failed is not called again: each failure may take minutes."""


class NamedTracker(Tracker):
    """A tracker whose errors are said once, and do not end the run.

    Args:
        name: The name in messages.
        tracker: The tracker.
        recorded: The steps that it has recorded already, and that the resumed run repeats.
    """

    def __init__(self, name: str, tracker: Tracker, recorded: range = range(0)):
        self.name = name
        self.tracker = tracker
        self.recorded = recorded
        self.run: TrackedRun | None = None
        self.is_started = self.has_failed = False
        self.resting_until = 0.0

    def start(self, run: TrackedRun) -> None:
        """Begin or continue the record."""
        self.run = run
        self._attempt(lambda: None)

    def log(self, step: int, metrics: Metrics) -> None:
        """Record a step that is not recorded yet."""
        if step not in self.recorded:
            self._attempt(lambda: self.tracker.log(step, metrics))

    def images(self, step: int, name: str, images: "Tensor", captions: Sequence[str]) -> None:
        """Record the pictures of a step that is not recorded yet."""
        if step not in self.recorded:
            self._attempt(lambda: self.tracker.images(step, name, images, captions))

    def close(self) -> None:
        """Close the tracker if it was ever started."""
        if self.is_started:
            self.resting_until = 0.0
            self._attempt(self.tracker.close)

    def _attempt(self, call: Callable[[], None]) -> None:
        """Call the tracker, unless it failed a short time ago."""
        if monotonic() < self.resting_until:
            return
        try:
            # A tracker that could not start, for want of a network, may do so later.
            if not self.is_started:
                assert self.run is not None
                self.tracker.start(self.run)
                self.is_started = True
            call()
        # A library or a user's tracker may raise anything, or end the program.
        except (Exception, SystemExit) as error:
            self.resting_until = monotonic() + REST
            self._say_once(error)

    def _say_once(self, error: BaseException) -> None:
        if not self.has_failed:
            say(
                f"tracking.{self.name} failed: {type(error).__name__}: {error}. The run continues, "
                "and tries again after ten minutes. metrics.jsonl and tensorboard/ have every step."
            )
        self.has_failed = True


def start_trackers(
    trackers: Mapping[str, Tracker], folder: Path, recorded: range, settings: dict[str, Any]
) -> list[NamedTracker]:
    """Start the trackers of a run, and keep the ids of their records in the run folder.

    Args:
        trackers: By name or path.
        folder: The run folder.
        recorded: From the step that the run resumes from, which may be 0, to the last logged one.
        settings: The configuration with every default.
    """
    # Without a checkpoint, a run begins again, perhaps with other settings.
    ids = _read_ids(folder) if recorded.start > 0 else {}
    known = {name: ids.get(name, uuid.uuid4().hex[:16]) for name in trackers}
    if trackers:
        write_file(folder / IDS, json.dumps(known, indent=2).encode())
    named = []
    for name, tracker in trackers.items():
        # The step itself may come again: its evaluation is repeated if it failed.
        repeated = recorded[1:] if name in ids else range(0)
        named.append(NamedTracker(name, tracker, repeated))
        run = TrackedRun(folder=folder, id=known[name], is_resumed=name in ids, settings=settings)
        named[-1].start(run)
    return named


def _read_ids(folder: Path) -> dict[str, str]:
    """Return the id of the run in each tracker. A damaged file costs the continuation only."""
    with suppress(OSError, ValueError, RecursionError):
        ids = json.loads((folder / IDS).read_text(encoding="utf-8"))
        if isinstance(ids, dict):
            return {name: value for name, value in ids.items() if isinstance(value, str)}
    return {}
