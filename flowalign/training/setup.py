"""From a configuration to everything that a run works with, cheapest checks first.

Files and rewards are read and tried before any weight of the model is loaded, so that most mistakes
are answered in seconds.
"""

import copy
from dataclasses import dataclass

import torch

from flowalign import distributed
from flowalign.batch import EVALUATION_STEP, Pairs, Prompts
from flowalign.config.sections import Config
from flowalign.data.preferences import Example, read_examples
from flowalign.data.prompts import Prompt, read_prompts
from flowalign.evaluation.evaluator import Evaluator
from flowalign.evaluation.held_out import HeldOut
from flowalign.models.base import FlowModel
from flowalign.policy import Policy
from flowalign.progress import say, task
from flowalign.rewards.base import Reward
from flowalign.rewards.registry import load_rewards
from flowalign.rollouts.batch_plan import BatchPlan
from flowalign.rollouts.scoring import RolloutScorer
from flowalign.rollouts.sources import make_examples, make_pairs, Source, source_of, SourceContext
from flowalign.runs.checkpoint import TrainState
from flowalign.training.reward_checks import (
    check_evaluation_rewards,
    check_rewards,
    load_evaluation_rewards,
    score_noise,
)


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
    learns_from = config.objective.learns_from
    plan = batch_plan(config, distributed.count())
    if plan.note and distributed.is_main():
        say(plan.note)
    paired = learns_from is Pairs
    examples = _read_examples(config.data.pairs, "data.pairs", paired)
    held_out = _read_examples(config.evaluation.pairs, "evaluation.pairs", paired)
    prompts = _read_prompts(config.data.prompts, "data.prompts") or _prompts_of(examples)
    path = config.evaluation.prompts
    evaluation_prompts = _read_prompts(path, "evaluation.prompts") or prompts
    # Many rewards load their weights at the first call, which the noise makes here.
    with task("loading rewards"):
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


def batch_plan(config: Config, processes: int = 1) -> BatchPlan:
    """Return the batch arithmetic of the run on this number of processes."""
    train = config.train
    return BatchPlan(
        prompts_per_step=train.prompts_per_step,
        images_per_prompt=train.images_per_prompt,
        updates_per_step=train.updates_per_step,
        max_images_per_pass=train.images_per_pass,
        processes=processes,
        # Pairs that are ranked are sampled and scored as single images.
        images_per_row=config.objective.learns_from.images_per_row if config.data.pairs else 1,
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
        rewards=rewards,
        # A combination may keep statistics, and each run of one configuration starts without any.
        combine=copy.deepcopy(config.combine),
        advantage=config.advantage,
        images_per_pass=plan.images_per_pass,
        device=distributed.device(),
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
