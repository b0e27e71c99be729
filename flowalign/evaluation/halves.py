"""Two halves of an evaluation: one chooses between steps, the other measures what was chosen.

The best of several evaluations looks better than it is, because the choice also picks the luckiest
noise. Prompts that took no part in the choice give a fair measure.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowalign.evaluation.results import EvaluationResult


@dataclass(frozen=True)
class Halves:
    """Which prompts choose, and which ones measure what was chosen."""

    choosing: Tensor  # (P,)
    """True for the prompts that choose."""
    measuring: Tensor  # (P,)
    """True for the others. A single prompt does both, because nothing is left for the other."""

    def choose(self, result: EvaluationResult) -> EvaluationResult:
        """Return a result in which only the prompts and entries that choose have scores."""
        return _only(result, self.choosing, 0)

    def measure(self, result: EvaluationResult) -> EvaluationResult:
        """Return a result in which only the prompts and entries that measure have scores."""
        return _only(result, self.measuring, 1)


def split_prompts(prompts: Sequence[str]) -> Halves:
    """Split prompts into halves. Equal texts are in the same half.

    The halves depend on the texts alone, not on their order or number of images. So a resumed run
    and another run with these prompts have the same halves.
    """
    texts = sorted(set(prompts), key=_digest)
    chosen = set(texts[: len(texts) // 2])
    choosing = torch.tensor([text in chosen for text in prompts])
    return Halves(choosing, ~choosing) if chosen else Halves(~choosing, ~choosing)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).digest()


def _only(result: EvaluationResult, prompts: Tensor, parity: int) -> EvaluationResult:
    """Return a result without the scores of other prompts, and of every second held-out entry."""
    rows = prompts[result.prompt]
    return replace(
        result,
        rewards={name: _scored_where(rows, values) for name, values in result.rewards.items()},
        held_out={
            name: _scored_where(_every_second(len(values), parity), values)
            for name, values in result.held_out.items()
        },
    )


def _every_second(count: int, parity: int) -> Tensor:
    """Return which of the entries have this parity; a single entry has both."""
    return (torch.arange(count) % 2 == parity) | (count == 1)


def _scored_where(rows: Tensor, values: Tensor) -> Tensor:
    return values.where(rows.to(values.device), math.nan)
