"""Trackers by name, imported when they are used.

Your own is named by its path: `tracking: ["my_tracker.py:MyTracker"]`.
"""

TRACKERS = {
    "wandb": "flowalign.tracking.wandb_runs:Wandb",
    "trackio": "flowalign.tracking.trackio_runs:Trackio",
    "mlflow": "flowalign.tracking.mlflow_runs:MLflow",
    "swanlab": "flowalign.tracking.swanlab_runs:SwanLab",
}
"""From the name in a YAML file to the place of the class."""
