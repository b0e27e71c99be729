"""Sources of training data: source(step) makes the batch of a step, with metrics about it.

Which prompts and noise a step uses depends on the seed and the step alone; what is sampled also
depends on the state (TrainState). A checkpoint holds that state, so a resumed run gets exactly the
same batches.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from flowalign import distributed
from flowalign.batch import (
    Batch,
    DifferentiableReward,
    Examples,
    Keys,
    Metadata,
    Pairs,
    Prompts,
    Rollout,
)
from flowalign.data.examples import Drawn, Example, Picture
from flowalign.data.latents import LatentCache
from flowalign.data.prompts import Prompt, prompts_of_step
from flowalign.errors import RunError, UserError
from flowalign.flow import Latent, PerImage
from flowalign.policy import Policy
from flowalign.rewards.base import Reward
from flowalign.rollouts.batch_plan import BatchPlan
from flowalign.rollouts.collect import collect_passes, make_prompts
from flowalign.rollouts.ranking import given_weights, rank
from flowalign.rollouts.ranking_settings import Ranking
from flowalign.rollouts.scoring import Metrics, RolloutScorer
from flowalign.rollouts.voted import VotedPictures

B = TypeVar("B", bound=Batch)
Source = Callable[[int], tuple[Batch, Metrics]]
"""From a training step to this process's batch and what to log about it."""


@dataclass(kw_only=True)
class SourceContext:
    """Everything that sources make their batches from."""

    policy: Policy
    scorer: RolloutScorer
    prompts: list[Prompt]
    examples: list[Example]
    plan: BatchPlan
    seed: int
    sampling_weights: str
    """The weights that sample: "policy", or a snapshot."""
    steps: int
    """The number of training steps."""
    keeps_paths: bool
    """True to keep the latents and log-probabilities of stochastic steps."""
    kept_steps: Sequence[int] = ()
    """Steps of the sampler before which rollouts keep the latents."""
    null_gradient: bool
    """False if the velocity of the empty prompt is a constant in the backward pass."""
    ranking: Ranking
    voted: VotedPictures
    """Makes the pictures of votes again."""

    @cached_property
    def latents(self) -> LatentCache:
        """The encoded pictures of `data.pairs`."""
        return LatentCache(self.policy.model)

    @cached_property
    def pair_weights(self) -> PerImage:
        """The weight of each pair of `data.pairs`, (N,), a function of all their gaps."""
        return given_weights(self.examples, self.ranking)

    def indices(self, count: int, step: int) -> dict[int, int]:
        """Return which of `count` prompts or examples this process uses in a step, by slot."""
        # Slots and not ranks decide, so that any number of processes uses the same prompts.
        order = prompts_of_step(count, step, self.plan.prompts_per_step, self.seed)
        return {slot: order[slot] for slot in self.plan.slots(distributed.rank())}

    def step_prompts(self, step: int) -> Prompts:
        """Return this process's prompts of a step, each repeated for its images."""
        indices = self.indices(len(self.prompts), step)
        members = self.plan.members(distributed.rank())
        prompts = [self.prompts[indices[slot]] for slot, _ in members]
        return self.make_prompts(prompts, Keys.training(self.seed, step, members), step)

    def make_prompts(self, prompts: list[Prompt], keys: Keys, step: int) -> Prompts:
        """Return prompts of a step with their embeddings. Each row is one image."""
        batch = make_prompts(self.policy, prompts, keys, self.upcoming(step))
        return replace(batch, cond=replace(batch.cond, null_gradient=self.null_gradient))

    def upcoming(self, step: int) -> Iterator[str]:
        """Yield this process's prompts of the steps after this one, for a pass over the data."""
        texts = [entry.prompt.text for entry in self.examples] or [p.text for p in self.prompts]
        steps = math.ceil(len(texts) / self.plan.prompts_per_step)
        for later in range(step + 1, min(step + 1 + steps, self.steps)):
            yield from (texts[index] for index in self.indices(len(texts), later).values())


def source_of(kind: type[Batch], context: SourceContext) -> Source:
    """Return the source of an objective that learns from this kind of batch."""
    # Given pictures come first: with them nothing needs to be sampled.
    makers = GIVEN if context.examples else SAMPLED
    return partial(makers[kind], context)


def differentiable_prompts(context: SourceContext, step: int) -> tuple[Prompts, Metrics]:
    """Return prompts with the rewards that a gradient passes through."""
    return replace(context.step_prompts(step), reward=differentiable_reward(context, step)), {}


def differentiable_reward(context: SourceContext, step: int) -> DifferentiableReward:
    """Return the combined reward of a step's images, through which a gradient passes."""
    scorer, group = context.scorer, context.plan.images_per_prompt

    def reward(
        images: Tensor, prompts: list[str], metadata: list[Metadata]
    ) -> tuple[PerImage, dict[str, PerImage]]:
        scores = {
            reward.name: _with_gradient(reward, group, (images, prompts, metadata), step)
            for reward in scorer.rewards
        }
        return scorer.combine(scores, scorer.weights), scores

    return reward


def _with_gradient(
    reward: Reward, group: int, inputs: tuple[Tensor, list[str], list[Metadata]], step: int
) -> PerImage:
    """Score a pass; a reward of groups sees the `group` images of one prompt at a time."""
    images, prompts, metadata = inputs
    size = group if reward.of_groups else len(images)
    parts = [slice(start, start + size) for start in range(0, len(images), size)]
    return torch.cat(
        [reward.with_gradient(images[part], prompts[part], metadata[part], step) for part in parts]
    )


def scored_rollouts(context: SourceContext, step: int) -> tuple[Rollout, Metrics]:
    """Return images sampled under `sampling_weights`, with rewards and advantages."""
    policy = context.policy.at(context.sampling_weights).keeping(context.kept_steps)
    passes = collect_passes(policy, context.step_prompts(step), context.plan.images_per_pass)
    if not context.keeps_paths:
        passes = (rollout.without_path() for rollout in passes)
    rollout, metrics = context.scorer(passes)
    return replace(rollout, reward_with_gradient=differentiable_reward(context, step)), metrics


def ranked_pairs(context: SourceContext, step: int) -> tuple[Pairs, Metrics]:
    """Return pairs of the best and the worst of each prompt's images."""
    rollout, metrics = scored_rollouts(context, step)
    return rank(rollout, context.ranking), metrics


def given_pairs(context: SourceContext, step: int) -> tuple[Pairs, Metrics]:
    """Return pairs of `data.pairs`. All ranks call it together; see `read_together`."""
    indices = context.indices(len(context.examples), step)
    pairs = read_together(lambda: make_pairs(context, context.examples, indices, step))
    weight = context.pair_weights[list(indices.values())]
    return replace(pairs, weight=weight.to(pairs.weight)), {}


def given_examples(context: SourceContext, step: int) -> tuple[Examples, Metrics]:
    """Return pictures of `data.pairs`; of pairs, the chosen. See `read_together`."""
    indices = context.indices(len(context.examples), step)
    return read_together(lambda: make_examples(context, context.examples, indices, step)), {}


def read_together(make: Callable[[], B]) -> B:
    """Return the batch of given pictures that `make` reads in the middle of a run.

    If a rank cannot read one, RunError is raised on all, so that the finished steps are saved.
    """
    batches, failure = [], None
    try:
        batches.append(make())
    except UserError as error:
        # Every picture was opened before the first step, so the user's input was right then.
        failure = RunError(str(error))
    distributed.raise_if_any_failed(failure)
    return batches[0]


Maker = Callable[[SourceContext, int], tuple[Batch, Metrics]]
GIVEN: dict[type[Batch], Maker] = {Pairs: given_pairs, Examples: given_examples}
"""Sources when `data.pairs` is given."""
SAMPLED: dict[type[Batch], Maker] = {
    Prompts: differentiable_prompts,
    Rollout: scored_rollouts,
    Pairs: ranked_pairs,
}
"""Sources when images are made from `data.prompts`."""


class GivenPictures(NamedTuple):
    """Latents of given pictures, with the paths that led to them if flowalign made them."""

    x0: Latent  # (B, *latent)
    path: Latent  # (B, S + 1, *latent); (B, 0, *latent) for files
    log_prob: Tensor  # (B, S)
    steps: range
    """The stochastic steps of the paths."""


def make_pairs(
    context: SourceContext, examples: list[Example], indices: dict[int, int], step: int
) -> Pairs:
    """Return pairs of some examples, given by slot. Raises UserError for an unreadable one."""
    members = [examples[index] for index in indices.values()]
    base = _prompts_of(context, members, indices, step)
    # Where a single picture is liked or disliked, it stands on both sides, and `voted` tells which
    # side counts.
    chosen = given_pictures(context, members, [example.chosen for example in members])
    rejected = given_pictures(context, members, [e.rejected or e.chosen for e in members])
    gap, preference, tie = torch.tensor(
        [(example.gap, example.preference, example.tie) for example in members], device=base.device
    ).unbind(1)
    voted = [(e.liked, not e.liked) if e.rejected is None else (True, True) for e in members]
    return Pairs(
        prompts=base.prompts,
        metadata=base.metadata,
        keys=base.keys,
        cond=base.cond,
        weight=torch.ones_like(gap),
        chosen=chosen.x0,
        rejected=rejected.x0,
        chosen_path=chosen.path,
        rejected_path=rejected.path,
        chosen_log_prob=chosen.log_prob,
        rejected_log_prob=rejected.log_prob,
        gap=gap,
        preference=preference,
        tie=tie,
        voted=torch.tensor(voted, device=base.device),
        steps=chosen.steps,
    )


def make_examples(
    context: SourceContext, examples: list[Example], indices: dict[int, int], step: int
) -> Examples:
    """Return pictures of some examples, given by slot. Raises UserError for an unreadable one."""
    members = [examples[index] for index in indices.values()]
    base = _prompts_of(context, members, indices, step)
    return Examples(
        prompts=base.prompts,
        metadata=base.metadata,
        keys=base.keys,
        cond=base.cond,
        weight=base.weight,
        x0=given_pictures(context, members, [example.chosen for example in members]).x0,
    )


def given_pictures(
    context: SourceContext, members: list[Example], pictures: list[Picture]
) -> GivenPictures:
    """Return the latents of one picture of each example.

    Raises UserError if a file cannot be read, or if a picture that is made again is another one.
    """
    parts = [
        given_picture(context, picture, example.where)
        for picture, example in zip(pictures, members, strict=True)
    ]
    device = context.policy.model.device
    x0, path, log_prob = (
        torch.cat(column).to(device)
        for column in zip(*((part.x0, part.path, part.log_prob) for part in parts), strict=True)
    )
    return GivenPictures(x0, path, log_prob, parts[0].steps)


def given_picture(context: SourceContext, picture: Picture, where: str) -> GivenPictures:
    """Return the latents of one picture (B = 1)."""
    if isinstance(picture, Drawn):
        row = context.voted(picture, where)
        return GivenPictures(row.x0, row.path, row.log_prob, row.steps)
    x0 = context.latents([picture()], [where])
    return GivenPictures(x0, x0.new_empty(1, 0, *x0.shape[1:]), x0.new_empty(1, 0), steps=range(0))


def _prompts_of(
    context: SourceContext, members: list[Example], indices: dict[int, int], step: int
) -> Prompts:
    keys = Keys.training(context.seed, step, [(slot, 0) for slot in indices])
    return context.make_prompts([example.prompt for example in members], keys, step)
