"""Diffusion-KTO: likes and dislikes of single images, on the flow-matching loss (arXiv 2404.04465).

With g = ‖v_ref - (noise - x0)‖² - ‖v - (noise - x0)‖², y = 1 for a liked and -1 for a disliked
image, and the reference point z = max(0, mean of g over all images of the update), which takes no
gradient,
    loss = λ_y (1 - σ(y β (g - z)))
Velocities are those without guidance, however images are sampled.

Differences from the paper: images come as pairs, one liked and one disliked, that share time and
noise (there: single images, four of five liked). z is the released code's, as is the default β
(there: a mean over other prompts' images, and 5000).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from flowalign.batch import Pairs
from flowalign.objectives.base import Loss, Mean, MeanOverImages, Term
from flowalign.objectives.draws import Draw
from flowalign.objectives.terms import PairObjective, preferred
from flowalign.policy import Policy
from flowalign.settings.types import NonNegative, Positive


@dataclass
class KTO(PairObjective):
    """Diffusion-KTO, on pairs of `data.pairs`, or online on the ranked images of `data.prompts`.

    Chosen images are liked, rejected ones disliked. z needs an update of 8 or more images.
    """

    beta: Positive = 1000.0
    """The steepness β of the value."""
    liked: NonNegative = 1.0
    """The weight λ of liked images."""
    disliked: NonNegative = 1.0
    """The weight λ of disliked images."""
    terms_span_update: ClassVar[bool] = True

    def group_terms(self, policy: Policy, pairs: Pairs, draw: Draw) -> dict[str, Term]:
        """Return the mean of g over all images, and the reference's errors, for its second use."""
        error_ref, error = self.errors_of([self.reference.of(policy), policy], pairs, draw)
        g = error_ref - error
        return {
            "mean_g": MeanOverImages(torch.stack(g.chunk(2), 1)),
            "errors_ref": torch.stack(error_ref.chunk(2), 1),
        }

    def loss(self, policy: Policy, pairs: Pairs, draw: Draw) -> Loss:
        """Return the loss at one time for each pair."""
        # One reference point for both images of every pair.
        z = pairs.terms["mean_g"].clamp(min=0).repeat(2)
        error_ref = torch.cat(pairs.terms["errors_ref"].unbind(1))
        g = error_ref - self.errors(policy, pairs, draw)
        y = torch.ones_like(z)
        y[len(pairs) :] = -1

        value = (y * self.beta * (g - z)).sigmoid()
        weight = torch.where(y > 0, self.liked, self.disliked) * pairs.weight.repeat(2)
        loss = (weight * (1 - value)).mean()

        liked, disliked = g.chunk(2)
        stats = {
            "chosen_preferred": Mean(preferred(liked - disliked)),
            "reference_point": Mean(z),
            "gained/liked": Mean(liked),
            "gained/disliked": Mean(disliked),
        }
        return Loss(loss, stats)
