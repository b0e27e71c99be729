"""Advantages against numbers computed by hand."""

import pytest
import torch

from flowalign import advantages as advantage
from flowalign.advantages import group_statistics, RewardTable

GROUP = torch.tensor([7, 3, 7, 3, 7, 3])
REWARD = torch.tensor([1.0, 0.0, 2.0, 0.0, 3.0, 6.0])
SHIFTED = torch.where(GROUP == 3, REWARD + 100, REWARD)


def rewards(**by_name: torch.Tensor) -> RewardTable:
    """All with weight 1."""
    return RewardTable(
        torch.stack(list(by_name.values())).sum(0), by_name, dict.fromkeys(by_name, 1.0)
    )


def group_advantage(reward: torch.Tensor, *arguments, **settings) -> torch.Tensor:
    return advantage.group_advantage(rewards(reward=reward), *arguments, **settings)


def test_statistics_are_those_of_each_images_own_group():
    mean, deviation = group_statistics(REWARD, GROUP)
    torch.testing.assert_close(mean, torch.full((6,), 2.0).double())
    expected = torch.tensor([2 / 3, 8, 2 / 3, 8, 2 / 3, 8], dtype=torch.float64).sqrt()
    torch.testing.assert_close(deviation, expected)


def test_the_group_deviation_divides_each_group_by_its_own():
    small, large = 1.5**0.5, 2**0.5
    expected = torch.tensor([-small, -1 / large, 0, -1 / large, small, large])
    torch.testing.assert_close(group_advantage(REWARD, GROUP, std="group", epsilon=0.0), expected)


def test_the_global_deviation_is_that_of_all_rewards():
    deviation = (26 / 6) ** 0.5  # Σ (reward - 2)² = 1 + 4 + 0 + 4 + 1 + 16
    torch.testing.assert_close(
        group_advantage(REWARD, GROUP, std="global", epsilon=0.0), (REWARD - 2) / deviation
    )


def test_adding_a_constant_to_a_group_changes_nothing():
    torch.testing.assert_close(
        group_advantage(SHIFTED, GROUP, "group"), group_advantage(REWARD, GROUP, "group")
    )


def test_adding_a_constant_to_a_group_keeps_the_order_and_signs_under_the_global_deviation():
    shifted, plain = group_advantage(SHIFTED, GROUP), group_advantage(REWARD, GROUP)
    scale = (SHIFTED.std(correction=0) + 1e-4) / (REWARD.std(correction=0) + 1e-4)
    torch.testing.assert_close(shifted * scale, plain)


@pytest.mark.parametrize("std", ["group", "global"])
def test_adding_a_constant_to_every_reward_changes_nothing(std):
    torch.testing.assert_close(
        group_advantage(REWARD + 100, GROUP, std), group_advantage(REWARD, GROUP, std)
    )


@pytest.mark.parametrize("std", ["group", "global"])
def test_scaling_the_rewards_changes_nothing_but_through_epsilon(std):
    scaled, plain = group_advantage(50 * REWARD, GROUP, std), group_advantage(REWARD, GROUP, std)
    torch.testing.assert_close(scaled, plain, rtol=3e-4, atol=0)


@pytest.mark.parametrize("std", ["group", "global"])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 2 / 3])
@pytest.mark.parametrize("size", [3, 12, 24])
def test_a_group_of_equal_rewards_gets_zeros(std, value, size):
    group = torch.arange(2).repeat_interleave(size)
    reward = torch.cat([torch.full((size,), value), torch.linspace(0, 1, size)])
    assert (group_advantage(reward, group, std)[:size] == 0).all()


@pytest.mark.parametrize("std", ["group", "global"])
def test_advantages_of_a_group_sum_to_zero(std):
    advantage = group_advantage(REWARD, GROUP, std)
    assert advantage[GROUP == 3].sum().abs() < 1e-5
    assert advantage[GROUP == 7].sum().abs() < 1e-5


CLOSE = torch.tensor([100.001, 99.999, 99.999, 100.001, 100.002, 99.998])
"""Rewards whose means lie between two numbers of float32, a fifth of their differences apart."""
CLOSE_GROUP = torch.tensor([0, 0, 0, 1, 1, 1])


def centred_by_group(reward: torch.Tensor) -> torch.Tensor:
    exact = reward.double().view(2, 3)
    return (exact - exact.mean(1, keepdim=True)).flatten()


@pytest.mark.parametrize("std", ["group", "global"])
@pytest.mark.parametrize("function", ["group_advantage", "log_tamed"])
def test_rewards_that_differ_a_little_around_100_keep_their_digits(function, std):
    centred = centred_by_group(CLOSE)
    deviation = {
        "group": centred.view(2, 3).square().mean(1).sqrt().repeat_interleave(3),
        "global": CLOSE.double().std(correction=0),
    }[std]
    found = getattr(advantage, function)(rewards(r=CLOSE), CLOSE_GROUP, std=std)
    torch.testing.assert_close(found, (centred / (deviation + 1e-4)).float(), rtol=1e-6, atol=0)


def test_several_rewards_around_100_keep_their_digits():
    other = CLOSE.flip(0) / 50
    standard = [
        part / (part.view(2, 3).square().mean(1).sqrt().repeat_interleave(3) + 1e-4)
        for part in map(centred_by_group, (CLOSE, other))
    ]
    total = standard[0] + standard[1]
    expected = (total - total.mean()) / (total.std(correction=0) + 1e-4)
    found = advantage.gdpo(rewards(a=CLOSE, b=other), CLOSE_GROUP)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)


def test_an_outlier_is_cut_at_the_clip():
    reward = torch.zeros(100).index_fill(0, torch.tensor([0]), 1.0)
    group = torch.zeros(100, dtype=torch.long)
    assert group_advantage(reward, group)[0] == 5
    assert group_advantage(-reward, group, clip=2.0)[0] == -2
    assert group_advantage(reward, group, clip=20.0)[0] == pytest.approx(99**0.5, rel=2e-3)


def test_the_order_of_images_does_not_matter():
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    torch.testing.assert_close(
        group_advantage(REWARD[order], GROUP[order]), group_advantage(REWARD, GROUP)[order]
    )


# several rewards


def test_gdpo_gives_every_reward_the_same_say_whatever_its_scale():
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    small, large = (
        torch.tensor([0.1, 0.2, 0.3, 0.0, 0.2, 0.1]),
        torch.tensor([300.0, 200.0, 100.0, 0.0, 0.0, 900.0]),
    )
    one = advantage.gdpo(rewards(a=small, b=large), group, epsilon=0.0)
    other = advantage.gdpo(rewards(a=1000 * small, b=large / 50), group, epsilon=0.0)
    torch.testing.assert_close(one, other)
    assert one[:3].abs().max() < 1e-5  # the two disagree exactly
    assert one.mean().abs() < 1e-6
    assert one.std(correction=0) == pytest.approx(1, abs=1e-6)


def test_gdpo_with_one_reward_is_the_group_s_advantage_normalised_over_all():
    plain = group_advantage(REWARD, GROUP, "group", epsilon=0.0)
    torch.testing.assert_close(
        advantage.gdpo(rewards(r=REWARD), GROUP, epsilon=0.0), plain / plain.std(correction=0)
    )


def test_win_rates_see_only_the_order():
    stretched = torch.where(REWARD > 1.5, REWARD**3, REWARD)
    one, other = (advantage.win_rate(rewards(r=reward), GROUP) for reward in (REWARD, stretched))
    torch.testing.assert_close(one, other)


def test_win_rates_by_hand():
    # group 7: rewards 1, 2, 3 win 0, 1/2, 1; group 3: 0, 0, 6 win 1/4, 1/4, 1. Both have mean 1/2.
    share = torch.tensor([0.0, 0.25, 0.5, 0.25, 1.0, 1.0])
    expected = (share - 0.5) / share.std(correction=0)
    torch.testing.assert_close(
        advantage.win_rate(rewards(r=REWARD), GROUP, std="global", epsilon=0.0), expected
    )


def test_the_work_is_linear_in_the_number_of_groups():
    """A comparison of all pairs of these images would take 29 GB."""
    group = torch.arange(60_000) % 20_000
    reward = (torch.arange(60_000) // 20_000).float()
    scores = {"r": reward.where(group != 5, torch.nan)}
    table = RewardTable.of_scores(scores["r"], scores, {"r": 1.0}, group)
    found = advantage.win_rate(table, group)
    high = 0.5 / (1 / 6) ** 0.5
    expected = torch.tensor([-high, 0, high])[reward.long()].where(group != 5, 0)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


def test_log_tamed_leaves_a_steady_reward_and_tames_a_wild_one():
    steady, wild = (
        torch.tensor([1.0, 1.1, 0.9, 1.0, 1.0, 1.0]),
        torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 50.0]),
    )
    found = advantage.log_tamed(rewards(a=steady, b=wild), GROUP, epsilon=0.0)
    torch.testing.assert_close(found, group_advantage(steady + wild.log1p(), GROUP, epsilon=0.0))
    torch.testing.assert_close(
        advantage.log_tamed(rewards(r=REWARD), GROUP), group_advantage(REWARD, GROUP)
    )


def test_log_tamed_refuses_rewards_below_zero():
    with pytest.raises(ValueError, match="rewards of 0 or more"):
        advantage.log_tamed(rewards(r=REWARD - 1), GROUP)


@pytest.mark.parametrize("function", ["group_advantage", "gdpo", "win_rate", "log_tamed"])
def test_every_advantage_gives_a_group_of_equal_rewards_zeros(function):
    group, reward = (
        torch.arange(3).repeat_interleave(4),
        torch.tensor([0.3] * 4 + [0.7] * 4 + [0.0, 1.0, 0.2, 0.5]),
    )
    found = getattr(advantage, function)(rewards(r=reward), group)
    assert found[:8].abs().max() < 1e-6 or function == "gdpo"
    assert found[:4].std() < 1e-6
    assert found[9] > 0
