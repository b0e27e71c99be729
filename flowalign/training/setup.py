"""From a configuration to everything that works on a run, checked in the order of what is cheap."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from flowalign import distributed
from flowalign.batch import Pairs, Prompts, Rollout
from flowalign.config.sections import Config
from flowalign.data.preferences import Example, read_examples
from flowalign.data.prompts import Prompt, read_prompts
from flowalign.errors import OutOfMemory, RunError, UserError
from flowalign.evaluation.evaluator import EVALUATION_STEP, Evaluator
from flowalign.evaluation.held_out import HeldOut
from flowalign.models.base import FlowModel
from flowalign.models.config import ModelConfig
from flowalign.policy import Policy
from flowalign.rewards import inspection as probe
from flowalign.rewards.base import Reward
from flowalign.rewards.registry import load_rewards, reward_entry
from flowalign.rollouts.batch_plan import BatchPlan
from flowalign.rollouts.scoring import RolloutScorer
from flowalign.rollouts.sources import make_examples, make_pairs, Source, source_of, SourceContext
from flowalign.runs.checkpoint import TrainState


@dataclass(frozen=True)
class Inputs:
    """What a configuration names, read and checked before any weight is loaded."""

    config: Config
    counts: BatchPlan
    prompts: list[Prompt]
    evaluation_prompts: list[Prompt]
    examples: list[Example]
    held_out: list[Example]
    rewards: list[Reward]
    evaluation_rewards: list[Reward]


@dataclass(frozen=True)
class Assembly:
    """What a run works with, and all that it changes."""

    config: Config
    learned: TrainState
    context: SourceContext
    source: Source
    evaluator: Evaluator

    @property
    def policy(self) -> Policy:
        return self.learned.policy

    @property
    def counts(self) -> BatchPlan:
        return self.context.counts


@contextmanager
def advise_on_out_of_memory(config: Config) -> Iterator[None]:
    """OutOfMemory that says what to write where the device has not enough."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        advice = f"lower train.images_per_pass (now {config.train.images_per_pass}), which changes no result"
        if not config.model.gradient_checkpointing:
            advice += ", or set model.gradient_checkpointing: true"
        raise OutOfMemory(
            f"the device is out of memory: {advice}; `flowalign plan` tells what is needed."
        ) from error


def read_inputs(config: Config) -> Inputs:
    """Prompts, pairs and rewards. UserError says what to type instead."""
    train, data, kind = config.train, config.data, config.objective.learns_from
    counts = BatchPlan(
        train.prompts_per_step,
        train.images_per_prompt,
        train.updates_per_step,
        train.images_per_pass,
        distributed.count(),
    )
    examples, held_out = (
        read_examples(path, key, kind is Pairs) if path else []
        for path, key in ((data.pairs, "data.pairs"), (config.evaluation.pairs, "evaluation.pairs"))
    )
    prompts = (
        read_prompts(data.prompts)
        if data.prompts
        else [Prompt(text) for text in dict.fromkeys(example.prompt.text for example in examples)]
    )
    evaluation_prompts = (
        read_prompts(config.evaluation.prompts, "evaluation.prompts")
        if config.evaluation.prompts
        else prompts
    )
    rewards, evaluation_rewards = rewards_of(config)
    look_at(rewards, prompts, config.model, needs_gradient=kind is Prompts)
    look_at(evaluation_rewards, evaluation_prompts, config.model, known=rewards)
    return Inputs(
        config, counts, prompts, evaluation_prompts, examples, held_out, rewards, evaluation_rewards
    )


def assemble(inputs: Inputs, model: FlowModel) -> Assembly:
    """The policy with its adapters, where batches come from, and how they are judged."""
    config, counts = inputs.config, inputs.counts
    train, objective = config.train, config.objective
    torch.manual_seed(train.seed)
    snapshots = [*objective.snapshots, *(["ema"] if train.ema.decay else [])]
    policy = Policy(model, config.sampler, snapshots, train.images_per_pass)
    model.remember([prompt.text for prompt in inputs.prompts])
    judging = config.combine, config.advantage, train.images_per_pass, distributed.device()
    judge = RolloutScorer(inputs.rewards, *judging, drop_equal_groups=train.drop_equal_groups)
    context = SourceContext(
        policy,
        judge,
        inputs.prompts,
        inputs.examples,
        counts,
        train.seed,
        objective.sampling_weights,
        config.data.ranking,
    )
    evaluator = Evaluator(
        inputs.evaluation_prompts,
        config.evaluation.images_per_prompt,
        RolloutScorer(inputs.evaluation_rewards, *judging),
        train.images_per_pass,
        train.seed,
        held_out=held_out(inputs, context),
    )
    optimizer = make_optimizer(policy, train.learning_rate, train.weight_decay)
    learned = TrainState(policy, optimizer, judge)
    return Assembly(config, learned, context, source_of(objective.learns_from, context), evaluator)


def make_optimizer(
    policy: Policy, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Of the adapter that trains."""
    return torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=weight_decay)


def rewards_of(config: Config) -> tuple[list[Reward], list[Reward]]:
    """The rewards to train on and those to evaluate by; what stands in both is made once. UserError where they do not fit."""
    rewards = load_rewards(config.rewards)
    learning = [reward.name for reward in rewards if reward.learner]
    if (
        learning
        and config.objective.learns_from is not Rollout
        and config.objective.learns_from is not Pairs
    ):
        name = config.raw["objective"]["name"]
        raise UserError(
            f"rewards.{learning[0]} learns from whole steps, but the objective {name} takes each image's gradient."
        )
    comparing, train = [reward.name for reward in rewards if reward.of_groups], config.train
    if (
        comparing
        and config.objective.learns_from is Prompts
        and train.images_per_pass % train.images_per_prompt
    ):
        raise UserError(
            f"train.images_per_pass is {train.images_per_pass}, but rewards.{comparing[0]} compares a prompt's images, and the "
            f"objective takes its gradient pass by pass; use a multiple of train.images_per_prompt, {train.images_per_prompt}."
        )
    asked = config.evaluation.rewards
    made = dict(zip(config.rewards, rewards, strict=True))
    made = {
        name: made[name]
        for name in asked
        if name in made and same_reward(name, asked[name], config.rewards[name])
    }
    others = {name: value for name, value in asked.items() if name not in made}
    made |= dict(zip(others, load_rewards(others, "evaluation.rewards"), strict=True))
    evaluation = [made[name] for name in asked]
    if moving := [reward.name for reward in evaluation if reward.learner]:
        raise UserError(
            f"{moving[0]} learns as training goes, so before and after could not be compared by it; "
            "name rewards that do not in evaluation.rewards."
        )
    for reward in evaluation:
        if reward.traits.level == "pairwise":
            raise UserError(
                f"{reward.name} is pairwise: the mean of a prompt's images by it is always ½, before and after; "
                "name rewards of single images in evaluation.rewards."
            )
        if reward.of_groups and config.evaluation.images_per_prompt == 1:
            raise UserError(
                f"evaluation.images_per_prompt is 1, but {reward.name} compares a prompt's images; write 2 or more, or name "
                "other rewards in evaluation.rewards."
            )
    return rewards, evaluation


def same_reward(name: str, one: Any, other: Any) -> bool:
    """Whether two entries of reward maps, of one name, differ in weight at most."""
    return replace(reward_entry(name, one), weight=1.0) == replace(
        reward_entry(name, other), weight=1.0
    )


def held_out(inputs: Inputs, context: SourceContext) -> HeldOut | None:
    """This process's share of `evaluation.pairs`, where it is given."""
    if not inputs.held_out:
        return None
    make = make_pairs if inputs.config.objective.learns_from is Pairs else make_examples
    mine = {i: i for i in range(distributed.rank(), len(inputs.held_out), distributed.count())}
    return HeldOut(make(context, inputs.held_out, mine, EVALUATION_STEP))


def look_at(
    rewards: Sequence[Reward],
    prompts: list[Prompt],
    model: ModelConfig,
    needs_gradient: bool = False,
    known: Sequence[Reward] = (),
) -> None:
    """Ask every reward about pictures of noise, so that what is wrong with it shows before the model loads.

    Each may cost money to ask, so those known already are asked once, for what they need of these prompts.
    """
    samples = probe.noise_samples(prompts[:2] * 2, model.height, model.width, distributed.device())
    for reward in rewards:
        findings = []
        try:
            if reward in known:
                probe.ask(reward, samples)
            else:
                findings = probe.look(reward, samples)[1]
            if needs_gradient:
                findings.append(probe.gradient(reward, samples, needed=True))
        except RunError as error:
            raise UserError(str(error)) from error
        for finding in findings:
            if finding.wrong and finding.subject != "spread" and distributed.is_main():
                print(f"rewards.{reward.name}, {finding.subject}: {finding.text}.")
