"""How a model sides with held-out votes."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from flowalign.evaluation.results import EvaluationResult
from flowalign.evaluation.statistics import paired_difference
from flowalign.reporting.curves import number

MARGIN, PREFERRED = "margin", "chosen_preferred"
"""The held-out figures of votes; see `HeldOut`."""
BARS = 21
WIDTH, HEIGHT = 420, 120


class Bar(NamedTuple):
    """A bar of a histogram, in pixels."""

    x: float
    y: float
    width: float
    height: float
    mood: str
    """"better" for margins above 0, "worse" for those below, empty for the bar around 0."""
    text: str


class Votes(NamedTuple):
    """The held-out votes about a run."""

    run: str
    total: int
    """The number of held-out entries."""
    share: str
    """The share of the votes that the model agrees with, of which the base has one half."""
    margin: str
    """The mean margin with its interval."""
    bars: Sequence[Bar]


def count_votes(
    run: str, before: EvaluationResult | None, after: EvaluationResult | None
) -> Votes | None:
    """Return how the trained weights side with held-out votes, or None without any."""
    if after is None or not {MARGIN, PREFERRED} <= after.held_out.keys():
        return None
    margins = after.held_out[MARGIN]
    scored = margins[margins.isfinite()].double()
    if not len(scored):
        return None
    differences = paired_difference(before, after) if before else {}
    known = MARGIN in differences and math.isfinite(differences[MARGIN][1])
    mean, high = scored.mean().item(), differences[MARGIN][2] if known else math.inf
    spread = high - differences[MARGIN][1] if known else math.inf
    return Votes(
        run=run,
        total=len(scored),
        share=f"{100 * after.means[PREFERRED]:.0f} %",
        margin=f"{mean:.2g}" + (f" ± {spread:.2g}" if math.isfinite(spread) else ""),
        bars=_histogram(scored),
    )


def _histogram(margins: torch.Tensor) -> list[Bar]:
    """Return bars around zero. The few largest margins are counted at the ends."""
    limit = margins.abs().quantile(0.98).item() or 1.0
    counts = torch.histc(margins.clamp(-limit, limit), BARS, -limit, limit).tolist()
    width, highest = WIDTH / BARS, max(counts)
    bars = []
    for place, count in enumerate(counts):
        height = round((HEIGHT - 4) * count / highest, 1)
        low = limit * (2 * place / BARS - 1)
        text = f"{count:.0f} votes: {number(low)} to {number(low + 2 * limit / BARS)}"
        side = place - BARS // 2
        mood = "better" if side > 0 else "worse" if side < 0 else ""
        bars.append(
            Bar(
                round(place * width + 1, 1),
                HEIGHT - height,
                round(width - 2, 1),
                height,
                mood,
                text,
            )
        )
    return bars
