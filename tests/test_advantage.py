"""Advantages against numbers computed by hand."""

import pytest
import torch

from flowalign.advantage import group_advantage, group_statistics

GROUP = torch.tensor([7, 3, 7, 3, 7, 3])
REWARD = torch.tensor([1.0, 0.0, 2.0, 0.0, 3.0, 6.0])
SHIFTED = torch.where(GROUP == 3, REWARD + 100, REWARD)


def test_statistics_are_those_of_each_images_own_group():
    mean, deviation = group_statistics(REWARD, GROUP)
    torch.testing.assert_close(mean, torch.full((6,), 2.0))
    torch.testing.assert_close(deviation, torch.tensor([2 / 3, 8, 2 / 3, 8, 2 / 3, 8]).sqrt())


def test_the_group_deviation_divides_each_group_by_its_own():
    small, large = 1.5**0.5, 2**0.5
    expected = torch.tensor([-small, -1 / large, 0, -1 / large, small, large])
    torch.testing.assert_close(group_advantage(REWARD, GROUP, std="group", epsilon=0.0), expected)


def test_the_global_deviation_is_that_of_all_rewards():
    deviation = (26 / 6) ** 0.5  # Σ (reward - 2)² = 1 + 4 + 0 + 4 + 1 + 16
    torch.testing.assert_close(group_advantage(REWARD, GROUP, std="global", epsilon=0.0), (REWARD - 2) / deviation)


def test_adding_a_constant_to_a_group_changes_nothing():
    torch.testing.assert_close(group_advantage(SHIFTED, GROUP, "group"), group_advantage(REWARD, GROUP, "group"))


def test_adding_a_constant_to_a_group_keeps_the_order_and_signs_under_the_global_deviation():
    shifted, advantage = group_advantage(SHIFTED, GROUP), group_advantage(REWARD, GROUP)
    scale = (SHIFTED.std(correction=0) + 1e-4) / (REWARD.std(correction=0) + 1e-4)
    torch.testing.assert_close(shifted * scale, advantage)


@pytest.mark.parametrize("std", ["group", "global"])
def test_adding_a_constant_to_every_reward_changes_nothing(std):
    torch.testing.assert_close(group_advantage(REWARD + 100, GROUP, std), group_advantage(REWARD, GROUP, std))


@pytest.mark.parametrize("std", ["group", "global"])
def test_scaling_the_rewards_changes_nothing_but_through_epsilon(std):
    scaled, advantage = group_advantage(50 * REWARD, GROUP, std), group_advantage(REWARD, GROUP, std)
    torch.testing.assert_close(scaled, advantage, rtol=3e-4, atol=0)


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


def test_an_outlier_is_cut_at_the_clip():
    reward = torch.zeros(100).index_fill(0, torch.tensor([0]), 1.0)
    group = torch.zeros(100, dtype=torch.long)
    assert group_advantage(reward, group)[0] == 5
    assert group_advantage(-reward, group, clip=2.0)[0] == -2
    assert group_advantage(reward, group, clip=20.0)[0] == pytest.approx(99**0.5, rel=2e-3)


def test_the_order_of_images_does_not_matter():
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    torch.testing.assert_close(group_advantage(REWARD[order], GROUP[order]), group_advantage(REWARD, GROUP)[order])
