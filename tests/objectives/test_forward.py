"""Objectives of the forward process on Gaussian data, whose first gradients and optima are known.

Below, A = k (x0 - mean) is an advantage of slope k, κ the weight of ‖v - v_ref‖², g = t / V, and
e = ‖v - (noise - x0)‖². Then
∂e/∂δ is -2 g² (x0 - m - δ) + terms in noise, and ‖v - v_ref‖² is g² δ².
"""

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from flowalign.advantages import group_advantage, RewardTable
from flowalign.batch import Cond, Rollout
from flowalign.errors import UserError
from flowalign.flow import add_noise, mean_square
from flowalign.objectives.awm import AWM
from flowalign.objectives.base import Loss, Mean, Objective
from flowalign.objectives.crd import CRD, FORMS
from flowalign.objectives.dgpo import DGPO
from flowalign.objectives.draws import Draw, ForwardTimes
from flowalign.objectives.nft import NFT
from flowalign.objectives.raft import RAFT
from flowalign.objectives.rwr import RWR
from flowalign.objectives.terms import adaptive_error, group_mean, optimality, VelocityKL
from flowalign.policy import Decay
from flowalign.training.gradient import split
from tests.objectives.gaussian import (
    expectation,
    g,
    GaussianPolicy,
    gradient,
    MEAN,
    midpoints,
    policy_at,
    rollout_of,
    root,
    VARIANCE,
)

SLOPE, KAPPA = 0.4, 0.5
NO_KL = VelocityKL(weight=0.0)


def awm(kl: VelocityKL = NO_KL, **settings) -> AWM:
    return AWM(**{"weighting": "uniform", "scale": 1.0, "trust": 0.0, **settings}, kl=kl)


def nft(kl: VelocityKL = NO_KL, **settings) -> NFT:
    return NFT(**{"adaptive": False, **settings}, kl=kl)


def crd(kl: VelocityKL = NO_KL, **settings) -> CRD:
    return CRD(**{"adaptive": False, "kl_least": kl.weight, **settings}, kl=kl)


def dgpo(kl: VelocityKL = NO_KL, **settings) -> DGPO:
    return DGPO(**settings, kl=kl)


def images(prompts: int = 2, per_prompt: int = 4, elements: int = 3, seed: int = 0) -> Rollout:
    """Random ones, with advantages that are 0 in the mean of every prompt."""
    generator = torch.Generator().manual_seed(seed)
    x0 = MEAN + VARIANCE**0.5 * torch.randn(prompts * per_prompt, elements, generator=generator)
    group = torch.arange(prompts).repeat_interleave(per_prompt)
    advantage = torch.randn(len(x0), generator=generator)
    return rollout_of(x0, advantage - group_mean(advantage, group), group)


def same_for_all(rollout: Rollout, t: float = 0.5, noise: float = 0.0) -> Draw:
    return Draw(0, torch.full((len(rollout),), t), torch.full_like(rollout.x0, noise))


def relative_difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_the_family_moves_the_mean_of_the_data():
    x, t = torch.linspace(-2, 3, 7)[:, None], torch.linspace(0, 1, 7)
    moved = policy_at(0.3).velocity(x, t, rollout_of(x, x[:, 0]).cond)
    torch.testing.assert_close(
        moved, GaussianPolicy().velocity(x, t, rollout_of(x, x[:, 0], mean=MEAN + 0.3).cond)
    )


# Where they lead


def settled(objective: Objective) -> float:
    """δ after many updates on fresh images of the policy, which `old` copies every time."""
    policy = policy_at(0.0, old=0.0)
    for _ in range(30):
        policy.snapshots["old"] = policy.delta.detach().clone()
        rollout, draws = expectation(SLOPE, policy.delta.detach())
        step = 0.2 / KAPPA * gradient(objective, policy, rollout, draws)
        with torch.no_grad():
            policy.delta -= step
    return policy.delta.item()


@pytest.mark.parametrize(
    "objective",
    [
        awm(VelocityKL(KAPPA)),
        awm(VelocityKL(KAPPA), trust=1.0),
        nft(VelocityKL(KAPPA)),
        nft(VelocityKL(KAPPA), beta=0.1, limit=2.0),
        crd(VelocityKL(KAPPA)),
        crd(VelocityKL(KAPPA), beta=0.1, limit=2.0),
        crd(VelocityKL(KAPPA), temperature=0.1),
    ],
    ids=[
        "awm",
        "awm, trusted",
        "nft",
        "nft, other constants",
        "crd",
        "crd, other constants",
        "crd, weighted centres",
    ],
)
def test_on_policy_all_lead_to_the_same_optimum(objective):
    """k s²/κ: the optimum of reward and κ KL, whatever β and A_max.

    The expected gradient of each is E[A ∂e/∂δ] + κ ∂(g² δ²)/∂δ = E[g²] (-2 k s² + 2 κ δ).
    For NFT it is that of r = A / (2 A_max)
    + ½ in A_max (2r - 1) e, for CRD that of R_c = A / (2 A_max) in A_max / β · 2 R_c β e.
    """
    assert settled(objective) == pytest.approx(SLOPE * VARIANCE / KAPPA, rel=1e-4)


def test_on_policy_dgpo_leads_where_half_the_reward_would_until_it_tells_the_group_apart():
    """With β → 0 all W are ½, so δ is that of ½ A."""
    assert settled(dgpo(VelocityKL(KAPPA), beta=1e-4)) == pytest.approx(
        SLOPE * VARIANCE / (2 * KAPPA), rel=1e-3
    )
    assert settled(dgpo(VelocityKL(KAPPA), beta=100.0)) < 0.5 * SLOPE * VARIANCE / (2 * KAPPA)


@pytest.mark.parametrize(("beta", "limit"), [(1.0, 5.0), (0.5, 5.0), (1.0, 0.5), (0.5, 0.5)])
def test_nft_from_images_of_a_frozen_policy_goes_further_the_smaller_beta(beta, limit):
    """k s² / (β A_max): the minimum of β² g² δ² - 2 β E[A / A_max · g² (x0 - m)] δ."""
    rollout, draws = expectation(SLOPE)
    found = root(nft(beta=beta, limit=limit), policy_at(0.0, old=0.0), rollout, draws)
    assert found == pytest.approx(SLOPE * VARIANCE / (beta * limit), rel=1e-4)


@pytest.mark.parametrize(("beta", "limit"), [(1.0, 5.0), (0.5, 5.0), (1.0, 0.5), (0.5, 0.5)])
def test_crd_from_images_of_a_frozen_policy_tells_as_much_apart_as_the_reward_does(beta, limit):
    """k / (4 β A_max) · E[g²] / E[g⁴].

    In the prompt, which shares time and noise, ρ_c is 2 g² δ (x0 - m) and R_c is
    k / (2 A_max) (x0 - m), at each time; δ is that of the least squares over all times.
    (k / (4 β A_max E[g²]) would be that of ρ averaged over the times before squaring.)
    """
    rollout, draws = expectation(SLOPE)
    found = root(crd(beta=beta, limit=limit), policy_at(0.0, old=0.0), rollout, draws)
    t = midpoints(100_000).double()
    optimum = SLOPE / (4 * beta * limit) * (g(t) ** 2).mean() / (g(t) ** 4).mean()
    assert found == pytest.approx(optimum.item(), rel=1e-3)


def both_noises(rollout: Rollout) -> list[Draw]:
    return [same_for_all(rollout, t.item(), noise) for t in midpoints(8) for noise in (-1.0, 1.0)]


def test_rwr_learns_the_data_tilted_by_the_reward():
    """Reward λ x0 makes N(m, s²) into N(m + λ s²/τ, s²)."""
    reward_slope, temperature = 0.5, 0.4
    x0 = MEAN + VARIANCE**0.5 * Normal(0.0, 1.0).icdf(midpoints(20_000))[:, None]
    rollout = rollout_of(x0, reward_slope * x0[:, 0])
    found = root(RWR(temperature=temperature), GaussianPolicy(), rollout, both_noises(rollout))
    assert found == pytest.approx(reward_slope * VARIANCE / temperature, rel=1e-3)


def test_rwr_weighs_by_the_softmax_within_the_prompt():
    rollout = rollout_of(
        torch.zeros(5, 1), torch.tensor([0.0, 0.2, 0.1, 0.3, 0.1]), [3, 3, 7, 7, 7]
    )
    weight = RWR(temperature=0.2).weight(rollout)
    rows = [2 * (rollout.reward[:2] / 0.2).softmax(0), 3 * (rollout.reward[2:] / 0.2).softmax(0)]
    torch.testing.assert_close(weight, torch.cat(rows))


def test_rwr_weighs_rewards_around_100_by_all_their_digits():
    reward = torch.tensor([100.001, 99.999, 99.999])
    weight = RWR(temperature=1e-3).weight(rollout_of(torch.zeros(3, 1), reward, [0, 0, 0]))
    expected = 3 * (reward.double() / 1e-3).softmax(0)
    torch.testing.assert_close(weight, expected.float(), rtol=1e-6, atol=0)


def test_rwr_weighs_a_prompt_alike_however_much_better_another_is():
    reward = torch.tensor([0.0, 0.1, 0.0, 0.1])
    alike, apart = (
        RWR(temperature=0.1).weight(rollout_of(torch.zeros(4, 1), values, [0, 0, 1, 1]))
        for values in (reward, reward + torch.tensor([0.0, 0, 100, 100]))
    )
    torch.testing.assert_close(apart, alike, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("keep", "kept"), [(1, [3]), (2, [3, 1]), (3, [3, 1, 0, 4]), (9, [0, 1, 2, 3, 4])]
)
def test_raft_learns_the_mean_of_the_images_it_keeps(keep, kept):
    x0 = torch.tensor([[1.0], [2.5], [0.3], [1.2], [0.7]])
    rollout = rollout_of(x0, torch.tensor([0.5, 0.8, 0.1, 0.9, 0.5]))
    found = root(RAFT(keep=keep), GaussianPolicy(), rollout, both_noises(rollout))
    assert found == pytest.approx(x0[kept].mean().item() - MEAN, rel=1e-4)


def test_raft_keeps_the_best_of_every_prompt():
    rollout = rollout_of(
        torch.zeros(5, 1), torch.tensor([5.0, 6.0, 0.1, 0.3, 0.2]), [3, 3, 7, 7, 7]
    )
    assert RAFT().weight(rollout).tolist() == [0, 2, 0, 3, 0]


# The first gradient


def test_the_first_gradients_are_the_same_up_to_a_factor():
    """E[A ∂e/∂δ] at policy = old = reference: in full for AWM, NFT and CRD, half of it for DGPO."""
    policy, rollout = policy_at(torch.zeros(3), old=0.0), images()
    first = gradient(awm(), policy, rollout)
    assert (first.abs() > 1e-2).all()
    others = [nft(), nft(beta=0.1), nft(limit=3.0), crd(), crd(beta=0.1), crd(limit=4.0)]
    scaled = [(awm(scale=0.2), 0.2), (dgpo(), 0.5), (dgpo(beta=1.0), 0.5)]
    for objective, factor in [*((other, 1.0) for other in others), *scaled]:
        found = gradient(objective, policy, rollout)
        assert torch.cosine_similarity(found, first, dim=0).item() == pytest.approx(1, abs=1e-6)
        torch.testing.assert_close(found, factor * first, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "objective",
    [
        awm(),
        AWM(kl=NO_KL),
        nft(),
        NFT(kl=NO_KL),
        crd(),
        CRD(kl=NO_KL),
        crd(temperature=0.1),
        dgpo(),
    ],
)
def test_without_advantages_there_is_no_first_gradient(objective):
    policy, rollout = policy_at(torch.full((3,), 0.1), old=0.1), images()
    assert gradient(objective, policy, rollout).ne(0).any()
    assert gradient(objective, policy, replace(rollout, advantage=torch.zeros(8))).eq(0).all()


GUIDED = VelocityKL(weight=KAPPA, guidance=3.0)


@pytest.mark.parametrize(
    "objective",
    [
        awm(VelocityKL(KAPPA)),
        nft(VelocityKL(KAPPA)),
        crd(VelocityKL(KAPPA)),
        dgpo(VelocityKL(KAPPA)),
    ],
)
def test_a_guided_policy_is_held_to_the_reference_under_its_own_guidance(objective):
    """So that before the first update the distance is 0, and DGPO's weight ½."""
    rollout = images()
    rollout = replace(
        rollout, cond=rollout_of(rollout.x0, rollout.advantage, null_mean=1.2).cond.guided(3.0)
    )
    for draw in objective.draws(rollout):
        stats = objective.loss(policy_at(0.0, old=0.0), rollout, draw).stats
        assert stats["kl"].values.eq(0).all()
        assert stats.get("group_weight", Mean(torch.tensor(0.5))).values.eq(0.5).all()


@pytest.mark.parametrize("objective", [awm(GUIDED), nft(GUIDED), crd(GUIDED), dgpo(GUIDED)])
def test_without_advantages_the_policy_learns_what_the_guided_reference_does(objective):
    """Under guidance w the reference makes N(m_null + w (m - m_null), s²); m_null is 1.2."""
    rollout = replace(images(), advantage=torch.zeros(8))
    rollout = replace(rollout, cond=rollout_of(rollout.x0, rollout.advantage, null_mean=1.2).cond)
    guided = 2 * (MEAN - 1.2)
    for delta in (0.0, guided, 1.0):
        found = gradient(objective, policy_at(delta, old=delta), rollout)
        expected = (
            sum((g(draw.t) ** 2).mean() for draw in objective.draws(rollout))
            / 3
            * 2
            * KAPPA
            * (delta - guided)
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@dataclass
class Watched(GaussianPolicy):
    """Notes whose velocities are asked, under which guidance and of how many images."""

    weights: str = "policy"
    asked: list[tuple[str, float, int]] = field(default_factory=list)

    def velocity(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.asked.append((self.weights, cond.guidance, len(x)))
        return super().velocity(x, t, cond)

    def at(self, name: str) -> GaussianPolicy:
        return replace(super().at(name), weights=name)


@pytest.mark.parametrize(
    "objective",
    [awm(VelocityKL(KAPPA)), nft(VelocityKL(KAPPA)), crd(VelocityKL(KAPPA)), dgpo(), RWR(), RAFT()],
)
@pytest.mark.parametrize("images_per_pass", [None, 3])
def test_velocities_are_guided_as_images_are_sampled_unless_the_objective_says_otherwise(
    objective, images_per_pass
):
    rollout = images()
    rollout = replace(rollout, cond=rollout.cond.guided(3.0))
    for guidance, expected in [(None, 3.0), (1.0, 1.0), (2.0, 2.0)]:
        policy = Watched(snapshots={"old": 0.0}, images_per_pass=images_per_pass)
        gradient(replace(objective, guidance=guidance), policy, rollout)
        assert {found for _, found, _ in policy.asked} == {expected}


@pytest.mark.parametrize("images_per_pass", [None, 3])
@pytest.mark.parametrize(
    ("objective", "weights"),
    [
        (crd(GUIDED), "old"),
        (crd(GUIDED), "reference"),
        (awm(GUIDED), "old"),
        (nft(GUIDED), "reference"),
    ],
)
def test_copies_are_asked_once_about_every_image_and_draw(objective, weights, images_per_pass):
    policy = Watched(snapshots={"old": 0.0}, images_per_pass=images_per_pass)
    gradient(objective, policy, images())
    assert (
        sum(rows for name, _, rows in policy.asked if name == weights) == objective.times.count * 8
    )


def test_dgpo_asks_the_reference_once_where_passes_hold_whole_prompts():
    policy = Watched(snapshots={"old": 0.0}, images_per_pass=4)
    gradient(dgpo(GUIDED), policy, images())
    assert [(name, rows) for name, _, rows in policy.asked].count(("reference", 4)) == 3 * 2


class WithTerms(AWM):
    terms_span_update = True

    def group_terms(self, policy, rollout, draw):
        return {"velocity": policy.velocity(rollout.x0, draw.t, rollout.cond)}

    def loss(self, policy, rollout, draw):
        expected = policy.velocity(rollout.x0, draw.t, rollout.cond)
        assert torch.equal(rollout.terms["velocity"], expected)
        assert not rollout.terms["velocity"].requires_grad
        return super().loss(policy, rollout, draw)


@pytest.mark.parametrize("images_per_pass", [8, 3])
def test_terms_belong_to_their_rows_and_draw_and_have_no_gradient(images_per_pass):
    policy = replace(policy_at(0.2, old=0.0), images_per_pass=images_per_pass)
    assert gradient(WithTerms(), policy, images()).ne(0).all()


class WithoutReference(GaussianPolicy):
    def at(self, name: str) -> GaussianPolicy:
        if name == "reference":
            raise LookupError(name)
        return super().at(name)


@pytest.mark.parametrize("objective_of", [awm, nft, crd])
def test_a_kl_of_weight_0_never_asks_the_reference(objective_of):
    policy, rollout = WithoutReference(snapshots={"old": 0.0}), images()
    assert "kl" not in objective_of().loss(policy, rollout, same_for_all(rollout)).stats
    with pytest.raises(LookupError, match="reference"):
        objective_of(VelocityKL(0.1)).loss(policy, rollout, same_for_all(rollout))


def test_the_anchor_adds_its_weight_times_the_distance():
    policy, rollout = policy_at(0.3), images()
    draw = same_for_all(rollout)
    v = policy.velocity(rollout.x0, draw.t, rollout.cond)
    penalty = VelocityKL(0.1).penalty(policy, v, rollout.x0, draw.t, rollout.cond)
    loss = Loss(torch.tensor(2.0), {"a": Mean(torch.tensor(1.0))}) + penalty
    distance = (0.3 * g(torch.tensor(0.5))) ** 2
    assert loss.total.item() == pytest.approx(2 + 0.1 * distance.item(), rel=1e-5)
    assert set(loss.stats) == {"a", "kl"}
    torch.testing.assert_close(loss.stats["kl"].values, distance.expand(8))


# The clip of AWM and DGPO: with t ½ and no noise, an x0 one above the mean has e = g² (1 - δ)²

CLIPPED = pytest.mark.parametrize(
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


def one_with_ratio(advantage: float, ratio: float) -> tuple[GaussianPolicy, Rollout, float]:
    """A policy at δ = 0, an image that has this ratio exp(e_old - e), and ∂e/∂δ."""
    g2 = g(torch.tensor(0.5)).item() ** 2
    old = 1 - (1 + torch.tensor(ratio).log().item() / g2) ** 0.5
    return (
        policy_at(0.0, old=old),
        rollout_of(torch.tensor([[MEAN + 1]]), torch.tensor([advantage])),
        -2 * g2,
    )


@CLIPPED
def test_the_clip_of_awm_stops_only_what_went_too_far_in_the_right_direction(
    advantage, ratio, has_gradient
):
    policy, rollout, slope = one_with_ratio(advantage, ratio)
    loss = awm(clip_range=0.2).loss(policy, rollout, same_for_all(rollout))
    assert loss.stats["ratio/mean"].values.item() == pytest.approx(ratio, rel=1e-5)
    assert loss.stats["ratio/clipped"].values.item() == (abs(ratio - 1) > 0.2)
    found = gradient(awm(clip_range=0.2), policy, rollout, [same_for_all(rollout)])
    assert found.item() == pytest.approx(
        advantage * ratio * slope if has_gradient else 0.0, rel=1e-4
    )


@CLIPPED
def test_the_clip_of_dgpo_stops_only_what_went_too_far_in_the_right_direction(
    advantage, ratio, has_gradient
):
    policy, rollout, slope = one_with_ratio(advantage, ratio)
    found = gradient(dgpo(clip_range=0.2), policy, rollout, [same_for_all(rollout)])
    assert found.item() == pytest.approx(advantage / 2 * slope if has_gradient else 0.0, rel=1e-4)


def test_awm_takes_the_worse_of_the_ratio_and_its_clipped_value():
    for advantage, ratio, taken in [
        (1.0, 1.5, 1.2),
        (1.0, 0.5, 0.5),
        (-1.0, 1.5, 1.5),
        (-1.0, 0.5, 0.8),
    ]:
        policy, rollout, _ = one_with_ratio(advantage, ratio)
        loss = awm(clip_range=0.2).loss(policy, rollout, same_for_all(rollout)).total.item()
        assert loss == pytest.approx(-advantage * taken, rel=1e-5)


# AWM


@pytest.mark.parametrize("weighting", ["uniform", "t", "t_squared", "huber", "ghuber"])
def test_the_ratio_of_awm_is_one_before_the_first_update(weighting):
    policy, rollout, objective = policy_at(0.2, old=0.2), images(), AWM(weighting=weighting)
    for draw in objective.draws(rollout):
        stats = objective.loss(policy, rollout, draw).stats
        assert (stats["ratio/mean"].values == 1).all()
        assert (stats["ratio/clipped"].values == 0).all()
        assert (stats["moved"].values == 0).all()


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("uniform", -(0.5**4)),
        ("t", -(0.5**5)),
        ("t_squared", -(0.5**6)),
        ("huber", -0.5 * (0.5**2 - 1e-5)),
        ("ghuber", -0.5 / 0.25 * (0.5 - 10**-2.5)),
    ],
)
def test_the_weightings_of_awm_at_an_error_of_a_sixteenth_and_half_time(weighting, expected):
    objective = AWM(weighting=weighting)
    error, t = torch.tensor([0.0625, 0.0]), torch.tensor([0.5, 0.5])
    torch.testing.assert_close(
        objective.log_prob(error, t), torch.tensor([expected, 0.0]), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("weighting", ["huber", "ghuber"])
def test_an_error_of_0_has_a_finite_gradient_in_awm(weighting):
    error = torch.zeros(1, requires_grad=True)
    AWM(weighting=weighting).log_prob(error, torch.ones(1)).sum().backward()
    assert error.grad is not None
    assert error.grad.isfinite().all()


def test_the_trust_region_of_awm_pulls_towards_old():
    rollout, draws = expectation(0.0)
    found = gradient(awm(trust=0.7), policy_at(0.3, old=0.1), rollout, draws)
    assert found.item() == pytest.approx(
        2 * 0.7 * (g(draws[0].t) ** 2).mean().item() * 0.2, rel=1e-4
    )


# NFT


def test_an_average_image_pulls_nft_towards_old():
    """With r = ½ only A_max β ‖v - v_old‖² is left."""
    rollout, draws = expectation(0.0)
    found = gradient(nft(beta=0.5, limit=3.0), policy_at(0.3, old=0.1), rollout, draws)
    assert found.item() == pytest.approx(
        2 * 3 * 0.5 * (g(draws[0].t) ** 2).mean().item() * 0.2, rel=1e-4
    )


@pytest.mark.parametrize("adaptive", [False, True])
def test_good_and_bad_changed_over_reverse_the_first_gradient_of_nft(adaptive):
    policy, rollout, objective = (
        policy_at(torch.full((3,), 0.1), old=0.1),
        images(),
        nft(adaptive=adaptive),
    )
    changed_over = replace(rollout, advantage=-rollout.advantage)
    torch.testing.assert_close(
        gradient(objective, policy, changed_over), -gradient(objective, policy, rollout)
    )


def test_the_adaptive_error_of_nft_is_that_of_x0_over_its_own_mean_size():
    """mean (x0_hat - x0)² / mean |x0_hat - x0|, where x0_hat = xt - t v, as DiffusionNFT has it."""
    policy, rollout = policy_at(0.3), images()
    draw = next(iter(ForwardTimes()(rollout)))
    xt, target = add_noise(rollout.x0, draw.t, draw.noise)
    v = policy.velocity(xt, draw.t, rollout.cond)
    away = (xt - draw.t[:, None] * v) - rollout.x0
    expected = away.square().mean(1) / away.abs().mean(1)
    torch.testing.assert_close(NFT().error(v, target, draw.t), expected, rtol=1e-4, atol=1e-6)


def test_the_loss_of_nft_is_that_of_its_equation():
    policy, rollout = (
        policy_at(0.3, old=0.1),
        rollout_of(torch.tensor([[2.0], [1.0]]), torch.tensor([2.0, -9.0])),
    )
    draw = same_for_all(rollout, noise=0.4)
    xt, target = add_noise(rollout.x0, draw.t, draw.noise)
    v, v_old = (view.velocity(xt, draw.t, rollout.cond) for view in (policy, policy.at("old")))
    good, bad = (((1 - b) * v_old + b * v - target).square()[:, 0] for b in (0.2, -0.2))
    expected = 4 / 0.2 * ((0.75 * good[0] + 0.25 * bad[0]) + bad[1]) / 2
    torch.testing.assert_close(nft(beta=0.2, limit=4.0).loss(policy, rollout, draw).total, expected)


# CRD


@pytest.mark.parametrize("temperature", [0.0, 0.2])
def test_a_constant_on_all_rewards_of_a_prompt_changes_nothing_in_crd(temperature):
    policy, rollout, objective = (
        policy_at(torch.full((3,), 0.2), old=0.0),
        images(),
        crd(temperature=temperature),
    )
    constant = torch.tensor([0.0, 1.5])[rollout.group]  # R stays between 0 and 1
    shifted = replace(rollout, advantage=rollout.advantage + constant)
    assert optimality(shifted.advantage).max() < 1
    torch.testing.assert_close(
        gradient(objective, policy, shifted),
        gradient(objective, policy, rollout),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("objective", [awm(), nft(), crd(), dgpo()])
def test_a_constant_on_all_rewards_of_a_prompt_changes_no_gradient_through_the_advantages(
    objective,
):
    policy, rollout = policy_at(torch.full((3,), 0.2), old=0.2), images()
    first, second = (
        replace(
            rollout,
            advantage=group_advantage(RewardTable(reward, {}, {}), rollout.group, std="group"),
        )
        for reward in (rollout.reward, rollout.reward + torch.tensor([0.0, 8.0])[rollout.group])
    )
    torch.testing.assert_close(
        gradient(objective, policy, second),
        gradient(objective, policy, first),
        rtol=1e-4,
        atol=1e-5,
    )


class PromptsAreEasier(CRD):
    """A log-ratio that is larger by a number of the prompt's own, as log Z is."""

    def error(self, v, target):
        return super().error(v, target) - (3.0 * images().group if v.requires_grad else 0.0)


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.2}, {"centring": "hard"}, {"form": "bce"}],
    ids=["equal", "soft", "hard", "cross-entropy"],
)
def test_a_constant_on_all_log_ratios_of_a_prompt_changes_nothing_in_crd(settings):
    policy, rollout = policy_at(torch.full((3,), 0.2), old=0.0), images()
    plain = gradient(crd(**settings), policy, rollout)
    shifted = PromptsAreEasier(adaptive=False, kl_least=0.0, **settings, kl=NO_KL)
    torch.testing.assert_close(gradient(shifted, policy, rollout), plain, rtol=1e-4, atol=1e-5)


def test_crd_centres_within_the_prompt():
    """Two prompts of different times give the mean of their gradients, unlike with one centre."""
    policy, rollout = policy_at(torch.full((3,), 0.4), old=0.0), images()
    t, noise = (
        torch.tensor([0.2, 0.6])[rollout.group],
        torch.tensor([-1.0, 1.0])[rollout.group][:, None].expand(-1, 3),
    )
    together = gradient(crd(), policy, rollout, [Draw(0, t, noise)])
    apart = [
        gradient(crd(), policy, rollout[rows], [Draw(0, t[rows], noise[rows])])
        for rows in (slice(0, 4), slice(4, 8))
    ]
    torch.testing.assert_close(together, (apart[0] + apart[1]) / 2)

    keys = replace(rollout.keys, prompt=torch.zeros_like(rollout.group))
    assert (
        relative_difference(
            gradient(crd(), policy, replace(rollout, keys=keys), [Draw(0, t, noise)]), together
        )
        > 0.1
    )


def test_the_loss_of_crd_as_it_comes_is_that_of_its_equation():
    """Two images of a prompt, errors over their detached mean size; R is 0.7 and 0.4."""
    policy = policy_at(torch.tensor([0.3, -0.2, 0.1]), old=0.1)
    rollout = rollout_of(
        torch.tensor([[2.0, 1.0, 1.4], [1.0, 1.7, 0.3]]), torch.tensor([2.0, -1.0])
    )
    draw = Draw(0, torch.full((2,), 0.6), torch.tensor([0.4, -1.0, 0.2]).expand(2, 3))
    xt, target = add_noise(rollout.x0, draw.t, draw.noise)
    away, away_old = (
        view.velocity(xt, draw.t, rollout.cond) - target for view in (policy, policy.at("old"))
    )
    sizes, sizes_old = (error.detach().abs().sum(1) / 3 for error in (away, away_old))
    rho = (away_old**2).sum(1) / 3 / sizes_old - (away**2).sum(1) / 3 / sizes
    residual = 2.0 * rho - torch.tensor([0.7, 0.4])
    centre = (residual.detach()[0] + residual.detach()[1]) / 2
    expected = 5.0 / 2.0 * ((residual - centre) ** 2).sum() / 2
    objective = CRD(beta=2.0, kl=NO_KL)
    torch.testing.assert_close(objective.loss(policy, rollout, draw).total, expected)
    (slope,) = torch.autograd.grad(expected, policy.delta)
    torch.testing.assert_close(gradient(objective, policy, rollout, [draw]), slope)


def test_the_centre_of_crd_is_weighted_towards_the_good_and_then_the_bad():
    rollout = rollout_of(torch.tensor([[2.0], [1.0], [1.2]]), torch.tensor([3.0, -1.0, 0.0]))
    rho, reward = torch.tensor([0.5, -0.2, 0.1]), torch.tensor([0.8, 0.4, 0.5])
    expected = [((sign * reward / 0.25).softmax(0) * (2 * rho - reward)).sum() for sign in (1, -1)]
    centres = crd(beta=2.0, temperature=0.25).centres(rho, rollout)
    torch.testing.assert_close(
        2 * centres[..., 0] - centres[..., 1], torch.stack(expected).expand(3, 2)
    )


def test_the_coldest_centres_of_crd_are_the_best_and_the_worst_image():
    rollout = rollout_of(torch.zeros(3, 1), torch.tensor([5.0, -4.0, 0.0]))
    rho = torch.tensor([0.5, -0.2, 0.1])
    best, worst = crd(temperature=0.01).centres(rho, rollout).unbind(1)
    torch.testing.assert_close(best, torch.tensor([0.5, 1.0]).expand(3, 2))
    torch.testing.assert_close(worst, torch.tensor([-0.2, 0.1]).expand(3, 2))


def test_hard_centres_of_crd_are_over_the_better_and_over_the_worse_images():
    """The released softmax(R), with thresholds at the average. It is not split there."""
    advantage = torch.tensor([3.0, 1.0, 0.0, -4.0, 2.0, 0.0])
    rollout = rollout_of(torch.zeros(6, 1), advantage, [0, 0, 0, 0, 1, 1])
    rho, r = torch.tensor([0.5, -0.2, 0.3, 0.1, 0.7, -0.5]), advantage / 10 + 0.5
    values = torch.stack([rho, r], 1)
    better, worse = crd(centring="hard").centres(rho, rollout).unbind(1)
    torch.testing.assert_close(better[0], r[:2].softmax(0) @ values[:2])
    torch.testing.assert_close(worse[:4], values[3].expand(4, 2))
    torch.testing.assert_close(better[4:], values[4].expand(2, 2))
    # No image of the second prompt is worse than average: its weights are equal.
    torch.testing.assert_close(worse[4:], values[4:].mean(0).expand(2, 2))


@pytest.mark.parametrize("centring", [{}, {"temperature": 0.2}, {"centring": "hard"}])
def test_the_cross_entropy_of_crd_is_that_of_its_equation(centring):
    """The mean over the choices of p of BCE(β ρ_c, σ(R_c)), times A_max / β, as released."""
    policy, rollout = policy_at(torch.full((3,), 0.3), old=0.0), images()
    objective = crd(beta=2.0, form="bce", **centring)
    draw = same_for_all(rollout, 0.6, 0.4)
    xt, target = add_noise(rollout.x0, draw.t, draw.noise)
    errors = [
        mean_square(view.velocity(xt, draw.t, rollout.cond) - target)
        for view in (policy.at("old"), policy)
    ]
    rho, r = errors[0] - errors[1], optimality(rollout.advantage)
    losses = []
    for centre in objective.centres(rho.detach(), rollout).unbind(1):
        p, goal = (2.0 * (rho - centre[:, 0])).sigmoid(), (r - centre[:, 1]).sigmoid()
        losses.append(-(goal * p.log() + (1 - goal) * (1 - p).log()).mean())
    torch.testing.assert_close(
        objective.loss(policy, rollout, draw).total, 5.0 / 2.0 * torch.stack(losses).mean()
    )


@pytest.mark.parametrize(("form", "slope"), [("mse", -0.8), ("bce", -0.0987)])
def test_the_forms_of_crd_have_the_slopes_of_their_papers_code(form, slope):
    """At R_c = 0.4, ρ_c = 0 and β = 1. Both are flat where β ρ_c = R_c."""
    target = torch.tensor(0.4)
    for prediction, expected in ((0.0, slope), (0.4, 0.0)):
        x = torch.tensor(prediction, requires_grad=True)
        (found,) = torch.autograd.grad(FORMS[form](x, target), x)
        assert found.item() == pytest.approx(expected, abs=5e-5)


def test_a_copy_of_decay_1_keeps_crd_at_the_ratio_to_the_untouched_model():
    """As the released `use_old_for_loss: false`: `old` begins as the model without adapter."""
    old = CRD(old=Decay(value=1.0, end=1.0)).snapshots["old"]
    assert {old(updates) for updates in (0, 1, 7, 1000)} == {1.0}


def test_the_kl_of_crd_is_stronger_for_good_images():
    """From kl_least at R = 0 to kl.weight at R = 1. A prompt of one image has no other gradient."""
    policy, objective = policy_at(0.3, old=0.0), crd(VelocityKL(0.1), kl_least=0.02)
    for advantage, weight in [
        (-7.0, 0.02),
        (-5.0, 0.02),
        (0.0, 0.06),
        (2.5, 0.08),
        (5.0, 0.1),
        (7.0, 0.1),
    ]:
        rollout = rollout_of(torch.tensor([[2.0]]), torch.tensor([advantage]))
        loss = objective.loss(policy, rollout, same_for_all(rollout))
        assert loss.total.item() == pytest.approx(
            weight * (0.3 * g(torch.tensor(0.5)).item()) ** 2, rel=1e-5
        )


# In passes

PASSES = [
    *(crd(GUIDED, temperature=temperature, kl_least=0.1) for temperature in (0.0, 0.2)),
    *(CRD(temperature=temperature) for temperature in (0.0, 0.2)),
    CRD(form="bce", centring="hard"),
    dgpo(GUIDED, beta=2.0, clip_range=0.5),
    *(awm(GUIDED), nft(GUIDED), RWR(), RAFT(keep=3)),
]


@pytest.mark.parametrize("objective", PASSES)
@pytest.mark.parametrize(
    ("prompts", "images_per_pass"), [(1, 1), (1, 7), (1, 24), (2, 1), (2, 5), (2, 12), (2, 18)]
)
def test_24_images_give_the_same_gradient_in_any_passes(objective, prompts, images_per_pass):
    policy, rollout = policy_at(torch.full((3,), 0.2), old=0.05), images(prompts, 24 // prompts)
    whole = gradient(objective, policy, rollout)
    assert (
        relative_difference(
            gradient(objective, replace(policy, images_per_pass=images_per_pass), rollout), whole
        )
        < 1e-5
    )


@pytest.mark.parametrize("objective", PASSES)
@pytest.mark.parametrize("images_per_pass", [1, 4, 12, 18])
def test_prompts_of_unequal_size_give_the_same_gradient_in_any_passes(objective, images_per_pass):
    """Some images may have no score: passes of 12 cut prompts of 6 and 12 images."""
    policy, rollout = policy_at(torch.full((3,), 0.2), old=0.05), images(2, 12)[list(range(6, 24))]
    whole = gradient(objective, policy, rollout)
    assert (
        relative_difference(
            gradient(objective, replace(policy, images_per_pass=images_per_pass), rollout), whole
        )
        < 1e-5
    )


@pytest.mark.parametrize(
    ("objective", "names"),
    [
        (crd(), {"error_old", "centres"}),
        (crd(temperature=0.2), {"error_old", "centres"}),
        (crd(centring="hard", form="bce"), {"error_old", "centres"}),
        (dgpo(), {"preference"}),
        (RWR(), {"weight"}),
        (AWM(), set()),
    ],
)
def test_terms_of_groups_are_computed_first_only_if_passes_cut_a_group(objective, names):
    policy, rollout = policy_at(0.2, old=0.0), images(2, 12)
    for images_per_pass, cut in [(24, False), (12, False), (18, True), (1, True)]:
        for one in split(policy, objective, rollout, images_per_pass):
            assert set(one.batch.terms) == (names if cut else set())
            assert all(len(term) == len(one.batch) for term in one.batch.terms.values())
            assert not any(term.requires_grad for term in one.batch.terms.values())


# DGPO


def test_the_weight_of_every_group_is_half_at_the_reference_and_between_0_and_1_elsewhere():
    rollout, objective = images(), dgpo(beta=10.0)
    draw = next(iter(objective.draws(rollout)))
    assert (
        objective.loss(policy_at(0.0, old=0.0), rollout, draw).stats["group_weight"].values == 0.5
    ).all()
    weight = objective.loss(policy_at(0.5, old=0.0), rollout, draw).stats["group_weight"].values
    assert ((weight > 0) & (weight < 1) & (weight != 0.5)).all()
    assert (weight == weight[[0] * 4 + [4] * 4]).all()


def test_the_gradient_of_dgpo_is_that_of_its_log_likelihood():
    """-log σ(-S) / β, S = β mean_i A_i (e_i - e_ref,i), in the mean over the prompts."""
    policy, rollout, objective = policy_at(torch.full((3,), 0.2), old=0.2), images(), dgpo(beta=3.0)
    draw = next(iter(objective.draws(rollout)))
    xt, target = add_noise(rollout.x0, draw.t, draw.noise)
    e, e_ref = (
        mean_square(view.velocity(xt, draw.t, rollout.cond) - target)
        for view in (policy, policy.at("reference"))
    )
    S = 3 * (rollout.advantage * (e - e_ref)).view(2, 4).mean(1)
    (expected,) = torch.autograd.grad(-torch.nn.functional.logsigmoid(-S).mean() / 3, policy.delta)
    torch.testing.assert_close(gradient(objective, policy, rollout, [draw]), expected)


def test_dgpo_stops_where_the_group_is_told_apart():
    rollout = rollout_of(torch.tensor([[MEAN + 0.5], [MEAN - 0.5]]), torch.tensor([1.0, -1.0]))
    weights = [
        dgpo(beta=100.0)
        .loss(policy_at(delta, old=delta), rollout, same_for_all(rollout))
        .stats["group_weight"]
        .values[0]
        for delta in (-0.1, 0.0, 0.02, 0.2)
    ]
    assert weights == sorted(weights, reverse=True)
    assert weights[0] > 0.99
    assert weights[-1] < 0.01


def test_dgpo_compares_with_the_guided_reference():
    """Without guidance the policy that does what the guided reference does has W ½ no longer."""
    rollout = images()
    rollout = replace(rollout, cond=rollout_of(rollout.x0, rollout.advantage, null_mean=1.2).cond)
    draw = same_for_all(rollout)
    for guidance, delta in [(1.0, 0.0), (3.0, 0.6)]:
        for other in (0.0, 0.6):
            objective = dgpo(VelocityKL(0.1, guidance), beta=10.0)
            loss = objective.loss(policy_at(other, old=other), rollout, draw)
            weight = loss.stats["group_weight"].values
            assert torch.allclose(weight, torch.tensor(0.5), atol=1e-4) == (other == delta)


@pytest.mark.parametrize(
    "objective", [dgpo(beta=3.0), crd(), crd(temperature=0.2), awm(), nft(), RWR(), RAFT(keep=2)]
)
def test_the_order_of_images_does_not_matter(objective):
    policy, rollout = policy_at(torch.full((3,), 0.2), old=0.2), images()
    for order in ([3, 1, 0, 2, 5, 4, 7, 6], [4, 0, 5, 1, 6, 2, 7, 3]):
        torch.testing.assert_close(
            gradient(objective, policy, rollout[order]),
            gradient(objective, policy, rollout),
            rtol=1e-4,
            atol=1e-5,
        )


# Times and noise


@pytest.mark.parametrize(
    "times",
    [ForwardTimes(), ForwardTimes(count=5, low=0.2, high=0.7), ForwardTimes(count=1, high=0.9)],
)
def test_there_is_one_time_in_every_stratum(times):
    batch = images(prompts=100, per_prompt=2)
    width = (times.high - times.low) / times.count
    draws = list(times(batch))
    assert [draw.index for draw in draws] == list(range(times.count))
    for draw in draws:
        start = times.low + draw.index * width
        assert (draw.t >= start - 1e-6).all()
        assert (draw.t < start + width + 1e-6).all()
        assert (draw.t >= times.low).all()
        assert (draw.t < times.high).all()


def test_the_places_within_the_strata_are_independent():
    first, second, _ = ForwardTimes()(images(prompts=50, per_prompt=1))
    assert (second.t - 1 / 3 - first.t).abs().min() > 1e-5


def test_images_of_a_prompt_share_times_and_noise_and_prompts_do_not():
    batch = images(prompts=3, per_prompt=4)
    draws = list(ForwardTimes()(batch))
    assert not torch.equal(draws[0].noise, draws[1].noise)
    for draw in draws:
        t, noise = draw.t.view(3, 4), draw.noise.view(3, 4, 3)
        assert (t == t[:, :1]).all()
        assert (noise == noise[:, :1]).all()
        assert t[:, 0].unique().numel() == 3
        assert noise[:, 0, 0].unique().numel() == 3


@pytest.mark.parametrize("objective", [RWR(), RAFT(), AWM(times=ForwardTimes(shared=False))])
def test_images_have_their_own_times_and_noise_where_they_are_not_shared(objective):
    for draw in objective.draws(images(prompts=3, per_prompt=4)):
        assert draw.t.unique().numel() == 12
        assert draw.noise[:, 0].unique().numel() == 12


@pytest.mark.parametrize("shared", [True, False])
def test_a_piece_of_a_batch_gets_the_draws_it_gets_in_the_whole(shared):
    batch, times = images(), ForwardTimes(shared=shared)
    for whole, part in zip(times(batch), times(batch[3:6]), strict=True):
        assert torch.equal(part.t, whole.t[3:6])
        assert torch.equal(part.noise, whole.noise[3:6])


def test_another_step_has_other_times():
    batch = images()
    keys = replace(batch.keys, step=batch.keys.step + 1)
    for now, then in zip(
        ForwardTimes()(batch), ForwardTimes()(replace(batch, keys=keys)), strict=True
    ):
        assert (now.t != then.t).all()
        assert (now.noise != then.noise).all()


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
def test_a_shift_moves_times_towards_the_noise(distribution):
    batch, settings = images(), {"distribution": distribution, "low": 0.1, "high": 0.9}
    for plain, moved in zip(
        ForwardTimes(**settings)(batch), ForwardTimes(**settings, shift=3.0)(batch), strict=True
    ):
        t = (plain.t - 0.1) / 0.8
        torch.testing.assert_close(moved.t, 0.1 + 0.8 * 3 * t / (1 + 2 * t))
        assert torch.equal(moved.noise, plain.noise)


def test_the_logits_of_logit_normal_times_are_stratified_normals():
    count = 10
    for draw in ForwardTimes(count=count, distribution="logit_normal")(
        images(prompts=50, per_prompt=1)
    ):
        below = Normal(0.0, 1.0).cdf(draw.t.double().logit())
        assert (below >= draw.index / count - 1e-5).all()
        assert (below <= (draw.index + 1) / count + 1e-5).all()


@pytest.mark.parametrize(
    ("distribution", "expected"),
    [("uniform", [0.25, 0.5, 0.75]), ("logit_normal", [0.33748, 0.5, 0.66252])],
)
def test_single_times_have_the_quartiles_of_their_distribution(distribution, expected):
    (draw,) = ForwardTimes(count=1, distribution=distribution)(
        images(prompts=4000, per_prompt=1, elements=1)
    )
    torch.testing.assert_close(
        draw.t.quantile(torch.tensor([0.25, 0.5, 0.75])), torch.tensor(expected), rtol=0, atol=0.02
    )


def test_the_20_draws_of_crd_are_always_the_same():
    """Of ten sampler times, the first and the fifth three times, the last never, others twice."""
    times = ForwardTimes(count=20, distribution="discrete", points=10, shift=3.0)
    schedule = [3 * u / (1 + 2 * u) for u in (1 - i / 10 for i in range(9))]
    expected = [t for i, t in enumerate(schedule) for _ in range(3 if i in (0, 4) else 2)]
    for batch in (images(), images(prompts=50, per_prompt=1)):
        drawn = torch.stack([draw.t for draw in times(batch)], 1)
        torch.testing.assert_close(drawn, torch.tensor(expected).expand(len(batch), 20))


def test_discrete_times_are_drawn_within_strata_of_two():
    """AWM's six times: of fourteen sampler times, one of each of six pairs of the first twelve."""
    times = ForwardTimes(
        count=6, distribution="discrete", points=14, low=0.25, shift=3.0, shared=False
    )
    schedule = torch.tensor([3 * u / (1 + 2 * u) for u in (1 - i / 14 for i in range(14))])
    for draw in times(images(prompts=50, per_prompt=2)):
        pair = schedule[2 * draw.index : 2 * draw.index + 2]
        torch.testing.assert_close(draw.t.unique().flip(0), pair)


def test_discrete_times_begin_and_end_within_their_range():
    times = ForwardTimes(count=4, distribution="discrete", points=10, low=0.4, high=0.9)
    drawn = torch.stack([draw.t for draw in times(images(prompts=50, per_prompt=1))])
    torch.testing.assert_close(drawn.unique(), torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9]))


@pytest.mark.parametrize(
    "settings",
    [
        {"count": 0},
        {"low": 0.5, "high": 0.5},
        {"low": -0.1},
        {"high": 1.1},
        {"shift": 0.0},
        {"distribution": "discrete", "points": 1},
        {"distribution": "discrete", "points": 10, "low": 0.55, "high": 0.65},
    ],
)
def test_times_that_mean_nothing_are_refused(settings):
    with pytest.raises(UserError, match=r"must be|Write low < high|of 10 discrete times 1 lie"):
        ForwardTimes(**settings)


@pytest.mark.parametrize(
    ("make", "answer"),
    [
        (lambda: NFT(beta=0.0), "must be greater than 0"),
        (lambda: AWM(trust=-0.1), "trust is -0.1; it must be greater than or equal to 0"),
        (
            lambda: CRD(temperature=-1.0),
            "temperature is -1.0; it must be greater than or equal to 0",
        ),
        (lambda: CRD(kl=VelocityKL(0.1), kl_least=0.2), "kl.weight is 0.1"),
        (lambda: CRD(centring="hard", temperature=0.1), "centring is hard, which has none"),
        (lambda: DGPO(clip_range=0.0), "must be greater than 0"),
        (lambda: RWR(temperature=0.0), "must be greater than 0"),
        (lambda: RAFT(keep=0), "must be greater than or equal to 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, answer):
    with pytest.raises(UserError, match=answer):
        make()


# What they share


def test_the_group_mean_is_over_the_images_of_a_prompt_wherever_they_stand():
    values, group = torch.tensor([1.0, 10.0, 3.0, 20.0, 5.0, 7.0]), torch.tensor([4, 9, 4, 9, 4, 2])
    assert group_mean(values, group).tolist() == [3, 15, 3, 15, 3, 7]


def test_the_group_mean_of_equal_numbers_is_that_number():
    values = torch.full((7,), 0.1)
    assert torch.equal(group_mean(values, torch.tensor([0, 0, 0, 1, 1, 1, 1])), values)


def test_optimality_is_half_for_the_average_image_and_ends_at_the_limit():
    advantage = torch.tensor([-9.0, -5.0, -2.5, 0.0, 1.0, 5.0, 9.0])
    torch.testing.assert_close(
        optimality(advantage), torch.tensor([0.0, 0.0, 0.25, 0.5, 0.6, 1.0, 1.0])
    )
    torch.testing.assert_close(
        optimality(advantage, limit=2.0), torch.tensor([0.0, 0.0, 0.0, 0.5, 0.75, 1.0, 1.0])
    )


def test_the_relative_error_is_over_its_mean_size_which_takes_no_gradient():
    prediction, target = (
        torch.tensor([[1.0, 4.0], [2.0, 2.0]], requires_grad=True),
        torch.tensor([[0.0, 1.0], [2.0, 2.0]]),
    )
    error = adaptive_error(prediction, target)
    torch.testing.assert_close(error, torch.tensor([5.0 / 2.0, 0.0]))
    error.sum().backward()
    torch.testing.assert_close(prediction.grad, torch.tensor([[1.0 / 2, 3.0 / 2], [0.0, 0.0]]))
