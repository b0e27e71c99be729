"""SOAR: learn to come back from one's own sampling errors; no reward (arXiv 2604.12617).

From x_t on the line between x0 and noise, one guided ODE step of the model itself, without gradient, leads to x' at s < t.
Taken back towards the same noise to s' in [s, 1], its velocity straight to x0 is known:
    x_{s'} = (1 - α) x' + α noise,   α = (s' - s) / (1 - s)
    loss = ‖v(x_t) - (noise - x0)‖² + λ ‖v(x_{s'}) - (x_{s'} - x0) / s'‖²
The velocities of the loss are those without guidance.

Differences from the paper: the step that errs is one of the ODE (there: some are stochastic), s' is any time (there: one of the
schedule's), and no prompts are dropped.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from flowalign.batch import Batch, Examples
from flowalign.flow import add_noise, Latent, mean_square, over_latent, PerImage
from flowalign.objectives.base import ForwardObjective, Loss
from flowalign.objectives.draws import Draw, ForwardTimes
from flowalign.policy import Policy
from flowalign.settings.types import Count, Guidance, NonNegative


@dataclass
class SOAR(ForwardObjective):
    """From the pictures of `data.pairs`; of pairs, the chosen."""

    times: ForwardTimes = field(
        default_factory=lambda: ForwardTimes(count=1, distribution="logit_normal")
    )
    guidance: Guidance = 4.5
    """Of the step that errs."""
    sampling_steps: Count = 40
    """Its length is one of so many steps."""
    points: Count = 6
    """How many s' are drawn."""
    weight: NonNegative = 1.0
    """λ of each of them; the loss is a mean over the plain term and the points."""
    learns_from: ClassVar[type[Batch]] = Examples

    def loss(self, policy: Policy, examples: Examples, draw: Draw) -> Loss:
        x0, t, cond = examples.x0, draw.t, examples.cond.unguided()
        xt, target = add_noise(x0, t, draw.noise)
        error = mean_square(policy.velocity(xt, t, cond) - target)

        s = self.next_time(t)
        v = policy.at("policy").velocity(xt, t, cond.guided(self.guidance))
        x = xt + over_latent(s - t, xt) * v
        corrections = []
        for point in range(self.points):
            u = examples.uniform("point", draw.index * self.points + point).to(t.device)
            s_next = (s + u * (1 - s)).clamp(min=1e-3)
            xs, target = self.correction(x, s, s_next, x0, draw.noise)
            corrections.append(mean_square(policy.velocity(xs, s_next, cond) - target))
        correction = torch.stack(corrections).sum(0)
        total = (error + self.weight * correction) / (1 + self.weight * self.points)
        return Loss(total.mean(), {"error": error, "error/corrected": correction / self.points})

    def next_time(self, t: PerImage) -> PerImage:
        """One of `sampling_steps` equal steps later, on the shifted schedule."""
        shift = self.times.shift
        unshifted = (t / (shift - (shift - 1) * t) - 1 / self.sampling_steps).clamp(min=0)
        return shift * unshifted / (1 + (shift - 1) * unshifted)

    @staticmethod
    def correction(
        x: Latent, s: PerImage, s_next: PerImage, x0: Latent, noise: Latent
    ) -> tuple[Latent, Latent]:
        """X at s taken back to s_next, and the velocity from there straight to x0."""
        alpha = over_latent((s_next - s) / (1 - s), x)
        xs = (1 - alpha) * x + alpha * noise
        return xs, (xs - x0) / over_latent(s_next, x)
