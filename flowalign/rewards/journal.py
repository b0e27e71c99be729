"""The trainer's side of a reward that was written for TRL: the step, and where to log figures."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real

from torch import Tensor


@dataclass(frozen=True)
class TrainerState:
    """The argument `trainer_state` of a reward, with the part of TRL's that is known here."""

    global_step: int
    """Training steps that were finished before this one; 0 outside training steps."""


class Journal:
    """Keeps what one reward logs in a training step.

    Outside training steps, as in evaluations, nothing is kept and the step is 0. An evaluation
    would otherwise score the same image differently after training, whatever it shows.
    """

    def __init__(self) -> None:
        self._step: int | None = None
        self._values: dict[str, list[float]] = {}

    def begin(self, step: int | None) -> None:
        """Prepare for a call in a training step, or outside of any if it is None."""
        self._step = step

    @property
    def state(self) -> TrainerState:
        """The argument `trainer_state` of the present call."""
        return TrainerState(self._step or 0)

    def log_metric(self, name: str, value: float) -> None:
        """Log a number. The metric of a step is the mean over its calls and processes.

        A number that is not finite is left out.
        """
        self._keep(name, [float(value)])

    def log_extra(self, column: str, values: Iterable[object]) -> None:
        """Log one value per image. The metric is the mean of the numbers; texts are not kept."""
        self._keep(column, [float(value) for value in values if isinstance(value, Real | Tensor)])

    def take(self) -> dict[str, list[float]]:
        """Return all that was logged since the last call, by name."""
        values, self._values = self._values, {}
        return values

    def _keep(self, name: str, values: list[float]) -> None:
        finite = [value for value in values if math.isfinite(value)]
        if self._step is not None and finite:
            self._values.setdefault(str(name), []).extend(finite)
