"""A rehearsal of one update on a model without weights: what a run needs, before any is loaded.

The code that trains (source, policy, objective) runs on a `MetaModel`, whose ledger counts what the
real model would allocate and compute. The whole run follows from one update.
"""

import inspect
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from flowalign.batch import Batch, Rollout
from flowalign.config.sections import Config
from flowalign.data.examples import Drawn, Example, ImageKey, Question, VoteSource
from flowalign.data.latents import LatentCache
from flowalign.data.prompts import Metadata, Prompt
from flowalign.diagnostics.meta_model import (
    Cost,
    flops,
    fused_attention,
    META,
    MetaModel,
    older_objects_kept,
    Work,
)
from flowalign.files import tensors_after_a_step
from flowalign.flow import Latent, PerImage
from flowalign.policy import Policy
from flowalign.rewards import REWARDS
from flowalign.rewards.base import Reward
from flowalign.rewards.combine import WeightedSum
from flowalign.rewards.registry import ADDRESSES, reward_entry, RewardEntry
from flowalign.rollouts.collect import collect
from flowalign.rollouts.scoring import RolloutScorer
from flowalign.rollouts.sources import source_of, SourceContext
from flowalign.rollouts.voted import VotedPictures
from flowalign.settings.by_name import imported
from flowalign.training.gradient import split
from flowalign.training.setup import batch_plan, errors_of_evaluation_model, make_optimizer


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The needs of a run, in bytes unless a field says otherwise."""

    parameters: dict[str, int]
    """Number of parameters of every network."""
    trained: int
    """Number of parameters of the adapter."""
    weights: dict[str, int]
    """Weights of every network."""
    stand_in: int
    """Weights of `evaluation.model`; 0 without one."""
    rewards: dict[str, int | None]
    """Weights of the rewards; None if they are not known before loading."""
    adapters: int
    """The adapter and its copies."""
    optimizer: int
    """Gradients, and the two moments of the optimizer."""
    held: int
    """Latents and embeddings of a step's images."""
    kept: int
    """Saved by one pass for its backward pass."""
    pass_peak: int
    """The most that one pass allocates."""
    evaluation_peak: int
    """The most that one pass of an evaluation allocates."""
    peaks: dict[str, int]
    """The most that is allocated in all, by phase."""
    work: Work
    """Kernels, and calls of the transformer, of a step."""

    @property
    def peak(self) -> int:
        """The most that is allocated at any time."""
        return max(self.peaks.values())

    @property
    def flops(self) -> int:
        """Floating-point operations of a step."""
        return flops(self.work)


@dataclass(frozen=True, kw_only=True)
class UpdateCosts:
    """The costs of one update, part by part."""

    batch: Cost
    """Making the batch."""
    terms: Cost
    """Computing what the loss needs to know about whole groups."""
    loss: Cost
    """The loss of one pass."""
    one_pass: Cost
    """The loss of one pass, and its backward pass."""
    passes: float
    """How many passes like that the update has."""
    held: int
    """Bytes of latents and embeddings of a step."""

    def work(self) -> Work:
        """Return the work of the update."""
        return self.batch.work + self.terms.work + scaled(self.one_pass.work, self.passes)


@older_objects_kept()
def rehearse(config: Config) -> Plan:
    """Return what a run needs. Raises UserError if the model's configuration cannot be read."""
    # Values of adapters change nothing that a plan counts, and no text is read from the disk.
    model = MetaModel(replace(config.model, adapter="", merge=[], text_cache_gb=0))
    stand_in = stand_in_weights(config)
    with fused_attention(), model.ledger:
        policy = make_policy(config, model)
        costs = rehearse_update(config, policy, model)
        evaluation = rehearse_evaluation(config, policy, model)
    adapter = sum(p.nbytes for p in policy.parameters())
    adapters = adapter * (1 + len(policy.snapshots))
    moments = tensors_after_a_step(make_optimizer(policy, config.train))
    optimizer = adapter + sum(tensor.nbytes for tensor in moments.values())
    rewards = reward_weights(config)
    networks = model.weights["transformer"] + model.weights["vae"]
    encoders = sum(model.weights.get(name, 0) for name in model.family.text_encoders)
    staying, visiting = (encoders, 0) if config.model.keep_text_encoders else (0, encoders)
    always = networks + sum(filter(None, rewards.values())) + adapters + staying
    if stand_in:
        always += stand_in + adapter
    # The gradients of all passes in one row. AdamW's step takes as much later.
    joined = 2 * adapter
    update = max(costs.terms.peak - costs.terms.kept, costs.one_pass.peak, joined)
    training = always + optimizer + costs.held
    return Plan(
        parameters=model.parameters,
        trained=sum(p.numel() for p in policy.parameters()),
        weights=model.weights,
        stand_in=stand_in,
        rewards=rewards,
        adapters=adapters,
        optimizer=optimizer,
        held=costs.held,
        kept=costs.loss.kept,
        pass_peak=costs.one_pass.peak,
        evaluation_peak=evaluation.peak,
        peaks={
            "while prompts are encoded": always + visiting + model.encoding.peak,
            # What the batch keeps is in `held` already.
            "while images are made": training + costs.batch.peak - costs.batch.kept,
            "in an update": training + update,
            # Nothing of a step is there any more, and images go to the CPU after each pass.
            "in an evaluation": always + optimizer + evaluation.peak,
        },
        work=scaled(costs.work(), config.train.updates_per_step),
    )


def stand_in_weights(config: Config) -> int:
    """Return the bytes of the networks of `evaluation.model`, which stay beside the others."""
    if not config.evaluation.model:
        return 0
    with errors_of_evaluation_model(config):
        model = MetaModel(replace(config.evaluation_model, merge=[], text_cache_gb=0))
        model.schedule(config.evaluation_sampler.steps)
    return model.weights["transformer"] + model.weights["vae"]


def make_policy(config: Config, model: MetaModel) -> Policy:
    """Return the run's policy, with gradients in place as after the first update."""
    copies = [*config.objective.snapshots, *(["ema"] if config.train.ema.decay else [])]
    with META:
        policy = Policy(model, config.sampler, copies, batch_plan(config).images_per_pass)
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return policy


def rehearse_update(config: Config, policy: Policy, model: MetaModel) -> UpdateCosts:
    """Make one update's batch, and train on its first pass, while the ledger counts.

    What has a local name stays allocated, as in training: a part's cost depends on it.
    """
    objective, ledger = config.objective, model.ledger
    with ledger.part() as batch_cost:
        batch, _ = source_of(objective.learns_from, blank_context(config, policy))(0)
    batch_cost.work = mean_batch_work(config, policy, model) or batch_cost.work
    with ledger.part() as terms_cost:
        passes = split(policy, objective, batch, batch_plan(config).images_per_pass)
    first = next(iter(passes))
    draws = len(list(objective.draws(first.batch)))
    with ledger.part() as pass_cost:
        with ledger.part() as loss_cost:
            loss = objective.loss(policy, first.batch, first.draw)
        loss.total.backward()
    # All updates of a step have their images from its start; the present one has its terms too.
    waiting = (config.train.updates_per_step - 1) * held_bytes([batch], model)
    return UpdateCosts(
        batch=batch_cost,
        terms=terms_cost,
        loss=loss_cost,
        one_pass=pass_cost,
        passes=draws * len(passes.batch) / len(first.batch),
        held=waiting + held_bytes([batch, passes.batch], model),
    )


def rehearse_evaluation(config: Config, policy: Policy, model: MetaModel) -> Cost:
    """Make the images of one pass of an evaluation, while the ledger counts."""
    view = policy.at("policy").sampling(config.evaluation_sampler)
    images = batch_plan(config).images_per_pass
    with model.ledger.part() as cost:
        prompts = blank_context(config, view).step_prompts(0)[:images]
        prompts = replace(prompts, cond=replace(prompts.cond, null_gradient=True))
        collect(view, prompts, images, "evaluation")
    return cost


def mean_batch_work(config: Config, policy: Policy, model: MetaModel) -> Work:
    """Return the mean work of a batch over the places of a window; none if all need the same."""
    sampler, total = policy.sampler, Work()
    starts = sampler.window.starts(sampler.steps)
    if not sampler.same_noise or len(starts) < 2:
        return total
    # Steps before the window are taken once for each prompt. The work falls by the same amount from
    # place to place, so that the mean of the first and the last place is that of all.
    for start in (starts[0], starts[-1]):
        window = replace(sampler.window, range=(start, start + sampler.window.size))
        view = policy.sampling(replace(sampler, window=window))
        with model.ledger.part() as cost:
            source_of(config.objective.learns_from, blank_context(config, view))(0)
        total += cost.work
    return scaled(total, 0.5)


class BlankLatents(LatentCache):
    """Returns zeros for every picture, and reads and writes no file."""

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape

    def __call__(self, images: Sequence[bytes], names: Sequence[str] = ()) -> Latent:
        """Return zeros (B, *latent)."""
        return torch.zeros(len(images), *self.shape)


class BlankContext(SourceContext):
    """A context whose given pictures are blank."""

    @cached_property
    def latents(self) -> LatentCache:
        """Latents of zeros."""
        return BlankLatents(self.policy.model.latent_shape)


def blank_context(config: Config, policy: Policy) -> SourceContext:
    """Return what makes the batch of one update, with different prompts and free rewards."""
    plan, train = batch_plan(config), config.train
    prompts = plan.prompts_per_step // plan.updates_per_step
    plan = replace(plan, prompts_per_step=prompts, updates_per_step=1)
    blank = [Prompt(str(number)) for number in range(prompts)]
    entries = [reward_entry(name, value) for name, value in config.rewards.items()]
    scorer = RolloutScorer(
        [Reward(entry.name, different_scores) for entry in entries],
        # The run's combination may keep statistics, or want scores of a certain range.
        WeightedSum(),
        config.advantage,
        plan.images_per_pass,
        policy.model.device,
    )
    return BlankContext(
        policy=policy,
        scorer=scorer,
        prompts=blank,
        examples=[blank_example(config, prompt) for prompt in blank] if config.data.pairs else [],
        plan=plan,
        seed=train.seed,
        sampling_weights=config.objective.sampling_weights,
        steps=train.steps,
        keeps_paths=config.objective.needs_stochastic_steps,
        kept_steps=config.objective.kept_steps(policy.times),
        null_gradient=config.objective.train_null_branch,
        ranking=config.data.ranking,
        voted=VotedPictures(
            policy.at("reference"),
            lambda _source: policy.sampler,
            keeps_paths=config.objective.needs_stochastic_steps,
        ),
    )


def blank_example(config: Config, prompt: Prompt) -> Example:
    """Return a pair of blank pictures, or of pictures to sample if the objective needs paths."""
    if not config.objective.needs_stochastic_steps:
        return Example(prompt=prompt, chosen=bytes, rejected=bytes)
    source = VoteSource(
        model="", merge=[], weights="", height=0, width=0, sampler={}, environment={}
    )
    keys = tuple(ImageKey(0, 0, int(prompt.text), image) for image in range(2))
    question = Question(prompt, keys, source)
    return Example(prompt=prompt, chosen=Drawn(question, 0), rejected=Drawn(question, 1))


def different_scores(images: Tensor, prompts: list[str], metadata: list[Metadata]) -> PerImage:
    """Score every image differently, so that none is left out of training."""
    return images.mean((1, 2, 3)) + torch.arange(len(images))


def held_bytes(batches: list[Batch], model: MetaModel) -> int:
    """Return the bytes of latents and embeddings at full size. Shared memory counts once."""
    # A number stands for the embeddings of a prompt.
    text = sum(row.nbytes for row in model.texts.values())
    sizes: dict[int, int] = {}
    for batch in batches:
        states = batch.states if isinstance(batch, Rollout) else {}
        for tensor in [*vars(batch).values(), *states.values()]:
            if isinstance(tensor, Tensor):
                sizes[_address(tensor)] = model.ledger.size(tensor)
        for tensor in (tensor for rows in batch.cond.rows for tensor in rows.table.values()):
            numbers = tensor.untyped_storage().nbytes() // tensor.element_size()
            sizes[_address(tensor)] = text * numbers
    return sum(sizes.values())


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def reward_weights(config: Config) -> dict[str, int | None]:
    """Return the bytes of the weights that each reward loads.

    0 for built-in functions, and None if they are not known before loading. Rewards on servers are
    left out.
    """
    weights: dict[str, int | None] = {}
    for name, value in (config.rewards | config.evaluation.rewards).items():
        entry = reward_entry(name, value)
        if not entry.spec.startswith(ADDRESSES):
            weights[entry.name] = local_weights(entry)
    return weights


def local_weights(entry: RewardEntry) -> int | None:
    """Return the bytes of the weights in the local folders that a reward's settings name."""
    # A plan runs none of a user's rewards: the file may come from somebody else.
    built_in = entry.spec in REWARDS
    reward = imported(REWARDS[entry.spec], "rewards", REWARDS) if built_in else None
    parameters = inspect.signature(reward).parameters.values() if reward else []
    settings = {parameter.name: parameter.default for parameter in parameters} | entry.settings
    values = [value for value in settings.values() if isinstance(value, str)]
    folders = [Path(value) for value in values if os.path.isdir(value)]
    files = {file for folder in folders for file in folder.glob("*.safetensors")}
    if not files and not (built_in and inspect.isroutine(reward)):
        return None
    return sum(file.stat().st_size for file in files)


def scaled(work: Work, factor: float) -> Work:
    """Return a multiple of some work."""
    return Counter({name: count * factor for name, count in work.items()})
