"""Preference pairs from the ranked images of each prompt."""

import torch

from flowalign import distributed
from flowalign.batch import Pairs, Rollout
from flowalign.flow import PerImage
from flowalign.rollouts.ranking_settings import Ranking


def rank(rollout: Rollout, ranking: Ranking) -> Pairs:
    """Pairs from the judged images of whole groups, the same number of every group."""
    better, worse, scale, number = [], [], [], []
    for label in rollout.group.unique().tolist():
        members = (rollout.group == label).nonzero().flatten()
        reward = rollout.reward.cpu()[members]
        order = members[ranked(reward)].tolist()
        top = min(ranking.top, len(order) // 2)
        better += [i for i in order[:top] for _ in range(top)]
        worse += [i for _ in range(top) for i in order[-top:]]
        number += range(top * top)
        reward = reward[~reward.isnan()] if not reward.isnan().all() else torch.zeros(1)
        spread = (reward.max() - reward.min()).item()
        scale.append(
            (
                ((reward - reward.min()) / spread).std(correction=0).item() if spread else 0.0,
                spread or 1.0,
                top * top,
            )
        )
    chosen, rejected = rollout[better], rollout[worse]
    gap = chosen.reward - rejected.reward
    weight = (gap > ranking.min_gap).float()
    if ranking.weighted:
        weight = (weight * gap_weights(gap, scale)).nan_to_num(nan=0)
    keys = torch.cat([chosen.keys[:, :3], torch.tensor(number)[:, None]], 1)
    sides = chosen.path, rejected.path, chosen.log_prob, rejected.log_prob
    return Pairs(
        chosen.prompts, chosen.metadata, keys, chosen.cond, *sides, gap, weight, rollout.steps
    )


def ranked(reward: PerImage) -> list[int]:
    """Best first; what was not scored in the middle, where it is paired last."""
    order = reward.argsort(descending=True, stable=True).tolist()
    scored = [i for i in order if not reward[i].isnan()]
    return [
        *scored[: len(scored) // 2],
        *(i for i in order if reward[i].isnan()),
        *scored[len(scored) // 2 :],
    ]


def gap_weights(gap: PerImage, scale: list[tuple[float, float, int]]) -> PerImage:
    """DP²O's: (gap + 1 - its mean in the group) · (spread of the group + 1 - its mean over groups), rewards in [0, 1] by group.

    `scale` holds for every group its deviation, its range, and how many pairs it has.
    """
    deviation = torch.tensor([entry[0] for entry in scale])
    between = deviation + 1 - distributed.mean(deviation.mean())
    parts = zip(gap.split([entry[2] for entry in scale]), scale, between.tolist(), strict=True)
    return torch.cat(
        [
            (part / whole + 1 - (part / whole).nanmean()) * outer
            for part, (_, whole, _), outer in parts
        ]
    )
