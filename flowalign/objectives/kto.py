"""Diffusion-KTO: likes and dislikes, one image at a time (arXiv 2404.04465), on the flow-matching loss.

With g = ‖v_ref - (noise - x0)‖² - ‖v - (noise - x0)‖², y = 1 for a liked and -1 for a disliked image, and the reference point
z = max(0, mean of g over all images of the update), without gradient,
    loss = λ_y (1 - σ(y β (g - z)))
Velocities are those without guidance, however images are sampled.

Difference from the paper: images come as pairs, one liked and one disliked, that share time and noise (there: each by itself,
four of five liked).
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from flowalign import processes
from flowalign.batch import Batch, Pairs
from flowalign.flow import add_noise, mean_square, PerImage
from flowalign.objectives.base import Draw, ForwardTimes, Loss, Objective
from flowalign.policy import Policy
from flowalign.settings import NonNegative, Positive


@dataclass
class KTO(Objective):
    """From pairs of `data.pairs`, or online from the ranked images of `data.prompts`: chosen are liked, rejected disliked.

    z is only as good as the images of an update are many: 8 or more.
    """

    learns_from: ClassVar[type[Batch]] = Pairs
    times: ForwardTimes = field(default_factory=lambda: ForwardTimes(count=1, distribution="logit_normal"))
    beta: Positive = 1000.0
    liked: NonNegative = 1.0
    """λ of liked images."""
    disliked: NonNegative = 1.0
    """λ of disliked images."""

    def draws(self, batch: Pairs) -> list[Draw]:
        return list(self.times(batch))

    def prepare(self, policy: Policy, pairs: Pairs) -> Pairs:
        """z of every draw, over all processes."""
        view = policy.at("policy")
        gained = torch.stack([self.gained(view, pairs, draw).double().sum() for draw in self.draws(pairs)])
        images = torch.full_like(gained, 2 * len(pairs))  # other processes may have fewer
        z = processes.mean(gained) / processes.mean(images).clamp(min=1)
        return replace(pairs, prepared=z.clamp(min=0).float().expand(len(pairs), -1))

    def loss(self, policy: Policy, pairs: Pairs, draw: Draw) -> Loss:
        g, z = self.gained(policy, pairs, draw), pairs.prepared[:, draw.index].repeat(2)
        y = torch.ones_like(z)
        y[len(pairs) :] = -1

        value = (y * self.beta * (g - z)).sigmoid()
        weight = torch.where(y > 0, self.liked, self.disliked) * pairs.weight.repeat(2)
        liked, disliked = g.chunk(2)
        stats = {"chosen_preferred": (liked > disliked).float() + 0.5 * (liked == disliked), "reference_point": z}
        return Loss((weight * (1 - value)).mean(), stats | {"gained/liked": liked, "gained/disliked": disliked})

    def gained(self, policy: Policy, pairs: Pairs, draw: Draw) -> PerImage:
        """g of the liked, then of the disliked images (2 B)."""
        xt, target = add_noise(torch.cat(pairs.x0), draw.t.repeat(2), torch.cat([draw.noise, draw.noise]))
        t, cond = draw.t.repeat(2), pairs.cond.unguided().twice()
        error = mean_square(policy.velocity(xt, t, cond) - target)
        return mean_square(policy.at("reference").velocity(xt, t, cond) - target) - error
