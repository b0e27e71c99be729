"""source(step) -> a step's batch and its metrics: prompts, judged rollouts, ranked or given pairs, or given pictures.

A pure function of the step, so that going on is exact.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flowalign import distributed
from flowalign.batch import Batch, Examples, Pairs, Prompts, Rollout, Scored
from flowalign.data.latents import LatentCache
from flowalign.data.preferences import Example, ReadBytes
from flowalign.data.prompts import Prompt, prompts_of_step
from flowalign.flow import PerImage
from flowalign.policy import Policy
from flowalign.rewards.base import Reward
from flowalign.rollouts.batch_plan import BatchPlan
from flowalign.rollouts.collect import make_prompts, passes
from flowalign.rollouts.ranking import rank, Ranking
from flowalign.rollouts.scoring import RolloutScorer

Source = Callable[[int], tuple[Any, dict[str, float]]]


@dataclass
class SourceContext:
    """What sources make their batches from."""

    policy: Policy
    judge: RolloutScorer
    prompts: list[Prompt]
    examples: list[Example]
    counts: BatchPlan
    seed: int
    sampling_weights: str
    ranking: Ranking

    @cached_property
    def latents(self) -> LatentCache:
        return LatentCache(self.policy.model, self.counts.images_per_pass)

    def chosen(self, count: int, step: int) -> dict[int, int]:
        """Of `count` prompts or examples those of this process and step, by their slot in the step."""
        order = prompts_of_step(count, step, self.counts.prompts_per_step, self.seed)
        return {slot: order[slot] for slot in self.counts.slots(distributed.rank())}

    def step_prompts(self, step: int) -> Prompts:
        """This process's prompts of a step, each repeated for its group."""
        chosen = self.chosen(len(self.prompts), step)
        members = [
            (slot, image) for slot in chosen for image in range(self.counts.images_per_prompt)
        ]
        keys = [(self.seed, step, slot, image) for slot, image in members]
        return make_prompts(self.policy, [self.prompts[chosen[slot]] for slot, _ in members], keys)


def source_of(kind: type[Batch], context: SourceContext) -> Source:
    """The source of an objective that learns from this kind of batch: given pictures where there are some."""
    given = {Pairs: given_pairs, Examples: given_examples}
    made = {Prompts: differentiable_prompts, Rollout: judged_rollouts, Pairs: ranked_pairs}
    return (given if context.examples else made)[kind](context)


def differentiable_prompts(context: SourceContext) -> Source:
    """Prompts with the rewards that a gradient passes through."""
    judge, size = context.judge, context.counts.images_per_prompt

    def reward(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Scored:
        scores = {
            reward.name: _with_gradient(reward, size, images, prompts, metadata)
            for reward in judge.rewards
        }
        return judge.combine(scores, judge.weights), scores

    return lambda step: (replace(context.step_prompts(step), reward=reward), {})


def _with_gradient(
    reward: Reward, size: int, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
) -> PerImage:
    """The scores of a pass; a reward of groups is asked about the `size` images of one prompt at a time."""
    size = size if reward.of_groups else len(images)
    parts = [slice(start, start + size) for start in range(0, len(images), size)]
    return torch.cat(
        [reward.with_gradient(images[part], prompts[part], metadata[part]) for part in parts]
    )


def judged_rollouts(context: SourceContext) -> Source:
    """Rollouts with rewards and advantages, sampled under the weights that the objective names."""

    def source(step: int) -> tuple[Rollout, dict[str, float]]:
        prompts = context.step_prompts(step)
        return context.judge(
            passes(
                context.policy.at(context.sampling_weights), prompts, context.counts.images_per_pass
            )
        )

    return source


def ranked_pairs(context: SourceContext) -> Source:
    """Pairs of the best and the worst of each prompt's images."""
    rollouts = judged_rollouts(context)

    def source(step: int) -> tuple[Pairs, dict[str, float]]:
        rollout, metrics = rollouts(step)
        return rank(rollout, context.ranking), metrics

    return source


def given_pairs(context: SourceContext) -> Source:
    """Pairs of `data.pairs`."""
    examples = context.examples
    return lambda step: (
        make_pairs(context, examples, context.chosen(len(examples), step), step),
        {},
    )


def given_examples(context: SourceContext) -> Source:
    """Pictures of `data.pairs`, of pairs the better ones."""
    examples = context.examples
    return lambda step: (
        make_examples(context, examples, context.chosen(len(examples), step), step),
        {},
    )


def make_pairs(
    context: SourceContext, examples: list[Example], chosen: dict[int, int], step: int
) -> Pairs:
    """Pairs of the examples chosen, by slot."""
    base = _prompts_of(context, examples, chosen, step)
    names = [examples[i].where for i in chosen.values()]
    better, worse = (
        context.latents([read() for read in side], names)[:, None]
        for side in _sides(examples, chosen)
    )
    gap = torch.tensor([examples[i].gap for i in chosen.values()], device=base.device)
    unknown = better.new_zeros(len(base), 0)
    return Pairs(
        base.prompts,
        base.metadata,
        base.keys,
        base.cond,
        better,
        worse,
        unknown,
        unknown,
        gap,
        torch.ones_like(gap),
    )


def make_examples(
    context: SourceContext, examples: list[Example], chosen: dict[int, int], step: int
) -> Examples:
    """Pictures of the examples chosen, by slot."""
    base = _prompts_of(context, examples, chosen, step)
    members = [examples[i] for i in chosen.values()]
    x0 = context.latents(
        [example.chosen() for example in members], [example.where for example in members]
    )
    return Examples(base.prompts, base.metadata, base.keys, base.cond, x0)


def _sides(
    examples: list[Example], chosen: dict[int, int]
) -> tuple[list[ReadBytes], list[ReadBytes]]:
    members = [examples[i] for i in chosen.values()]
    return [example.chosen for example in members], [
        example.rejected for example in members if example.rejected
    ]


def _prompts_of(
    context: SourceContext, examples: list[Example], chosen: dict[int, int], step: int
) -> Prompts:
    keys = [(context.seed, step, slot, 0) for slot in chosen]
    return make_prompts(context.policy, [examples[i].prompt for i in chosen.values()], keys)
