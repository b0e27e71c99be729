"""`flowalign plan`: print what a run will need, without loading any weights."""

from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass, replace

from flowalign.config.sections import Config
from flowalign.diagnostics.meta_model import CALLS, Kernel, kernels, Work
from flowalign.diagnostics.rehearsal import Plan, rehearse
from flowalign.errors import did_you_mean, UserError
from flowalign.files import format_bytes
from flowalign.training.setup import batch_plan

REACHED = {"half": 0.65, "tf32": 0.65, "float32": 0.75}
"""Shares of a GPU's peaks that large products are assumed to reach."""
BANDWIDTH_REACHED = 0.85
"""Share of a GPU's bandwidth that other kernels are assumed to reach.

With these shares, a compiled step of SD3.5 medium on an H200 took 0.97 times the estimate.
"""


@dataclass(frozen=True)
class Gpu:
    """Nominal figures of a GPU."""

    memory: float
    """GB."""
    half: float
    """Dense TFLOPS in half precision."""
    tf32: float
    """Dense TFLOPS in tf32."""
    float32: float
    """TFLOPS in float32."""
    bandwidth: float
    """TB/s of its memory."""


GPUS = {
    "h100": Gpu(memory=80, half=989, tf32=494, float32=67, bandwidth=3.35),
    "h200": Gpu(memory=141, half=989, tf32=494, float32=67, bandwidth=4.8),
    "a100-40": Gpu(memory=40, half=312, tf32=156, float32=19.5, bandwidth=1.56),
    "a100-80": Gpu(memory=80, half=312, tf32=156, float32=19.5, bandwidth=2.04),
    "l40s": Gpu(memory=48, half=362, tf32=183, float32=91.6, bandwidth=0.864),
    "rtx-4090": Gpu(memory=24, half=165, tf32=82.6, float32=82.6, bandwidth=1.01),
    "rtx-3090": Gpu(memory=24, half=71, tf32=35.6, float32=35.6, bandwidth=0.936),
    "rtx-a6000": Gpu(memory=48, half=155, tf32=77.4, float32=38.7, bandwidth=0.768),
    "t4": Gpu(memory=16, half=65, tf32=8.1, float32=8.1, bandwidth=0.32),
}


def report(config: Config, gpu: str | None = None, memory: float | None = None) -> Iterator[str]:
    """Yield what the command prints, line by line.

    Args:
        config: The run.
        gpu: A name of `GPUS`, for the time of a step and the largest pass that fits.
        memory: GB for the largest pass, if they are not those of the GPU.

    Raises:
        UserError: The GPU is unknown, the memory is not positive, or the model cannot be read.
    """
    if gpu and gpu not in GPUS:
        names = ", ".join(GPUS)
        raise UserError(
            f"--gpu: there is no {gpu!r}.{did_you_mean(gpu, GPUS)} The GPUs are {names}."
        )
    if memory is not None and not memory > 0:
        raise UserError(f"--memory is {memory:g}. Write how many GB there are, above 0.")
    model, plan = config.model, rehearse(config)
    picture = f"{model.precision}, {model.height} × {model.width}"
    yield f"{model.name} from {model.path}, {picture}: no weights were loaded"
    yield from memory_rows(plan)
    yield from peak_rows(config, plan)
    yield "\na step, by one process, without its rewards"
    yield from (row(name, f"{round(plan.work[name]):,}") for name in CALLS)
    yield row("floating-point operations", f"{plan.flops:.3g}")
    if gpu:
        seconds = f"{step_seconds(plan.work, GPUS[gpu]):,.3g} s"
        yield row("time", seconds, f"on {gpu}, by operations and bytes of every kernel")
    if available := memory or (GPUS[gpu].memory if gpu else None):
        largest = largest_pass(config, 1e9 * available) or "none"
        now = batch_plan(config).images_per_pass
        note = f"is the largest that fits {available:g} GB; now {now}"
        yield row("train.images_per_pass", f"{largest}", note)


def step_seconds(work: Work, gpu: Gpu) -> float:
    """Return the estimated seconds of a step's work on a GPU.

    A kernel takes the longer of two times: for its operations, and for the bytes that it moves
    (roofline). No kernel waits for the host.
    """
    return sum(count * kernel_seconds(kernel, gpu) for kernel, count in kernels(work))


def kernel_seconds(kernel: Kernel, gpu: Gpu) -> float:
    """Return the seconds of one kernel on a GPU."""
    operations = kernel.flops / (REACHED[kernel.unit] * 1e12 * getattr(gpu, kernel.unit))
    return max(operations, kernel.bytes / (BANDWIDTH_REACHED * 1e12 * gpu.bandwidth))


def largest_pass(config: Config, memory: float) -> int:
    """Return the most images per pass that fit into so much memory, in bytes; 0 if none does.

    Only divisors of an update's images are tried, since passes have one size, and of whole pairs.
    """
    counts = batch_plan(config)
    images, row = counts.images_per_update, counts.images_per_row
    sizes = [size for size in range(row, images + 1, row) if images % size == 0]

    def peak(size: int) -> int:
        return rehearse(replace(config, train=replace(config.train, images_per_pass=size))).peak

    # The peak grows with the size, so that a few rehearsals are enough.
    return [0, *sizes][bisect(sizes, memory, key=peak)]


def memory_rows(plan: Plan) -> Iterator[str]:
    """Yield the memory of networks, adapters, and what stays allocated during a step."""
    yield row("", "parameters", "memory")
    for name, count in plan.parameters.items():
        yield row(name, millions(count), format_bytes(plan.weights[name]))
    if plan.stand_in:
        yield row("evaluation.model", "", format_bytes(plan.stand_in))
    yield row("adapter, with its copies", millions(plan.trained), format_bytes(plan.adapters))
    yield row("gradients and moments", "", format_bytes(plan.optimizer))
    yield row("latents and embeddings", "", format_bytes(plan.held))
    for name, count in plan.rewards.items():
        if count != 0:
            yield row(f"reward {name}", "", "not counted" if count is None else format_bytes(count))


def peak_rows(config: Config, plan: Plan) -> Iterator[str]:
    """Yield what a pass keeps and the peaks, without and with gradient checkpointing."""
    active = config.model.gradient_checkpointing
    other_model = replace(config.model, gradient_checkpointing=not active)
    other = rehearse(replace(config, model=other_model))
    stored, recomputed = (other, plan) if active else (plan, other)
    heads = ("false", "true (now)") if active else ("false (now)", "true")
    yield "\n" + row("model.gradient_checkpointing", *heads)
    images = batch_plan(config).images_per_pass
    yield row(
        f"kept by {images} image(s)", format_bytes(stored.kept), format_bytes(recomputed.kept)
    )
    for phase, peak in stored.peaks.items():
        yield row(f"peak {phase}", format_bytes(peak), format_bytes(recomputed.peaks[phase]))


def row(name: str, first: str, second: str = "") -> str:
    """Return a line of the table."""
    return f"{name:31}{first:>14}  {second:>14}".rstrip()


def millions(count: int) -> str:
    """Return a number of parameters in millions."""
    return f"{count / 1e6:,.2f} M"
