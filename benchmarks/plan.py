"""Compare what `flowalign plan` says with what is measured.

    python benchmarks/plan.py [CASE ...] [--output FILE.json]

Runs the bundled models and prints a row for each case. A cell holds the measured figure and, in
parentheses, plan / measured. The figures are the bytes that one pass keeps for its backward pass,
the most that the pass allocates, the most that a whole step needs (with weights, adapters, the
optimiser, and the step's latents and embeddings), the most that a pass of an evaluation allocates,
and the floating-point operations of a step. The last column says whether the calls of the
transformer agree.
"""

import argparse
import gc
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn, Tensor
from torch.profiler import profile, ProfilerActivity, record_function
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from flowalign.config.load import load_config
from flowalign.config.sections import Config
from flowalign.diagnostics.meta_model import CALLS
from flowalign.diagnostics.rehearsal import rehearse
from flowalign.models import load_model
from flowalign.models.frozen_linear import parameter_count
from flowalign.training.gradient import compute_gradient, Meter, split
from flowalign.training.setup import assemble, Assembly, read_inputs

ROOT = Path(__file__).parents[1]
SMALL = [
    "train.prompts_per_step=2",
    "sampler.steps=4",
    "train.images_per_prompt=4",
    "evaluation.images_per_prompt=1",
]
PASS, RECOMPUTED = "train.images_per_pass=8", "model.gradient_checkpointing=true"
CASES: dict[str, tuple[str, list[str]]] = {
    "flow_grpo, passes of 2": ("flow_grpo", ["train.images_per_pass=2"]),
    "flow_grpo, passes of 8": ("flow_grpo", [PASS]),
    "flow_grpo, recomputed": ("flow_grpo", [PASS, RECOMPUTED]),
    "flow_grpo, guidance 3": ("flow_grpo", ["train.images_per_pass=4", "sampler.guidance=3"]),
    "flow_grpo, bfloat16": ("flow_grpo", ["train.images_per_pass=4", "model.dtype=bfloat16"]),
    "Flux": ("flow_grpo_flux", ["train.images_per_pass=4"]),
    "Flux, recomputed": ("flow_grpo_flux", ["train.images_per_pass=4", RECOMPUTED]),
    "crd, passes of 2, 2 updates": (
        "crd",
        [
            "train.images_per_pass=2",
            "sampler.steps=2",
            "objective.times.count=1",
            "train.updates_per_step=2",
        ],
    ),
    "nft": ("nft", ["train.images_per_pass=4"]),
    **{
        f"flow_grpo, {quantize}, recomputed": (
            "flow_grpo",
            [PASS, RECOMPUTED, f"model.quantize={quantize}"],
        )
        for quantize in ("int8", "fp8", "nf4")
    },
    "flow_grpo, nf4, recomputed, offloaded": (
        "flow_grpo",
        [PASS, RECOMPUTED, "model.quantize=nf4", "model.offload=true"],
    ),
    "dpo_online": ("dpo_online", ["train.images_per_pass=4", "rewards={brightness: 1.0}"]),
    "alignprop": (
        "alignprop",
        ["train.images_per_pass=4", "sampler.steps=2", "rewards={brightness: 1.0}"],
    ),
}
"""For each case, a file of configs/tiny and overrides."""
COLUMNS = {
    "parameters": "parameters, M",
    "weights": "weights, MB",
    "kept": "kept by a pass, MB",
    "pass_peak": "peak of a pass, MB",
    "peak": "peak of a step, MB",
    "evaluation_peak": "peak of an evaluation's pass, MB",
    "flops": "FLOPs of a step, M",
}


Shape = torch.Size


def attention_flops(query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
    """Count the operations of attention from the shapes of its inputs."""
    return sdpa_flop_count(query, key, value)


def attention_backward_flops(
    gradient: Shape, query: Shape, key: Shape, value: Shape, *_: object, **__: object
) -> int:
    """Count the operations of attention's gradient from the shapes of its inputs."""
    return sdpa_backward_flop_count(gradient, query, key, value)


# Torch has formulas for the attention kernels of GPUs. Up to version 2.14 it has none for the
# kernel of CPUs, and counts it as zero operations.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}
"""Formulas for operators that some versions of torch do not count."""


@dataclass
class Figures:
    """Figures of one training step, in bytes unless the name says otherwise."""

    parameters: int
    """Number of parameters of all networks."""
    weights: int
    kept: int
    """Saved by one pass for its backward pass."""
    pass_peak: int
    """The most that one pass allocates."""
    peak: int
    """The most that a step needs in all."""
    evaluation_peak: int
    """The most that one pass of an evaluation allocates."""
    flops: int
    calls: dict[str, int]
    """Calls of the transformer by kind."""


Comparison = TypedDict(
    "Comparison",
    {
        "plan": dict[str, Any],
        "measured": dict[str, Any],
        "ratios": dict[str, float],
        "same calls": bool,
    },
)
"""The two sides of a case, plan / measured for every figure of COLUMNS, and whether calls agree."""


def planned(config: Config) -> Figures:
    """Return the figures that the plan says."""
    plan = rehearse(config)
    return Figures(
        parameters=sum(plan.parameters.values()),
        weights=sum(plan.weights.values()),
        kept=plan.kept,
        pass_peak=plan.pass_peak,
        peak=max(plan.peaks["while images are made"], plan.peaks["in an update"]),
        evaluation_peak=plan.evaluation_peak,
        flops=plan.flops,
        calls={name: plan.work[name] for name in CALLS},
    )


def measured(config: Config) -> Figures:
    """Measure the run's first step. The optimiser already has its moments."""
    # Memory that is freed while allocations are watched would be subtracted.
    gc.collect()
    inputs = read_inputs(config)
    model = load_model(config.model, "cuda" if torch.cuda.is_available() else "cpu")
    networks = model.networks().values()
    # Counted now: the policy adds adapters to the transformer, which the plan counts separately.
    parameters = sum(map(parameter_count, networks))
    weights = sum(size(tensors_of(network)) for network in networks)
    # Text encoders are on the device only while prompts are encoded.
    resident = size([*tensors_of(model.transformer), *tensors_of(model.vae)])
    runs = list[Assembly]()

    def prepare() -> None:
        runs.append(assemble(inputs, model))
        for parameter in runs[0].policy.parameters():
            parameter.grad = torch.zeros_like(parameter)
        # AdamW makes its moments in its first step.
        runs[0].state.optimizer.step()

    peak = resident + peak_of(model.device, lambda: step(runs[0]), prepare)
    evaluate_pass(runs[0])  # encodes the prompts
    evaluation_peak = peak_of(model.device, lambda: evaluate_pass(runs[0]))
    flops, calls = count_work(runs[0])
    kept, pass_peak = memory_of_one_pass(runs[0])
    return Figures(
        parameters=parameters,
        weights=weights,
        kept=kept,
        pass_peak=pass_peak,
        peak=peak,
        evaluation_peak=evaluation_peak,
        flops=flops,
        calls=calls,
    )


def step(run: Assembly) -> None:
    """Make the first training step, as the trainer does."""
    train = run.config.train
    batch, _ = run.source(0)
    for piece in batch.pieces(len(batch) // train.updates_per_step):
        run.state.optimizer.zero_grad()
        compute_gradient(run.policy, run.config.objective, piece, train.images_per_pass, Meter())
        run.state.optimizer.step()


def evaluate_pass(run: Assembly) -> None:
    """Make the images of the first pass of an evaluation."""
    policy = run.policy.at("policy").sampling(run.config.evaluation_sampler)
    next(iter(run.evaluator.sample(policy)))


def count_work(run: Assembly) -> tuple[int, dict[str, int]]:
    """Return the operations of a step, and the calls of the transformer by kind."""
    operations = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    with operations, counted_calls(run.policy.model.transformer) as calls:
        step(run)
    return operations.get_total_flops(), dict(calls)


def memory_of_one_pass(run: Assembly) -> tuple[int, int]:
    """Return the bytes that the first pass of an update keeps, and the most it allocates."""
    objective, policy, train = run.config.objective, run.policy, run.config.train
    batch, _ = run.source(0)
    update = batch[: len(batch) // train.updates_per_step]
    first = next(iter(split(policy, objective, update, train.images_per_pass)))
    piece, draw = first.batch, first.draw

    # Called twice, since the first call is for what it saves and the second for its peak.
    def loss() -> Tensor:
        return objective.loss(policy, piece, draw).total

    inputs = [x for x in tree_leaves([vars(piece), vars(piece.cond)]) if isinstance(x, Tensor)]
    networks = policy.model.transformer, policy.model.vae
    kept = saved_bytes(loss, [*inputs, *tensors_of(networks[0]), *tensors_of(networks[1])])
    return kept, peak_of(policy.model.device, lambda: loss().backward())


def saved_bytes(loss: Callable[[], Tensor], known: list[Tensor]) -> int:
    """Return the bytes of the storages that autograd keeps, without those of known tensors."""
    before = {tensor.untyped_storage().data_ptr() for tensor in known}
    storages = dict[int, int]()

    def remember(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        total = loss()
    # While the graph lives, no address can be given out a second time.
    total.backward()
    return sum(size for address, size in storages.items() if address not in before)


def peak_of(
    device: torch.device, action: Callable[[], None], prepare: Callable[[], None] = lambda: None
) -> int:
    """Return the most bytes that are allocated during `action`, since before `prepare`."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        prepare()
        torch.cuda.reset_peak_memory_stats(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        prepare()
        with record_function("action"):
            action()
    return peak_of_profile(profiler)


def peak_of_profile(profiler: profile) -> int:
    """Return the most bytes allocated after "action" began."""
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    start = next(event.start_ns() for event in events if event.name() == "action")
    allocations = [event for event in events if event.name() == "[memory]"]
    # The action may allocate nothing before it frees: what is there at its start counts too.
    live = sum(event.nbytes() for event in allocations if event.start_ns() < start)
    peak = live
    for event in sorted(allocations, key=lambda event: event.start_ns()):
        if event.start_ns() >= start:
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@contextmanager
def counted_calls(transformer: nn.Module) -> Iterator[Counter[str]]:
    """Count the calls of the transformer by kind while the context is open."""
    calls = Counter[str]()

    def before(_: nn.Module, __: tuple) -> None:
        calls[CALLS[torch.is_grad_enabled()]] += 1

    def after(_: nn.Module, __: tuple, out: tuple[Tensor, ...]) -> None:
        if out[0].requires_grad:
            out[0].register_hook(lambda _: calls.update([CALLS[2]]))

    # A hook on the output counts backward passes: with recomputation, a forward runs twice.
    handles = [
        transformer.register_forward_pre_hook(before),
        transformer.register_forward_hook(after),
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def tensors_of(network: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of a network."""
    return [*network.parameters(), *network.buffers()]


def size(tensors: list[Tensor]) -> int:
    """Return the bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def compare(name: str) -> Comparison:
    """Plan and measure a case."""
    file, overrides = CASES[name]
    config = load_config(ROOT / "configs" / "tiny" / f"{file}.yaml", [*SMALL, *overrides])
    plan, figures = planned(config), measured(config)
    # A figure may be 0 on both sides, such as the bytes that a pass without gradient keeps.
    ratios = {key: getattr(plan, key) / max(1, getattr(figures, key)) for key in COLUMNS}
    return {
        "plan": asdict(plan),
        "measured": asdict(figures),
        "ratios": ratios,
        "same calls": plan.calls == figures.calls,
    }


def table_row(name: str, case: Comparison) -> str:
    """Return the row of a case."""
    cells = [f"{case['measured'][key] / 1e6:,.2f} ({case['ratios'][key]:.3f})" for key in COLUMNS]
    return f"| {name} | {' | '.join(cells)} | {'yes' if case['same calls'] else 'no'} |"


def main() -> None:
    """Print the table, and write it where --output says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"one of {'; '.join(CASES)}")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    print(f"| measured, and plan / measured | {' | '.join(COLUMNS.values())} | equal calls |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for name in options.cases or CASES:
        results[name] = compare(name)
        print(table_row(name, results[name]), flush=True)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
