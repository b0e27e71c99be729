"""From a configuration to everything that a run works with, cheapest checks first.

Files and rewards are read and tried before any weight of the model is loaded, so that most mistakes
are answered in seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from flowalign import distributed
from flowalign.batch import EVALUATION_STEP, Pairs, Prompts, Rollout
from flowalign.config.sections import Config
from flowalign.data.preferences import Example, read_examples
from flowalign.data.prompts import Prompt, read_prompts
from flowalign.errors import RunError, UserError
from flowalign.evaluation.evaluator import Evaluator
from flowalign.evaluation.held_out import HeldOut
from flowalign.models.base import FlowModel
from flowalign.models.config import ModelConfig
from flowalign.policy import Policy
from flowalign.progress import say
from flowalign.rewards import inspection
from flowalign.rewards.base import Reward
from flowalign.rewards.registry import load_rewards, reward_entry
from flowalign.rollouts.batch_plan import BatchPlan
from flowalign.rollouts.scoring import RolloutScorer
from flowalign.rollouts.sources import make_examples, make_pairs, Source, source_of, SourceContext
from flowalign.runs.checkpoint import TrainState


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The files and rewards that a configuration names, read and checked."""

    config: Config
    plan: BatchPlan
    prompts: list[Prompt]
    evaluation_prompts: list[Prompt]
    examples: list[Example]
    """The pictures of `data.pairs`; empty if images are generated."""
    held_out: list[Example]
    """The pictures of `evaluation.pairs`."""
    rewards: list[Reward]
    evaluation_rewards: list[Reward]


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """The parts of a run, ready to train."""

    config: Config
    state: TrainState
    context: SourceContext
    source: Source
    evaluator: Evaluator

    @property
    def policy(self) -> Policy:
        """The policy that trains."""
        return self.state.policy

    @property
    def plan(self) -> BatchPlan:
        """The batch arithmetic of a step."""
        return self.context.plan


def read_inputs(config: Config) -> Inputs:
    """Read prompts, pairs and rewards, and score noise with each reward.

    Raises:
        UserError: A file cannot be read, or a reward does not work or does not fit the objective.
    """
    train, learns_from = config.train, config.objective.learns_from
    plan = BatchPlan(
        prompts_per_step=train.prompts_per_step,
        images_per_prompt=train.images_per_prompt,
        updates_per_step=train.updates_per_step,
        max_images_per_pass=train.images_per_pass,
        processes=distributed.count(),
    )
    if plan.note and distributed.is_main():
        say(plan.note)
    paired = learns_from is Pairs
    examples = _read_examples(config.data.pairs, "data.pairs", paired)
    held_out = _read_examples(config.evaluation.pairs, "evaluation.pairs", paired)
    prompts = _read_prompts(config.data.prompts, "data.prompts") or _prompts_of(examples)
    path = config.evaluation.prompts
    evaluation_prompts = _read_prompts(path, "evaluation.prompts") or prompts
    rewards = load_rewards(config.rewards)
    check_rewards(config, plan, rewards)
    evaluation_rewards = load_evaluation_rewards(config, rewards)
    check_evaluation_rewards(config, evaluation_rewards)
    score_noise(rewards, prompts, config.model, needs_gradient=learns_from is Prompts)
    score_noise(evaluation_rewards, evaluation_prompts, config.model, known=rewards)
    return Inputs(
        config=config,
        plan=plan,
        prompts=prompts,
        evaluation_prompts=evaluation_prompts,
        examples=examples,
        held_out=held_out,
        rewards=rewards,
        evaluation_rewards=evaluation_rewards,
    )


def _read_examples(path: str, key: str, paired: bool) -> list[Example]:
    return read_examples(path, key, paired) if path else []


def _read_prompts(path: str, key: str) -> list[Prompt]:
    return read_prompts(path, key) if path else []


def _prompts_of(examples: list[Example]) -> list[Prompt]:
    """Return the prompts of the examples, each once, in their order."""
    return [Prompt(text) for text in dict.fromkeys(example.prompt.text for example in examples)]


def assemble(inputs: Inputs, model: FlowModel) -> Assembly:
    """Build the policy with its adapters, the source of batches, and the evaluator."""
    config, plan = inputs.config, inputs.plan
    train, objective = config.train, config.objective
    # The adapter is drawn from the global generator; nothing after it is.
    torch.manual_seed(train.seed)
    snapshots = [*objective.snapshots, *(["ema"] if train.ema.decay else [])]
    policy = Policy(model, config.sampler, snapshots, plan.images_per_pass)
    model.remember([prompt.text for prompt in inputs.prompts])
    scorer = make_scorer(config, plan, inputs.rewards, train.drop_equal_groups)
    context = SourceContext(
        policy=policy,
        scorer=scorer,
        prompts=inputs.prompts,
        examples=inputs.examples,
        plan=plan,
        seed=train.seed,
        sampling_weights=objective.sampling_weights,
        ranking=config.data.ranking,
    )
    optimizer = make_optimizer(policy, train.learning_rate, train.weight_decay)
    return Assembly(
        config=config,
        state=TrainState(policy, optimizer, scorer),
        context=context,
        source=source_of(objective.learns_from, context),
        evaluator=make_evaluator(inputs, context),
    )


def make_scorer(
    config: Config, plan: BatchPlan, rewards: list[Reward], drop_equal_groups: bool = False
) -> RolloutScorer:
    """Return what scores images by these rewards and compares the images of each prompt."""
    return RolloutScorer(
        rewards,
        config.combine,
        config.advantage,
        plan.images_per_pass,
        distributed.device(),
        drop_equal_groups=drop_equal_groups,
    )


def make_evaluator(inputs: Inputs, context: SourceContext) -> Evaluator:
    """Return the evaluator on the evaluation prompts, rewards and pairs."""
    config = inputs.config
    return Evaluator(
        prompts=inputs.evaluation_prompts,
        images_per_prompt=config.evaluation.images_per_prompt,
        scorer=make_scorer(config, inputs.plan, inputs.evaluation_rewards),
        images_per_pass=inputs.plan.images_per_pass,
        seed=config.train.seed,
        held_out=make_held_out(inputs, context),
    )


def make_held_out(inputs: Inputs, context: SourceContext) -> HeldOut | None:
    """Return this rank's share of `evaluation.pairs`, or None without pairs."""
    if not inputs.held_out:
        return None
    make = make_pairs if inputs.config.objective.learns_from is Pairs else make_examples
    share = range(distributed.rank(), len(inputs.held_out), distributed.count())
    return HeldOut(make(context, inputs.held_out, {i: i for i in share}, EVALUATION_STEP))


def make_optimizer(
    policy: Policy, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Return AdamW over the trained adapter."""
    return torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=weight_decay)


def check_rewards(config: Config, plan: BatchPlan, rewards: Sequence[Reward]) -> None:
    """Check that the objective can use the training rewards. Raises UserError otherwise."""
    learns_from = config.objective.learns_from
    learning = [reward.name for reward in rewards if reward.learner]
    if learning and learns_from not in (Rollout, Pairs):
        raise UserError(
            f"rewards.{learning[0]} learns from whole steps, but the objective "
            f"{config.objective_name} takes each image's gradient. Remove the reward, or "
            "choose an objective that learns from scores."
        )
    comparing = [reward.name for reward in rewards if reward.of_groups]
    cuts_groups = plan.images_per_pass % plan.images_per_prompt != 0
    if comparing and learns_from is Prompts and cuts_groups:
        raise UserError(
            f"Passes have {plan.images_per_pass} images, but rewards.{comparing[0]} compares a "
            "prompt's images, and the objective takes its gradient pass by pass. Set "
            "train.images_per_pass to a multiple of train.images_per_prompt, "
            f"{plan.images_per_prompt}, that divides the images of an update, "
            f"{plan.images_per_update}."
        )


def load_evaluation_rewards(config: Config, rewards: Sequence[Reward]) -> list[Reward]:
    """Return the evaluation's rewards. Those that training also uses are loaded only once."""
    entries = config.evaluation.rewards
    loaded = {
        name: reward
        for name, reward in zip(config.rewards, rewards, strict=True)
        if name in entries and _differ_in_weight_only(name, entries[name], config.rewards[name])
    }
    others = {name: value for name, value in entries.items() if name not in loaded}
    loaded |= dict(zip(others, load_rewards(others, "evaluation.rewards"), strict=True))
    return [loaded[name] for name in entries]


def _differ_in_weight_only(name: str, one: Any, other: Any) -> bool:
    first, second = reward_entry(name, one), reward_entry(name, other)
    return replace(first, weight=1.0) == replace(second, weight=1.0)


def check_evaluation_rewards(config: Config, rewards: Sequence[Reward]) -> None:
    """Check that the rewards can compare before and after. Raises UserError otherwise."""
    for reward in rewards:
        if reward.learner:
            raise UserError(
                f"{reward.name} changes while it learns, so its scores before and after cannot be "
                "compared. Name other rewards in evaluation.rewards."
            )
        if reward.traits.level == "pairwise":
            raise UserError(
                f"{reward.name} is pairwise: its mean over a prompt's images is always ½, before "
                "and after. Name rewards of single images in evaluation.rewards."
            )
        if reward.of_groups and config.evaluation.images_per_prompt == 1:
            raise UserError(
                f"evaluation.images_per_prompt is 1, but {reward.name} compares a prompt's images. "
                "Write 2 or more, or name other rewards in evaluation.rewards."
            )


def score_noise(
    rewards: Sequence[Reward],
    prompts: list[Prompt],
    model: ModelConfig,
    needs_gradient: bool = False,
    known: Sequence[Reward] = (),
) -> None:
    """Score pictures of noise with each reward, so that mistakes show before the model loads.

    Args:
        rewards: The rewards to try.
        prompts: The prompts that they will be used on.
        model: The section of the model, whose size the pictures have.
        needs_gradient: Whether the objective takes the rewards' gradient.
        known: Rewards that were tried before. Scoring may cost money, so these score only once
            more, for what they need to know of these prompts.

    Raises:
        UserError: A reward raised an error or returned something other than scores.
    """
    samples = inspection.noise_samples(
        prompts[:2] * 2, model.height, model.width, distributed.device()
    )
    for reward in rewards:
        findings = []
        try:
            if reward in known:
                inspection.score(reward, samples)
            else:
                findings = inspection.inspect_scores(reward, samples)[1]
            if needs_gradient:
                findings.append(inspection.inspect_gradient(reward, samples, needed=True))
        except RunError as error:
            raise UserError(str(error)) from error
        for finding in findings:
            # Noise may well score the same everywhere, so equal scores are not worth a message.
            if finding.wrong and finding.subject != "spread" and distributed.is_main():
                say(f"rewards.{reward.name}, {finding.subject}: {finding.text}.")
