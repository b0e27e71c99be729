"""Flow-DPO: direct preference optimisation on the flow-matching loss.

arXiv 2311.12908; for flows 2501.13918. With D(x0) = ‖v - (noise - x0)‖² - ‖v_ref - (noise - x0)‖²
and the logit s = -β/2 (D(chosen) - D(rejected)),
    loss = -log σ(s)
A pair of votes has the shares p of voters who prefer the chosen image, q the rejected one, and r
neither. Its loss is, with Rao and Kupper's threshold m of ties (1967),
    loss = -(p + r) log σ(s - m) - (q + r) log σ(-s - m)
Chosen and rejected share time and noise. Errors are means over latent elements, and so are those
that published β belong to. Velocities are those without guidance, however images are sampled.

The reference is the model without adapter. With `reference: {every: 40}` it is a copy of the policy
that is renewed every 40 updates, as in Flow-GRPO's released online form.

Difference from that form: the policy makes the images (there: the reference).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from flowalign.batch import Pairs
from flowalign.flow import PerImage
from flowalign.objectives.base import Loss, Mean
from flowalign.objectives.draws import Draw
from flowalign.objectives.terms import PairObjective, preferred
from flowalign.policy import Policy
from flowalign.settings.types import NonNegative, Positive


def sigmoid(s: Tensor) -> Tensor:
    """Return DPO's loss, -log σ(s)."""
    return -F.logsigmoid(s)


def ipo(s: Tensor) -> Tensor:
    """Return β² times the loss of IPO (arXiv 2310.12036). Its optimum is finite, s = ½."""
    return (s - 0.5) ** 2


def hinge(s: Tensor) -> Tensor:
    """Return the loss of SLiC (arXiv 2305.10425)."""
    return (1 - s).relu()


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": sigmoid, "ipo": ipo, "hinge": hinge}


def of_noise_error(t: PerImage) -> Tensor:
    """Return the factor of errors of the noise: ‖noise_hat - noise‖² = (1 - t)² ‖v - u‖².

    With it the loss is that of Diffusion-DPO to the letter.
    """
    return (1 - t) ** 2


BETAS: dict[str, Callable[[PerImage], Tensor]] = {
    "constant": torch.ones_like,
    "of_noise_error": of_noise_error,
}


@dataclass
class DPO(PairObjective):
    """Flow-DPO, on pairs of `data.pairs`, or online on the ranked images of `data.prompts`."""

    beta: Positive = 500.0
    """The steepness β of the preference."""
    beta_over_time: Literal["constant", "of_noise_error"] = "constant"
    """How β depends on the time."""
    form: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """The loss of a logit."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """The probability that a pair's order is wrong."""
    tie_margin: NonNegative = 0.0
    """The threshold m above which a voter sees a difference; 0 leaves ties out.

    A share τ of ties between equal images has m = log((1 + τ) / (1 - τ)).
    """
    imitate: NonNegative = 0.0
    """Weight of the chosen image's flow-matching loss, so that not both errors rise (RPO)."""

    @property
    def learns_from_ties(self) -> bool:
        """True with a threshold of ties."""
        return self.tie_margin > 0

    def loss(self, policy: Policy, pairs: Pairs, draw: Draw) -> Loss:
        """Return the loss at one time for each pair."""
        error, error_ref = self.errors_of([policy, self.reference.of(policy)], pairs, draw)

        D_w, D_l = (error - error_ref).chunk(2)
        s = -self.beta * BETAS[self.beta_over_time](draw.t) / 2 * (D_w - D_l)
        form, e, m = LOSSES[self.form], self.label_smoothing, self.tie_margin
        won, lost = pairs.votes
        won, lost = (1 - e) * won + e * lost, e * won + (1 - e) * lost
        loss = won * form(s - m) + lost * form(-s - m)
        error_w, error_l = error.chunk(2)
        total = (pairs.weight * (loss + self.imitate * error_w)).mean()

        stats = {
            "chosen_preferred": Mean(preferred(s)),
            "margin": Mean(s),
            "moved/chosen": Mean(D_w),
            "moved/rejected": Mean(D_l),
            "error/chosen": Mean(error_w),
            "error/rejected": Mean(error_l),
        }
        return Loss(total, stats)
