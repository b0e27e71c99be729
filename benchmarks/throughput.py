"""Measure how much of a Flow-GRPO step is the model's own work.

    python benchmarks/throughput.py [--model FOLDER | --architecture NAME] [key=value ...]

Times rollouts (`collect`) and whole steps (`source` and `update`). In the same process, by turns,
it times the bare work that they consist of: the same calls of transformer and decoder, and nothing
else. Ratios compare a rollout and a step with that work:

- of the base network, which has no adapters and is not compiled, in its own dtype,
- of the network that trains, with its adapters,
- on a GPU that `flowalign plan` knows: of the base network, estimated by the operations and bytes
  of every kernel.

`--architecture` builds a network of published size with random weights and random embeddings
instead of loading a folder. Settings are written as those of `train.py`, for example
`sampler.guidance=4.5 model.compile=true objective.train_null_branch=false`.
`benchmarks/whole_run.py` measures what a run does besides its steps.
"""

import argparse
import copy
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from architectures import ARCHITECTURES
from torch import nn, Tensor

from flowalign.batch import Rollout
from flowalign.config.load import build_config
from flowalign.config.sections import Config
from flowalign.data.prompts import Prompt
from flowalign.diagnostics.meta_model import fused_attention, Ledger, META
from flowalign.diagnostics.plan import Gpu, GPUS, step_seconds
from flowalign.errors import UserError
from flowalign.models import load_model
from flowalign.models.base import FlowModel
from flowalign.models.compiled import compile_blocks
from flowalign.models.families import describe
from flowalign.rewards.registry import load_rewards
from flowalign.rollouts.collect import collect
from flowalign.runs.environment import environment, peak_memory
from flowalign.runs.failures import SkippedUpdate
from flowalign.settings.merging import merge, overridden, Section
from flowalign.settings.yaml_files import parse_yaml
from flowalign.training.setup import assemble, Assembly, batch_plan, Inputs
from flowalign.training.update import update

COLOURS, SHAPES = ("red", "green", "blue", "yellow"), ("circle", "square", "triangle")
PROMPTS = [Prompt(f"a {colour} {shape}") for colour, shape in product(COLOURS, SHAPES)]
SECTIONS: Section = {
    "sampler": {"steps": 10, "dynamics": {"name": "flow_sde", "eta": 0.7}},
    "train": {"prompts_per_step": 8, "images_per_prompt": 8, "images_per_pass": 64},
    "rewards": {"scene_match_graded": 1.0},
    "data": {"prompts": "PROMPTS of this file"},
}
"""The run that is measured, without its model."""
RANDOM: Section = {
    "dtype": "bfloat16",
    "height": 512,
    "width": 512,
    "max_sequence_length": 128,
}
"""Settings of a random network."""

Kind = tuple[bool, tuple[torch.Size, ...]]
"""What calls must share to cost the same: whether there is a gradient, and the shapes."""
Seconds = dict[str, list[float]]
"""Times of every part, one for each repetition."""


@dataclass
class Calls:
    """The calls of a module while a step runs: an example of every kind, and its number."""

    module: nn.Module
    examples: dict[Kind, tuple[tuple, dict]] = field(default_factory=dict)
    counts: Counter[Kind] = field(default_factory=Counter)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the calls made inside."""

        def remember(_: nn.Module, args: tuple, kwargs: dict) -> None:
            tensors = [x for x in [*args, *kwargs.values()] if isinstance(x, Tensor)]
            kind = torch.is_grad_enabled(), tuple(x.shape for x in tensors)
            # One example is kept for each kind: all of them would take the memory of the step.
            self.examples.setdefault(kind, (args, kwargs))
            self.counts[kind] += 1

        handle = self.module.register_forward_pre_hook(remember, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def count(self, gradient: bool) -> int:
        """Return the number of calls with or without gradient."""
        return sum(count for kind, count in self.counts.items() if kind[0] == gradient)

    def replay(self, gradient: bool) -> None:
        """Repeat the calls with or without gradient; those with gradient also run backward."""
        for kind, (args, kwargs) in self.examples.items():
            if kind[0] == gradient:
                for _ in range(self.counts[kind]):
                    self._call(args, kwargs, gradient)

    def of(self, module: nn.Module) -> "Calls":
        """Return the same calls of another module, on its device.

        The first input needs a gradient, so that a module without adapters runs backward too.
        """
        device = next(module.parameters()).device

        def move(value: Any, gradient: bool = False) -> Any:
            moved = value.detach().to(device) if isinstance(value, Tensor) else value
            return moved.requires_grad_() if gradient else moved

        def moved_call(kind: Kind, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            first, *rest = [*args, *kwargs.values()]
            values = [move(first, gradient=kind[0]), *map(move, rest)]
            names = zip(kwargs, values[len(args) :], strict=True)
            return tuple(values[: len(args)]), dict(names)

        examples = {kind: moved_call(kind, *call) for kind, call in self.examples.items()}
        return replace(self, module=module, examples=examples)

    def _call(self, args: tuple, kwargs: dict, gradient: bool) -> None:
        with torch.set_grad_enabled(gradient):
            out = self.module(*args, **kwargs)
        if gradient:
            out[0].backward(torch.ones_like(out[0]))


@dataclass
class Bench:
    """A run without a folder, and the calls that one of its steps makes."""

    run: Assembly
    base: nn.Module
    """The transformer without adapters."""

    def __post_init__(self) -> None:
        self.plan, self.context = self.run.plan, self.run.context
        model = self.run.policy.model
        self.batch = self.context.step_prompts(0)
        self.rollout = self.collect()
        self.adapted, self.decoder = Calls(model.transformer), Calls(model.vae.decoder)
        with self.adapted.recording(), self.decoder.recording():
            self.step()
        self.peak_memory = peak_memory(model.device)
        self.verify_calls()
        self.bare = self.adapted.of(self.base)

    def verify_calls(self) -> None:
        """Fail if the step made other calls than its sampler and its objective need."""
        passes = self.plan.images_per_step // self.plan.images_per_pass
        sampled, trained = self.adapted.count(gradient=False), self.adapted.count(gradient=True)
        sampler, null_branch = self.run.config.sampler, self.run.config.objective.train_null_branch
        trained_steps = len(self.rollout.steps)
        # The empty prompt has calls of its own if it has no gradient.
        alone = sampler.guidance != 1 and not null_branch
        expected = sampler.steps + alone * (sampler.steps + trained_steps)
        assert sampled == passes * expected, f"{sampled} forwards, {passes} passes"
        assert trained == passes * trained_steps, f"{trained} trained forwards, {passes} passes"
        # The decoder takes a pass at once, or image by image.
        assert self.decoder.count(gradient=False) in (passes, self.plan.images_per_step)

    def step(self) -> None:
        """Make the first training step, as the trainer does."""
        batch, _ = self.run.source(0)
        update(self.run.state, self.run.config.objective, batch, self.run.config.train, fail)

    def collect(self) -> Rollout:
        """Make the images of a step."""
        images_per_pass = self.run.config.train.images_per_pass
        return collect(self.run.policy.at("policy"), self.batch, images_per_pass)

    def measure(self, repetitions: int, clock: Callable[[], float]) -> Seconds:
        """Time every part. Its order is reversed every other time."""
        parts: dict[str, Callable[[], object]] = {
            "rollout": self.collect,
            "base forwards": lambda: self.bare.replay(gradient=False),
            "adapted forwards": lambda: self.adapted.replay(gradient=False),
            "decoding": lambda: self.decoder.replay(gradient=False),
            "reward": lambda: self.context.scorer([self.rollout]),
            "step": self.step,
            "base backwards": lambda: self.bare.replay(gradient=True),
            "adapted backwards": lambda: self.adapted.replay(gradient=True),
        }
        # What is compiled or tuned at the first call of its kind.
        for warm_up in parts.values():
            warm_up()
        seconds: Seconds = {name: [] for name in parts}
        for repetition in range(repetitions):
            # The machine's speed may drift: in both orders, no part is always measured last.
            for name in list(parts)[:: -1 if repetition % 2 else 1]:
                # Gradients of a part before would be added to, which takes time of its own.
                self.run.state.optimizer.zero_grad()
                seconds[name].append(timed(parts[name], clock, self.run.policy.model.device))
        return seconds

    def estimate(self, gpu: Gpu) -> dict[str, float]:
        """Return seconds of the bare work on a GPU, by operations and bytes of every kernel."""
        network = self.bare.of(on_meta(self.base))
        decoder = self.decoder.of(on_meta(self.decoder.module))
        parts: dict[str, Callable[[], object]] = {
            "base forwards": lambda: network.replay(gradient=False),
            "base backwards": lambda: network.replay(gradient=True),
            "decoding": lambda: decoder.replay(gradient=False),
        }
        ledger, seconds = Ledger((1, 1, 1), (1, 1, 1)), {}
        with fused_attention(), ledger:
            for name, replay in parts.items():
                with ledger.part() as cost:
                    replay()
                seconds[name] = step_seconds(cost.work, gpu)
        return seconds


def fail(skipped: SkippedUpdate) -> None:
    """Raise RuntimeError: a step that trains nothing would be measured too fast."""
    raise RuntimeError(skipped.reason)


def timed(action: Callable[[], object], clock: Callable[[], float], device: torch.device) -> float:
    """Return the seconds of an action, by a clock."""

    def now() -> float:
        # Calls on a GPU return before their work is done.
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock()

    start = now()
    action()
    return now() - start


def with_same_weights(module: nn.Module) -> nn.Module:
    """Return a copy of a module that shares its parameters and buffers."""
    tensors = chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def on_meta(module: nn.Module) -> nn.Module:
    """Return a copy of a module without values."""
    # The copy has no weights yet when it is moved, so that they are never there twice.
    tensors = {id(t): t.to(META) for t in module.buffers()}
    for parameter in module.parameters():
        moved = nn.Parameter(parameter.detach().to(META), requires_grad=parameter.requires_grad)
        tensors[id(parameter)] = moved
    return copy.deepcopy(module, tensors)


def ratio(numerators: list[float], *denominators: list[float]) -> float:
    """Return the median, over the repetitions, of a time over a sum of times."""
    sums = map(sum, zip(*denominators, strict=True))
    return statistics.median(a / b for a, b in zip(numerators, sums, strict=True))


def summarise(bench: Bench, seconds: Seconds, gpu: Gpu | None) -> dict[str, Any]:
    """Return medians over the repetitions, and ratios to the bare work."""
    rollout, step, decoding = (seconds[name] for name in ("rollout", "step", "decoding"))
    ratios = {}
    for network in ("base", "adapted"):
        forwards = seconds[f"{network} forwards"], decoding
        ratios[f"rollout_over_{network}"] = ratio(rollout, *forwards)
        ratios[f"step_over_{network}"] = ratio(step, *forwards, seconds[f"{network} backwards"])
    estimate = bench.estimate(gpu) if gpu else {}
    if estimate:
        forwards = estimate["base forwards"] + estimate["decoding"]
        ratios["rollout_over_estimate"] = statistics.median(rollout) / forwards
        whole = forwards + estimate["base backwards"]
        ratios["step_over_estimate"] = statistics.median(step) / whole
    return {
        "images_per_second": bench.plan.images_per_step / statistics.median(rollout),
        "step_seconds": statistics.median(step),
        **ratios,
        "decode_share": ratio(decoding, step),
        "reward_share": ratio(seconds["reward"], step),
        "peak_memory_bytes": bench.peak_memory,
        "images_per_step": bench.plan.images_per_step,
        "forwards": bench.adapted.count(gradient=False),
        "forwards_and_backwards": bench.adapted.count(gradient=True),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "estimated_seconds": estimate,
    }


def build(options: argparse.Namespace) -> Bench:
    """Set up a run without a run folder."""
    config = make_config(options)
    plain = replace(config.model, compile=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(options.architecture, replace(config, model=plain), device)
    base = with_same_weights(model.transformer)
    if config.model.compile:
        compile_blocks(model.blocks)
    rewards = load_rewards(config.rewards)
    inputs = Inputs(
        config=config,
        plan=batch_plan(config),
        prompts=PROMPTS,
        evaluation_prompts=PROMPTS,
        examples=[],
        held_out=[],
        rewards=rewards,
        evaluation_rewards=rewards,
    )
    return Bench(assemble(inputs, model), base)


def make_model(architecture: str | None, config: Config, device: str) -> FlowModel:
    """Load the model of the configuration, or build one with random weights."""
    if architecture is None:
        return load_model(config.model, device)
    return ARCHITECTURES[architecture][1](config.model, device)


def make_config(options: argparse.Namespace) -> Config:
    """Build the configuration that the command line describes."""
    if options.architecture:
        name = ARCHITECTURES[options.architecture][0]
        model = {"name": name, "path": f"random/{options.architecture}", **RANDOM}
    else:
        model = asdict(describe(options.model))
    values = merge(SECTIONS, {"model": model})
    return build_config(overridden(values, options.settings, parse_yaml), Path("throughput"))


def known_gpu() -> Gpu | None:
    """Return the nominal figures of this machine's GPU; None if there is none, or none known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    return next((gpu for key, gpu in GPUS.items() if key in name), None)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("settings", nargs="*", metavar="key=value", help="settings of the run")
    add("--model", default="assets/tiny-sd3", metavar="FOLDER")
    add("--architecture", choices=ARCHITECTURES, help="random weights instead of a folder")
    add("--repetitions", type=int, default=5)
    add("--cpu-time", action="store_true", help="time of this process, on a shared machine")
    add("--output", type=Path, metavar="FILE.json")
    return parser


def main() -> None:
    """Print the figures, and write them where --output says."""
    parser = make_parser()
    options = parser.parse_args()
    try:
        bench = build(options)
    except UserError as error:
        parser.error(str(error))
    clock = time.process_time if options.cpu_time else time.perf_counter
    seconds = bench.measure(options.repetitions, clock)
    results = summarise(bench, seconds, known_gpu())
    for name, value in results.items():
        if not isinstance(value, dict):
            form = "," if isinstance(value, int) else ".3f"
            print(f"{name:24}{value:>15{form}}")
    if options.output:
        settings = {key: value for key, value in vars(options).items() if key != "output"}
        record = {
            "settings": settings,
            "environment": environment(bench.run.policy.model.device, 1),
            "results": results,
            "repetitions": seconds,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
