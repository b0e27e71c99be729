"""Flow-GRPO on policies of known Gaussian steps: gradients and optima have closed forms."""

import copy
import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from flowalign.batch import Cond, Keys, Rollout
from flowalign.dynamics import flow_sde, Gaussian, ode
from flowalign.errors import UserError
from flowalign.objectives.draws import PathSteps
from flowalign.objectives.flow_grpo import FlowGRPO, log_ratio, normalised_log_ratio

STEPS, MEAN, VARIANCE = 10, 1.5, 0.25
TIMES = [3 * t / (1 + 2 * t) for t in (1 - k / STEPS for k in range(STEPS))] + [0.0]


@dataclass
class BiasedPolicy:
    """Flow-SDE for data N(MEAN, VARIANCE), plus a trainable bias in the mean of every step."""

    bias: Tensor = field(default_factory=lambda: torch.zeros(STEPS, requires_grad=True))
    times: list[float] = field(default_factory=lambda: TIMES)

    def step(self, x: Tensor, k: int, cond: Cond) -> Gaussian:
        t, s = self.times[k], self.times[k + 1]
        v = (t - (1 - t) * VARIANCE) / ((1 - t) ** 2 * VARIANCE + t**2) * (
            x - (1 - t) * MEAN
        ) - MEAN
        step = (flow_sde if s else ode)(x, v, t, s)
        return Gaussian(step.mean + self.bias[k], step.std)

    def at(self, name: str) -> "BiasedPolicy":
        assert name == "reference"
        view = copy.copy(self)
        view.bias = torch.zeros(STEPS)
        return view


class PolicyWithoutReference(BiasedPolicy):
    def at(self, name: str) -> "BiasedPolicy":
        raise LookupError(name)


def rollout_of(path: Tensor, log_prob: Tensor, advantage: Tensor) -> Rollout:
    count = len(path)
    empty = {"prompt": torch.zeros(count, 1)}
    return Rollout(
        prompts=[""] * count,
        metadata=[{}] * count,
        keys=Keys.training(0, 0, [(0, 0)] * count),
        cond=Cond(empty, empty),
        weight=torch.ones(count),
        x0=path[:, -1],
        path=path,
        log_prob=log_prob,
        images=torch.zeros(count, 3, 1, 1, dtype=torch.uint8),
        reward=advantage,
        advantage=advantage,
        steps=range(STEPS - 1),
    )


@torch.no_grad()
def sampled(policy: BiasedPolicy, count: int, seed: int = 0) -> Rollout:
    """Paths of one latent element under the policy; the advantage is x0 less its mean."""
    generator = torch.Generator().manual_seed(seed)
    path, log_prob = [torch.randn(count, 1, generator=generator)], []
    nothing = Cond({}, {})
    for k in range(STEPS):
        step = policy.step(path[-1], k, nothing)
        path.append(step.sample(torch.randn(count, 1, generator=generator)))
        log_prob.append(step.log_prob(path[-1]) if step.std else torch.zeros(count))
    x0 = path[-1].flatten()
    return rollout_of(torch.stack(path, 1), torch.stack(log_prob, 1), x0 - x0.mean())


def gradient(objective: FlowGRPO, policy: BiasedPolicy, rollout: Rollout, k: int) -> Tensor:
    (found,) = torch.autograd.grad(objective.loss(policy, rollout, k).total, policy.bias)
    return found


def test_the_ratio_is_one_before_the_first_update():
    policy = BiasedPolicy()
    rollout = sampled(policy, 100)
    for k in rollout.steps:
        stats = FlowGRPO().loss(policy, rollout, k).stats
        assert (stats["ratio/mean"].values == 1).all()
        assert (stats["ratio/max_log_error"].values == 0).all()
        assert (stats["ratio/clipped"].values == 0).all()


def test_the_normalised_ratio_of_an_image_does_not_depend_on_its_company():
    """GRPO-Guard's released script adds the mean ‖Δμ‖² of a pass, which shifts the log-ratio."""
    count, k, std = 4, 3, BiasedPolicy().step(torch.zeros(1, 1), 3, Cond({}, {})).std
    rollout = sampled(BiasedPolicy(), count)
    noise = rollout.step_noise(k)
    mean = BiasedPolicy().step(rollout.path[:, k], k, rollout.cond).mean
    path = rollout.path.clone()
    path[:, k + 1] = mean + std * noise
    log_prob = rollout.log_prob.clone()
    log_prob[:, k] = Gaussian(mean, std).log_prob(path[:, k + 1])
    rollout = replace(rollout, path=path, log_prob=log_prob)
    delta = torch.tensor([[0.1], [-0.2], [0.3], [0.5]])
    moved = Gaussian(mean + delta, std)

    plain, squares = log_ratio(moved, rollout, k), delta.square().flatten()
    ours = normalised_log_ratio(moved, rollout, k)
    torch.testing.assert_close(ours, std * (plain + squares / (2 * std**2)))
    torch.testing.assert_close(ours, (noise * delta).flatten())
    alone = normalised_log_ratio(Gaussian(moved.mean[:2], std), rollout[:2], k)
    torch.testing.assert_close(alone, ours[:2])
    released = std * (plain + squares.mean() / (2 * std**2))
    torch.testing.assert_close(released - ours, (squares.mean() - squares) / (2 * std))


@pytest.mark.parametrize("k", [0, 4, 8])
def test_the_gradient_at_ratio_one_is_that_of_reinforce(k):
    policy = BiasedPolicy()
    rollout = sampled(policy, 100)
    log_prob = policy.step(rollout.path[:, k], k, rollout.cond).log_prob(rollout.path[:, k + 1])
    (reinforce,) = torch.autograd.grad(-(rollout.advantage * log_prob).mean(), policy.bias)
    assert reinforce[k] != 0
    torch.testing.assert_close(gradient(FlowGRPO(), policy, rollout, k), reinforce)


@pytest.mark.parametrize(
    ("advantage", "ratio", "has_gradient"),
    [
        (1.0, 1.3, False),
        (1.0, 1.1, True),
        (1.0, 0.7, True),
        (-1.0, 0.7, False),
        (-1.0, 0.9, True),
        (-1.0, 1.3, True),
        (0.0, 1.3, False),
    ],
)
def test_the_clip_stops_only_what_went_too_far_in_the_right_direction(
    advantage, ratio, has_gradient
):
    policy, k = BiasedPolicy(), 4
    rollout = sampled(policy, 1)
    rollout.advantage = torch.tensor([advantage])
    rollout.log_prob[:, k] -= math.log(ratio)
    log_prob = policy.step(rollout.path[:, k], k, rollout.cond).log_prob(rollout.path[:, k + 1])
    (score,) = torch.autograd.grad(log_prob.sum(), policy.bias)
    expected = -advantage * ratio * score if has_gradient else torch.zeros(STEPS)
    torch.testing.assert_close(gradient(FlowGRPO(clip_range=0.2), policy, rollout, k), expected)


def test_the_loss_takes_the_worse_of_the_ratio_and_its_clipped_value():
    policy, k = BiasedPolicy(), 4
    rollout = sampled(policy, 4)
    rollout.advantage = torch.tensor([1.0, 1.0, -1.0, -1.0])
    rollout.log_prob[:, k] -= torch.tensor([1.5, 0.5, 1.5, 0.5]).log()
    loss = FlowGRPO(clip_range=0.2).loss(policy, rollout, k)
    assert loss.total.item() == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8) / 4, rel=1e-5)
    assert loss.stats["ratio/clipped"].values.tolist() == [1, 1, 1, 1]


def test_a_weight_of_zero_never_asks_the_reference():
    policy = PolicyWithoutReference()
    rollout = sampled(policy, 10)
    assert "kl" not in FlowGRPO(kl_weight=0.0).loss(policy, rollout, 3).stats
    with pytest.raises(LookupError, match="reference"):
        FlowGRPO(kl_weight=0.1).loss(policy, rollout, 3)


@pytest.mark.parametrize(("kl", "scale"), [("exact", 1.0), ("per_time", TIMES[3] - TIMES[4])])
def test_the_kl_pulls_towards_the_reference(kl, scale):
    policy, k, weight = BiasedPolicy(), 3, 0.1
    with torch.no_grad():
        policy.bias += 0.2
    rollout = sampled(policy, 10)
    rollout.advantage = torch.zeros(10)
    std = policy.step(rollout.path[:, k], k, rollout.cond).std
    objective = FlowGRPO(kl_weight=weight, kl=kl)
    torch.testing.assert_close(
        objective.loss(policy, rollout, k).stats["kl"].values,
        torch.full((10,), scale * 0.2**2 / (2 * std**2)),
    )
    expected = torch.zeros(STEPS).index_fill(0, torch.tensor(k), weight * scale * 0.2 / std**2)
    torch.testing.assert_close(gradient(objective, policy, rollout, k), expected)


def test_training_ends_at_the_optimum_of_reward_and_path_kl():
    """Reward λ x0 and weight β: b_k = (λ/β) c_k² g_k, g_k = ∂x0/∂x_{k+1}, c_k step k's std."""
    slope, weight = 0.6, 0.5
    slopes, stds = affine_steps(BiasedPolicy())
    g = torch.tensor([math.prod(slopes[k + 1 :]) for k in range(STEPS)])
    variance = torch.tensor(stds) ** 2
    optimum = slope / weight * variance * g

    policy, objective, late = BiasedPolicy(), FlowGRPO(clip_range=0.2, kl_weight=weight), []
    for update in range(60):
        rollout = sampled(policy, 10_000, seed=update)
        rollout.advantage = slope * rollout.advantage
        total = sum(gradient(objective, policy, rollout, k) for k in rollout.steps)
        with torch.no_grad():
            policy.bias -= (
                0.3 / weight * variance * total
            )  # a step measured by the Fisher information, 1 / c²
        late += [policy.bias.detach().clone()] * (update >= 20)
    found = torch.stack(late).mean(0)

    torch.testing.assert_close(found, optimum, rtol=0.05, atol=1e-3)
    assert (g @ found).item() == pytest.approx(0.2049, rel=0.02)


def affine_steps(policy: BiasedPolicy) -> tuple[list[float], list[float]]:
    """Every step is x' = slope x + bias + std z."""
    probe, nothing = torch.tensor([[0.0], [1.0]]), Cond({}, {})
    steps = [policy.step(probe, k, nothing) for k in range(STEPS)]
    return [(step.mean[1] - step.mean[0]).item() for step in steps], [step.std for step in steps]


def test_the_draws_are_the_stochastic_steps_the_noisiest_first():
    rollout = sampled(BiasedPolicy(), 1)
    assert PathSteps()(rollout) == range(9)
    assert PathSteps(fraction=1 / 3)(rollout) == range(3)
    assert PathSteps(fraction=0.01)(rollout) == range(1)


@pytest.mark.parametrize(
    "settings", [{"clip_range": 0.0}, {"clip_range": -1e-4}, {"kl_weight": -0.1}]
)
def test_a_range_or_weight_that_means_nothing_is_refused(settings):
    with pytest.raises(UserError, match="it must be greater than"):
        FlowGRPO(**settings)
