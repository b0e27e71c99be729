"""Objectives on pairs and on paths, against formulas, exact optima and finite differences."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal
from torch.testing import assert_close

from flowalign import distributed
from flowalign.batch import Keys, Pairs, Rollout
from flowalign.data.examples import Example
from flowalign.data.prompts import Prompt
from flowalign.dynamics import flow_sde, Window
from flowalign.errors import UserError
from flowalign.flow import add_noise
from flowalign.objectives.base import Objective
from flowalign.objectives.d3po import D3PO
from flowalign.objectives.ddpo import DDPO
from flowalign.objectives.dpo import DPO, sigmoid
from flowalign.objectives.draws import Draw, PathSteps
from flowalign.objectives.flow_grpo import FlowGRPO, normalised_log_ratio
from flowalign.objectives.kto import KTO, REFERENCE_POINTS
from flowalign.objectives.prdp import PRDP
from flowalign.objectives.terms import Reference
from flowalign.policy import Policy, Sampler
from flowalign.rollouts.collect import collect
from flowalign.rollouts.ranking import given_weights, rank
from flowalign.rollouts.ranking_settings import Ranking
from flowalign.training.gradient import whole_terms
from tests.objectives.toy import (
    ChainPolicy,
    free,
    minimiser,
    pairs_of,
    path_pairs,
    random,
    rollout_of,
    standard_normal,
    VelocityPolicy,
)
from tests.tiny import make_policy, stir, two_groups

ONE = torch.ones(1, 1)
LATENT = (2, 3)


def at_time(t: float, count: int = 1, noise: Tensor | None = None) -> Draw:
    return Draw(0, torch.full((count,), t), random(count, 1) if noise is None else noise)


def free_case(count: int = 2, t: float = 0.6) -> tuple[VelocityPolicy, Pairs, Draw, Tensor]:
    """Pairs of LATENT pictures, freely chosen velocities of both sides, and their targets."""
    x0, noise = random(2 * count, *LATENT), random(count, *LATENT, seed=1)
    target = torch.cat([noise, noise]) - x0
    policy = VelocityPolicy(
        free,
        (target + random(2 * count, *LATENT, seed=2)).requires_grad_(),
        target + random(*LATENT, seed=3),
    )
    return policy, pairs_of(*x0.chunk(2)), at_time(t, count, noise), target


def with_terms(objective: Objective, policy: Any, pairs: Pairs) -> list[Pairs]:
    """The pairs with the terms of each draw."""
    by_draw = whole_terms(policy, objective, pairs, len(pairs))
    return [replace(pairs, terms=terms) for terms in by_draw]


def gradient(total: Tensor, parameter: Tensor) -> Tensor:
    return torch.autograd.grad(total, parameter)[0]


# DPO


@pytest.mark.parametrize("form", ["sigmoid", "ipo", "hinge"])
def test_dpo_s_loss_at_the_reference_is_that_of_an_even_bet(form):
    policy, pairs, draw, _ = free_case()
    loss = DPO(form=form, label_smoothing=0.1).loss(
        replace(policy, theta=policy.reference), pairs, draw
    )
    assert loss.total.item() == pytest.approx(
        {"sigmoid": math.log(2), "ipo": 0.25, "hinge": 1.0}[form]
    )
    assert loss.stats["chosen_preferred"].values.tolist() == [0.5, 0.5]


def test_dpo_s_gradient_is_the_formula():
    """∂L/∂v = ±β σ(-s) (v - target) / n, over the number of pairs."""
    policy, pairs, draw, target = free_case()
    loss = DPO(beta=4.0).loss(policy, pairs, draw)
    wrong = (-loss.stats["margin"].values).sigmoid().repeat(2)[:, None, None]
    sign = torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None, None]
    assert_close(
        gradient(loss.total, policy.theta), sign * 4.0 * wrong * (policy.theta - target) / 6 / 2
    )


def test_dpo_s_gradient_is_that_of_finite_differences():
    """Errors are float32 whatever the velocity is, hence the tolerance."""
    policy, pairs, draw, _ = free_case()
    objective, h = DPO(beta=4.0), 1e-2

    def total(v: Tensor) -> float:
        return objective.loss(replace(policy, theta=v), pairs, draw).total.double().item()

    found = gradient(objective.loss(policy, pairs, draw).total, policy.theta)
    for place in [(0, 0, 0), (1, 1, 2), (2, 0, 1), (3, 1, 0)]:
        moved = torch.zeros_like(policy.theta)
        moved[place] = h
        with torch.no_grad():
            difference = (total(policy.theta + moved) - total(policy.theta - moved)) / (2 * h)
        assert found[place].item() == pytest.approx(difference, rel=2e-3, abs=1e-5)


def opposite_pictures(
    t: float, beta: float, **settings: object
) -> tuple[DPO, VelocityPolicy, Pairs, Draw]:
    """+1 beats -1, with the velocity of N(0, 1) data plus θ: s = -2 β θ t / (t² + (1 - t)²)."""
    policy = VelocityPolicy(standard_normal, torch.zeros(1), torch.zeros(1))
    return DPO(beta=beta, **settings), policy, pairs_of(ONE, -ONE), at_time(t)


def test_dpo_s_margin_is_linear_in_the_move_whatever_the_noise():
    objective, policy, pairs, _ = opposite_pictures(t=0.6, beta=4.0)
    for noise in (-1.3, 0.0, 2.0):
        loss = objective.loss(
            replace(policy, theta=torch.tensor([-0.1])), pairs, at_time(0.6, noise=noise * ONE)
        )
        assert loss.stats["margin"].values.item() == pytest.approx(
            2 * 4 * 0.1 * 0.6 / 0.52, rel=1e-5
        )


@pytest.mark.parametrize(
    ("settings", "theta", "value"),
    [
        ({"label_smoothing": 0.2}, -0.1501816, 0.5004024),
        ({"form": "ipo"}, -0.5 * 0.52 / (2 * 4 * 0.6), 0.0),
    ],
)
def test_dpo_has_its_optimum_where_the_formula_says(settings, theta, value):
    """Smoothed by p, σ(s) = 1 - p, at the entropy of p; IPO, s = ½."""
    objective, policy, pairs, draw = opposite_pictures(t=0.6, beta=4.0, **settings)
    found = minimiser(
        lambda theta: objective.loss(replace(policy, theta=theta), pairs, draw).total,
        torch.zeros(1),
    )
    loss = objective.loss(replace(policy, theta=found), pairs, draw)
    assert found.item() == pytest.approx(theta, abs=1e-6)
    assert loss.total.item() == pytest.approx(value, abs=1e-6)


def test_dpo_without_label_noise_never_stops_moving_towards_the_chosen():
    objective, policy, pairs, draw = opposite_pictures(t=0.6, beta=4.0)
    losses = [
        objective.loss(replace(policy, theta=torch.tensor([-m])), pairs, draw).total.item()
        for m in (0, 0.1, 0.5, 1, 2)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-7


@pytest.mark.parametrize(
    ("s", "value", "slope"), [(0.5, 0.5, -1.0), (1.5, 0.0, 0.0), (-2.0, 3.0, -1.0)]
)
def test_the_hinge_is_satisfied_by_a_margin_of_one(s, value, slope):
    objective, policy, pairs, draw = opposite_pictures(t=0.6, beta=4.0, form="hinge")
    per_theta = -2 * 4 * 0.6 / 0.52
    theta = torch.tensor([s / per_theta], requires_grad=True)
    total = objective.loss(replace(policy, theta=theta), pairs, draw).total
    assert total.item() == pytest.approx(value, abs=1e-5)
    assert gradient(total, theta).item() == pytest.approx(slope * per_theta, rel=1e-5, abs=1e-9)


def test_swapping_chosen_and_rejected_negates_the_margin():
    policy, pairs, draw, _ = free_case()
    swapped = replace(pairs, chosen=pairs.rejected, rejected=pairs.chosen)
    turned = replace(policy, theta=policy.theta.roll(2, 0), reference=policy.reference.roll(2, 0))
    margin, other = (
        DPO().loss(*case, draw).stats["margin"].values
        for case in ((policy, pairs), (turned, swapped))
    )
    assert_close(other, -margin)
    assert margin.abs().min() > 1


def test_chosen_and_rejected_share_time_and_noise():
    seen = []

    def field(x: Tensor, t: Tensor, theta: Tensor) -> Tensor:
        seen.append((x, t))
        return theta * x

    pairs = pairs_of(random(5, 4), random(5, 4, seed=1))
    (draw,) = DPO().draws(pairs)
    DPO().loss(VelocityPolicy(field, torch.ones(1), torch.ones(1)), pairs, draw)
    assert len(seen) == 2
    for x, t in seen:
        (x_w, x_l), (t_w, t_l) = x.chunk(2), t.chunk(2)
        assert torch.equal(t_w, t_l)
        assert_close(
            x_w - (1 - t_w) * pairs.x0[0], x_l - (1 - t_w) * pairs.x0[1], atol=1e-6, rtol=0
        )
    assert len(draw.t.unique()) == 5


@pytest.mark.parametrize("objective", [DPO(beta=1.0, imitate=0.5), KTO(beta=1.0)])
def test_a_pair_of_weight_0_gives_no_gradient(objective):
    policy, pairs, draw, _ = free_case()
    (pairs,) = with_terms(objective, policy, replace(pairs, weight=torch.tensor([1.0, 0.0])))
    found = gradient(objective.loss(policy, pairs, draw).total, policy.theta)
    assert found[[0, 2]].abs().min() > 0
    assert found[[1, 3]].abs().max() == 0


def test_a_weight_scales_its_pair_s_gradient():
    policy, pairs, draw, _ = free_case()
    even, uneven = (
        gradient(
            DPO(beta=4.0)
            .loss(policy, replace(pairs, weight=torch.tensor([1.0, weight])), draw)
            .total,
            policy.theta,
        )
        for weight in (1.0, 3.0)
    )
    assert_close(uneven, even * torch.tensor([1.0, 3.0, 1.0, 3.0])[:, None, None])


def test_the_beta_of_noise_errors_is_diffusion_dpo_to_the_letter():
    policy, pairs, draw, _ = free_case(t=0.3)
    margin = (
        DPO(beta=7.0, beta_over_time="of_noise_error")
        .loss(policy, pairs, draw)
        .stats["margin"]
        .values
    )
    xt, _ = add_noise(torch.cat(pairs.x0), draw.t.repeat(2), draw.noise.repeat(2, 1, 1))

    def noise_error(v: Tensor) -> Tensor:
        return (xt + (1 - 0.3) * v - draw.noise.repeat(2, 1, 1)).square().mean((1, 2))

    chosen, rejected = (noise_error(policy.theta) - noise_error(policy.reference)).chunk(2)
    assert_close(margin, -7.0 / 2 * (chosen - rejected))
    assert_close(margin, 0.7**2 * DPO(beta=7.0).loss(policy, pairs, draw).stats["margin"].values)


def test_imitating_adds_the_chosen_picture_s_own_error():
    policy, pairs, draw, target = free_case()
    plain, imitating = (
        DPO(imitate=weight).loss(policy, pairs, draw).total for weight in (0.0, 0.25)
    )
    error = (policy.theta - target)[:2].square().mean()
    assert_close(imitating - plain, 0.25 * error, rtol=1e-4, atol=1e-5)


# KTO


def kto_gradient(objective: KTO, policy: VelocityPolicy, pairs: Pairs, draw: Draw) -> Tensor:
    return gradient(objective.loss(policy, pairs, draw).total, policy.theta)


def with_reference_point(
    objective: KTO, policy: VelocityPolicy, pairs: Pairs, draw: Draw, z: float
) -> Pairs:
    errors_ref = objective.errors(policy.at("reference"), pairs, draw).detach().chunk(2)
    one = torch.ones(len(pairs))
    terms = {"liked": one, "disliked": one, "g_liked": z * one, "g_disliked": z * one}
    return replace(pairs, terms={**terms, "errors_ref": torch.stack(errors_ref, 1)})


def gained(objective: KTO, policy: VelocityPolicy, pairs: Pairs, draw: Draw) -> Tensor:
    return (
        objective.errors(policy.at("reference"), pairs, draw)
        - objective.errors(policy, pairs, draw)
    ).detach()


@pytest.mark.parametrize("error", [1.0, 0.5])
def test_kto_s_loss_is_half_where_every_image_gained_the_same(error):
    """At the reference, and where all errors fell from 1 to ¼."""
    policy, pairs, draw, target = free_case()
    policy = replace(policy, theta=target + error, reference=target + 1)
    objective = KTO(liked=0.8, disliked=0.8)
    prepared = with_reference_point(objective, policy, pairs, draw, 1 - error**2)
    assert objective.loss(policy, prepared, draw).total.item() == pytest.approx(0.8 / 2, abs=1e-4)


def test_kto_s_gradient_draws_liked_images_near_and_pushes_disliked_away():
    """∂L/∂v = ±λ 2 β h (1 - h) (v - target) / n, over the number of images."""
    policy, pairs, draw, target = free_case()
    objective, z = KTO(beta=3.0, liked=0.7, disliked=1.5), 0.2
    g = (policy.reference - target).square().mean((1, 2)) - (policy.theta - target).square().mean(
        (1, 2)
    )
    y, scale = torch.tensor([1.0, 1, -1, -1]), torch.tensor([0.7, 0.7, 1.5, 1.5])
    h = (y * 3.0 * (g - z)).sigmoid()
    expected = (y * scale * 2 * 3.0 * h * (1 - h))[:, None, None] * (policy.theta - target) / 6 / 4
    prepared = with_reference_point(objective, policy, pairs, draw, z)
    assert_close(kto_gradient(objective, policy, prepared, draw), expected)


def kto_case(step: float) -> tuple[KTO, VelocityPolicy, Pairs]:
    """Pictures of ±1, a policy that moves by `step`."""
    pairs = pairs_of(1 + 0.1 * random(4, 1), -2 + 0.1 * random(4, 1, seed=1))
    return (
        KTO(beta=2.0),
        VelocityPolicy(standard_normal, torch.tensor([step], requires_grad=True), torch.zeros(1)),
        pairs,
    )


def test_kto_s_reference_point_is_the_mean_over_the_whole_update():
    objective, policy, pairs = kto_case(step=0.3)
    (draw,) = objective.draws(pairs)
    (prepared,) = with_terms(objective, policy, pairs)
    mean = gained(objective, policy, pairs, draw).mean()
    assert mean > 0
    loss = objective.loss(policy, prepared, draw)
    assert_close(loss.stats["reference_point"].values, mean.expand(8))
    assert not loss.stats["reference_point"].values.requires_grad


def test_a_rare_kind_has_the_same_influence_on_a_balanced_reference_point():
    """Means of 2e-3 over 80 likes and -4e-3 over 20 dislikes: 8e-4, or -1e-3 if balanced."""
    terms = {"liked": 0.8, "disliked": 0.2, "g_liked": 0.8 * 2e-3, "g_disliked": 0.2 * -4e-3}
    tensors = {name: torch.tensor(value) for name, value in terms.items()}
    points = {name: point(tensors).item() for name, point in REFERENCE_POINTS.items()}
    assert points == pytest.approx({"mean": 8e-4, "balanced": -1e-3})


def test_single_likes_and_dislikes_have_the_loss_of_kto():
    """g = (1, -.5, .2, 0)e-3, y = (+, -, +, -), β = 1000: z = 1.75e-4 and the loss .39805."""
    g, liked = torch.tensor([1e-3, -5e-4, 2e-4, 0.0]), torch.tensor([True, False, True, False])
    errors = torch.tensor([1e-2]).sub(g)
    singles = replace(
        pairs_of(errors.sqrt()[:, None], errors.sqrt()[:, None]),
        voted=torch.stack([liked, ~liked], 1),
    )
    policy = VelocityPolicy(lambda x, t: 0 * x, torch.zeros(1, requires_grad=True), torch.zeros(1))
    objective, draw = FixedErrors(beta=1000.0), at_time(0.5, 4, torch.zeros(4, 1))
    means = {
        "liked": liked.float().mean(),
        "disliked": (~liked).float().mean(),
        "g_liked": (g * liked).mean(),
        "g_disliked": (g * ~liked).mean(),
    }
    terms = {name: value.expand(4) for name, value in means.items()}
    terms["errors_ref"] = torch.full((4, 2), 1e-2)
    loss = objective.loss(policy, replace(singles, terms=terms), draw)
    assert loss.stats["reference_point"].values[0].item() == pytest.approx(1.75e-4)
    assert loss.total.item() == pytest.approx(0.39805, abs=1e-5)


class FixedErrors(KTO):
    """KTO whose errors are the squares of the pictures."""

    def errors(self, policy: Any, pairs: Pairs, draw: Draw) -> Tensor:
        return torch.cat(pairs.x0)[:, 0].square()


def test_pieces_of_a_kto_update_have_the_gradient_of_the_whole():
    objective, policy, pairs = kto_case(step=0.3)
    (prepared,) = with_terms(objective, policy, pairs)
    (draw,) = objective.draws(prepared)
    whole = kto_gradient(objective, policy, prepared, draw)
    pieces = [
        kto_gradient(objective, policy, piece, *objective.draws(piece))
        for piece in prepared.pieces(1)
    ]
    assert_close(torch.stack(pieces).mean(0), whole)
    alone = [
        kto_gradient(objective, policy, *with_terms(objective, policy, p), *objective.draws(p))
        for p in pairs.pieces(1)
    ]
    assert not torch.allclose(torch.stack(alone).mean(0), whole, rtol=1e-2)


def test_kto_s_reference_point_is_never_negative():
    objective, policy, pairs = kto_case(step=-1.0)
    pairs = replace(pairs, rejected=pairs.chosen - 2.5)
    policy = replace(policy, theta=torch.tensor([5.0]))
    (draw,) = objective.draws(pairs)
    assert gained(objective, policy, pairs, draw).mean() < 0
    (prepared,) = with_terms(objective, policy, pairs)
    loss = objective.loss(policy, prepared, draw)
    assert loss.stats["reference_point"].values.abs().max() == 0


@pytest.mark.parametrize("make", [KTO, PRDP])
def test_the_reference_is_asked_once_about_every_image_and_draw(make, monkeypatch):
    policy = make_policy(Sampler(steps=3, dynamics=flow_sde))
    rollout = collect(policy.at("policy"), two_groups(policy), 6)
    pairs = rank(replace(rollout, reward=torch.arange(6.0)), Ranking())
    asked, velocity = [], Policy.velocity

    def counted(self: Policy, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        asked.append((self.weights, len(x)))
        return velocity(self, x, t, cond)

    monkeypatch.setattr(Policy, "velocity", counted)
    objective = make()
    draws = list(objective.draws(pairs))
    for piece, draw in zip(with_terms(objective, policy, pairs), draws, strict=True):
        objective.loss(policy, piece, draw)
    assert (
        asked.count(("reference", 2 * len(pairs)))
        == len(draws)
        == len([name for name, _ in asked if name == "reference"])
    )


@pytest.mark.parametrize("make", [DPO, KTO])
def test_every_pair_of_a_prompt_has_a_time_and_a_noise_of_its_own(make):
    """Otherwise 16 pairs of 8 images would count no more than 8 images."""
    policy = make_policy(Sampler(steps=3, dynamics=flow_sde))
    rollout = collect(policy.at("policy"), two_groups(policy), 6)
    keys = Keys.training(0, 0, [(0, image) for image in range(6)])
    pairs = rank(replace(rollout, keys=keys, reward=torch.arange(6.0)), Ranking(top=3))
    (draw,) = make().draws(pairs)
    assert len(draw.t.unique()) == len(draw.noise.flatten(1).unique(dim=0)) == len(pairs) == 9


# D3PO


def test_d3po_s_log_ratio_is_that_of_two_normal_densities():
    path = random(2, 2, *LATENT)
    policy = ChainPolicy(torch.tensor([0.02]), stds=(0.5,))
    loss = D3PO(beta=3.0).loss(policy, path_pairs(path[:1], path[1:], torch.zeros(0)), 0)
    move = path[:, 1]
    densities = [Normal(path[:, 0] + bias, 0.5).log_prob(move).mean((1, 2)) for bias in (0.02, 0.0)]
    chosen, rejected = densities[0] - densities[1]
    assert loss.stats["ratio/clipped"].values.sum() == 0
    assert_close(
        loss.stats["margin"].values, (3.0 * (chosen - rejected))[None], rtol=1e-4, atol=1e-6
    )


def test_d3po_s_loss_at_the_reference_is_log_2():
    pairs = path_pairs(random(3, 2, 4), random(3, 2, 4, seed=1), torch.zeros(0))
    loss = D3PO().loss(ChainPolicy(torch.zeros(1)), pairs, 0)
    assert loss.total.item() == pytest.approx(math.log(2))
    assert loss.stats["chosen_preferred"].values.tolist() == [0.5] * 3


@pytest.mark.parametrize(
    ("chosen", "rejected"), [(2.0, -2.0), (0.1, -2.0), (2.0, -0.1), (0.1, -0.1)]
)
def test_a_ratio_outside_the_clip_range_gives_no_gradient(chosen, rejected):
    """log ratio = θ x - θ² / 2 with θ = 0.2: a limit near ±0.1 clips |x| = 2, but not 0.1."""
    theta = torch.tensor([0.2], requires_grad=True)
    sides = (torch.tensor([[[0.0], [x]]]) for x in (chosen, rejected))
    loss = D3PO(beta=1.0).loss(ChainPolicy(theta), path_pairs(*sides, torch.zeros(0)), 0)
    log_ratios = torch.tensor([0.2 * x - 0.02 for x in (chosen, rejected)]).clamp(
        math.log(0.9), math.log(1.1)
    )
    wrong = (log_ratios[1] - log_ratios[0]).sigmoid()
    inside = [float(abs(x) < 1) for x in (chosen, rejected)]
    expected = -wrong * (inside[0] * (chosen - 0.2) - inside[1] * (rejected - 0.2))
    assert gradient(loss.total, theta).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize(("chosen", "rejected"), [(2.0, -2.0), (-2.0, 2.0), (-2.0, -0.1)])
def test_a_one_sided_clip_still_pulls_back_what_moved_the_wrong_way(chosen, rejected):
    """min(log r_w, log(1 + ε)) and max(log r_l, log(1 - ε)); θ = 0.2 as above."""
    theta = torch.tensor([0.2], requires_grad=True)
    pairs = path_pairs(*(torch.tensor([[[0.0], [x]]]) for x in (chosen, rejected)), torch.zeros(0))
    objective = D3PO(beta=1.0, clip="one_sided")
    loss = objective.loss(ChainPolicy(theta), pairs, 0)
    log_w, log_l = (0.2 * x - 0.02 for x in (chosen, rejected))
    margin = min(log_w, math.log(1.1)) - max(log_l, math.log(0.9))
    assert loss.stats["margin"].values.item() == pytest.approx(margin, abs=1e-6)
    inside = float(log_w < math.log(1.1)), float(log_l > math.log(0.9))
    wrong = 1 / (1 + math.exp(margin))
    expected = -wrong * (inside[0] * (chosen - 0.2) - inside[1] * (rejected - 0.2))
    assert gradient(loss.total, theta).item() == pytest.approx(expected, abs=1e-6)
    if abs(chosen) == abs(rejected):
        two_sided = D3PO(beta=1.0).loss(ChainPolicy(theta), pairs, 0)
        assert gradient(two_sided.total, theta).item() == 0
        assert (abs(expected) > 1) == (chosen < rejected)


def test_both_clips_have_the_same_gradient_at_the_reference():
    pairs = path_pairs(random(3, 2, 4), random(3, 2, 4, seed=1), torch.zeros(0))
    slopes = []
    for clip in ("two_sided", "one_sided"):
        theta = torch.zeros(1, requires_grad=True)
        slopes.append(gradient(D3PO(clip=clip).loss(ChainPolicy(theta), pairs, 0).total, theta))
    assert torch.equal(*slopes)


def test_d3po_s_anchor_is_the_kl_to_the_model_without_adapter_wherever_the_reference_is():
    """KL(N(θ, std²) ‖ N(0, std²)) = θ² / 2 std²."""
    pairs = path_pairs(random(3, 2, 4), random(3, 2, 4, seed=1), torch.zeros(0))
    copies = {Reference.COPY: torch.tensor([0.1])}
    policy = ChainPolicy(torch.tensor([0.3]), stds=(0.5,), copies=copies)
    for reference in (Reference(), Reference(every=2)):
        plain, anchored = (
            D3PO(kl_weight=weight, reference=reference).loss(policy, pairs, 0)
            for weight in (0.0, 0.7)
        )
        kl = 0.3**2 / (2 * 0.5**2)
        assert_close(anchored.stats["kl"].values, torch.full((6,), kl))
        assert (anchored.total - plain.total).item() == pytest.approx(0.7 * kl, rel=1e-5)
        assert "kl" not in plain.stats


def bradley_terry(slope: float, mean: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """One-step paths of N(mean, 1) in both orders, weighted by how often slope · x prefers each."""
    a, b = random(2, 200, 1) + mean
    weight = torch.cat([(slope * (a - b)).sigmoid(), (slope * (b - a)).sigmoid()])[:, 0]
    start = torch.zeros(400, 1)
    return (
        torch.stack([start, torch.cat([a, b])], 1),
        torch.stack([start, torch.cat([b, a])], 1),
        weight,
    )


def test_d3po_ends_at_the_kl_regularised_optimum():
    """Steps N(θ, 1), reference N(0, 1), reward c x: θ = c / β. So small that nothing is clipped."""
    c, beta = 0.7, 7.0
    chosen, rejected, weight = bradley_terry(c)
    pairs, objective = (
        path_pairs(chosen, rejected, torch.zeros(0), weight=weight),
        D3PO(beta=beta, clip_range=0.9),
    )
    found = minimiser(
        lambda theta: objective.loss(ChainPolicy(theta), pairs, 0).total, torch.zeros(1)
    )
    assert objective.loss(ChainPolicy(found), pairs, 0).stats["ratio/clipped"].values.sum() == 0
    assert found.item() == pytest.approx(c / beta, rel=1e-4)


def test_a_reference_that_follows_has_no_optimum():
    """Renewed at each optimum, θ = k c / β after k rounds: as far as one round at β / k."""
    c, beta, found = 0.7, 7.0, torch.zeros(1)
    objective = D3PO(beta=beta, clip_range=0.9, reference=Reference(every=1))
    for number in range(1, 5):
        chosen, rejected, weight = bradley_terry(c, found.item())
        pairs = path_pairs(chosen, rejected, torch.zeros(0), weight=weight)
        copies = {Reference.COPY: found}
        found = minimiser(
            lambda theta, copies=copies, pairs=pairs: (
                objective.loss(ChainPolicy(theta, copies=copies), pairs, 0).total
            ),
            found,
        )
        assert found.item() == pytest.approx(number * c / beta, rel=1e-3)


@pytest.mark.parametrize("make", [DPO, KTO])
def test_errors_are_compared_with_the_reference_that_the_settings_name(make):
    policy, pairs, draw, target = free_case()
    moved = target + random(*target.shape, seed=9)
    policy = replace(policy, copies={Reference.COPY: moved})
    margins = []
    for reference in (Reference(), Reference(every=4)):
        objective = make(beta=4.0, reference=reference)
        assert set(objective.snapshots) == ({Reference.COPY} if reference.every else set())
        (prepared,) = with_terms(objective, policy, pairs)[:1]
        margins.append(objective.loss(policy, prepared, draw).total.item())
    assert margins[0] != pytest.approx(margins[1], rel=1e-3)
    at_reference = replace(policy, theta=moved)
    (prepared,) = with_terms(make(reference=Reference(every=4)), at_reference, pairs)[:1]
    loss = make(reference=Reference(every=4)).loss(at_reference, prepared, draw)
    assert loss.total.item() == pytest.approx({DPO: math.log(2), KTO: 0.5}[make], rel=1e-5)


def test_a_moving_reference_is_a_copy_that_follows_every_so_many_updates():
    (decay,) = D3PO(reference=Reference(every=40)).snapshots.values()
    assert [decay(updates) for updates in (39, 40, 41, 80)] == [1, 0, 1, 0]
    (decay,) = DPO(reference=Reference(every=20, decay=0.9)).snapshots.values()
    assert [decay(updates) for updates in (10, 20)] == [1, 0.9]


# PRDP

STDS = (0.5, 1.0, 0.7)


def chains(count: int = 50) -> tuple[Tensor, Tensor]:
    """Paths of the reference from one start, chosen and rejected, without order."""
    noise = random(2, count, 3) * torch.tensor(STDS)
    start = random(count, 1).expand(2, -1, -1)
    chosen, rejected = torch.cat([start, start + noise.cumsum(2)], 2).unsqueeze(3)
    return chosen, rejected


def chain_pairs(slope: float, old: ChainPolicy) -> Pairs:
    """The reward of a path is slope · x0; `old` is what sampled."""
    chosen, rejected = chains()
    return path_pairs(
        chosen,
        rejected,
        old.log_prob(torch.cat([chosen, rejected])),
        slope * (chosen - rejected)[:, -1, 0],
    )


def prdp_gradient(objective: PRDP, policy: ChainPolicy, pairs: Pairs) -> Tensor:
    """Of the mean over the draws, as the loop takes it."""
    by_step = zip(with_terms(objective, policy, pairs), objective.draws(pairs), strict=True)
    return torch.stack(
        [gradient(objective.loss(policy, piece, k).total, policy.bias) for piece, k in by_step]
    ).mean(0)


def directly(objective: PRDP, policy: ChainPolicy, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Squared errors of the whole paths' differences, as they are and with clipped steps."""
    paths = torch.cat([pairs.chosen_path, pairs.rejected_path])
    reference = policy.at("reference")
    old = torch.cat([pairs.chosen_log_prob, pairs.rejected_log_prob])
    new = [
        policy.step(paths[:, k], k, pairs.cond.twice()).log_prob(paths[:, k + 1]) for k in range(3)
    ]
    moved, limit = torch.stack(new, 1) - old, objective.clip_range
    before = (old - reference.log_prob(paths)).sum(1)
    errors = []
    for step in (moved, moved.clamp(-limit, limit)):
        chosen, rejected = (step.sum(1) + before).chunk(2)
        errors.append(
            (objective.temperature * (chosen - rejected) - pairs.gap) ** 2 / objective.temperature
        )
    return errors[0], errors[1]


def test_prdp_ends_at_the_kl_regularised_optimum():
    """Reward c x0 over N(0, std_k²) steps: step k's bias is c std_k² / τ."""
    c, tau = 0.6, 1.5
    optimum = c / tau * torch.tensor(STDS) ** 2
    objective, pairs = (
        PRDP(temperature=tau, clip_range=100.0),
        chain_pairs(c, ChainPolicy(torch.zeros(3), STDS)),
    )
    policy = ChainPolicy(torch.zeros(3, requires_grad=True), STDS)
    for _ in range(200):
        step = prdp_gradient(objective, policy, pairs) * torch.tensor(STDS) ** 2
        policy = replace(policy, bias=(policy.bias - 0.15 * step).detach().requires_grad_())
    assert_close(policy.bias.detach(), optimum, rtol=1e-4, atol=1e-5)
    losses = [
        objective.loss(policy, piece, k).total
        for k, piece in enumerate(with_terms(objective, policy, pairs))
    ]
    assert max(losses) < 1e-8


@pytest.mark.parametrize("clip_range", [100.0, 0.05])
def test_prdp_s_steps_together_give_the_gradient_of_the_whole(clip_range):
    policy, old = (
        ChainPolicy(torch.tensor([0.1, -0.2, 0.3], requires_grad=True), STDS),
        ChainPolicy(torch.tensor([0.0, -0.1, 0.1]), STDS),
    )
    objective, pairs = PRDP(temperature=1.3, clip_range=clip_range), chain_pairs(0.6, old)
    pairs = replace(pairs, weight=torch.rand(50, generator=torch.Generator().manual_seed(0)))
    whole = (pairs.weight * torch.maximum(*directly(objective, policy, pairs))).mean()
    assert_close(
        prdp_gradient(objective, policy, pairs), gradient(whole, policy.bias), rtol=1e-4, atol=1e-6
    )


def test_prdp_takes_the_larger_of_the_plain_and_the_clipped_error():
    policy, old = (
        ChainPolicy(torch.tensor([0.1, -0.2, 0.3]), STDS),
        ChainPolicy(torch.zeros(3), STDS),
    )
    objective, pairs = PRDP(clip_range=0.05), chain_pairs(0.6, old)
    plain, clipped = directly(objective, policy, pairs)
    assert (plain < clipped).any()
    assert (plain > clipped).any()
    for k, piece in enumerate(with_terms(objective, policy, pairs)):
        loss = objective.loss(policy, piece, k)
        assert_close(loss.total, torch.maximum(plain, clipped).mean(), rtol=1e-4, atol=1e-6)
        assert_close(loss.stats["ratio/clipped"].values, (plain < clipped).float())


def test_prdp_learns_from_the_steps_that_are_drawn_alone():
    policy = ChainPolicy(torch.tensor([0.1, -0.2, 0.3], requires_grad=True), STDS)
    objective, pairs = (
        PRDP(steps=PathSteps(fraction=2 / 3), clip_range=100.0),
        chain_pairs(0.6, ChainPolicy(torch.zeros(3), STDS)),
    )
    assert list(objective.draws(pairs)) == [0, 1]
    assert prdp_gradient(objective, policy, pairs)[2] == 0


# DDPO and Flow-GRPO


def old_rollout(count: int = 20) -> tuple[ChainPolicy, Rollout]:
    """Paths of an unbiased policy, and a policy that has moved since."""
    path, _ = chains(count)
    rollout = rollout_of(
        path, ChainPolicy(torch.zeros(3), STDS).log_prob(path), random(count, seed=5)
    )
    return ChainPolicy(torch.tensor([0.1, -0.2, 0.3], requires_grad=True), STDS), rollout


def test_ddpo_s_score_function_is_reinforce():
    """-A (x' - x - θ) / std²"""
    policy, rollout = old_rollout()
    for k, std in enumerate(STDS):
        found = gradient(DDPO().loss(policy, rollout, k).total, policy.bias)
        score = (rollout.path[:, k + 1] - rollout.path[:, k] - policy.bias[k])[:, 0] / std**2
        assert found[k].item() == pytest.approx(
            -(rollout.advantage * score).mean().item(), rel=1e-5
        )


@pytest.mark.parametrize("clip_range", [0.05, 10.0])
def test_ddpo_s_importance_sampling_is_flow_grpo_without_kl(clip_range):
    policy, rollout = old_rollout()
    for k in range(3):
        ddpo = DDPO(estimator="importance_sampling", clip_range=clip_range).loss(policy, rollout, k)
        grpo = FlowGRPO(clip_range=clip_range).loss(policy, rollout, k)
        assert_close(ddpo.total, grpo.total)
        assert_close(gradient(ddpo.total, policy.bias), gradient(grpo.total, policy.bias))


@pytest.fixture(scope="module")
def sampled() -> tuple[Policy, Rollout]:
    """The tiny model and its rollout, with advantages."""
    policy = make_policy(Sampler(steps=4, dynamics=flow_sde))
    rollout = collect(policy.at("policy"), two_groups(policy), images_per_pass=6)
    return policy, replace(rollout, advantage=torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0]))


def test_the_normalised_ratio_is_one_before_the_first_update(sampled):
    policy, rollout = sampled
    for k in rollout.steps:
        ratio = FlowGRPO(ratio="normalised").loss(policy, rollout, k).stats["ratio/mean"].values
        assert (ratio - 1).abs().max() <= 1e-6


def test_the_normalised_ratio_is_the_ratio_without_its_bias_and_scale(sampled):
    """std (log ratio + ‖Δμ‖² / 2 std²) = mean(noise Δμ)"""
    still, rollout = sampled
    policy = make_policy(Sampler(steps=4, dynamics=flow_sde))
    stir(policy)
    for k in rollout.steps:
        step, old = (
            p.at("policy").step(rollout.transition(k).before, k, rollout.cond)
            for p in (policy, still)
        )
        moved = step.mean - old.mean
        log_ratio = step.log_prob(rollout.path[:, k + 1]) - rollout.log_prob[:, k]
        centred = step.std * (log_ratio + moved.square().flatten(1).mean(1) / (2 * step.std**2))
        noise = (rollout.path[:, k + 1] - old.mean) / old.std
        assert_close(centred, (noise * moved).flatten(1).mean(1), atol=2e-6, rtol=1e-3)
        assert_close(normalised_log_ratio(step, rollout, k), centred, atol=2e-6, rtol=1e-3)
        assert centred.abs().max() > 1e-4


@pytest.mark.parametrize("size", [0, 1, 2])
def test_weights_by_noise_average_to_one_over_the_steps_that_a_window_reaches(sampled, size):
    """Also where one step is trained at a time, as by TempFlow-GRPO."""
    policy, rollout = sampled
    policy = policy.sampling(replace(policy.sampler, window=Window(size=size)))
    weights = {
        k: step_weight(policy, rollout, FlowGRPO(step_weight="noise"), k) for k in rollout.steps
    }
    assert sum(weights.values()) / len(weights) == pytest.approx(1, rel=1e-5)
    assert [weights[k] / weights[0] for k in weights] == pytest.approx(
        [policy.std(k) / policy.std(0) for k in weights], rel=1e-5
    )


def step_weight(policy: Policy, rollout: Rollout, objective: FlowGRPO, k: int) -> float:
    """By how much the loss of a step differs from the unweighted one."""
    rollout = replace(rollout, advantage=torch.ones(len(rollout)))
    return (
        objective.loss(policy, rollout, k).total / FlowGRPO().loss(policy, rollout, k).total
    ).item()


def test_weights_by_inverse_time_undo_the_step_s_length(sampled):
    policy, rollout = sampled
    for k in rollout.steps:
        expected = 1 / (policy.times[k] - policy.times[k + 1])
        assert step_weight(
            policy, rollout, FlowGRPO(step_weight="inverse_time"), k
        ) == pytest.approx(expected, rel=1e-5)


# ranked pairs


def judged(rewards: list[list[float]]) -> Rollout:
    """Paths of one step whose x0 is their reward."""
    reward = torch.tensor(rewards).flatten()
    return rollout_of(
        torch.stack([reward - 1, reward], 1)[:, :, None],
        reward[:, None],
        reward,
        images=len(rewards[0]),
    )


def test_the_best_image_is_paired_with_the_worst_of_its_own_prompt():
    pairs = rank(judged([[0.2, 0.9, 0.1], [5.0, 3.0, 4.0]]), Ranking())
    assert_close(pairs.x0[0].flatten(), torch.tensor([0.9, 5.0]))
    assert_close(pairs.x0[1].flatten(), torch.tensor([0.1, 3.0]))
    assert_close(pairs.gap, torch.tensor([0.8, 2.0]))
    assert pairs.weight.tolist() == [1, 1]
    assert pairs.group.tolist() == [0, 1]


@pytest.mark.parametrize(("top", "count"), [(1, 1), (2, 4), (3, 9), (9, 9)])
def test_the_best_n_and_the_worst_n_make_n_squared_pairs(top, count):
    pairs = rank(judged([[6.0, 1, 5, 2, 4, 3], [60, 10, 50, 20, 40, 30]]), Ranking(top=top))
    found = list(zip(pairs.x0[0].flatten().tolist(), pairs.x0[1].flatten().tolist(), strict=True))
    n = math.isqrt(count)
    expected = [(6.0 - i, n - float(j)) for i in range(n) for j in range(n)]
    assert found == expected + [(10 * better, 10 * worse) for better, worse in expected]
    assert len({tuple(key) for key in pairs.keys.table().tolist()}) == 2 * count


def test_groups_that_lie_mixed_are_never_mixed():
    rollout = judged([[1.0, 2.0], [30.0, 10.0]])[[0, 2, 1, 3]]
    pairs = rank(rollout, Ranking())
    assert [pairs.x0[0].flatten().tolist(), pairs.x0[1].flatten().tolist()] == [[2, 30], [1, 10]]


def test_ties_and_small_gaps_weigh_nothing():
    rollout = judged([[1.0, 1.0], [1.0, 0.75], [1.0, 0.5]])
    assert rank(rollout, Ranking()).weight.tolist() == [0, 1, 1]
    pairs = rank(rollout, Ranking(min_gap=0.25))
    assert pairs.weight.tolist() == [0, 0, 1]
    assert pairs.trainable_rows().group.tolist() == [2]


def dominance_pairs(*scores: list[float], **settings: Any) -> tuple[list[tuple[int, int]], Pairs]:
    """The pairs of one prompt's images by these scores of each reward, and all rows."""
    rewards = {str(number): torch.tensor(values) for number, values in enumerate(scores)}
    rollout = judged([[sum(values) for values in zip(*scores, strict=True)]])
    rollout = replace(rollout, rewards=rewards, x0=torch.arange(len(rollout)).view(-1, 1))
    pairs = rank(rollout, Ranking(by="dominance", **settings))
    kept = pairs.trainable_rows()
    sides = (side.flatten().tolist() for side in kept.x0)
    return list(zip(*sides, strict=True)), pairs


def test_an_image_beats_those_that_it_dominates():
    found, _ = dominance_pairs([1.0, 0.0, 0.5, 0.4], [0.0, 1.0, 0.5, 0.4])
    assert found == [(2, 3)]


@pytest.mark.parametrize(
    ("a", "b", "found"),
    [
        ([30.0, 10.0, 6.0], [20.0, 8.0, 5.0], [(0, 1)]),
        ([30.0, 10.0, 6.0], [40.0, 4.0, 4.0], []),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.5], [(1, 0)]),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], []),
        ([1.0, math.nan, 3.0], [0.0, 9.0, 3.0], [(0, 1)]),
        ([1.0, math.nan, math.nan], [math.nan, 9.0, 3.0], []),
    ],
)
def test_two_images_are_compared_as_by_d3po_s_released_code(a, b, found):
    """The first two are its own example; a reward that one of them lacks is not compared."""
    scores = [list(pair) for pair in zip(a, b, strict=True)]
    assert dominance_pairs(*scores)[0] == found


@pytest.mark.parametrize(("bad", "count"), [(0, 0), (1, 6), (2, 10), (3, 12), (6, 6), (7, 0)])
def test_marks_of_seven_images_give_the_pairs_whose_marks_differ(bad, count):
    found, pairs = dominance_pairs([-1.0] * bad + [0.0] * (7 - bad))
    assert len(found) == count
    assert len(pairs) == max(1, count)
    assert pairs.weight.tolist() == [1.0] * count or pairs.weight.tolist() == [0.0]


def test_one_best_and_one_worst_of_seven_give_eleven_pairs():
    assert len(dominance_pairs([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])[0]) == 11


def test_a_rising_map_of_a_reward_leaves_dominance_as_it_is():
    first, second = random(2, 8).tolist()
    plain, mapped = (
        dominance_pairs(values, second)[0] for values in (first, [math.exp(x) for x in first])
    )
    assert plain == mapped
    assert plain


def test_the_share_of_pairs_that_dominance_leaves_halves_with_each_reward():
    """2^(1 - m) of the pairs for m independent rewards."""
    for rewards in (1, 2, 3):
        scores = random(rewards, 200, seed=rewards).tolist()
        share = len(dominance_pairs(*scores)[0]) / (200 * 199 / 2)
        assert share == pytest.approx(2.0 ** (1 - rewards), abs=0.04)


def test_a_dominating_image_must_be_better_by_more_than_the_least_gap():
    scores = [1.0, 0.9, 0.5], [1.0, 1.0, 1.0]
    assert dominance_pairs(*scores)[0] == [(0, 1), (0, 2), (1, 2)]
    assert dominance_pairs(*scores, min_gap=0.2)[0] == [(0, 2), (1, 2)]


def test_groups_with_fewer_dominance_pairs_are_filled_up_with_rows_of_weight_0():
    rollout = judged([[3.0, 2.0, 1.0], [1.0, 1.0, 0.0]])
    pairs = rank(replace(rollout, rewards={"one": rollout.reward}), Ranking(by="dominance"))
    assert pairs.group.tolist() == [0, 0, 0, 1, 1, 1]
    assert pairs.weight.tolist() == [1, 1, 1, 1, 1, 0]
    assert pairs.keys.image.tolist() == [0, 1, 2, 0, 1, 2]
    ranking = Ranking(by="dominance", weighted=True)
    weight = rank(replace(rollout, rewards={"one": rollout.reward}), ranking).weight
    # Deviations of the rewards in [0, 1]: that of 0, ½, 1 and that of 0, 1, 1.
    outer = (math.sqrt(1 / 6) - math.sqrt(2 / 9)) / 2
    expected = [(1 + outer) * gap for gap in (5 / 6, 4 / 3, 5 / 6)]
    assert_close(weight, torch.tensor([*expected, 1 - outer, 1 - outer, 0.0]))


def test_a_dominating_image_with_a_smaller_combined_reward_is_still_preferred():
    """Its gap of -1 counts as 0, so that gaps have the mean 1/3."""
    rollout = replace(judged([[1.0, 1.0, 0.0, 1.0]]), rewards={"one": torch.tensor([4.0, 3, 2, 1])})
    pairs = rank(rollout, Ranking(by="dominance", weighted=True))
    assert pairs.gap.tolist() == [0, 1, 0, 1, 0, -1]
    assert_close(pairs.weight, torch.tensor([2.0, 5, 2, 5, 2, 2]) / 3)


def test_pairs_that_are_not_trained_on_take_no_part_in_the_mean_weight():
    """Gaps of 1, 3/4, 1/4 and 0, of which the last does not count: the others have the mean 2/3."""
    weight = rank(judged([[4.0, 1.0, 1.0, 0.0]]), Ranking(top=2, weighted=True)).weight
    assert_close(weight.sort().values, torch.tensor([0.0, 7, 13, 16]) / 12)
    assert weight[weight > 0].mean().item() == pytest.approx(1, rel=1e-6)


def test_all_processes_make_as_many_rows_of_a_group(monkeypatch):
    """The other process has a group of five pairs."""
    monkeypatch.setattr(distributed, "gather_objects", lambda count: [count, 5])
    found, pairs = dominance_pairs([3.0, 2.0, 1.0])
    assert (len(found), len(pairs)) == (3, 5)
    assert pairs.gap[3:].isnan().all()
    assert pairs.padding(2).gap.isfinite().all()


def given(*gaps: float) -> list[Example]:
    return [Example(prompt=Prompt(""), chosen=bytes, rejected=bytes, gap=gap) for gap in gaps]


def test_given_pairs_weigh_by_their_gap_and_one_on_average():
    """gap / largest + 1 - mean: DP²O's weight with all pairs as one group."""
    weight = given_weights(given(1.0, 2.0, 4.0, 5.0), Ranking(weighted=True))
    assert_close(weight, torch.tensor([0.6, 0.8, 1.2, 1.4]))
    assert given_weights(given(1.0, 2.0, 4.0, 5.0), Ranking()).tolist() == [1, 1, 1, 1]
    assert given_weights(given(1.0, 1.0), Ranking(weighted=True)).tolist() == [1, 1]


def test_given_pairs_of_a_small_gap_weigh_nothing():
    ranking = Ranking(min_gap=1.0, weighted=True)
    assert_close(given_weights(given(1.0, 2.0, 4.0), ranking), torch.tensor([0.0, 0.75, 1.25]))
    with pytest.raises(UserError, match=r"min_gap is 1, but no pair .* above 0.5\. Write"):
        given_weights(given(0.5, 0.25), ranking)


def test_weights_average_to_one_within_a_prompt_and_between_prompts():
    """DP²O: (gap + 1 - mean gap) (deviation + 1 - mean deviation), rewards in [0, 1] by group."""
    rewards = [[0.0, 1.0, 2.0, 4.0], [10.0, 0.0, 10.0, 0.0]]
    weight = rank(judged(rewards), Ranking(top=2, weighted=True)).weight
    scaled = torch.tensor([[0.0, 0.25, 0.5, 1.0], [1.0, 0.0, 1.0, 0.0]])
    deviation = scaled.std(1, correction=0)
    outer = deviation + 1 - deviation.mean()
    gaps = torch.tensor([1.0, 0.75, 0.5, 0.25])
    inner = gaps + 1 - gaps.mean()
    assert_close(weight[:4].sort().values, (inner * outer[0]).sort().values)
    assert_close(weight[4:], outer[1].expand(4))
    assert weight.mean().item() == pytest.approx(1, rel=1e-6)
    assert (weight[:4] / outer[0]).mean().item() == pytest.approx(1, rel=1e-6)


def test_ranked_pairs_keep_the_paths_and_log_probabilities_that_were_sampled(sampled):
    rollout = replace(sampled[1], reward=torch.tensor([0.1, 0.5, 0.3, 2.0, 1.0, 3.0]))
    pairs = rank(rollout, Ranking())
    sides = (pairs.chosen, pairs.chosen_path, [1, 5]), (pairs.rejected, pairs.rejected_path, [0, 4])
    for x0, path, rows in sides:
        assert torch.equal(x0, rollout.x0[rows])
        assert torch.equal(path, rollout.path[rows])
    assert torch.equal(pairs.chosen_log_prob, rollout.log_prob[[1, 5]])
    assert torch.equal(pairs.rejected_log_prob, rollout.log_prob[[0, 4]])
    assert pairs.steps == rollout.steps
    embeds = rollout.cond.inputs["embeds"]
    assert torch.equal(pairs.cond.inputs["embeds"], embeds[[1, 5]])


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        (DPO, {"beta": 0.0}),
        (DPO, {"label_smoothing": 0.5}),
        (DPO, {"imitate": -1.0}),
        (KTO, {"beta": -1.0}),
        (KTO, {"liked": -1.0}),
        (D3PO, {"clip_range": 1.0}),
        (D3PO, {"clip": "none"}),
        (D3PO, {"kl_weight": -0.1}),
        (Reference, {"every": -1}),
        (Reference, {"decay": 1.5}),
        (Ranking, {"by": "vote"}),
        (PRDP, {"temperature": 0.0}),
        (DDPO, {"clip_range": 0.0}),
        (Ranking, {"top": 0}),
        (Ranking, {"min_gap": -0.1}),
    ],
)
def test_a_setting_that_means_nothing_is_refused(objective, settings):
    with pytest.raises(UserError, match=r"write|must be|choose from"):
        objective(**settings)


# votes


def voted_pairs(preference: float, tie: float) -> Pairs:
    pairs = pairs_of(random(2, 1), random(2, 1, seed=1))
    return replace(pairs, preference=torch.full((2,), preference), tie=torch.full((2,), tie))


@pytest.mark.parametrize(
    ("preference", "tie", "margin", "expected"),
    [
        # Every vote for one picture: the loss of a certain pair.
        (1.0, 0.0, 0.0, 0.0),
        # Three of four votes: log odds of the share.
        (0.75, 0.0, 0.0, math.log(3)),
        # A fifth of ties and 80 % wins of the rest, with Rao and Kupper's m: 1.117.
        (0.8, 0.2, 0.541, 1.117),
        # Nothing but ties.
        (0.5, 1.0, 0.405, 0.0),
    ],
)
def test_dpo_s_optimum_is_the_log_odds_of_the_votes(preference, tie, margin, expected):
    won, lost = (float(side[0]) for side in voted_pairs(preference, tie).votes)
    objective = DPO(tie_margin=margin)
    assert objective.learns_from_ties == (margin > 0)

    def slope(s: float) -> float:
        value = torch.tensor(s, requires_grad=True)
        loss = won * sigmoid(value - margin) + lost * sigmoid(-value - margin)
        loss.backward()
        assert value.grad is not None
        return value.grad.item()

    if lost == 0:
        assert slope(10.0) < 0  # it never stops
    else:
        assert slope(expected) == pytest.approx(0, abs=1e-3)


def test_a_pair_of_equally_many_votes_pulls_d3po_to_the_reference():
    """The gradient of -½ log σ(m) - ½ log σ(-m) is 0 at m = 0."""
    paths = random(1, 3, 1), random(1, 3, 1, seed=1)
    certain = path_pairs(*paths, torch.zeros(2, 2))
    even = replace(certain, preference=torch.tensor([0.5]))
    for pairs, is_zero in ((certain, False), (even, True)):
        bias = torch.zeros(2, requires_grad=True)
        D3PO(beta=1.0).loss(ChainPolicy(bias, stds=(1.0, 1.0)), pairs, 0).total.backward()
        assert bias.grad is not None
        assert (bias.grad.abs().max().item() < 1e-9) == is_zero
