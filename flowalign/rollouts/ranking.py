"""Preference pairs from the ranked images of each prompt."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from flowalign import distributed
from flowalign.batch import Pairs, Rollout
from flowalign.flow import PerImage
from flowalign.rollouts.ranking_settings import Ranking


class GroupScale(NamedTuple):
    """The scale of one group's rewards."""

    deviation: float  # of the rewards rescaled to [0, 1]
    spread: float  # largest minus smallest reward; 1 if all are equal
    pairs: int  # number of pairs made of the group


def rank(rollout: Rollout, ranking: Ranking) -> Pairs:
    """Return pairs of the images of whole groups, the same number for groups of the same size."""
    labels = rollout.group.unique().tolist()
    groups = [(rollout.group == label).nonzero().flatten() for label in labels]
    rewards = [rollout.reward.cpu()[members] for members in groups]
    better, worse, number = [], [], []
    for members, reward in zip(groups, rewards, strict=True):
        order = members[rank_order(reward)].tolist()
        top = min(ranking.top, len(order) // 2)
        best, worst = order[:top], order[len(order) - top :]
        better += [best[number // top] for number in range(top * top)]
        worse += worst * top
        number += range(top * top)
    chosen, rejected = rollout[better], rollout[worse]
    gap = chosen.reward - rejected.reward
    weight = (gap > ranking.min_gap).float()
    if ranking.weighted:
        scales = [group_scale(reward, ranking.top) for reward in rewards]
        weight = (weight * gap_weights(gap, scales)).nan_to_num(nan=0)
    return Pairs(
        prompts=chosen.prompts,
        metadata=chosen.metadata,
        # Pairs of a prompt are numbered, so that each has noise of its own.
        keys=replace(chosen.keys, image=torch.tensor(number, dtype=torch.int64)),
        cond=chosen.cond,
        weight=weight,
        chosen=chosen.path,
        rejected=rejected.path,
        chosen_log_prob=chosen.log_prob,
        rejected_log_prob=rejected.log_prob,
        gap=gap,
        steps=rollout.steps,
    )


def rank_order(reward: PerImage) -> list[int]:
    """Return the rows best first, with those that were not scored in the middle."""
    order = reward.argsort(descending=True, stable=True).tolist()
    scored = [row for row in order if not reward[row].isnan()]
    unscored = [row for row in order if reward[row].isnan()]
    # Best and worst are taken from the ends, so rows in the middle are paired last.
    half = len(scored) // 2
    return [*scored[:half], *unscored, *scored[half:]]


def group_scale(reward: PerImage, top: int) -> GroupScale:
    """Measure the rewards of one group; those that are NaN are left out."""
    scored = reward[~reward.isnan()] if not reward.isnan().all() else torch.zeros(1)
    spread = (scored.max() - scored.min()).item()
    deviation = ((scored - scored.min()) / spread).std(correction=0).item() if spread else 0.0
    return GroupScale(deviation, spread or 1.0, min(top, len(reward) // 2) ** 2)


def gap_weights(gap: PerImage, scales: list[GroupScale]) -> PerImage:
    """Return DP²O's weights of pairs, for rewards that are rescaled to [0, 1] in each group.

    A weight is (gap + 1 - mean gap of the group) · (deviation + 1 - mean deviation of all groups).
    """
    deviation = torch.tensor([scale.deviation for scale in scales])
    between = deviation + 1 - distributed.mean(deviation.mean())
    gaps = gap.split([scale.pairs for scale in scales])
    weights: list[Tensor] = []
    for part, scale, outer in zip(gaps, scales, between.tolist(), strict=True):
        rescaled = part / scale.spread
        weights.append((rescaled + 1 - rescaled.nanmean()) * outer)
    return torch.cat(weights)
