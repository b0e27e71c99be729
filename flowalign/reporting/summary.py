"""The summary of a run: what `summary.json` holds and the report shows."""

from typing import TypedDict

Interval = tuple[float, float, float]
"""Low end, mean and high end of a 95 % interval."""


class Summary(TypedDict):
    """The content of `summary.json`."""

    before: dict[str, float]
    """Mean of every reward and held-out figure without the adapter."""
    after: dict[str, float]
    """The same with the exported weights; empty for an interrupted run."""
    difference: dict[str, Interval]
    """Low end, mean and high end of the 95 % interval of the paired difference."""
    images: int
    """Images that were generated for training."""
    seconds: float
    """Seconds spent in training steps."""
    peak_memory_bytes: int
    """Most bytes in use: allocated on a GPU, resident on a CPU."""
    stopped: str
    """Why training ended: "finished", "interrupted" or the rule of train.stop."""
    weights: str
    """The exported weights: "policy" or "ema"."""
    step: int
    """The training step of the exported weights."""
