"""The `data.ranking` section, apart from its formulas so that reading it does not import torch."""

from dataclasses import dataclass
from typing import Literal

from flowalign.settings.types import Count, NonNegative, Settings


@dataclass
class Ranking(Settings):
    """Which images become preference pairs, and how much a pair counts.

    `by` and `top` are for generated images. `min_gap` and `weighted` are for the pairs of
    `data.pairs` too, whose gap is score_chosen - score_rejected.
    """

    by: Literal["reward", "dominance"] = "reward"
    """How images of a prompt are paired.

    reward pairs each of the `top` best with each of the `top` worst. dominance pairs an image with
    each image that it dominates: it is worse in no reward and better in one (D3PO).
    """
    top: Count = 1
    """Number of best images, and of worst images, of a prompt; for `by: reward` only."""
    min_gap: NonNegative = 0.0
    """Pairs whose rewards differ by this or less are not trained on.

    With `by: dominance`, one reward must be better by more than this.
    """
    weighted: bool = False
    """True to weight pairs by how far their rewards differ (DP²O, arXiv 2510.18851).

    Prompts of generated images are weighted too. The mean weight is 1.
    """

    def most_pairs(self, images: int) -> int:
        """Return the largest number of pairs of a prompt with this number of images."""
        return {"reward": self.top**2, "dominance": images * (images - 1) // 2}[self.by]
