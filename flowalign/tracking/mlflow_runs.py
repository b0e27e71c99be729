"""MLflow, on this machine or on a tracking server."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TYPE_CHECKING

from flowalign.tracking.base import Metrics, TrackedRun
from flowalign.tracking.external import LibraryTracker, pil_images

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker
    from torch import Tensor

ID_TAG = "flowalign.id"
CAPTION_LENGTH = 80
"""Characters of a caption that name a picture. The whole text is in `captions.json`."""


@dataclass
class MLflow(LibraryTracker):
    """MLflow. `project` is the experiment; MLFLOW_TRACKING_URI says where records are kept."""

    package: ClassVar[str] = "mlflow"

    tracking_uri: str | None = None
    """A server or a folder, in place of MLFLOW_TRACKING_URI."""

    def start(self, run: TrackedRun) -> None:
        """Begin or continue the run. Settings are recorded once, for MLflow lets none change."""
        import mlflow  # pyright: ignore[reportMissingImports]

        if self.tracking_uri is not None:
            mlflow.set_tracking_uri(self.tracking_uri)
        if not run.is_resumed:
            super().start(run)
            return
        self.tracker = self.connect(run)
        self.tracker.start()

    def connect(self, run: TrackedRun) -> "GeneralTracker":
        """Return the run with this id, or a new one that gets it as a tag."""
        from accelerate.tracking import MLflowTracker

        return MLflowTracker(
            self.project,
            run_id=self.find_run(run),
            run_name=self.name_of(run),
            tags={ID_TAG: run.id},
        )

    def find_run(self, run: TrackedRun) -> str | None:
        """Return MLflow's own id of the run, or None if there is none yet."""
        import mlflow  # pyright: ignore[reportMissingImports]

        if not run.is_resumed:
            return None
        runs = mlflow.search_runs(
            experiment_names=[self.project],
            filter_string=f"tags.`{ID_TAG}` = '{run.id}'",
            output_format="list",
        )
        return runs[0].info.run_id if runs else None

    def log(self, step: int, metrics: Metrics) -> None:
        """Record every finite number, under a name that MLflow accepts."""
        super().log(step, {_allowed(name): value for name, value in metrics.items()})

    def images(self, step: int, name: str, images: "Tensor", captions: Sequence[str]) -> None:
        """Record each picture in a series that its caption names."""
        import mlflow  # pyright: ignore[reportMissingImports]

        keys = [
            f"{name}/{i:02d} {_allowed(caption)[:CAPTION_LENGTH].replace('/', '_')}"
            for i, caption in enumerate(captions)
        ]
        for key, picture in zip(keys, pil_images(images), strict=True):
            mlflow.log_image(picture, key=key, step=step, synchronous=True)
        mlflow.log_dict(dict(zip(keys, captions, strict=True)), f"{name}/captions.json")


def _allowed(text: str) -> str:
    """Replace the characters that MLflow refuses in names."""
    return re.sub(r"[^a-zA-Z0-9_\-. /]", "_", text)
