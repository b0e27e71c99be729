"""DiffusionOPSD: targets and losses in closed form, and a two-step model that learns."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign import evaluate
from flowalign.advantages import group_advantage
from flowalign.batch import Metadata, Rollout
from flowalign.config.load import load_config
from flowalign.data.prompts import Prompt
from flowalign.dynamics import flow_sde, Window
from flowalign.errors import UserError
from flowalign.objectives.opsd import OPSD
from flowalign.objectives.terms import VelocityKL
from flowalign.policy import Policy, Sampler
from flowalign.rewards.base import Reward
from flowalign.rewards.combine import WeightedSum
from flowalign.rewards.pixel_statistics import brightness
from flowalign.rollouts.batch_plan import BatchPlan
from flowalign.rollouts.ranking_settings import Ranking
from flowalign.rollouts.scoring import RolloutScorer
from flowalign.rollouts.sources import scored_rollouts, SourceContext
from flowalign.rollouts.voted import VotedPictures
from flowalign.training.gradient import compute_gradient, Meter
from flowalign.training.setup import read_inputs
from tests.objectives.gaussian import GaussianPolicy, policy_at, rollout_of
from tests.objectives.toy import random
from tests.tiny import make_policy, ROOT, TEXTS

T = 0.278
V_OVER_T_SQUARED = 2.69
"""A shift Δ of the prediction at T is one of 2.69 Δ of the whole family N(m + δ, ¼)."""


def of_pictures(function: Callable[[Tensor], Tensor]) -> Any:
    """A reward that asks for nothing but the pictures."""

    def reward(
        images: Tensor, prompts: list[str], metadata: list[Metadata]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return function(images), {}

    return reward


def linear(slope: Tensor) -> Callable[[Tensor], Tensor]:
    """The gradient of a linear reward."""
    return lambda y: slope.expand_as(y)


# targets


@pytest.mark.parametrize("ascent_steps", [1, 2, 5])
def test_targets_of_a_linear_reward_are_a_radius_away_on_both_sides(ascent_steps):
    y, slope = random(4, 2, 3, 3), random(2, 3, 3, seed=1)
    up, down = OPSD(ascent_steps=ascent_steps).targets(y, linear(slope))
    lengths = y.flatten(1).norm(dim=1)
    for target, sign in ((up, 1), (down, -1)):
        away = (target - y).flatten(1)
        torch.testing.assert_close(away.norm(dim=1) / lengths, torch.full((4,), 0.1))
        cosine = torch.cosine_similarity(away, slope.flatten()[None])
        torch.testing.assert_close(cosine, torch.full((4,), float(sign)))
    torch.testing.assert_close(up + down, 2 * y)


def test_a_target_turns_where_the_gradient_turns():
    """Of -(y - 1.02)² / 2 at y = 1 with the radius 0.1: up to 1.05 and back, down to 0.9."""
    up, down = OPSD().targets(torch.ones(1, 1), lambda y: 1.02 - y)
    torch.testing.assert_close(torch.cat([up, down]), torch.tensor([[1.0], [0.9]]))


def test_no_target_leaves_the_ball_however_the_gradient_turns():
    y, generator = random(50, 6), torch.Generator().manual_seed(2)
    targets = OPSD(ascent_steps=4).targets(y, lambda y: torch.randn(y.shape, generator=generator))
    for target in targets:
        assert ((target - y).norm(dim=1) <= 0.1 * y.norm(dim=1) * (1 + 1e-5)).all()


def test_a_reward_without_slope_leaves_the_targets_where_they_are():
    y = random(3, 5)
    for target in OPSD().targets(y, torch.zeros_like):
        assert target.equal(y)


def test_both_targets_share_the_first_gradient():
    calls = []

    def gradient(y: Tensor) -> Tensor:
        calls.append(y)
        return torch.ones_like(y)

    OPSD(ascent_steps=2).targets(random(3, 5), gradient)
    assert len(calls) == 3


# the loss, on Gaussian data


@dataclass
class PicturePolicy(GaussianPolicy):
    """Pictures are latents, and the sampler has a state at T."""

    times = (1.0, T, 0.0)

    def decode(self, x0: Tensor) -> Tensor:
        return x0


def picture_policy(delta: float, old: float = 0.0) -> PicturePolicy:
    gaussian = policy_at(delta, old=old)
    return PicturePolicy(gaussian.delta, gaussian.snapshots)


def rollout_at(z: Tensor, advantage: Tensor, slope: float = 1.0) -> Rollout:
    """Images that passed z (B, D) at T; the reward is slope · the sum of the picture."""
    reward = of_pictures(lambda images: slope * images.flatten(1).sum(1))
    rollout = rollout_of(torch.zeros_like(z), advantage)
    return replace(rollout, states={1: z}, reward_with_gradient=reward)


def prediction(z: Tensor) -> Tensor:
    """y_old, of the velocity with δ = 0."""
    policy = picture_policy(0.0)
    rollout = rollout_at(z, torch.zeros(len(z)))
    return z - T * policy.at("old").velocity(z, torch.full((len(z),), T), rollout.cond)


def gradient_of(objective: OPSD, policy: PicturePolicy, rollout: Rollout) -> float:
    compute_gradient(policy, objective, rollout, len(rollout), Meter())
    assert policy.delta.grad is not None
    return policy.delta.grad.item()


@pytest.mark.parametrize("advantage", [-4.0, 0.0, 2.0])
@pytest.mark.parametrize("slope", [3.0, -0.2])
def test_a_linear_reward_has_the_closed_form_loss_whatever_the_advantage(advantage, slope):
    """5 ρ |y_old|, as a mean over images; by δ its slope is -10 t² / V times the reward's sign."""
    z = random(6, 1)
    rollout = rollout_at(z, torch.full((6,), advantage), slope)
    policy = picture_policy(0.0)
    loss = OPSD().loss(policy, rollout, 1)
    torch.testing.assert_close(loss.total, 5 * 0.1 * prediction(z).abs().mean())
    sign = 1 if slope > 0 else -1
    expected = -10 * sign / V_OVER_T_SQUARED
    assert gradient_of(OPSD(), policy, rollout) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_the_loss_ends_where_the_prediction_is_the_target_over_beta(beta):
    """δ = 2.69 ρ |y_old| / β, where the loss and its gradient are 0."""
    z = torch.tensor([[0.7]])
    shift = 0.1 * prediction(z).abs().item() / beta
    v = (1 - T) ** 2 * 0.25 + T**2
    assert v / T**2 == pytest.approx(V_OVER_T_SQUARED, abs=5e-3)
    policy = picture_policy(shift * v / T**2)
    rollout = rollout_at(z, torch.tensor([1.0]))
    assert OPSD(beta=beta).loss(policy, rollout, 1).total.item() == pytest.approx(0, abs=1e-6)
    assert gradient_of(OPSD(beta=beta), policy, rollout) == pytest.approx(0, abs=0.05)
    nearer = picture_policy(0.9 * shift * v / T**2)
    assert gradient_of(OPSD(beta=beta), nearer, rollout) < -0.5 * beta


def test_without_a_radius_the_policy_is_drawn_to_the_old_one():
    rollout = rollout_at(random(5, 3), random(5, seed=3))
    assert gradient_of(OPSD(radius=0), picture_policy(0.4, old=0.4), rollout) == 0
    assert gradient_of(OPSD(radius=0), picture_policy(0.5, old=0.4), rollout) > 0
    assert gradient_of(OPSD(radius=0), picture_policy(0.3, old=0.4), rollout) < 0


def test_the_share_of_good_images_matters_where_the_reward_bends():
    z = random(6, 2)
    totals = set()
    for advantage in (-4.0, 4.0):
        bent = of_pictures(lambda images: -(images - 1).square().flatten(1).sum(1))
        rollout = replace(rollout_at(z, torch.full((6,), advantage)), reward_with_gradient=bent)
        totals.add(OPSD(radius=0.5).loss(picture_policy(0.0), rollout, 1).total.item())
    assert len(totals) == 2


def test_the_penalty_is_the_distance_to_the_reference_at_the_state():
    z = random(4, 3)
    rollout = rollout_at(z, random(4, seed=5))
    plain, anchored = (
        OPSD(kl=VelocityKL(weight=weight)).loss(picture_policy(0.3), rollout, 1).total
        for weight in (0.0, 2.0)
    )
    v = (1 - T) ** 2 * 0.25 + T**2
    torch.testing.assert_close(anchored - plain, torch.tensor(2 * (0.3 * T / v) ** 2))


# states of a rollout


@pytest.mark.parametrize(
    ("times", "visited", "steps"),
    [
        ([1.0, 0.5, 0.0], [0.278], [1]),
        ([1.0, 0.5, 0.0], [0.5, 1.0], [0, 1]),
        ([1 - k / 10 for k in range(11)], [0.278], [7]),
        ([1 - k / 10 for k in range(11)], [0.0, 0.05, 0.31], [7, 9]),
    ],
)
def test_the_sampler_s_nearest_times_are_visited(times, visited, steps):
    assert OPSD(visited=visited).kept_steps(times) == steps


def context_of(policy: Policy, objective: OPSD) -> SourceContext:
    policy.model.remember(TEXTS)
    scorer = RolloutScorer(
        [Reward("brightness", brightness)],
        WeightedSum(),
        group_advantage,
        4,
        torch.device("cpu"),
    )
    plan = BatchPlan(
        prompts_per_step=2, images_per_prompt=4, updates_per_step=1, max_images_per_pass=4
    )
    return SourceContext(
        policy=policy,
        scorer=scorer,
        prompts=[Prompt(text) for text in TEXTS],
        examples=[],
        plan=plan,
        seed=0,
        sampling_weights=objective.sampling_weights,
        steps=100,
        keeps_paths=False,
        kept_steps=objective.kept_steps(policy.times),
        null_gradient=True,
        ranking=Ranking(),
        voted=VotedPictures(policy, lambda _: policy.sampler, keeps_paths=False),
    )


def two_step_policy() -> Policy:
    path = str(ROOT / "assets" / "tiny-sd3-2step")
    return make_policy(Sampler(steps=2), ["old"], path=path)


def test_the_two_step_model_has_its_states_at_1_and_a_half():
    assert two_step_policy().times == [1.0, 0.5, 0.0]


@pytest.mark.slow
def test_the_two_step_model_draws_better_in_two_steps_than_its_teacher():
    path = ROOT / "configs" / "tiny" / "opsd.yaml"
    few = ["evaluation.images_per_prompt=2", "evaluation.guidance_sweep=[]"]
    models = {"tiny-sd3-2step": 2, "tiny-sd3": 3}  # the teacher's times are 1, 0.5 and 0.001
    strict = {}
    for name, steps in models.items():
        overrides = [*few, f"model.path=assets/{name}", f"evaluation.sampler.steps={steps}"]
        strict[name] = evaluate(load_config(path, overrides)).means["scene_match"]
    assert strict["tiny-sd3-2step"] > strict["tiny-sd3"] + 0.15


def test_states_are_those_that_the_sampler_passed():
    policy, objective = make_policy(Sampler(steps=4), ["old"]), OPSD(visited=[0.3, 1.0])
    rollout, _ = scored_rollouts(context_of(policy, objective), 0)
    assert list(rollout.states) == list(objective.draws(rollout)) == [0, 2]
    with torch.no_grad():
        for k, state in rollout.states.items():
            expected = policy.beginning(rollout, "rollout", k)
            torch.testing.assert_close(state, expected, atol=1e-5, rtol=1e-5)
        x = policy.unroll(rollout.states[2], rollout, range(2, 4))
    torch.testing.assert_close(x, rollout.x0, atol=1e-5, rtol=1e-5)
    assert list(rollout[2:5].states[0].shape) == [3, *rollout.latent_shape]


def test_states_are_kept_if_the_images_of_a_prompt_share_their_noise():
    sampler = Sampler(steps=4, dynamics=flow_sde, same_noise=True, window=Window(range=(2, 3)))
    policy, objective = make_policy(sampler, ["old"]), OPSD(visited=[1.0])
    rollout, _ = scored_rollouts(context_of(policy, objective), 0)
    assert rollout.states[0][0].equal(rollout.states[0][1])
    assert not rollout.x0[0].equal(rollout.x0[1])


def test_other_objectives_keep_no_state():
    policy = make_policy(Sampler(steps=3), ["old"])
    context = replace(context_of(policy, OPSD()), kept_steps=())
    assert scored_rollouts(context, 0)[0].states == {}


@pytest.mark.parametrize("visited", [[0.5], [1.0], [0.5, 1.0]])
def test_a_two_step_model_learns_a_reward_in_two_steps(visited):
    policy, objective = two_step_policy(), OPSD(visited=visited)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-3)
    context = context_of(policy, objective)
    rewards = []
    for step in range(10):
        rollout, metrics = scored_rollouts(context, step)
        rewards.append(metrics["reward/brightness"])
        optimizer.zero_grad()
        compute_gradient(policy, objective, rollout, 4, Meter())
        optimizer.step()
        policy.update_copy("old", objective.old(step + 1))
    assert rewards[-1] > rewards[0] + 0.05


def test_the_target_pass_leaves_no_gradient_elsewhere():
    policy, objective = two_step_policy(), OPSD()
    rollout, _ = scored_rollouts(context_of(policy, objective), 0)
    objective.loss(policy, rollout, 1).total.backward()
    assert all(p.grad is None for p in policy.parameters("old"))
    assert all(p.grad is None for p in policy.model.pipe.vae.parameters())
    assert any(p.grad.abs().sum() > 0 for p in policy.parameters())


def test_a_reward_without_gradient_is_refused():
    config = load_config(ROOT / "configs" / "tiny" / "opsd.yaml", ["rewards={scene_match: 1}"])
    with pytest.raises(UserError, match=r"scene_match.*gradient"):
        read_inputs(config)
