"""flowalign plan: what a run will need, found before any weight is loaded.

One update of the run is rehearsed by the code that trains, source, policy and objective, on a model that has only an outline
(`models/outline.py`), and a ledger counts what the real one would allocate and compute.
"""

import copy
import inspect
import os
from bisect import bisect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowalign.batch import Batch
from flowalign.config.sections import Config
from flowalign.data.preferences import Example
from flowalign.data.prompts import Prompt
from flowalign.diagnostics.meta_model import CALLS, fused_attention, META, MetaModel
from flowalign.errors import did_you_mean, UserError
from flowalign.files import size
from flowalign.policy import Policy
from flowalign.rewards import REWARDS
from flowalign.rewards.base import Reward
from flowalign.rewards.registry import reward_entry
from flowalign.rollouts.batch_plan import BatchPlan
from flowalign.rollouts.scoring import RolloutScorer
from flowalign.rollouts.sources import source_of, SourceContext
from flowalign.settings.by_name import imported
from flowalign.training.gradient import split

EFFICIENCY = 0.4
"""Share of a GPU's peak that these networks are assumed to reach; not measured."""


@dataclass(frozen=True)
class Gpu:
    """Nominal memory in GB, and dense TFLOPS in half precision, in tf32 and in float32."""

    memory: float
    half: float
    tf32: float
    float32: float


GPUS = {
    "h100": Gpu(80, 989, 494, 67),
    "h200": Gpu(141, 989, 494, 67),
    "a100-40": Gpu(40, 312, 156, 19.5),
    "a100-80": Gpu(80, 312, 156, 19.5),
    "l40s": Gpu(48, 362, 183, 91.6),
    "rtx-4090": Gpu(24, 165, 82.6, 82.6),
    "rtx-3090": Gpu(24, 71, 35.6, 35.6),
    "rtx-a6000": Gpu(48, 155, 77.4, 38.7),
    "t4": Gpu(16, 65, 8.1, 8.1),
}


@dataclass
class Plan:
    """What a run needs, in bytes where nothing else is said."""

    parameters: dict[str, int]
    """How many, of every network."""
    trained: int
    """How many, of the adapter."""
    weights: dict[str, int]
    """Every network."""
    rewards: dict[str, int | None]
    """Their networks; None where that is not known."""
    adapters: int
    """The policy's, and its copies."""
    optimizer: int
    """Gradients, and AdamW's two moments."""
    held: int
    """Latents and embeddings of a step's images."""
    kept: int
    """By one pass, for its backward pass."""
    pass_peak: int
    """The most that one pass allocates."""
    peaks: dict[str, int]
    """The most that is allocated in all, by phase."""
    work: Counter[str]
    """FLOPs by precision and calls of the transformer, in a step."""

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    @property
    def flops(self) -> int:
        return self.work["half"] + self.work["tf32"] + self.work["float32"]

    def seconds(self, gpu: Gpu) -> float:
        """Of a step."""
        trillions = (
            self.work["half"] / gpu.half
            + self.work["tf32"] / gpu.tf32
            + self.work["float32"] / gpu.float32
        )
        return trillions / 1e12 / EFFICIENCY


def rehearse(config: Config) -> Plan:
    """One update of the run, and from it the whole."""
    train, objective, model = config.train, config.objective, MetaModel(config.model)
    ledger, images_per_pass = model.ledger, plan_of(config).images_per_pass
    with fused_attention(), ledger:
        copies = [*objective.snapshots, *(["ema"] if train.ema.decay else [])]
        with META:
            policy = Policy(model, config.sampler, copies, images_per_pass)
        for parameter in policy.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with ledger.part() as collected:
            made, _ = source_of(objective.learns_from, supplies_of(config, policy))(0)
        with ledger.part() as prepared:
            passes = split(policy, objective, made, images_per_pass)
        first = next(iter(passes))
        draws = len(list(objective.draws(first.batch)))
        with ledger.part() as learned:
            with ledger.part() as forward:
                loss = objective.loss(policy, first.batch, first.draw)
            loss.total.backward()
    adapter, rewards = sum(p.nbytes for p in policy.parameters()), reward_weights(config)
    held = (train.updates_per_step - 1) * held_by([made], model) + held_by(
        [made, passes.batch], model
    )
    adapters, optimizer = adapter * (1 + len(copies)), adapter * 3
    always = (
        model.weights["transformer"]
        + model.weights["vae"]
        + sum(filter(None, rewards.values()))
        + adapters
    )
    encoders = sum(model.weights.get(name, 0) for name in model.family.text_encoders)
    joined = 2 * adapter  # the gradients of all passes in one row; later what AdamW's step takes
    repeated = draws * len(passes.batch) / len(first.batch)
    return Plan(
        parameters=model.parameters,
        trained=sum(p.numel() for p in policy.parameters()),
        weights=model.weights,
        rewards=rewards,
        adapters=adapters,
        optimizer=optimizer,
        held=held,
        kept=forward.kept,
        pass_peak=learned.peak,
        peaks={
            "while prompts are encoded": always + encoders + model.encoding.peak,
            "while images are made": always + optimizer + held + collected.peak - collected.kept,
            "in an update": always
            + optimizer
            + held
            + max(prepared.peak - prepared.kept, learned.peak, joined),
        },
        work=scaled(
            collected.work + prepared.work + scaled(learned.work, repeated), train.updates_per_step
        ),
    )


class Blank(SourceContext):
    """Supplies whose given pictures are blank."""

    @cached_property
    def latents(self) -> Any:
        return lambda pictures: torch.zeros(len(pictures), *self.policy.model.latent_shape)


def plan_of(config: Config) -> BatchPlan:
    """Return the batch arithmetic of the run on one process."""
    train = config.train
    return BatchPlan(
        prompts_per_step=train.prompts_per_step,
        images_per_prompt=train.images_per_prompt,
        updates_per_step=train.updates_per_step,
        max_images_per_pass=train.images_per_pass,
    )


def supplies_of(config: Config, policy: Policy) -> SourceContext:
    """Supplies for one update in one process, of rewards that give every image another number."""

    def reward(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        return images.mean((1, 2, 3)) + torch.arange(len(images))

    train, blank = config.train, Prompt("")
    entries = [reward_entry(name, value) for name, value in config.rewards.items()]
    rewards = [Reward(entry.name, reward, entry.weight) for entry in entries]
    counts = plan_of(config)
    counts = replace(
        counts,
        prompts_per_step=train.prompts_per_step // train.updates_per_step,
        updates_per_step=1,
    )
    judge = RolloutScorer(
        rewards,
        copy.deepcopy(config.combine),
        config.advantage,
        counts.images_per_pass,
        policy.model.device,
    )
    examples = [Example(prompt=blank, chosen=bytes, rejected=bytes)] if config.data.pairs else []
    return Blank(
        policy=policy,
        scorer=judge,
        prompts=[blank],
        examples=examples,
        plan=counts,
        seed=train.seed,
        sampling_weights=config.objective.sampling_weights,
        ranking=config.data.ranking,
    )


def held_by(batches: list[Batch], model: MetaModel) -> int:
    """Bytes of latents and embeddings at full size; what batches share is counted once."""
    text = sum(row.nbytes for row in model.texts.values())
    sizes: dict[int, int] = {}
    for batch in batches:
        sizes |= {
            _place(x): model.ledger.size(x) for x in vars(batch).values() if isinstance(x, Tensor)
        }
        sizes |= {
            _place(x): text * x.untyped_storage().nbytes() // 4
            for x in (*batch.cond.inputs.values(), *batch.cond.null.values())
        }
    return sum(sizes.values())


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def reward_weights(config: Config) -> dict[str, int | None]:
    """Bytes of the weights in local folders that rewards name; 0 for functions, None for what is only known once it is loaded."""
    found: dict[str, int | None] = {}
    for name, value in (config.rewards | config.evaluation.rewards).items():
        reward = reward_entry(name, value)
        if reward.spec.startswith(("http://", "https://")):
            continue
        entry = imported(REWARDS.get(reward.spec, reward.spec), f"rewards.{name}", REWARDS)
        defaults = {
            parameter.name: parameter.default
            for parameter in inspect.signature(entry).parameters.values()
        }
        named = (defaults | reward.settings).values()
        folders = [Path(text) for text in named if isinstance(text, str) and os.path.isdir(text)]
        files = {file for folder in folders for file in folder.glob("*.safetensors")}
        found[reward.name] = (
            sum(file.stat().st_size for file in files)
            if files or not inspect.isclass(entry)
            else None
        )
    return found


def scaled(work: Counter[str], times: float) -> Counter[str]:
    return Counter({name: round(count * times) for name, count in work.items()})


def largest_pass(config: Config, memory: float) -> int:
    """The most images a pass, of those that divide an update, that fit so many bytes; 0 where none does."""
    train = config.train
    images = train.prompts_per_step // train.updates_per_step * train.images_per_prompt
    sizes = [size for size in range(1, images + 1) if images % size == 0]
    fitting = bisect(
        sizes,
        memory,
        key=lambda size: rehearse(replace(config, train=replace(train, images_per_pass=size))).peak,
    )
    return [0, *sizes][fitting]


def report(config: Config, gpu: str | None = None, memory: float | None = None) -> Iterator[str]:
    """What the command prints, line by line. `memory` is in GB."""
    if gpu and gpu not in GPUS:
        raise UserError(
            f"--gpu: there is no {gpu!r}.{did_you_mean(gpu, GPUS)} The GPUs are {', '.join(GPUS)}."
        )
    if memory is not None and not memory > 0:
        raise UserError(f"--memory is {memory:g}; write how many GB there are, above 0.")
    model, train = config.model, config.train
    plan = rehearse(config)
    yield f"{model.name} from {model.path}, {model.dtype}, {model.height} × {model.width}: no weights were loaded"
    yield from memory_by_part(plan)
    yield from peaks(config, plan)
    yield "\na step, by one process, without its rewards"
    yield from (row(name, f"{plan.work[name]:,}") for name in CALLS)
    yield row("floating-point operations", f"{plan.flops:.3g}")
    if gpu:
        yield row(
            "time",
            f"{plan.seconds(GPUS[gpu]):,.3g} s",
            f"on {gpu}, if it reaches {EFFICIENCY:.0%} of its peak",
        )
        memory = memory or GPUS[gpu].memory
    if memory:
        most = largest_pass(config, 1e9 * memory) or "none"
        yield row(
            "train.images_per_pass",
            f"{most}",
            f"is the largest that fits {memory:g} GB; now {train.images_per_pass}",
        )


def memory_by_part(plan: Plan) -> Iterator[str]:
    """Networks, adapters and what stays during a step."""
    yield row("", "parameters", "memory")
    for name, count in plan.parameters.items():
        yield row(name, millions(count), size(plan.weights[name]))
    yield row("adapter, with its copies", millions(plan.trained), size(plan.adapters))
    yield row("gradients and moments", "", size(plan.optimizer))
    yield row("latents and embeddings", "", size(plan.held))
    for name, count in plan.rewards.items():
        if count != 0:
            yield row(f"reward {name}", "", "not counted" if count is None else size(count))


def peaks(config: Config, plan: Plan) -> Iterator[str]:
    """What a pass keeps, and the peaks, without and with recomputation."""
    model, images = config.model, config.train.images_per_pass
    now = model.gradient_checkpointing
    other = rehearse(replace(config, model=replace(model, gradient_checkpointing=not now)))
    stored, recomputed = (other, plan) if now else (plan, other)
    yield "\n" + row(
        "model.gradient_checkpointing", *("false", "true (now)") if now else ("false (now)", "true")
    )
    yield row(f"kept by {images} image(s)", size(stored.kept), size(recomputed.kept))
    for phase, most in stored.peaks.items():
        yield row(f"peak {phase}", size(most), size(recomputed.peaks[phase]))


def row(name: str, first: str, second: str = "") -> str:
    return f"{name:31}{first:>14}  {second:>14}".rstrip()


def millions(count: int) -> str:
    return f"{count / 1e6:,.2f} M"
