"""Trackers: records of a run that are written while it trains."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Metrics = Mapping[str, float]
"""Numbers by name. `step` may be among them."""


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """The run that a tracker records."""

    folder: Path
    """The run folder."""
    id: str
    """Letters and digits. Equal after resuming, and different for every run and tracker."""
    is_resumed: bool
    """True if this tracker has recorded earlier steps of the run."""
    settings: dict[str, Any]
    """The configuration with every default, as in `config.yaml`."""


class Tracker(ABC):
    """A record of a run. Only the main process has trackers.

    Your own is a subclass. Its fields, or the arguments of its `__init__`, are its settings.
    """

    def start(self, run: TrackedRun) -> None:  # noqa: B027 - not every tracker has a beginning
        """Begin the record of a run, or continue it. Called before any other method."""

    @abstractmethod
    def log(self, step: int, metrics: Metrics) -> None:
        """Record the metrics of a training step."""

    def images(  # noqa: B027 - some trackers record numbers only
        self, step: int, name: str, images: "Tensor", captions: Sequence[str]
    ) -> None:
        """Record pictures (B, 3, H, W) in bytes, with one caption each. `name` names the series."""

    def close(self) -> None:  # noqa: B027 - some trackers write everything at once
        """Write what is still in memory."""


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Return nested settings by dotted key. Lists and missing values become text."""
    values: dict[str, bool | int | float | str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{prefix}{name}.")
        else:
            is_plain = isinstance(value, bool | int | float | str)
            values[f"{prefix}{name}"] = value if is_plain else json.dumps(value, default=str)
    return values
