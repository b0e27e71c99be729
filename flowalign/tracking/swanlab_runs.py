"""SwanLab, in its cloud or on this machine."""

import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TYPE_CHECKING

from flowalign.tracking.base import TrackedRun
from flowalign.tracking.external import LibraryTracker, pil_images

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker
    from torch import Tensor


@dataclass
class SwanLab(LibraryTracker):
    """SwanLab. `swanlab login` first, or `mode: offline` and `swanlab sync` later."""

    package: ClassVar[str] = "swanlab"

    workspace: str | None = None
    """The user or organisation that owns the project; your own if left out."""
    mode: Literal["online", "offline", "local"] | None = None
    """Place of the records: the cloud, files to send later, or files. Else SWANLAB_MODE counts."""

    def start(self, run: TrackedRun) -> None:
        """Begin or continue the run, and leave Ctrl-C to flowalign."""
        handler = signal.getsignal(signal.SIGINT)
        super().start(run)
        # SwanLab ends the process on Ctrl-C, before the step is finished and saved.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)

    def connect(self, run: TrackedRun) -> "GeneralTracker":
        """Return a run of the same id after resuming. Its files are in the run folder."""
        from accelerate.tracking import SwanLabTracker

        log_dir = run.folder / "swanlab"
        log_dir.mkdir(exist_ok=True)
        return SwanLabTracker(
            self.project,
            name=self.name_of(run),
            id=run.id,
            resume="allow",
            log_dir=str(log_dir),
            workspace=self.workspace,
            mode=self.mode,
        )

    def images(self, step: int, name: str, images: "Tensor", captions: Sequence[str]) -> None:
        """Record the pictures with their captions."""
        import swanlab  # pyright: ignore[reportMissingImports]

        pictures = zip(pil_images(images), captions, strict=True)
        self.tracker.log({name: [swanlab.Image(p, caption=c) for p, c in pictures]}, step=step)
