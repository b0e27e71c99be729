"""From rewards to advantages: pure functions of the rewards and of which prompt each image belongs to."""

from typing import Literal

import torch
from torch import Tensor

from flowalign.flow import PerImage


def group_statistics(reward: PerImage, group: Tensor) -> tuple[PerImage, PerImage]:
    """Mean and population deviation of each image's group, per image. `group` holds integers."""
    _, index = group.unique(return_inverse=True)
    exact = reward.double()  # so that equal rewards deviate by exactly 0
    count = torch.bincount(index).double()
    mean = (torch.zeros_like(count).index_add_(0, index, exact) / count)[index]
    variance = (torch.zeros_like(count).index_add_(0, index, (exact - mean) ** 2) / count)[index]
    return mean.to(reward.dtype), variance.sqrt().to(reward.dtype)


def group_advantage(
    reward: PerImage, group: Tensor, std: Literal["group", "global"] = "global", epsilon: float = 1e-4, clip: float = 5.0
) -> PerImage:
    """Flow-GRPO's: how far above the mean of its group an image stands, over the deviation of the group or of all rewards.

    A group of equal rewards gets zeros. Advantages are cut to [-clip, clip].
    """
    mean, deviation = group_statistics(reward, group)
    if std == "global":
        deviation = reward.std(correction=0)
    return ((reward - mean) / (deviation + epsilon)).clamp(-clip, clip)


ADVANTAGES = {"group": group_advantage}
