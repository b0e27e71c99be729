"""Weights & Biases."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TYPE_CHECKING

from flowalign.tracking.base import TrackedRun
from flowalign.tracking.external import LibraryTracker, pil_images

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker
    from torch import Tensor

FINISH_TIMEOUT = 600
"""Seconds that the end of a run waits for uploads; `wandb sync` sends the rest."""


@dataclass
class Wandb(LibraryTracker):
    """Weights & Biases. `wandb login` first, or WANDB_MODE=offline and `wandb sync` later."""

    package: ClassVar[str] = "wandb"

    entity: str | None = None
    """The user or team that owns the project; your default one if left out."""
    group: str | None = None
    """The group of the run."""
    tags: list[str] = field(default_factory=list)
    """Labels of the run."""

    def connect(self, run: TrackedRun) -> "GeneralTracker":
        """Return a run of the same id after resuming. Its files are in the run folder."""
        from accelerate.tracking import WandBTracker

        return WandBTracker(
            self.project,
            name=self.name_of(run),
            id=run.id,
            resume="allow",
            dir=str(run.folder),
            entity=self.entity,
            group=self.group,
            tags=self.tags,
            settings={"finish_timeout": FINISH_TIMEOUT},
        )

    def images(self, step: int, name: str, images: "Tensor", captions: Sequence[str]) -> None:
        """Record the pictures with their captions."""
        import wandb  # pyright: ignore[reportMissingImports]

        pictures = zip(pil_images(images), captions, strict=True)
        self.tracker.log({name: [wandb.Image(p, caption=c) for p, c in pictures]}, step=step)
