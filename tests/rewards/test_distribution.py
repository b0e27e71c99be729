"""Shares of a set's score: known sets, and that increasing the shares increases the score."""

import itertools
import math

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from flowalign.errors import UserError
from flowalign.rewards.adapters import make_reward
from flowalign.rewards.distribution import (
    distance_shares,
    FeatureDistance,
    squared_mmd,
    Vendi,
    vendi_score,
    vendi_shares,
)
from tests.rewards.test_features import random_dinov2

EYE = torch.eye(4)


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(
        torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64),
        dim=-1,
    )


def plain(*colours: tuple[float, float, float]) -> Tensor:
    return torch.tensor(colours)[:, :, None, None].expand(-1, 3, 64, 64)


RED, DARK_RED, BLUE, GREEN = (0.9, 0.1, 0.1), (0.8, 0.1, 0.1), (0.1, 0.1, 0.9), (0.1, 0.8, 0.1)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [([0, 0, 0, 0], 1), ([0, 1, 2, 3], 4), ([0, 0, 1, 1], 2), ([0], 1), ([2, 2, 1, 1, 0, 0], 3)],
    ids=["identical", "orthogonal", "two equal groups", "one", "three equal groups"],
)
def test_the_vendi_score_counts_different_images(rows, expected):
    assert vendi_score(EYE[rows]).item() == pytest.approx(expected, abs=1e-5)
    assert vendi_shares(EYE[rows]).tolist() == pytest.approx(
        [math.log(expected)] * len(rows), abs=1e-5
    )


def test_the_vendi_score_is_the_exponential_of_the_eigenvalues_entropy():
    features = unit(6, 5)
    p = torch.linalg.svdvals(features).square() / 6
    assert vendi_score(features).item() == pytest.approx(math.exp(-(p * p.log()).sum()))


def test_an_image_that_differs_has_the_larger_share():
    """Three alike and one other: the eigenvalues are 3/4 and 1/4, each image along one of them."""
    assert vendi_shares(EYE[[0, 0, 0, 1]]).tolist() == pytest.approx(
        [-math.log(3 / 4)] * 3 + [-math.log(1 / 4)], abs=1e-5
    )


def test_the_gradient_of_vendi_shares_is_that_of_the_score():
    def log_score(raw: Tensor) -> Tensor:
        return vendi_shares(F.normalize(raw, dim=1)).mean()

    assert torch.autograd.gradcheck(log_score, (2 * unit(4, 6)).requires_grad_())


def test_the_gradient_of_identical_images_is_finite():
    features = EYE[[0, 0, 1]].clone().requires_grad_()
    vendi_shares(features).sum().backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()


def test_distance_shares_are_known_for_two_images_and_one_exemplar():
    """k is 1 for the image that is the exemplar and 1/e for what is at right angles, with σ = 1."""
    shares = distance_shares(EYE[:2], EYE[:1], 1.0)
    assert shares.tolist() == pytest.approx([1 - math.exp(-1), 0], abs=1e-6)
    assert distance_shares(EYE[:1], EYE[:2], 1.0).tolist() == pytest.approx(
        [(1 + math.exp(-1)) / 2]
    )


def test_repeating_the_nearest_exemplar_does_not_pay():
    exemplars = EYE[:2]
    same, spread = (distance_shares(EYE[rows], exemplars, 0.5).mean() for rows in ([0, 0], [0, 1]))
    assert spread > same
    assert squared_mmd(EYE[[0, 1]], exemplars, 0.5) < squared_mmd(EYE[[0, 0]], exemplars, 0.5)


def test_the_squared_mmd_is_known_and_zero_in_the_mean_where_both_are_drawn_alike():
    e = math.exp(-1)
    assert squared_mmd(EYE[:2], EYE[2:], 1.0).item() == pytest.approx(0, abs=1e-6)
    assert squared_mmd(EYE[[0, 0]], EYE[[1, 1]], 1.0).item() == pytest.approx(2 - 2 * e)
    pairs = list(itertools.product(range(3), repeat=2))
    drawn = [squared_mmd(EYE[list(a)], EYE[list(b)], 0.7).item() for a in pairs for b in pairs]
    assert sum(drawn) / len(drawn) == pytest.approx(0, abs=1e-6)


def test_backpropagation_through_distance_shares_ascends_minus_half_the_squared_mmd():
    features, exemplars = unit(4, 3).requires_grad_(), unit(5, 3, seed=1)
    (gradient,) = torch.autograd.grad(distance_shares(features, exemplars, 0.7).mean(), features)
    (expected,) = torch.autograd.grad(-0.5 * squared_mmd(features, exemplars, 0.7), features)
    torch.testing.assert_close(gradient, expected)


def test_the_policy_gradient_of_distance_shares_ascends_minus_half_the_squared_mmd():
    """A policy over three images that draws two: the mean of all nine draws is the gradient."""
    pictures, exemplars = unit(3, 4), unit(2, 4, seed=1)
    logits = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64, requires_grad=True)
    p = logits.softmax(0)
    mean = torch.zeros(3, dtype=torch.float64)
    for draw in itertools.product(range(3), repeat=2):
        shares = distance_shares(pictures[list(draw)], exemplars, 0.7)
        score = torch.stack([p[i].log() for i in draw])
        (gradient,) = torch.autograd.grad((score * shares).mean(), logits, retain_graph=True)
        mean += p[list(draw)].prod().detach() * gradient

    def k(a: Tensor, b: Tensor) -> Tensor:
        return (-torch.cdist(a, b).square() / (2 * 0.7**2)).exp()

    mmd = p @ k(pictures, pictures) @ p - 2 * (p @ k(pictures, exemplars).mean(1))
    (expected,) = torch.autograd.grad(-0.5 * mmd, logits)
    torch.testing.assert_close(mean, expected)


@pytest.mark.parametrize("backbone", ["bundled", "dinov2"])
def test_images_like_the_exemplars_have_the_larger_shares(tmp_path, backbone):
    for level in (200, 215, 230):
        Image.new("RGB", (80, 64), (level, 25, 25)).save(tmp_path / f"{level}.png")
    settings = {"path": random_dinov2(tmp_path / "dinov2")} if backbone == "dinov2" else {}
    reward = make_reward("feature_distance", FeatureDistance(str(tmp_path), **settings))
    assert reward.traits.level == "group"
    scores = reward(plain(RED, BLUE, GREEN), ["a red circle"] * 3, [{}] * 3)
    assert scores.argmax() == 0
    assert reward(plain(RED), [""], [{}]) > reward(plain(BLUE), [""], [{}])


def test_pictures_that_are_alike_have_the_smaller_shares():
    reward = make_reward("vendi", Vendi())
    assert reward.traits.level == "group"
    assert reward(plain(RED, RED, RED), [""] * 3, [{}] * 3).tolist() == pytest.approx(
        [0] * 3, abs=1e-4
    )
    scores = reward(plain(RED, DARK_RED, BLUE), [""] * 3, [{}] * 3)
    assert scores.argmax() == 2


def test_a_bandwidth_that_cannot_work_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"rewards\.feature_distance\.bandwidth is 0"):
        FeatureDistance(str(tmp_path), bandwidth=0)
