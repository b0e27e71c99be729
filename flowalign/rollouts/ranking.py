"""Preference pairs from the ranked images of each prompt, and the weights of pairs."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import NamedTuple, Self

import torch
from torch import Tensor

from flowalign import distributed
from flowalign.batch import Pairs, Rollout
from flowalign.data.examples import Example
from flowalign.errors import UserError
from flowalign.flow import PerImage
from flowalign.rollouts.ranking_settings import Ranking


class RowPairs(NamedTuple):
    """Pairs of images, as rows of a rollout. An image that is paired with itself is a filler."""

    better: list[int]
    worse: list[int]
    counts: list[bool]
    """True for each pair that is trained on."""

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Return all pairs of all parts, in order."""
        return cls(*(list(chain.from_iterable(column)) for column in zip(*parts, strict=True)))

    def filled(self, count: int, row: int) -> "RowPairs":
        """Return `count` pairs; those behind the present ones pair a row with itself."""
        fill = count - len(self.counts)
        return RowPairs(
            [*self.better, *[row] * fill],
            [*self.worse, *[row] * fill],
            [*self.counts, *[False] * fill],
        )


class GroupScale(NamedTuple):
    """The scale of one group's rewards."""

    deviation: float  # of the rewards rescaled to [0, 1]
    spread: float  # largest minus smallest reward; 1 if all are equal


def rank(rollout: Rollout, ranking: Ranking) -> Pairs:
    """Return pairs of the images of whole groups, the same number of rows for each group.

    Rows of weight 0 fill up a group that has fewer pairs. All processes call it together.
    """
    labels = rollout.group.unique().tolist()
    groups = [(rollout.group == label).nonzero().flatten() for label in labels]
    parts = [PAIRINGS[ranking.by](rollout, members, ranking) for members in groups]
    # Updates take equal shares of the rows, so that all groups on all processes need as many.
    most = distributed.gather_objects(max(len(part.counts) for part in parts))
    count = max(1, *most)
    filled = [
        part.filled(count, int(members[0])) for part, members in zip(parts, groups, strict=True)
    ]
    pairs = RowPairs.joined(filled)
    chosen, rejected = rollout[pairs.better], rollout[pairs.worse]
    is_filler = chosen.keys.image == rejected.keys.image
    gap = chosen.reward - rejected.reward
    gap = gap.masked_fill(is_filler.to(gap.device), torch.nan)
    weight = torch.tensor(pairs.counts, device=gap.device).float()
    if ranking.weighted:
        rewards = rollout.reward.cpu()
        scales = [group_scale(rewards[members]) for members in groups]
        # An image can dominate one of a larger combined reward. Its gap is 0 then, because a weight
        # below 0 would prefer the dominated image.
        counted = gap.clamp(min=0).masked_fill(weight == 0, torch.nan)
        weight = gap_weights(counted, scales).nan_to_num(nan=0)
    return Pairs(
        prompts=chosen.prompts,
        metadata=chosen.metadata,
        # Pairs of a prompt are numbered, so that each has noise of its own.
        keys=replace(chosen.keys, image=torch.arange(len(gap)) % count),
        cond=chosen.cond,
        weight=weight,
        chosen=chosen.x0,
        rejected=rejected.x0,
        chosen_path=chosen.path,
        rejected_path=rejected.path,
        chosen_log_prob=chosen.log_prob,
        rejected_log_prob=rejected.log_prob,
        gap=gap,
        preference=torch.ones_like(gap),
        tie=torch.zeros_like(gap),
        voted=torch.ones(len(gap), 2, dtype=torch.bool, device=gap.device),
        steps=rollout.steps,
    )


def best_and_worst(rollout: Rollout, members: Tensor, ranking: Ranking) -> RowPairs:
    """Return each of the `top` best images of a prompt with each of the `top` worst."""
    reward = rollout.reward.cpu()
    order = members[rank_order(reward[members])].tolist()
    top = min(ranking.top, len(order) // 2)
    best, worst = order[:top], order[len(order) - top :]
    better, worse = [best[number // top] for number in range(top * top)], worst * top
    return RowPairs(better, worse, (reward[better] - reward[worse] > ranking.min_gap).tolist())


def dominant_and_dominated(rollout: Rollout, members: Tensor, ranking: Ranking) -> RowPairs:
    """Return each image of a prompt with each that it dominates (D3PO's released code).

    An image dominates another if it is worse in no reward and better in one, by more than
    `min_gap`. Only rewards that have scored both are compared.
    """
    scores = torch.stack([values.cpu()[members] for values in rollout.rewards.values()])
    difference = scores[:, :, None] - scores[:, None, :]  # (rewards, images, images)
    is_no_worse = ((difference >= 0) | difference.isnan()).all(0)
    is_better = (difference > ranking.min_gap).any(0)
    better, worse = members[(is_no_worse & is_better).nonzero()].T.tolist()
    return RowPairs(better, worse, [True] * len(better))


PAIRINGS: dict[str, Callable[[Rollout, Tensor, Ranking], RowPairs]] = {
    "reward": best_and_worst,
    "dominance": dominant_and_dominated,
}


def rank_order(reward: PerImage) -> list[int]:
    """Return the rows best first, with those that were not scored in the middle."""
    order = reward.argsort(descending=True, stable=True).tolist()
    scored = [row for row in order if not reward[row].isnan()]
    unscored = [row for row in order if reward[row].isnan()]
    # Best and worst are taken from the ends, so rows in the middle are paired last.
    half = len(scored) // 2
    return [*scored[:half], *unscored, *scored[half:]]


def group_scale(reward: PerImage) -> GroupScale:
    """Measure the rewards of one group; those that are NaN are left out."""
    scored = reward[~reward.isnan()] if not reward.isnan().all() else torch.zeros(1)
    spread = (scored.max() - scored.min()).item()
    deviation = ((scored - scored.min()) / spread).std(correction=0).item() if spread else 0.0
    return GroupScale(deviation, spread or 1.0)


def gap_weights(gap: PerImage, scales: list[GroupScale]) -> PerImage:
    """Return DP²O's weights of pairs, for rewards that are rescaled to [0, 1] in each group.

    A weight is (gap + 1 - mean gap of the group) · (deviation + 1 - mean deviation of all groups).
    Groups have equally many rows; a gap of NaN takes no part.
    """
    deviation = torch.tensor([scale.deviation for scale in scales])
    between = deviation + 1 - distributed.mean(deviation.mean())
    gaps = gap.split(len(gap) // len(scales))
    weights: list[Tensor] = []
    for part, scale, outer in zip(gaps, scales, between.tolist(), strict=True):
        weights.append(outer * centred_gaps(part / scale.spread))
    return torch.cat(weights)


def centred_gaps(gap: PerImage) -> PerImage:
    """Return gap + 1 - mean gap, for gaps in [0, 1]; the mean of the result is 1."""
    return gap + 1 - gap.nanmean()


def given_weights(examples: Sequence[Example], ranking: Ranking) -> PerImage:
    """Return the weights (N,) of all pairs of `data.pairs`, from their gaps.

    With `weighted`, all pairs are one group of DP²O's weights: gaps are divided by the largest,
    and the mean weight is 1. Pairs whose gap is `min_gap` or less have weight 0.

    Raises:
        UserError: All pairs would have weight 0.
    """
    gap = torch.tensor([pair.gap for pair in examples])
    # Ties have no gap, and are examples only for an objective that learns from them.
    counts = (gap > ranking.min_gap) | torch.tensor([pair.tie > 0 for pair in examples])
    if not counts.any():
        raise UserError(
            f"data.ranking.min_gap is {ranking.min_gap:g}, but no pair of data.pairs has a gap "
            f"above {gap.max().item():g}. Write a smaller min_gap."
        )
    if not ranking.weighted:
        return counts.float()
    gap = gap.masked_fill(~counts, torch.nan)
    largest = gap[counts].max()
    return centred_gaps(gap / largest).nan_to_num(nan=0) if largest else counts.float()
