"""A tracker of another library: accelerate starts it and sends it numbers."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, TYPE_CHECKING

from flowalign.errors import UserError
from flowalign.settings.types import Settings
from flowalign.tracking.base import flat, Metrics, TrackedRun, Tracker

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker
    from PIL.Image import Image
    from torch import Tensor


@dataclass
class LibraryTracker(Settings, Tracker):
    """A tracker of another library, which must be installed."""

    package: ClassVar[str]
    """The name under which the library is imported, and of the extra that installs it."""

    project: str = "flowalign"
    """The project in which the run is listed."""
    run_name: str = ""
    """The name of the run; that of the run folder if empty."""

    def require(self) -> None:
        """Raise UserError if the library is not installed."""
        if find_spec(self.package) is None:
            raise UserError(
                f"tracking: {self.package} is not installed. "
                f"Run: pip install 'flowalign[{self.package}]'"
            )

    @abstractmethod
    def connect(self, run: TrackedRun) -> "GeneralTracker":
        """Return accelerate's tracker of the library, not yet started."""

    def start(self, run: TrackedRun) -> None:
        """Begin or continue the run in the library, and record the configuration."""
        self.tracker: Any = self.connect(run)
        self.tracker.start()
        self.tracker.store_init_configuration(flat(run.settings))

    def log(self, step: int, metrics: Metrics) -> None:
        """Record every finite number."""
        # Some libraries refuse NaN, which metrics.jsonl has as null.
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        finite.pop("step", None)
        self.tracker.log(finite, step=step)

    def close(self) -> None:
        """Send what is still in memory, and end the run in the library."""
        self.tracker.finish()

    def name_of(self, run: TrackedRun) -> str:
        """Return the name of the run."""
        return self.run_name or run.folder.resolve().name


def pil_images(images: "Tensor") -> "list[Image]":
    """Convert pictures (B, 3, H, W) in bytes."""
    from PIL import Image

    return [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).contiguous().numpy()]
