"""Diffusion-KTO: likes and dislikes of single images, on the flow-matching loss (arXiv 2404.04465).

With g = ‖v_ref - (noise - x0)‖² - ‖v - (noise - x0)‖², y = 1 for a liked and -1 for a disliked
image, and the reference point z = max(0, mean of g over all images of the update), which takes no
gradient,
    loss = λ_y (1 - σ(y β (g - z)))
Velocities are those without guidance, however images are sampled. With `reference_point: balanced`,
z is the mean of the two means, of liked and of disliked images, so that the rarer kind has as much
influence on it.

Images come as single ones, or as pairs of a liked and a disliked image that share time and noise.

Differences from the paper: z is the released code's, as is the default β (there: a mean over other
prompts' images, and 5000). Balanced z has the lower limit 0, too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from flowalign.batch import Pairs
from flowalign.objectives.base import Loss, Mean, MeanOverImages, Term
from flowalign.objectives.draws import Draw
from flowalign.objectives.terms import PairObjective, preferred
from flowalign.policy import Policy
from flowalign.settings.types import NonNegative, Positive


def mean(terms: Mapping[str, Tensor]) -> Tensor:
    """Return the mean of g over all images."""
    total = terms["g_liked"] + terms["g_disliked"]
    return total / (terms["liked"] + terms["disliked"])


def balanced(terms: Mapping[str, Tensor]) -> Tensor:
    """Return the mean of the means of g over liked and over disliked images."""
    # Of a kind that the update lacks, nothing is known: its mean counts as 0.
    g_liked = terms["g_liked"] / terms["liked"].clamp(min=1e-9)
    g_disliked = terms["g_disliked"] / terms["disliked"].clamp(min=1e-9)
    return (g_liked + g_disliked) / 2


REFERENCE_POINTS: dict[str, Callable[[Mapping[str, Tensor]], Tensor]] = {
    "mean": mean,
    "balanced": balanced,
}


@dataclass
class KTO(PairObjective):
    """Diffusion-KTO, on pairs of `data.pairs`, or online on the ranked images of `data.prompts`.

    Chosen images are liked, rejected ones disliked. z needs an update of 8 or more images. If one
    kind is rare, raise its weight: liked · likes should be about disliked · dislikes.
    """

    beta: Positive = 1000.0
    """The steepness β of the value."""
    liked: NonNegative = 1.0
    """The weight λ of liked images."""
    disliked: NonNegative = 1.0
    """The weight λ of disliked images."""
    reference_point: Literal["mean", "balanced"] = "mean"
    """How the images count in z: all equally, or both kinds equally."""
    terms_span_update: ClassVar[bool] = True
    learns_from_likes: ClassVar[bool] = True

    def group_terms(self, policy: Policy, pairs: Pairs, draw: Draw) -> dict[str, Term]:
        """Return the means of g over all images, and the reference's errors, for its second use."""
        error_ref, error = self.errors_of([self.reference.of(policy), policy], pairs, draw)
        voted_liked, voted_disliked = pairs.voted.to(error.dtype).unbind(1)
        g_liked, g_disliked = (error_ref - error).chunk(2)
        return {
            "liked": MeanOverImages(voted_liked),
            "disliked": MeanOverImages(voted_disliked),
            "g_liked": MeanOverImages(voted_liked * g_liked),
            "g_disliked": MeanOverImages(voted_disliked * g_disliked),
            "errors_ref": torch.stack(error_ref.chunk(2), 1),
        }

    def loss(self, policy: Policy, pairs: Pairs, draw: Draw) -> Loss:
        """Return the loss at one time for each pair."""
        # One reference point for both images of every pair.
        z = REFERENCE_POINTS[self.reference_point](pairs.terms).clamp(min=0).repeat(2)
        error_ref = torch.cat(pairs.terms["errors_ref"].unbind(1))
        g = error_ref - self.errors(policy, pairs, draw)
        y = torch.ones_like(z)
        y[len(pairs) :] = -1

        value = (y * self.beta * (g - z)).sigmoid()
        # A row with a single image has the weight of a pair.
        share = 2 * pairs.voted / pairs.voted.sum(1, keepdim=True)
        voted = torch.cat(share.unbind(1))
        weight = torch.where(y > 0, self.liked, self.disliked) * pairs.weight.repeat(2) * voted
        loss = (weight * (1 - value)).mean()

        liked, disliked = g.chunk(2)
        share_liked, share_disliked = (
            pairs.terms[kind].clamp(min=1e-9) for kind in ("liked", "disliked")
        )
        stats = {
            # Half for a single image, of which nothing is preferred.
            "chosen_preferred": Mean(
                torch.where(pairs.voted.all(1), preferred(liked - disliked), 0.5)
            ),
            "reference_point": Mean(z),
            # Over the share of images of this kind: means of those alone.
            "gained/liked": Mean(liked * pairs.voted[:, 0] / share_liked),
            "gained/disliked": Mean(disliked * pairs.voted[:, 1] / share_disliked),
        }
        return Loss(loss, stats)
