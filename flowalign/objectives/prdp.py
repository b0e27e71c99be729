"""PRDP: predict reward differences from the log-ratios of whole paths (arXiv 2402.08714).

With ρ = Σ_k log π_θ(x_{k+1} | x_k, c) / π_ref(x_{k+1} | x_k, c) along a path of the stochastic
sampler,
    loss = max over {ρ, ρ clipped} of (τ Δρ - Δreward)² / τ,   Δ = chosen - rejected
where clipping keeps each step's log-ratio to the weights that sampled within ±ε. Its optimum is the
KL-regularised one.

Differences from the paper: pairs are the best against the worst of a prompt's images (there: all
pairs). The loss is τ times the paper's, so that its gradient keeps its size at small τ.
Log-probabilities are means over latent elements. The paper's listing takes the mean over the K
steps as well, so its β of 3e-6 to 3e-5 is τ = β / K here.

The sum over steps is computed first, without gradient. Each step then puts its own term back, so
that memory does not grow with the number of steps.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flowalign.batch import Batch, Pairs
from flowalign.flow import PerImage
from flowalign.objectives.base import Loss, Max, Mean, PathObjective, SumOverDraws, Term
from flowalign.policy import Policy
from flowalign.settings.types import Positive


@dataclass
class PRDP(PathObjective[Pairs]):
    """PRDP on the ranked images of a prompt. It needs a stochastic sampler."""

    learns_from: ClassVar[type[Batch]] = Pairs
    temperature: Positive = 1.0
    """The temperature τ."""
    clip_range: Positive = 1e-4
    """The range ±ε of log-ratios."""
    terms_span_update: ClassVar[bool] = True

    @property
    def log_ratio_clip(self) -> float:
        """The clip range."""
        return self.clip_range

    def group_terms(self, policy: Policy, pairs: Pairs, k: int) -> dict[str, Term]:
        """Return the sums over steps, plain and clipped, and log π_ref of step k."""
        # Kept for `loss`, so that the reference runs only once for each step.
        log_prob_ref = self.log_prob(policy.at("reference"), pairs, k)
        plain, clipped, _ = self.differences(policy, pairs, k, log_prob_ref)
        return {
            "wholes": SumOverDraws(torch.stack([plain, clipped], 1)),
            "log_prob_ref": torch.stack(log_prob_ref.chunk(2), 1),
        }

    def loss(self, policy: Policy, pairs: Pairs, k: int) -> Loss:
        """Return the loss with the gradient of step k's term."""
        log_prob_ref = torch.cat(pairs.terms["log_prob_ref"].unbind(1))
        *differences, moved = self.differences(policy, pairs, k, log_prob_ref)
        wholes, count = pairs.terms["wholes"].unbind(1), len(self.draws(pairs))
        # The gradient is averaged over the steps, hence `count`. In float64, since τ may be small
        # compared with the gap.
        plain, clipped = (
            self.temperature * (whole.double() + count * (term - term.detach())) - pairs.gap
            for whole, term in zip(wholes, differences, strict=True)
        )
        plain_loss, clipped_loss = plain**2 / self.temperature, clipped**2 / self.temperature
        loss = (pairs.weight * torch.maximum(plain_loss, clipped_loss)).mean().float()

        stats = {
            "difference_error": Mean(plain.abs()),
            "ratio/clipped": Mean((plain_loss < clipped_loss).float()),
            "ratio/max_log_error": Max(moved.abs()),
        }
        return Loss(loss, stats)

    def log_prob(self, policy: Policy, pairs: Pairs, k: int) -> PerImage:
        """Return log π(x_{k+1} | x_k, c) of the chosen, then of the rejected (2 B,)."""
        before, after, _old_log_prob = pairs.transition(k)
        return policy.step(before, k, pairs.cond.twice()).log_prob(after)

    def differences(
        self, policy: Policy, pairs: Pairs, k: int, log_prob_ref: PerImage
    ) -> tuple[PerImage, PerImage, PerImage]:
        """Return step k's term of ρ(chosen) - ρ(rejected), plain and clipped.

        The third value is the log-ratio of each image to the weights that sampled (2 B,).
        """
        old_log_prob = pairs.transition(k).log_prob
        moved = self.log_prob(policy, pairs, k) - old_log_prob
        before = old_log_prob - log_prob_ref
        clipped = moved.clamp(-self.clip_range, self.clip_range)
        return _difference(moved + before), _difference(clipped + before), moved


def _difference(log_ratio: Tensor) -> Tensor:
    chosen, rejected = log_ratio.chunk(2)
    return chosen - rejected
