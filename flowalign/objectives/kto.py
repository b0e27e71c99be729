"""Diffusion-KTO: likes and dislikes, one image at a time (arXiv 2404.04465), on the flow-matching loss.

With g = ‖v_ref - (noise - x0)‖² - ‖v - (noise - x0)‖², y = 1 for a liked and -1 for a disliked image, and the reference point
z = max(0, mean of g over all images of the update), without gradient,
    loss = λ_y (1 - σ(y β (g - z)))
Velocities are those without guidance, however images are sampled.

Differences from the paper: images come as pairs, one liked and one disliked, that share time and noise (there: each by itself,
four of five liked); z is the released code's, as is the default β (there: a mean over other prompts' images, and 5000).
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from flowalign import distributed
from flowalign.batch import Batch, Pairs
from flowalign.flow import add_noise, mean_square, PerImage
from flowalign.objectives.base import Loss, Objective
from flowalign.objectives.draws import Draw, ForwardTimes
from flowalign.policy import Policy
from flowalign.settings.types import NonNegative, Positive


@dataclass
class KTO(Objective):
    """From pairs of `data.pairs`, or online from the ranked images of `data.prompts`: chosen are liked, rejected disliked.

    z is only as good as the images of an update are many: 8 or more.
    """

    learns_from: ClassVar[type[Batch]] = Pairs
    times: ForwardTimes = field(
        default_factory=lambda: ForwardTimes(count=1, distribution="logit_normal", shared=False)
    )
    beta: Positive = 1000.0
    liked: NonNegative = 1.0
    """λ of liked images."""
    disliked: NonNegative = 1.0
    """λ of disliked images."""

    def draws(self, batch: Pairs) -> list[Draw]:
        return list(self.times(batch))

    def prepare(self, policy: Policy, pairs: Pairs) -> Pairs:
        """Of every draw z, over all processes, and the reference's errors of the liked and of the disliked images."""
        columns = []
        for draw in self.draws(pairs):
            error_ref = self.error(policy.at("reference"), pairs, draw)
            gained = (error_ref - self.error(policy, pairs, draw)).double().sum()
            images = torch.full_like(gained, 2 * len(pairs))  # other processes may have fewer
            total, count = distributed.mean(torch.stack([gained, images]))
            z = (total / count.clamp(min=1)).clamp(min=0).float().expand(len(pairs))
            columns += [z, error_ref[: len(pairs)], error_ref[len(pairs) :]]
        return replace(pairs, prepared=torch.stack(columns, 1))

    def loss(self, policy: Policy, pairs: Pairs, draw: Draw) -> Loss:
        z, *errors_ref = pairs.prepared[:, 3 * draw.index : 3 * draw.index + 3].T
        g, z = torch.cat(errors_ref) - self.error(policy, pairs, draw), z.repeat(2)
        y = torch.ones_like(z)
        y[len(pairs) :] = -1

        value = (y * self.beta * (g - z)).sigmoid()
        weight = torch.where(y > 0, self.liked, self.disliked) * pairs.weight.repeat(2)
        liked, disliked = g.chunk(2)
        stats = {
            "chosen_preferred": (liked > disliked).float() + 0.5 * (liked == disliked),
            "reference_point": z,
        }
        return Loss(
            (weight * (1 - value)).mean(),
            stats | {"gained/liked": liked, "gained/disliked": disliked},
        )

    def error(self, policy: Policy, pairs: Pairs, draw: Draw) -> PerImage:
        """‖v - (noise - x0)‖² of the liked, then of the disliked images (2 B)."""
        xt, target = add_noise(
            torch.cat(pairs.x0), draw.t.repeat(2), torch.cat([draw.noise, draw.noise])
        )
        return mean_square(
            policy.velocity(xt, draw.t.repeat(2), pairs.cond.unguided().twice()) - target
        )
