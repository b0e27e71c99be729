"""Policies of known velocities or steps, small batches for them, and a model of one number."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn, Tensor

from flowalign.batch import Batch, Cond, Examples, Keys, Pairs, Rollout
from flowalign.dynamics import Gaussian
from flowalign.flow import over_latent
from flowalign.models.base import FlowModel
from flowalign.models.config import Lora, ModelConfig
from flowalign.policy import Policy, Sampler


@dataclass
class VelocityPolicy:
    """v = field(x, t, theta); the reference and copies have their own theta."""

    field: Callable[[Tensor, Tensor, Tensor], Tensor]
    theta: Tensor
    reference: Tensor
    copies: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def velocity(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.field(x, over_latent(t, x), self.theta)

    def at(self, name: str) -> "VelocityPolicy":
        thetas = {"policy": self.theta, "reference": self.reference, **self.copies}
        return replace(self, theta=thetas[name].detach())


def free(x: Tensor, t: Tensor, theta: Tensor) -> Tensor:
    """A field that says theta everywhere."""
    return theta


def standard_normal(x: Tensor, t: Tensor, theta: Tensor) -> Tensor:
    """The exact velocity of N(0, 1) data, and theta."""
    return (2 * t - 1) / (t**2 + (1 - t) ** 2) * x + theta


def normal(x: Tensor, t: Tensor, mean: Tensor, variance: float = 0.25) -> Tensor:
    """The exact velocity of N(mean, variance) data."""
    return (t - (1 - t) * variance) / ((1 - t) ** 2 * variance + t**2) * (x - (1 - t) * mean) - mean


@dataclass
class ChainPolicy:
    """Steps x' ~ N(x + bias_k, std_k²); the reference has no bias, copies have their own."""

    bias: Tensor
    stds: tuple[float, ...] = (1.0,)
    copies: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def step(self, x: Tensor, k: int, cond: Cond) -> Gaussian:
        return Gaussian(x + self.bias[k], self.stds[k])

    def at(self, name: str) -> "ChainPolicy":
        bias = self.bias.detach()
        biases = {"policy": bias, "reference": torch.zeros_like(bias), **self.copies}
        return replace(self, bias=biases[name])

    @torch.no_grad()
    def log_prob(self, path: Tensor) -> Tensor:
        """(B, K) of the path's steps."""
        nothing = cond_of(len(path))
        steps = [
            self.step(path[:, k], k, nothing).log_prob(path[:, k + 1])
            for k in range(len(self.stds))
        ]
        return torch.stack(steps, 1)


def cond_of(count: int) -> Cond:
    empty = {"prompt": torch.zeros(count, 1)}
    return Cond(empty, empty)


def labels(count: int, images: int = 1) -> dict[str, Any]:
    """The fields of any batch, for groups of so many images."""
    return {
        "prompts": [""] * count,
        "metadata": [{}] * count,
        "keys": Keys.training(0, 0, [divmod(row, images) for row in range(count)]),
        "cond": cond_of(count),
        "weight": torch.ones(count),
    }


def pairs_of(chosen: Tensor, rejected: Tensor, weight: Tensor | None = None) -> Pairs:
    """Pairs of x0 (B, *latent)."""
    paths = chosen[:, None], rejected[:, None]
    return path_pairs(*paths, torch.zeros(len(chosen), 0), weight=weight)


def path_pairs(
    chosen: Tensor,
    rejected: Tensor,
    log_prob: Tensor,
    gap: Tensor | None = None,
    weight: Tensor | None = None,
) -> Pairs:
    """Pairs of paths (B, K + 1, *latent); `log_prob` of chosen, then of rejected (2 B, K)."""
    one = torch.ones(len(chosen))
    gap, weight = one if gap is None else gap, one if weight is None else weight
    unknown = torch.zeros(len(chosen), chosen.shape[1] - 1)
    log_probs = log_prob.chunk(2) if log_prob.numel() else (unknown, unknown)
    return Pairs(
        **{**labels(len(chosen)), "weight": weight},
        chosen=chosen[:, -1],
        rejected=rejected[:, -1],
        chosen_path=chosen,
        rejected_path=rejected,
        chosen_log_prob=log_probs[0],
        rejected_log_prob=log_probs[1],
        gap=gap,
        preference=torch.ones(len(chosen)),
        tie=torch.zeros(len(chosen)),
        voted=torch.ones(len(chosen), 2, dtype=torch.bool),
        steps=range(chosen.shape[1] - 1),
    )


def examples_of(x0: Tensor) -> Examples:
    return Examples(**labels(len(x0)), x0=x0)


def rollout_of(path: Tensor, log_prob: Tensor, reward: Tensor, images: int = 1) -> Rollout:
    """Judged paths (B, K + 1, *latent) in groups of so many images; the advantage is the reward."""
    pictures = torch.zeros(len(path), 3, 1, 1, dtype=torch.uint8)
    return Rollout(
        **labels(len(path), images),
        x0=path[:, -1],
        path=path,
        log_prob=log_prob,
        images=pictures,
        reward=reward,
        advantage=reward,
        steps=range(path.shape[1] - 1),
    )


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def minimiser(loss: Callable[[Tensor], Tensor], start: Tensor, iterations: int = 15) -> Tensor:
    """By Newton's method."""
    x = start.clone().requires_grad_()
    for _ in range(iterations):
        (slope,) = torch.autograd.grad(loss(x), x)
        curvature = torch.autograd.functional.hessian(loss, x.detach())
        x = (
            (x - torch.linalg.solve(curvature.view(x.numel(), -1), slope.flatten()).view_as(x))
            .detach()
            .requires_grad_()
        )
    return x.detach()


class Times(nn.Module):
    """v = factor · x, a linear layer without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.factor.weight)


class NumberModel(FlowModel):
    """Latents and pictures are one number, in float64; times are even."""

    lora_targets = ["factor"]  # noqa: RUF012 (as the base class has it)
    latent_shape = (1, 1, 1)

    def __init__(self) -> None:
        self.config = ModelConfig(path="", lora=Lora(rank=1, alpha=1))
        self.device, self.transformer = torch.device("cpu"), Times()

    def forward(self, x: Tensor, t: Tensor, inputs: Any) -> Tensor:
        return self.transformer.factor(x)

    def schedule(self, steps: int) -> list[float]:
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()

    def decode(self, x0: Tensor) -> Tensor:
        return x0

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        raise NotImplementedError


class DoublePolicy(Policy):
    """Starts from float64 noise."""

    def initial_noise(self, batch: Batch, purpose: str = "rollout") -> Tensor:
        return super().initial_noise(batch, purpose).double()


def number_policy(theta: float, steps: int, model: NumberModel | None = None) -> Policy:
    """v = theta · x. The adapter's matrices are 1 and theta, which has the gradient."""
    policy = DoublePolicy(model or NumberModel(), Sampler(steps=steps))
    policy.model.transformer.double()
    down, up = policy.parameters()
    with torch.no_grad():
        down.fill_(1)
        up.fill_(theta)
    return policy
