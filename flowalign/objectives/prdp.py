"""PRDP: predict reward differences from the log-ratios of whole paths (arXiv 2402.08714), on the flow SDE.

With ρ = Σ_k log π_θ(x_{k+1} | x_k, c) / π_ref(x_{k+1} | x_k, c) along a path,
    loss = max over {ρ, ρ clipped} of (τ (ρ(chosen) - ρ(rejected)) - (reward(chosen) - reward(rejected)))² / τ
where clipping keeps each step's log-ratio to the weights that sampled within ±ε. Its optimum is the KL-regularised one.

Differences from the paper: pairs are the best against the worst of a prompt's images (there: all pairs); the loss is τ times the
paper's, so that its gradient keeps its size where τ is small; log-probabilities are means over latent elements. The paper's
listing takes the mean over the K steps as well, so its β of 3e-6 to 3e-5 is τ = β / K here. The sum over steps is found first
without gradient; each step then puts its own term back, so that memory does not grow with steps.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from flowalign.batch import Batch, Pairs
from flowalign.flow import PerImage
from flowalign.objectives.base import Loss, PathObjective
from flowalign.policy import Policy
from flowalign.settings.types import Positive


@dataclass
class PRDP(PathObjective):
    """Needs a stochastic sampler. Pairs are the ranked images of a prompt."""

    learns_from: ClassVar[type[Batch]] = Pairs
    temperature: Positive = 1.0
    """τ."""
    clip_range: Positive = 1e-4
    """ε."""

    @property
    def log_ratio_clip(self) -> float:
        return self.clip_range

    def prepare(self, policy: Policy, pairs: Pairs) -> Pairs:
        """Sums over the steps: ρ(chosen) - ρ(rejected), and the same of clipped terms; then every step's log π_ref of both."""
        reference = policy.at("reference")
        ref_log_probs = [self.log_prob(reference, pairs, k) for k in self.draws(pairs)]
        terms = [
            torch.stack(self.terms(policy, pairs, k, ref)[:2], 1)
            for k, ref in zip(self.draws(pairs), ref_log_probs, strict=True)
        ]
        kept = [ref.view(2, len(pairs)).T for ref in ref_log_probs]
        return replace(pairs, prepared=torch.cat([torch.stack(terms).sum(0), *kept], 1))

    def loss(self, policy: Policy, pairs: Pairs, k: int) -> Loss:
        steps = self.draws(pairs)
        wholes, kept = pairs.prepared[:, :2].T, pairs.prepared[:, 2:].unflatten(1, (len(steps), 2))
        *terms, moved = self.terms(policy, pairs, k, kept[:, steps.index(k)].T.flatten())
        errors = [  # in double precision, since τ may be small beside the gap; the loop takes the mean over steps
            self.temperature * (whole.double() + len(steps) * (term - term.detach())) - pairs.gap
            for whole, term in zip(wholes, terms, strict=True)
        ]
        plain, clipped = (error**2 / self.temperature for error in errors)
        loss = (pairs.weight * torch.maximum(plain, clipped)).mean().float()
        stats = {"difference_error": errors[0].abs(), "ratio/clipped": (plain < clipped).float()}
        return Loss(loss, stats | {"ratio/max_log_error": moved.abs()})

    def log_prob(self, policy: Policy, pairs: Pairs, k: int) -> PerImage:
        """Log π(x_{k+1} | x_k, c) of the chosen, then of the rejected (2 B)."""
        paths = torch.cat([pairs.chosen, pairs.rejected])
        return policy.step(paths[:, k], k, pairs.cond.twice()).log_prob(paths[:, k + 1])

    def terms(
        self, policy: Policy, pairs: Pairs, k: int, ref_log_prob: PerImage
    ) -> tuple[PerImage, PerImage, PerImage]:
        """Step k's part of the difference, as it is and clipped, and every log-ratio to the weights that sampled."""
        old_log_prob = torch.cat([pairs.chosen_log_prob[:, k], pairs.rejected_log_prob[:, k]])
        moved = self.log_prob(policy, pairs, k) - old_log_prob
        before = old_log_prob - ref_log_prob
        clipped = moved.clamp(-self.clip_range, self.clip_range)
        return _difference(moved + before), _difference(clipped + before), moved


def _difference(log_ratio: Tensor) -> Tensor:
    chosen, rejected = log_ratio.chunk(2)
    return chosen - rejected
