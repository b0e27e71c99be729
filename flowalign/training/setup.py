"""From a configuration to everything that a run works with, cheapest checks first.

Files and rewards are read and tried before any weight of the model is loaded, so that most mistakes
are answered in seconds.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from flowalign import distributed
from flowalign.batch import EVALUATION_STEP, Pairs, Prompts
from flowalign.config.sections import Config, Train
from flowalign.data.examples import Example
from flowalign.data.held_out import hold_out
from flowalign.data.preferences import check_pictures, read_examples, Reading
from flowalign.data.prompts import negative_texts, Prompt, prompts_of_step, read_prompts
from flowalign.data.source import Written
from flowalign.errors import UserError
from flowalign.evaluation.evaluator import Evaluator
from flowalign.evaluation.held_out import HeldOut
from flowalign.models import load_model, MODELS
from flowalign.models.base import FlowModel
from flowalign.models.config import ModelConfig
from flowalign.models.families import name_of
from flowalign.models.hub import is_local
from flowalign.models.text_cache import ENCODE_AT_ONCE
from flowalign.policy import Policy, Sampler
from flowalign.progress import say, task
from flowalign.rewards.base import Reward
from flowalign.rewards.registry import load_rewards
from flowalign.rollouts.batch_plan import BatchPlan
from flowalign.rollouts.ranking import given_weights
from flowalign.rollouts.scoring import RolloutScorer
from flowalign.rollouts.sources import make_examples, make_pairs, Source, source_of, SourceContext
from flowalign.runs.checkpoint import TrainState
from flowalign.training.adamw8bit import AdamW8bit
from flowalign.training.reward_checks import (
    check_evaluation_rewards,
    check_rewards,
    load_evaluation_rewards,
    score_noise,
)
from flowalign.training.votes import (
    check_paths,
    drawn_pictures,
    resolved_examples,
    voted_pictures,
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
    """The pictures of `evaluation.pairs`, or else a tenth of `data.pairs`."""
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
    """Read prompts, pairs and rewards, score noise with each reward, and open the pictures.

    Raises:
        UserError: A file cannot be read, or a reward does not work or does not fit the objective.
    """
    learns_from = config.objective.learns_from
    plan = batch_plan(config, distributed.count())
    if plan.note and distributed.is_main():
        say(plan.note)
    check_sharding(config, plan)
    given = _read_examples(config, "data.pairs", config.data.pairs)
    examples, held_out = divide(config, given)
    # Of a tie, no picture is the chosen one.
    held_out = [example for example in held_out if example.gap]
    if learns_from is Pairs and examples:
        _check_weights(config, examples)
    prompts = _read_prompts(config.data.prompts, "data.prompts") or _prompts_of(given)
    path = config.evaluation.prompts
    evaluation_prompts = _read_prompts(path, "evaluation.prompts") or prompts
    check_halves(config, evaluation_prompts)
    # Many rewards load their weights at the first call, which the noise makes here.
    with task("loading rewards"):
        rewards = load_rewards(config.rewards)
        check_rewards(config, plan, rewards)
        evaluation_rewards = load_evaluation_rewards(config, rewards)
        check_evaluation_rewards(config, evaluation_rewards)
        score_noise(
            rewards, prompts, config.model, needs_gradient=config.objective.takes_reward_gradient
        )
        score_noise(evaluation_rewards, evaluation_prompts, config.model, known=rewards)
    check_pictures(_share([*used_examples(config, examples), *held_out]))
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


def check_halves(config: Config, prompts: list[Prompt]) -> None:
    """Refuse `train.export: best` if no prompt is left to measure the chosen step."""
    texts = {prompt.text for prompt in prompts}
    if config.train.export == "best" and config.evaluation.rewards and len(texts) < 2:
        raise UserError(
            "train.export is best, which chooses on one half of the evaluation prompts, but "
            f"{config.evaluation.prompts or 'the file'} holds one prompt. Give two or more."
        )


def batch_plan(config: Config, processes: int = 1) -> BatchPlan:
    """Return the batch arithmetic of the run on this number of processes."""
    train, learns_from = config.train, config.objective.learns_from
    return BatchPlan(
        prompts_per_step=train.prompts_per_step,
        images_per_prompt=train.images_per_prompt,
        updates_per_step=train.updates_per_step,
        max_images_per_pass=train.images_per_pass,
        processes=processes,
        # Pairs that are ranked are sampled and scored as single images.
        images_per_row=learns_from.images_per_row if config.data.pairs else 1,
        # Advantages compare scores of all processes; other comparisons need the images themselves.
        whole_groups=config.objective.has_group_terms or learns_from is Pairs,
    )


def divide(config: Config, given: list[Example]) -> tuple[list[Example], list[Example]]:
    """Return the entries of `data.pairs` to train on, and the held-out entries.

    These are those of `evaluation.pairs`; without that key, a tenth of `data.pairs`.
    """
    if config.evaluation.pairs or not given:
        return given, _read_examples(config, "evaluation.pairs", config.evaluation.pairs)
    examples, held_out = hold_out(given)
    if distributed.is_main():
        say(
            f"{len(held_out)} of the {len(given)} entries of data.pairs are held out for "
            "evaluations and not trained on, because evaluation.pairs is not given."
        )
    return examples, held_out


def used_examples(config: Config, examples: list[Example]) -> list[Example]:
    """Return the examples that the steps of a run take, in the order of the file."""
    train = config.train
    count = min(len(examples), train.steps * train.prompts_per_step)
    # A step as large as the run takes the same examples as its steps one after another.
    used = prompts_of_step(len(examples), 0, count, train.seed) if examples else []
    return [examples[index] for index in sorted(used)]


def _share(examples: list[Example]) -> list[Example]:
    """Return this process's share of some examples: those that no other process opens."""
    return examples[distributed.rank() :: distributed.count()]


def _read_examples(config: Config, key: str, source: Written) -> list[Example]:
    if not source:
        return []
    objective = config.objective
    reading = Reading(
        paired=objective.learns_from is Pairs,
        likes=objective.learns_from_likes,
        ties=objective.learns_from_ties,
    )
    examples = read_examples(source, key, reading)
    check_paths(config, examples, key)
    return examples


def _check_weights(config: Config, pairs: list[Example]) -> None:
    """Say if weights by gap make no difference. Raises UserError if no pair counts."""
    weights = given_weights(pairs, config.data.ranking)
    if config.data.ranking.weighted and len(weights.unique()) == 1 and distributed.is_main():
        say(
            "data.ranking.weighted has no effect, because all pairs of data.pairs have one gap. "
            "Add score_chosen and score_rejected to the pairs."
        )


def _read_prompts(source: Written, key: str) -> list[Prompt]:
    return read_prompts(source, key) if source else []


def _prompts_of(examples: list[Example]) -> list[Prompt]:
    """Return the prompts of the examples, each once, in their order."""
    return [Prompt(text) for text in dict.fromkeys(example.prompt.text for example in examples)]


def load(config: Config) -> FlowModel:
    """Load the model of a run onto the device of this process, or its share of the model."""
    return _load(config.model, config.distributed.shard)


def _load(config: ModelConfig, shard: bool) -> FlowModel:
    device = distributed.device()
    if not shard or distributed.count() == 1:
        return load_model(config, str(device))
    model = load_model(config, "cpu")
    model.shard(device)
    return model


def check_sharding(config: Config, plan: BatchPlan) -> None:
    """Check that the weights can be split, and that all processes make the same forwards.

    Raises UserError otherwise.
    """
    if not config.distributed.shard:
        return
    if distributed.count() == 1:
        say("distributed.shard has no effect, because there is one process.")
    if config.model.quantize != "none" or config.model.offload:
        raise UserError(
            "distributed.shard is true, but only weights in their own dtype, on the device, can be "
            "split. Set it to false, or set model.quantize to none and model.offload to false."
        )
    if config.model.lora.use_dora:
        raise UserError(
            "distributed.shard is true, but DoRA needs whole weights. Set it to false, or set "
            "model.lora.use_dora to false."
        )
    if config.objective.learns_from is Prompts:
        raise UserError(
            f"distributed.shard is true, but {config.objective_name} passes gradients through the "
            "sampler, where processes may make different numbers of forwards. Set it to false, or "
            "choose an objective that learns from scores."
        )
    if config.sampler.same_noise and plan.cuts_groups:
        raise UserError(
            f"distributed.shard and sampler.same_noise are true, but {plan.processes} processes "
            "share the images of a prompt. Start a number of processes that divides the prompts "
            "of an update."
        )


def assemble(inputs: Inputs, model: FlowModel) -> Assembly:
    """Build the policy with its adapters, the source of batches, and the evaluator."""
    # Before the adapters are added, since the model's own weights decide what can be made again.
    inputs = replace(
        inputs,
        examples=resolved_examples(inputs.config, inputs.examples, model, "data.pairs"),
        held_out=resolved_examples(inputs.config, inputs.held_out, model, "evaluation.pairs"),
    )
    config, plan = inputs.config, inputs.plan
    train, objective = config.train, config.objective
    # The adapter is drawn from the global generator; nothing after it is.
    torch.manual_seed(train.seed)
    snapshots = [*objective.snapshots, *(["ema"] if train.ema.decay else [])]
    policy = Policy(model, config.sampler, snapshots, plan.images_per_pass)
    # All prompts of the training steps, in an order of the data alone. Encoded later, in a batch
    # with others that are missing then, they would be rounded in a way that depends on resuming.
    prompts = [*inputs.prompts, *(one.prompt for one in inputs.examples)]
    remember(model, inputs, prompts, config.sampler)
    scorer = make_scorer(config, plan, inputs.rewards, train.drop_equal_groups)
    context = SourceContext(
        policy=policy,
        scorer=scorer,
        prompts=inputs.prompts,
        examples=inputs.examples,
        plan=plan,
        seed=train.seed,
        sampling_weights=objective.sampling_weights,
        steps=train.steps,
        keeps_paths=objective.needs_stochastic_steps,
        kept_steps=objective.kept_steps(policy.times),
        null_gradient=objective.train_null_branch,
        ranking=config.data.ranking,
        voted=voted_pictures(policy, config),
    )
    optimizer = make_optimizer(policy, train)
    return Assembly(
        config=config,
        state=TrainState(policy, optimizer, scorer),
        context=context,
        source=source_of(objective.learns_from, context),
        evaluator=make_evaluator(inputs, context),
    )


def remember(model: FlowModel, inputs: Inputs, prompts: list[Prompt], sampler: Sampler) -> None:
    """Encode prompts, and the negative prompts of a sampler, in advance."""
    # Pictures of votes are made again from the embeddings that made them, of each prompt alone.
    votes = drawn_pictures([*inputs.examples, *inputs.held_out])
    model.remember(
        [prompt.text for prompt in prompts],
        together=1 if votes else ENCODE_AT_ONCE,
        negative=negative_texts(prompts, sampler.negative_prompt),
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
    config, held_out = inputs.config, make_held_out(inputs, context)
    stand_in = make_stand_in(config, context.policy)
    # Here and not in an evaluation: which prompts are encoded together must not depend on the
    # evaluations that were made before a run was resumed.
    for policy in filter(None, (context.policy, stand_in)):
        remember(policy.model, inputs, inputs.evaluation_prompts, config.evaluation_sampler)
    return Evaluator(
        prompts=inputs.evaluation_prompts,
        images_per_prompt=config.evaluation.images_per_prompt,
        scorer=make_scorer(config, inputs.plan, inputs.evaluation_rewards),
        images_per_pass=inputs.plan.images_per_pass,
        seed=config.train.seed,
        held_out=held_out,
        stand_in=stand_in,
    )


def make_stand_in(config: Config, policy: Policy) -> Policy | None:
    """Return a policy on `evaluation.model`, or None without one.

    Raises UserError if this model cannot take the adapter of the policy.
    """
    if not config.evaluation.model:
        return None
    with errors_of_evaluation_model(config):
        model = _load(config.evaluation_model, config.distributed.shard)
        stand_in = Policy(model, config.evaluation_sampler, images_per_pass=policy.images_per_pass)
    own, trained = ([p.shape for p in each.parameters()] for each in (stand_in, policy))
    if own != trained:
        raise UserError(
            f"evaluation.model: {config.evaluation.model} has layers of other sizes than "
            "model.path, so that it cannot take the adapter. Give a model of the same size."
        )
    return stand_in


@contextmanager
def errors_of_evaluation_model(config: Config) -> Iterator[None]:
    """Name `evaluation.model` in errors about a model that is loaded in the block.

    Raises UserError if it is of another family.
    """
    path, name = config.evaluation.model, config.model.name
    # A family of one's own knows itself what its paths are. Those on the hub are not asked twice.
    if name in MODELS and is_local(path):
        family = name_of(path, key="evaluation.model")
        if family != name:
            raise UserError(f"evaluation.model: {path} is a {family}, but model.path is a {name}.")
    try:
        yield
    except UserError as error:
        text = str(error).replace("model.path", "evaluation.model", 1)
        raise UserError(text.replace("sampler.steps", "evaluation.sampler.steps", 1)) from error


def make_held_out(inputs: Inputs, context: SourceContext) -> HeldOut | None:
    """Return this rank's share of the held-out pictures, or None if there are none."""
    if not inputs.held_out:
        return None
    make = make_pairs if inputs.config.objective.learns_from is Pairs else make_examples
    # In chunks that are the same on any number of processes.
    held_out = [example.prompt for example in inputs.held_out]
    remember(context.policy.model, inputs, held_out, inputs.config.sampler)
    entries = len(inputs.held_out)
    share = {slot: slot % entries for slot in distributed.share(entries)}
    single = make is make_pairs and any(one.rejected is None for one in inputs.held_out)
    return HeldOut(make(context, inputs.held_out, share, EVALUATION_STEP), entries, single)


def make_optimizer(policy: Policy, train: Train) -> torch.optim.Optimizer:
    """Return the optimizer of the trained adapter."""
    kind = {"adamw": torch.optim.AdamW, "adamw8bit": AdamW8bit}[train.optimizer]
    return kind(policy.parameters(), lr=train.learning_rate, weight_decay=train.weight_decay)
