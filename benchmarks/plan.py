"""What `flowalign plan` says against what is measured: python benchmarks/plan.py [CASE ...] [--output FILE.json]

Runs the bundled models, prints a row for every case, and as a ratio plan / measured: what one pass keeps for its backward pass,
the most that pass allocates, the most there is in a whole step (weights, adapters, optimiser, the step's latents and
embeddings included), floating-point operations of a step, and the calls of the transformer.
"""

import argparse
import gc
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn, Tensor
from torch.profiler import profile, ProfilerActivity, record_function
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from flowalign.config.load import load_config
from flowalign.config.sections import Config
from flowalign.diagnostics.meta_model import CALLS
from flowalign.diagnostics.plan import rehearse
from flowalign.models import load_model
from flowalign.training.gradient import compute_gradient, Meter
from flowalign.training.setup import assemble, Assembly, read_inputs

ROOT = Path(__file__).parents[1]
SMALL = [
    "train.prompts_per_step=2",
    "sampler.steps=4",
    "train.images_per_prompt=4",
    "evaluation.images_per_prompt=1",
]
RECOMPUTED = "model.gradient_checkpointing=true"
CASES: dict[str, tuple[str, list[str]]] = {
    "flow_grpo, passes of 2": ("flow_grpo", ["train.images_per_pass=2"]),
    "flow_grpo, passes of 8": ("flow_grpo", ["train.images_per_pass=8"]),
    "flow_grpo, recomputed": ("flow_grpo", ["train.images_per_pass=8", RECOMPUTED]),
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
    "dpo_online": ("dpo_online", ["train.images_per_pass=4", "rewards={brightness: 1.0}"]),
    "alignprop": (
        "alignprop",
        ["train.images_per_pass=4", "sampler.steps=2", "rewards={brightness: 1.0}"],
    ),
}
"""Names to a file of configs/tiny and overrides."""
COLUMNS = {
    "parameters": "parameters, M",
    "weights": "weights, MB",
    "kept": "kept by a pass, MB",
    "pass_peak": "peak of a pass, MB",
    "peak": "peak of a step, MB",
    "flops": "FLOPs of a step, M",
}


def attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Count the operations of attention from the shapes of its inputs."""
    return sdpa_flop_count(query, key, value)


def attention_backward_flops(
    gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any
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
    """Of a run's step, in bytes where nothing else is said."""

    parameters: int
    weights: int
    kept: int
    pass_peak: int
    peak: int
    flops: int
    calls: dict[str, int]


def planned(config: Config) -> Figures:
    plan = rehearse(config)
    weights, calls = sum(plan.weights.values()), {name: plan.work[name] for name in CALLS}
    peak = max(plan.peaks["while images are made"], plan.peaks["in an update"])
    return Figures(
        sum(plan.parameters.values()), weights, plan.kept, plan.pass_peak, peak, plan.flops, calls
    )


def measured(config: Config) -> Figures:
    """Of the run's first step, the optimiser's moments in place."""
    gc.collect()  # what goes while allocations are watched would count as given back
    inputs, model = (
        read_inputs(config),
        load_model(config.model, "cuda" if torch.cuda.is_available() else "cpu"),
    )
    networks = [part for part in model.pipe.components.values() if isinstance(part, nn.Module)]
    tensors = [tensor for part in networks for tensor in [*part.parameters(), *part.buffers()]]
    parameters, weights = (
        sum(p.numel() for part in networks for p in part.parameters()),
        total(tensors),
    )
    resident = total(
        [
            x
            for part in (model.transformer, model.vae)
            for x in [*part.parameters(), *part.buffers()]
        ]
    )
    runs, calls = list[Assembly](), Counter[str]()
    operations = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)

    def begin() -> None:
        runs.append(assemble(inputs, model))
        for parameter in runs[0].policy.parameters():
            parameter.grad = torch.zeros_like(parameter)
        runs[0].state.optimizer.step()  # makes the moments

    peak = resident + allocated(model.device, begin, lambda: step(runs[0]))
    with operations, counted(model.transformer, calls):
        step(runs[0])
    kept, pass_peak = of_one_pass(runs[0])
    return Figures(
        parameters, weights, kept, pass_peak, peak, operations.get_total_flops(), dict(calls)
    )


def step(run: Assembly) -> None:
    """The first, as the trainer's."""
    train = run.config.train
    batch, _ = run.source(0)
    for piece in batch.pieces(len(batch) // train.updates_per_step):
        run.state.optimizer.zero_grad()
        compute_gradient(
            run.policy, run.config.objective, piece.trainable_rows(), train.images_per_pass, Meter()
        )
        run.state.optimizer.step()


def of_one_pass(run: Assembly) -> tuple[int, int]:
    """Bytes that the first pass of an update keeps, and the most it allocates."""
    objective, policy, train = run.config.objective, run.policy, run.config.train
    batch, _ = run.source(0)
    taught = batch[: len(batch) // train.updates_per_step].trainable_rows()
    piece = objective.prepare(policy.at("policy"), taught).passes(train.images_per_pass)[0]
    draw = next(iter(objective.draws(piece)))
    model = policy.model
    given = [
        x for x in [*vars(piece).values(), *vars(piece.cond).values()] if isinstance(x, Tensor)
    ]
    known = [
        *given,
        *model.transformer.parameters(),
        *model.transformer.buffers(),
        *model.vae.parameters(),
    ]
    kept = saved(lambda: objective.loss(policy, piece, draw).total, known)
    peak = allocated(
        model.device, lambda: None, lambda: objective.loss(policy, piece, draw).total.backward()
    )
    return kept, peak


def saved(loss: Callable[[], Tensor], known: list[Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps once the loss is there, but for those known before."""
    before, storages = {tensor.untyped_storage().data_ptr() for tensor in known}, dict[int, int]()

    def remember(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        total = loss()
    total.backward()
    return sum(size for place, size in storages.items() if place not in before)


def allocated(device: torch.device, prepare: Callable[[], None], action: Callable[[], None]) -> int:
    """The most bytes there are while `action` runs, of those that the allocator gave out since before `prepare`."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        prepare()
        torch.cuda.reset_peak_memory_stats(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        prepare()
        with record_function("action"):
            action()
    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    results = [
        event
        for event in seen.profiler.kineto_results.events()
        if event.name() in ("[memory]", "action")
    ]
    began = next(event.start_ns() for event in results if event.name() == "action")
    live = most = 0
    for event in sorted(results, key=lambda event: event.start_ns()):
        live += event.nbytes() if event.name() == "[memory]" else 0
        most = max(most, live) if event.start_ns() >= began else 0
    return most


@contextmanager
def counted(transformer: nn.Module, calls: Counter[str]) -> Iterator[None]:
    """Its calls, by kind."""

    def answered(_: nn.Module, __: Any, out: Any) -> None:
        if out[0].requires_grad:
            out[0].register_hook(lambda _: calls.update([CALLS[2]]))

    handles = [
        transformer.register_forward_pre_hook(
            lambda _, __: calls.update([CALLS[torch.is_grad_enabled()]])
        ),
        transformer.register_forward_hook(answered),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def total(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def compared(name: str) -> dict[str, Any]:
    """The figures of a case, and every plan over its measurement."""
    file, overrides = CASES[name]
    config = load_config(ROOT / "configs" / "tiny" / f"{file}.yaml", [*SMALL, *overrides])
    plan, found = planned(config), measured(config)
    ratios = {key: getattr(plan, key) / max(1, getattr(found, key)) for key in COLUMNS}
    return {
        "plan": asdict(plan),
        "measured": asdict(found),
        "ratios": ratios,
        "same calls": plan.calls == found.calls,
    }


def line(name: str, found: dict[str, Any]) -> str:
    cells = [f"{found['measured'][key] / 1e6:,.2f} ({found['ratios'][key]:.3f})" for key in COLUMNS]
    return f"| {name} | {' | '.join(cells)} | {'yes' if found['same calls'] else 'no'} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {'; '.join(CASES)}")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    print(f"| measured, and plan / measured | {' | '.join(COLUMNS.values())} | equal calls |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for name in options.cases or CASES:
        results[name] = compared(name)
        print(line(name, results[name]), flush=True)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
