"""A policy for Gaussian data of known velocity, so that gradients and optima have closed forms.

For data N(m, s²) in every latent element, with V = (1 - t)² s² + t²,
    v(x, t) = (t - (1 - t) s²) / V · (x - (1 - t) m) - m
and v_δ = v - δ t / V is the velocity of N(m + δ, s²). At the xt of an x0 and a noise it errs by
    v_δ - (noise - x0) = t / V · (x0 - m - δ) - (1 - t) s² / V · noise
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowalign.batch import Batch, Cond, Keys, Rollout
from flowalign.flow import Latent, over_latent, PerImage
from flowalign.objectives.base import Objective
from flowalign.objectives.draws import Draw
from flowalign.training.gradient import compute_gradient, Meter

MEAN, VARIANCE = 1.5, 0.25


@dataclass
class GaussianPolicy:
    """N(m + δ, s²) with the prompt's `mean` m; guidance w replaces m by m_null + w (m - m_null)."""

    delta: Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))
    """δ: one for all latent elements, or one for each. It trains."""
    snapshots: dict[str, Any] = field(default_factory=dict)
    """Their δ, by name."""
    variance: float = VARIANCE
    images_per_pass: int | None = None
    model: ClassVar = SimpleNamespace(device=torch.device("cpu"))

    def parameters(self) -> list[Tensor]:
        return [self.delta]

    def loss_scale(self, passes: int) -> float:
        return 2.0**passes

    def velocity(self, x: Latent, t: PerImage, cond: Cond) -> Latent:
        t, m, m_null = (
            over_latent(rows, x) for rows in (t, cond.inputs["mean"], cond.null["mean"])
        )
        m = m_null + cond.guidance * (m - m_null)
        V = (1 - t) ** 2 * self.variance + t**2
        v = (t - (1 - t) * self.variance) / V * (x - (1 - t) * m) - m
        return v - self.delta * t / V

    def at(self, name: str) -> "GaussianPolicy":
        """The reference has δ = 0."""
        delta = {"policy": self.delta, "reference": 0.0, **self.snapshots}[name]
        return replace(self, delta=torch.as_tensor(delta).detach())


def policy_at(delta: Any, **snapshots: Any) -> GaussianPolicy:
    """A policy that has come to δ, and its snapshots."""
    return GaussianPolicy(torch.as_tensor(delta).detach().clone().requires_grad_(), snapshots)


def labels(
    group: Sequence[int] | Tensor, mean: Any = MEAN, null_mean: float = 0.0
) -> dict[str, Any]:
    """The fields of any batch: which prompt each row belongs to, and the mean of its data."""
    group = torch.as_tensor(group)
    image = torch.stack([(group[:row] == number).sum() for row, number in enumerate(group)])
    means, null = torch.as_tensor(mean).expand(len(group)), torch.full((len(group),), null_mean)
    return {
        "prompts": [f"prompt {number}" for number in group],
        "metadata": [{}] * len(group),
        "keys": Keys(torch.zeros_like(group), torch.zeros_like(group), group, image),
        "cond": Cond({"mean": means}, {"mean": null}),
        "weight": torch.ones(len(group)),
    }


def rollout_of(
    x0: Latent,
    advantage: PerImage,
    group: Sequence[int] | Tensor | None = None,
    reward: PerImage | None = None,
    **means: Any,
) -> Rollout:
    """Images of one prompt unless `group` is given; rewards are the advantages unless given."""
    group = [0] * len(x0) if group is None else group
    log_prob, images = torch.zeros(len(x0), 0), torch.zeros(len(x0), 3, 1, 1, dtype=torch.uint8)
    reward = advantage if reward is None else reward
    return Rollout(
        **labels(group, **means),
        x0=x0,
        path=x0[:, None][:, :0],
        log_prob=log_prob,
        images=images,
        reward=reward,
        advantage=advantage,
        steps=range(0),
    )


def gradient(
    objective: Objective, policy: GaussianPolicy, batch: Batch, draws: Sequence[Draw] | None = None
) -> Tensor:
    """The gradient by δ in passes of the policy's size, at these draws or the objective's own."""
    if draws is not None:
        objective = copy.copy(objective)
        objective.draws = lambda _: draws
    policy.delta.grad = None
    compute_gradient(
        policy,
        objective,
        batch,
        policy.images_per_pass or len(batch) * batch.images_per_row,
        Meter(),
    )
    return policy.delta.grad


def midpoints(count: int) -> Tensor:
    """Of equal parts of [0, 1]."""
    return (torch.arange(count) + 0.5) / count


def g(t: Tensor, variance: float = VARIANCE) -> Tensor:
    """t / V: by how much a shift of the mean by 1 changes the velocity."""
    return t / ((1 - t) ** 2 * variance + t**2)


def expectation(slope: float, delta: Any = 0.0, times: int = 200) -> tuple[Rollout, list[Draw]]:
    """Images of N(MEAN + δ, VARIANCE) whose mean loss is the expected loss.

    Advantages are slope · (x0 - mean). There is a prompt for every time and a noise of ±1, and in
    each of them an image one deviation to either side: these have a Gaussian's moments up to the
    third, and the expectations needed are of polynomials of degree 3 or less.
    """
    sign = torch.tensor([-1.0, 1.0])
    t, noise, side = torch.cartesian_prod(midpoints(times), sign, sign).unbind(1)
    away = VARIANCE**0.5 * side[:, None]
    rollout = rollout_of(MEAN + delta + away, slope * away[:, 0], torch.arange(len(t)) // 2)
    return rollout, [Draw(0, t, noise[:, None])]


def root(
    objective: Objective, policy: GaussianPolicy, batch: Batch, draws: Sequence[Draw] | None = None
) -> float:
    """The δ without gradient, where the loss is a parabola in δ."""
    at_0, at_1 = (
        gradient(
            objective, replace(policy, delta=torch.tensor(x, requires_grad=True)), batch, draws
        )
        for x in (0.0, 1.0)
    )
    return (at_0 / (at_0 - at_1)).item()
