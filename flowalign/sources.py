"""source(step) -> a step's batch and its metrics: prompts, judged rollouts, ranked or given pairs, or given pictures.

A pure function of the step, so that going on is exact.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flowalign import processes
from flowalign.batch import Batch, Examples, Pairs, Prompts, Rollout, Scored
from flowalign.data import Prompt, prompts_of_step
from flowalign.experience import Counts, Judge, make_prompts, passes
from flowalign.flow import PerImage
from flowalign.pairs import Bytes, Example, Latents
from flowalign.policy import Policy
from flowalign.rewards.base import Reward
from flowalign.settings import Count, NonNegative, Settings

Source = Callable[[int], tuple[Any, dict[str, float]]]


@dataclass
class Ranking(Settings):
    """Which pairs are made of the ranked images of a prompt: each of the best `top` with each of the worst."""

    top: Count = 1
    min_gap: NonNegative = 0.0
    """Pairs whose rewards differ by this or less teach nothing."""
    weighted: bool = False
    """Whether pairs, and prompts, whose rewards lie further apart count more (DP²O, arXiv 2510.18851)."""


@dataclass
class Supplies:
    """What sources make their batches from."""

    policy: Policy
    judge: Judge
    prompts: list[Prompt]
    examples: list[Example]
    counts: Counts
    seed: int
    rollout_with: str
    ranking: Ranking

    @cached_property
    def latents(self) -> Latents:
        return Latents(self.policy.model, self.counts.images_per_pass)

    def chosen(self, count: int, step: int) -> dict[int, int]:
        """Of `count` prompts or examples those of this process and step, by their slot in the step."""
        order = prompts_of_step(count, step, self.counts.prompts_per_step, self.seed)
        return {slot: order[slot] for slot in self.counts.slots(processes.rank())}

    def step_prompts(self, step: int) -> Prompts:
        """This process's prompts of a step, each repeated for its group."""
        chosen = self.chosen(len(self.prompts), step)
        members = [(slot, image) for slot in chosen for image in range(self.counts.images_per_prompt)]
        keys = [(self.seed, step, slot, image) for slot, image in members]
        return make_prompts(self.policy, [self.prompts[chosen[slot]] for slot, _ in members], keys)


def source_of(kind: type[Batch], supplies: Supplies) -> Source:
    """The source of an objective that learns from this kind of batch: given pictures where there are some."""
    given = {Pairs: given_pairs, Examples: given_examples}
    made = {Prompts: differentiable_prompts, Rollout: judged_rollouts, Pairs: ranked_pairs}
    return (given if supplies.examples else made)[kind](supplies)


def differentiable_prompts(supplies: Supplies) -> Source:
    """Prompts with the rewards that a gradient passes through."""
    judge, size = supplies.judge, supplies.counts.images_per_prompt

    def reward(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Scored:
        scores = {reward.name: _with_gradient(reward, size, images, prompts, metadata) for reward in judge.rewards}
        return judge.combine(scores, judge.weights), scores

    return lambda step: (replace(supplies.step_prompts(step), reward=reward), {})


def _with_gradient(reward: Reward, size: int, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> PerImage:
    """The scores of a pass; a reward of groups is asked about the `size` images of one prompt at a time."""
    size = size if reward.of_groups else len(images)
    parts = [slice(start, start + size) for start in range(0, len(images), size)]
    return torch.cat([reward.with_gradient(images[part], prompts[part], metadata[part]) for part in parts])


def judged_rollouts(supplies: Supplies) -> Source:
    """Rollouts with rewards and advantages, sampled under the weights that the objective names."""

    def source(step: int) -> tuple[Rollout, dict[str, float]]:
        prompts = supplies.step_prompts(step)
        return supplies.judge(passes(supplies.policy.at(supplies.rollout_with), prompts, supplies.counts.images_per_pass))

    return source


def ranked_pairs(supplies: Supplies) -> Source:
    """Pairs of the best and the worst of each prompt's images."""
    rollouts = judged_rollouts(supplies)

    def source(step: int) -> tuple[Pairs, dict[str, float]]:
        rollout, metrics = rollouts(step)
        return rank(rollout, supplies.ranking), metrics

    return source


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
        scale.append((((reward - reward.min()) / spread).std(correction=0).item() if spread else 0.0, spread or 1.0, top * top))
    chosen, rejected = rollout[better], rollout[worse]
    gap = chosen.reward - rejected.reward
    weight = (gap > ranking.min_gap).float()
    if ranking.weighted:
        weight = (weight * gap_weights(gap, scale)).nan_to_num(nan=0)
    keys = torch.cat([chosen.keys[:, :3], torch.tensor(number)[:, None]], 1)
    sides = chosen.path, rejected.path, chosen.log_prob, rejected.log_prob
    return Pairs(chosen.prompts, chosen.metadata, keys, chosen.cond, *sides, gap, weight, rollout.steps)


def ranked(reward: PerImage) -> list[int]:
    """Best first; what was not scored in the middle, where it is paired last."""
    order = reward.argsort(descending=True, stable=True).tolist()
    scored = [i for i in order if not reward[i].isnan()]
    return [*scored[: len(scored) // 2], *(i for i in order if reward[i].isnan()), *scored[len(scored) // 2 :]]


def gap_weights(gap: PerImage, scale: list[tuple[float, float, int]]) -> PerImage:
    """DP²O's: (gap + 1 - its mean in the group) · (spread of the group + 1 - its mean over groups), rewards in [0, 1] by group.

    `scale` holds for every group its deviation, its range, and how many pairs it has.
    """
    deviation = torch.tensor([entry[0] for entry in scale])
    between = deviation + 1 - processes.mean(deviation.mean())
    parts = zip(gap.split([entry[2] for entry in scale]), scale, between.tolist(), strict=True)
    return torch.cat([(part / whole + 1 - (part / whole).nanmean()) * outer for part, (_, whole, _), outer in parts])


def given_pairs(supplies: Supplies) -> Source:
    """Pairs of `data.pairs`."""
    examples = supplies.examples
    return lambda step: (make_pairs(supplies, examples, supplies.chosen(len(examples), step), step), {})


def given_examples(supplies: Supplies) -> Source:
    """Pictures of `data.pairs`, of pairs the better ones."""
    examples = supplies.examples
    return lambda step: (make_examples(supplies, examples, supplies.chosen(len(examples), step), step), {})


def make_pairs(supplies: Supplies, examples: list[Example], chosen: dict[int, int], step: int) -> Pairs:
    """Pairs of the examples chosen, by slot."""
    base = _prompts_of(supplies, examples, chosen, step)
    names = [examples[i].where for i in chosen.values()]
    better, worse = (supplies.latents([read() for read in side], names)[:, None] for side in _sides(examples, chosen))
    gap = torch.tensor([examples[i].gap for i in chosen.values()], device=base.device)
    unknown = better.new_zeros(len(base), 0)
    return Pairs(base.prompts, base.metadata, base.keys, base.cond, better, worse, unknown, unknown, gap, torch.ones_like(gap))


def make_examples(supplies: Supplies, examples: list[Example], chosen: dict[int, int], step: int) -> Examples:
    """Pictures of the examples chosen, by slot."""
    base = _prompts_of(supplies, examples, chosen, step)
    members = [examples[i] for i in chosen.values()]
    x0 = supplies.latents([example.chosen() for example in members], [example.where for example in members])
    return Examples(base.prompts, base.metadata, base.keys, base.cond, x0)


def _sides(examples: list[Example], chosen: dict[int, int]) -> tuple[list[Bytes], list[Bytes]]:
    members = [examples[i] for i in chosen.values()]
    return [example.chosen for example in members], [example.rejected for example in members if example.rejected]


def _prompts_of(supplies: Supplies, examples: list[Example], chosen: dict[int, int], step: int) -> Prompts:
    keys = [(supplies.seed, step, slot, 0) for slot in chosen]
    return make_prompts(supplies.policy, [examples[i].prompt for i in chosen.values()], keys)
