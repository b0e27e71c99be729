"""Trackio, which keeps its records on this machine or in a Space of the Hugging Face hub."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TYPE_CHECKING

from flowalign.tracking.base import TrackedRun
from flowalign.tracking.external import LibraryTracker, pil_images

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker
    from torch import Tensor


@dataclass
class Trackio(LibraryTracker):
    """Trackio, on this machine (`trackio show`) or in a Space."""

    package: ClassVar[str] = "trackio"

    space_id: str | None = None
    """The Space that shows the records, as owner/name; this machine alone if left out."""

    def connect(self, run: TrackedRun) -> "GeneralTracker":
        """Return a run of the same name after resuming."""
        from accelerate.tracking import TrackioTracker

        # Trackio continues runs by name, and folders of other projects may have the same one.
        name = f"{self.name_of(run)}-{run.id[:6]}"
        return TrackioTracker(
            self.project, name=name, resume="allow", space_id=self.space_id, embed=False
        )

    def images(self, step: int, name: str, images: "Tensor", captions: Sequence[str]) -> None:
        """Record the pictures with their captions, in a series of its own for each."""
        import trackio  # pyright: ignore[reportMissingImports]

        pictures = enumerate(zip(pil_images(images), captions, strict=True))
        self.tracker.log(
            {f"{name}/{i:02d}": trackio.Image(p, caption=c) for i, (p, c) in pictures}, step=step
        )
