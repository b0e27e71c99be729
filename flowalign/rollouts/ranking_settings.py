"""The `data.ranking` section, apart from its formulas so that reading it does not import torch."""

from dataclasses import dataclass

from flowalign.settings.types import Count, NonNegative, Settings


@dataclass
class Ranking(Settings):
    """Which ranked images of a prompt become preference pairs.

    Each of the best `top` images is paired with each of the worst `top`.
    """

    top: Count = 1
    """Number of best images, and of worst images, of a prompt."""
    min_gap: NonNegative = 0.0
    """Pairs whose rewards differ by this or less are not trained on."""
    weighted: bool = False
    """True to weight pairs and prompts by how far their rewards differ (DP²O, arXiv 2510.18851)."""
