"""SOAR: learn to correct one's own sampling errors, without a reward (arXiv 2604.12617).

From x_t on the line between x0 and noise, one guided ODE step of the model, without gradient, leads
to x' at s < t. Taken back towards the same noise to s' in [s, 1], the velocity straight to x0 is
known:
    x_{s'} = (1 - α) x' + α noise,   α = (s' - s) / (1 - s)
    loss = ‖v(x_t) - (noise - x0)‖² + λ ‖v(x_{s'}) - (x_{s'} - x0) / s'‖²
The velocities of the loss are those without guidance.

Differences from the paper: the step away from the line is one of the ODE (there: some are
stochastic). s' is any time (there: a time of the schedule). No prompts are dropped.
"""

from dataclasses import dataclass

import torch

from flowalign.batch import Examples
from flowalign.flow import add_noise, Latent, mean_square, over_latent, PerImage
from flowalign.objectives.base import Loss, Mean
from flowalign.objectives.draws import Draw
from flowalign.objectives.terms import ExampleObjective
from flowalign.policy import Policy
from flowalign.settings.types import Count, Guidance, NonNegative


@dataclass
class SOAR(ExampleObjective):
    """SOAR, on the pictures of `data.pairs`; of pairs, on the chosen."""

    guidance: Guidance = 4.5
    """Guidance of the step away from the line."""
    sampling_steps: Count = 40
    """Number of steps of the schedule whose length that step has."""
    points: Count = 6
    """How many s' are drawn."""
    weight: NonNegative = 1.0
    """The weight λ of each s'; the loss is a mean over the plain term and all s'."""

    def loss(self, policy: Policy, examples: Examples, draw: Draw) -> Loss:
        """Return the loss at one time for each picture."""
        x0, t, cond = examples.x0, draw.t, examples.cond.unguided()
        xt, target = add_noise(x0, t, draw.noise)
        error = mean_square(policy.velocity(xt, t, cond) - target)

        s = self.next_time(t)
        # Without gradient: the step only leads to a state that sampling would come to.
        v = policy.at("policy").velocity(xt, t, cond.guided(self.guidance))
        x = xt + over_latent(s - t, xt) * v
        corrections = []
        for point in range(self.points):
            u = examples.uniform("point", draw.index * self.points + point).to(t.device)
            # At s' = 0 the velocity (x_{s'} - x0) / s' is not defined.
            s_next = (s + u * (1 - s)).clamp(min=1e-3)
            xs, target = self.correction(x, s, s_next, x0, draw.noise)
            corrections.append(mean_square(policy.velocity(xs, s_next, cond) - target))
        correction = torch.stack(corrections).sum(0)
        total = (error + self.weight * correction) / (1 + self.weight * self.points)

        stats = {"error": Mean(error), "error/corrected": Mean(correction / self.points)}
        return Loss(total.mean(), stats)

    def next_time(self, t: PerImage) -> PerImage:
        """Return the time one of `sampling_steps` equal steps later, on the shifted schedule."""
        shift = self.times.shift
        unshifted = (t / (shift - (shift - 1) * t) - 1 / self.sampling_steps).clamp(min=0)
        return shift * unshifted / (1 + (shift - 1) * unshifted)

    @staticmethod
    def correction(
        x: Latent, s: PerImage, s_next: PerImage, x0: Latent, noise: Latent
    ) -> tuple[Latent, Latent]:
        """Return x at s taken back to s_next, and the velocity from there straight to x0."""
        alpha = over_latent((s_next - s) / (1 - s), x)
        xs = (1 - alpha) * x + alpha * noise
        return xs, (xs - x0) / over_latent(s_next, x)
