"""From rewards to advantages: pure functions of the rewards and of which prompt each image belongs to."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowalign.flow import PerImage
from flowalign.settings.types import NonNegative, Positive


@dataclass(frozen=True)
class RewardTable:
    """What the images of a step were given."""

    combined: PerImage  # (N,)
    by_name: dict[str, PerImage]  # (N,) each
    weights: dict[str, float]


def group_statistics(reward: PerImage, group: Tensor) -> tuple[PerImage, PerImage]:
    """Mean and population deviation of each image's group, per image. `group` holds integers.

    Rewards of NaN, not scored, take no part; a group without any has NaN.
    """
    labels, index = group.unique(return_inverse=True)
    scored = ~reward.isnan()
    exact = reward.double().where(
        scored, 0
    )  # in float64, so that equal rewards deviate by exactly 0
    empty = exact.new_zeros(len(labels))
    count = empty.index_add(0, index, scored.double())
    mean = (empty.index_add(0, index, exact) / count)[index]
    variance = (empty.index_add(0, index, ((exact - mean) ** 2).where(scored, 0)) / count)[index]
    return mean.to(reward.dtype), variance.sqrt().to(reward.dtype)


def normalised(reward: PerImage, group: Tensor, std: str, epsilon: float, clip: float) -> PerImage:
    """How far above the mean of its group an image stands, over the deviation of the group or of all rewards; 0 if not scored."""
    mean, deviation = group_statistics(reward, group)
    if std == "global":
        deviation = deviation_of(reward)
    return ((reward - mean) / (deviation + epsilon)).clamp(-clip, clip).nan_to_num(nan=0)


def deviation_of(reward: PerImage) -> Tensor:
    """Population deviation of what was scored."""
    scored = reward[~reward.isnan()]
    return scored.std(correction=0) if len(scored) else reward.new_tensor(torch.nan)


def group_advantage(
    rewards: RewardTable,
    group: Tensor,
    std: Literal["group", "global"] = "global",
    epsilon: NonNegative = 1e-4,
    clip: Positive = 5.0,
) -> PerImage:
    """Flow-GRPO's (arXiv 2505.05470): the combined reward, normalised. A group of equal rewards gets zeros.

    Advantages are cut to [-clip, clip].
    """
    return normalised(rewards.combined, group, std, epsilon, clip)


def gdpo(
    rewards: RewardTable, group: Tensor, epsilon: NonNegative = 1e-4, clip: Positive = 5.0
) -> PerImage:
    """GDPO (arXiv 2601.05242): every reward normalised by itself within its group, weighted, and the sum normalised over all.

    So a reward with a wide scale does not drown the others.
    """
    total = torch.zeros_like(rewards.combined)
    for name, reward in rewards.by_name.items():
        mean, deviation = group_statistics(reward, group)
        total = total + (
            rewards.weights[name] * (reward - mean) / (deviation + epsilon)
        ).nan_to_num(nan=0)
    total = total.where(~rewards.combined.isnan(), torch.nan)
    return (
        ((total - total[~total.isnan()].mean()) / (deviation_of(total) + epsilon))
        .clamp(-clip, clip)
        .nan_to_num(nan=0)
    )


def win_rate(
    rewards: RewardTable,
    group: Tensor,
    std: Literal["group", "global"] = "group",
    epsilon: NonNegative = 1e-4,
    clip: Positive = 5.0,
) -> PerImage:
    """Pref-GRPO (arXiv 2508.20751): the share of its group that an image beats, ties a half, normalised.

    Only the order of the combined rewards counts, so tiny differences are not blown up by their own deviation.
    """
    reward = rewards.combined
    scored = ~reward.isnan()
    together = ((group[:, None] == group[None]) & scored[:, None] & scored[None]).double()
    wins = (reward[:, None] > reward[None]).double() + 0.5 * (reward[:, None] == reward[None])
    beaten = (together * wins).sum(1) - 0.5  # not against itself
    share = beaten / (together.sum(1) - 1).clamp(min=1)
    return normalised(share.to(reward.dtype).where(scored, torch.nan), group, std, epsilon, clip)


def log_tamed(
    rewards: RewardTable,
    group: Tensor,
    std: Literal["group", "global"] = "global",
    epsilon: NonNegative = 1e-4,
    clip: Positive = 5.0,
) -> PerImage:
    """PaCo-GRPO (arXiv 2512.04784): rewards that vary more than the others, over their mean, enter as log(1 + reward).

    For rewards of 0 or more. ValueError otherwise.
    """
    if any((reward < 0).any() for reward in rewards.by_name.values()):
        raise ValueError(
            "advantage log_tamed takes rewards of 0 or more; use another advantage, such as gdpo."
        )
    found = {name: reward for name, reward in rewards.by_name.items() if not reward.isnan().all()}
    spread = {
        name: (deviation_of(reward) / (reward.nanmean() + 1e-6)).item()
        for name, reward in found.items()
    }
    threshold = sum(spread.values()) / max(1, len(spread))
    total = torch.zeros_like(rewards.combined)
    for name, reward in found.items():
        tamed = reward.log1p() if spread[name] > threshold else reward
        total = total + (rewards.weights[name] * tamed).nan_to_num(nan=0)
    return normalised(total.where(~rewards.combined.isnan(), torch.nan), group, std, epsilon, clip)


ADVANTAGES = {"group": group_advantage, "gdpo": gdpo, "win_rate": win_rate, "log_tamed": log_tamed}
PER_REWARD = (gdpo, log_tamed)
"""These weigh the rewards one by one, and take nothing from how `combine` would make them into one."""
