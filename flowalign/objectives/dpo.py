"""Flow-DPO: direct preference optimisation on the flow-matching loss (arXiv 2311.12908; for flows 2501.13918).

With D(x0) = ‖v - (noise - x0)‖² - ‖v_ref - (noise - x0)‖² and the logit s = -β/2 (D(chosen) - D(rejected)),
    loss = -log σ(s)
Chosen and rejected share time and noise. Errors are means over latent elements, and published β are for that. Velocities are
those without guidance, however images are sampled.

Difference from the released online form: the reference stays the model without adapter (there: it is renewed now and then).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from flowalign.batch import Batch, Pairs
from flowalign.flow import add_noise, mean_square, PerImage
from flowalign.objectives.base import Loss, Objective
from flowalign.objectives.draws import Draw, ForwardTimes
from flowalign.policy import Policy
from flowalign.settings.types import NonNegative, Positive


def sigmoid(s: Tensor) -> Tensor:
    return -F.logsigmoid(s)


def ipo(s: Tensor) -> Tensor:
    """Of arXiv 2310.12036, times β²: the margin's optimum is finite, s = ½."""
    return (s - 0.5) ** 2


def hinge(s: Tensor) -> Tensor:
    """Of SLiC, arXiv 2305.10425."""
    return (1 - s).relu()


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": sigmoid, "ipo": ipo, "hinge": hinge}
BETAS: dict[str, Callable[[PerImage], Tensor]] = {
    "constant": torch.ones_like,
    "of_noise_error": lambda t: (
        (1 - t) ** 2
    ),  # ‖noise_hat - noise‖² = (1 - t)² ‖v - u‖²: Diffusion-DPO to the letter
}


@dataclass
class DPO(Objective):
    """From pairs of `data.pairs`, or online from the ranked images of `data.prompts`."""

    learns_from: ClassVar[type[Batch]] = Pairs
    times: ForwardTimes = field(
        default_factory=lambda: ForwardTimes(count=1, distribution="logit_normal", shared=False)
    )
    beta: Positive = 500.0
    beta_over_time: Literal["constant", "of_noise_error"] = "constant"
    form: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability that a pair is the wrong way round."""
    imitate: NonNegative = 0.0
    """Weight of the chosen image's own flow-matching loss, against both errors rising together (RPO)."""

    def draws(self, batch: Pairs) -> list[Draw]:
        return list(self.times(batch))

    def loss(self, policy: Policy, pairs: Pairs, draw: Draw) -> Loss:
        xt, target = add_noise(
            torch.cat(pairs.x0), draw.t.repeat(2), torch.cat([draw.noise, draw.noise])
        )
        t, cond = draw.t.repeat(2), pairs.cond.unguided().twice()
        error = mean_square(policy.velocity(xt, t, cond) - target)
        error_ref = mean_square(policy.at("reference").velocity(xt, t, cond) - target)

        D_w, D_l = (error - error_ref).chunk(2)
        s = -self.beta * BETAS[self.beta_over_time](draw.t) / 2 * (D_w - D_l)
        form = LOSSES[self.form]
        loss = (1 - self.label_smoothing) * form(s) + self.label_smoothing * form(-s)
        error_w, error_l = error.chunk(2)
        total = (pairs.weight * (loss + self.imitate * error_w)).mean()
        stats = {
            "chosen_preferred": (s > 0).float() + 0.5 * (s == 0),
            "margin": s,
            "moved/chosen": D_w,
            "moved/rejected": D_l,
        }
        return Loss(total, stats | {"error/chosen": error_w, "error/rejected": error_l})
