"""PRDP: predict reward differences from the log-ratios of whole paths (arXiv 2402.08714), on the flow SDE.

With ρ = Σ_k log π_θ(x_{k+1} | x_k, c) / π_ref(x_{k+1} | x_k, c) along a path,
    loss = max over {ρ, ρ clipped} of (τ (ρ(chosen) - ρ(rejected)) - (reward(chosen) - reward(rejected)))²
where clipping keeps each step's log-ratio to the weights that sampled within ±ε. Its optimum is the KL-regularised one.

Differences from the paper: ε and τ are not published and log-probabilities are means over latent elements. The sum over
steps is found first without gradient; each step then puts its own term back, so that memory does not grow with steps.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from flowalign.batch import Batch, Pairs
from flowalign.flow import PerImage
from flowalign.objectives.base import Loss, PathObjective
from flowalign.policy import Policy
from flowalign.settings import Positive


@dataclass
class PRDP(PathObjective):
    """Needs a stochastic sampler. Pairs are the ranked images of a prompt."""

    learns_from: ClassVar[type[Batch]] = Pairs
    temperature: Positive = 1.0
    """τ."""
    clip_range: Positive = 1e-2
    """ε."""

    @property
    def clips_at(self) -> float:
        return self.clip_range

    def prepare(self, policy: Policy, pairs: Pairs) -> Pairs:
        """Sums over the steps: ρ(chosen) - ρ(rejected), and the same of clipped terms."""
        view = policy.at("policy")
        terms = [torch.stack(self.terms(view, pairs, k)[:2], 1) for k in self.draws(pairs)]
        return replace(pairs, prepared=torch.stack(terms).sum(0))

    def loss(self, policy: Policy, pairs: Pairs, k: int) -> Loss:
        *terms, moved = self.terms(policy, pairs, k)
        steps = len(self.draws(pairs))  # of whose gradients the mean is taken, and meant is their sum
        errors = [
            self.temperature * (whole + steps * (term - term.detach())) - pairs.gap
            for whole, term in zip(pairs.prepared.T, terms, strict=True)
        ]
        plain, clipped = (error**2 for error in errors)
        loss = (pairs.weight * torch.maximum(plain, clipped)).mean()
        stats = {"difference_error": errors[0].abs(), "ratio/clipped": (plain < clipped).float()}
        return Loss(loss, stats | {"ratio/max_log_error": moved.abs()})

    def terms(self, policy: Policy, pairs: Pairs, k: int) -> tuple[PerImage, PerImage, PerImage]:
        """Step k's part of the difference, as it is and clipped, and every log-ratio to the weights that sampled."""
        paths, cond = torch.cat([pairs.chosen, pairs.rejected]), pairs.cond.twice()
        x, x_next = paths[:, k], paths[:, k + 1]
        old_log_prob = torch.cat([pairs.chosen_log_prob[:, k], pairs.rejected_log_prob[:, k]])
        ref_log_prob = policy.at("reference").step(x, k, cond).log_prob(x_next)

        moved = policy.step(x, k, cond).log_prob(x_next) - old_log_prob
        before = old_log_prob - ref_log_prob
        clipped = moved.clamp(-self.clip_range, self.clip_range)
        return _difference(moved + before), _difference(clipped + before), moved


def _difference(log_ratio: Tensor) -> Tensor:
    chosen, rejected = log_ratio.chunk(2)
    return chosen - rejected
