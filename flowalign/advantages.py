"""From rewards to advantages: pure functions of the rewards and of each image's group.

A reward of NaN stands for an image that was not scored. Such an image gets the advantage 0 and
takes no part in any mean.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from flowalign.flow import PerImage
from flowalign.settings.types import NonNegative, Positive


@dataclass(frozen=True)
class RewardTable:
    """The rewards of a step's images."""

    combined: PerImage  # (N,)
    by_name: dict[str, PerImage]  # (N,) each
    weights: dict[str, float]

    @classmethod
    def of_scores(
        cls,
        combined: PerImage,
        scores: dict[str, PerImage],
        weights: dict[str, float],
        group: Tensor,
    ) -> Self:
        """Return a table in which images that cannot be compared with their group are NaN."""
        incomplete = incomplete_rows(scores, group)
        by_name = {
            name: values.masked_fill(incomplete, torch.nan) for name, values in scores.items()
        }
        return cls(combined.masked_fill(incomplete, torch.nan), by_name, weights)

    @property
    def scored(self) -> Tensor:
        """True for each image with a reward, (N,)."""
        return ~self.combined.isnan()


def incomplete_rows(scores: dict[str, PerImage], group: Tensor) -> Tensor:
    """Return True (N,) for each image that lacks a score which another image of its group has.

    Such images cannot be compared with each other. A reward that no image of a group has is left
    to the other rewards.
    """
    labels, index = group.unique(return_inverse=True)
    incomplete = torch.zeros(len(group), dtype=torch.bool)
    for values in scores.values():
        scored = torch.zeros(len(labels)).index_add(0, index, (~values.isnan()).float())
        incomplete |= values.isnan() & (scored > 0)[index]
    return incomplete


def group_statistics(reward: PerImage, group: Tensor) -> tuple[PerImage, PerImage]:
    """Return the mean and the population deviation of each image's group, (N,) each in float64.

    `group` holds integers. Rewards of NaN are left out; a group without others has NaN. In float32
    a mean near 100 would be off by 4e-6, which is much where rewards differ by 1e-3.
    """
    labels, index = group.unique(return_inverse=True)
    scored = ~reward.isnan()
    exact = reward.double().where(scored, torch.inf)
    empty = exact.new_zeros(len(labels))
    count = empty.index_add(0, index, scored.double())
    # Means are taken from the least reward upwards, so that equal rewards deviate by exactly 0.
    least = exact.new_full((len(labels),), torch.inf).scatter_reduce(0, index, exact, "amin")[index]
    above = (exact - least).where(scored, 0)
    mean_above = (empty.index_add(0, index, above) / count)[index]
    squares = ((above - mean_above) ** 2).where(scored, 0)
    variance = (empty.index_add(0, index, squares) / count)[index]
    return least + mean_above, variance.sqrt()


def normalised(reward: PerImage, group: Tensor, std: str, epsilon: float, clip: float) -> PerImage:
    """Return (reward - mean of the group) / deviation, cut to [-clip, clip]; 0 if not scored.

    The deviation is that of the group, or with `std` "global" that of all rewards. The result is in
    float32, and everything before it in float64.
    """
    mean, deviation = group_statistics(reward, group)
    if std == "global":
        deviation = deviation_of(reward)
    return _cut((reward.double() - mean) / (deviation + epsilon), clip)


def _cut(advantage: PerImage, clip: float) -> PerImage:
    """Return advantages in [-clip, clip], in float32; 0 if not scored."""
    return advantage.clamp(-clip, clip).nan_to_num(nan=0).float()


def deviation_of(reward: PerImage) -> Tensor:
    """Return the population deviation of all rewards that are not NaN, in float64."""
    scored = reward[~reward.isnan()].double()
    return scored.std(correction=0) if len(scored) else scored.new_tensor(torch.nan)


def group_advantage(
    rewards: RewardTable,
    group: Tensor,
    std: Literal["group", "global"] = "global",
    epsilon: NonNegative = 1e-4,
    clip: Positive = 5.0,
) -> PerImage:
    """Return Flow-GRPO's advantages (arXiv 2505.05470): the combined reward, normalised.

    A group of equal rewards gets zeros. Advantages are cut to [-clip, clip].
    """
    return normalised(rewards.combined, group, std, epsilon, clip)


def gdpo(
    rewards: RewardTable, group: Tensor, epsilon: NonNegative = 1e-4, clip: Positive = 5.0
) -> PerImage:
    """Return GDPO's advantages (arXiv 2601.05242): each reward is normalised within its group.

    The weighted sum is then normalised over all images, so that a reward with a wide scale does not
    dominate the others.
    """
    total = torch.zeros_like(rewards.combined, dtype=torch.float64)
    for name, reward in rewards.by_name.items():
        mean, deviation = group_statistics(reward, group)
        weighted = rewards.weights[name] * (reward.double() - mean) / (deviation + epsilon)
        total = total + weighted.nan_to_num(nan=0)
    total = total.where(rewards.scored, torch.nan)
    return _cut((total - total.nanmean()) / (deviation_of(total) + epsilon), clip)


def win_rate(
    rewards: RewardTable,
    group: Tensor,
    std: Literal["group", "global"] = "group",
    epsilon: NonNegative = 1e-4,
    clip: Positive = 5.0,
) -> PerImage:
    """Return advantages from ranks: the share of the group that an image's reward beats.

    Ties count half, and the share is normalised. Only the order of the combined rewards counts, so
    tiny differences are not enlarged by their own deviation. Pref-GRPO (arXiv 2508.20751) has win
    rates too, but its judge compares images in pairs: a pairwise reward and `group_advantage`.
    """
    reward, share = rewards.combined, torch.full((len(group),), torch.nan, dtype=torch.float64)
    _labels, index, sizes = group.unique(return_inverse=True, return_counts=True)
    for members in index.argsort(stable=True).split(sizes.tolist()):
        rows = members[rewards.scored[members]]
        share[rows] = share_beaten(reward[rows])
    return normalised(share, group, std, epsilon, clip)


def share_beaten(reward: PerImage) -> PerImage:
    """Return the share of the other rewards that each one beats, (N,) in float64."""
    wins = (reward[:, None] > reward[None]).double() + 0.5 * (reward[:, None] == reward[None])
    # A reward ties with itself, which is taken off again.
    return (wins.sum(1) - 0.5) / max(1, len(reward) - 1)


def log_tamed(
    rewards: RewardTable,
    group: Tensor,
    std: Literal["group", "global"] = "global",
    epsilon: NonNegative = 1e-4,
    clip: Positive = 5.0,
) -> PerImage:
    """Return PaCo-GRPO's advantages (arXiv 2512.04784), for rewards of 0 or more.

    Rewards whose deviation over mean is above average enter as log(1 + reward). Raises ValueError
    for a negative reward.
    """
    if any((reward < 0).any() for reward in rewards.by_name.values()):
        raise ValueError(
            "The advantage log_tamed needs rewards of 0 or more. Use another advantage, such as "
            "gdpo."
        )
    scored = {name: reward for name, reward in rewards.by_name.items() if not reward.isnan().all()}
    spread = {
        name: (deviation_of(reward) / (reward.double().nanmean() + 1e-6)).item()
        for name, reward in scored.items()
    }
    threshold = sum(spread.values()) / max(1, len(spread))
    total = torch.zeros_like(rewards.combined, dtype=torch.float64)
    for name, reward in scored.items():
        exact = reward.double()
        tamed = exact.log1p() if spread[name] > threshold else exact
        total = total + (rewards.weights[name] * tamed).nan_to_num(nan=0)
    return normalised(total.where(rewards.scored, torch.nan), group, std, epsilon, clip)


ADVANTAGES: dict[str, Callable[..., PerImage]] = {
    "group": group_advantage,
    "gdpo": gdpo,
    "win_rate": win_rate,
    "log_tamed": log_tamed,
}
PER_REWARD = (gdpo, log_tamed)
"""Advantages that weigh the rewards one by one, and ignore how `combine` joins them."""
