"""Measure how much of a training step is the model's own work.

    python benchmarks/throughput.py [MODEL_FOLDER] [options]

Times rollouts (`collect`) and whole steps (`source` and `update`). In the same process, by turns,
it times the bare work they consist of: the same calls of transformer and decoder, with the adapter
active, and nothing else. `--architecture sd3.5-medium` or `flux-dev` builds the published network
with random weights instead of loading a folder.
"""

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from architectures import ARCHITECTURES
from torch import nn, Tensor

from flowalign.batch import Rollout
from flowalign.config.load import build_config
from flowalign.config.sections import Config
from flowalign.data.prompts import Prompt
from flowalign.errors import UserError
from flowalign.models import load_model
from flowalign.models.base import FlowModel
from flowalign.models.compiled import compile_blocks
from flowalign.models.families import describe
from flowalign.rewards.registry import load_rewards
from flowalign.rollouts.batch_plan import BatchPlan
from flowalign.rollouts.collect import collect
from flowalign.runs.environment import environment, peak_memory
from flowalign.runs.failures import SkippedUpdate
from flowalign.training.setup import assemble, Assembly, Inputs
from flowalign.training.update import update

COLOURS, SHAPES = ("red", "green", "blue", "yellow"), ("circle", "square", "triangle")
PROMPTS = [Prompt(f"a {colour} {shape}") for colour, shape in product(COLOURS, SHAPES)]

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

    def _call(self, args: tuple, kwargs: dict, gradient: bool) -> None:
        with torch.set_grad_enabled(gradient):
            out = self.module(*args, **kwargs)
        if gradient:
            out[0].backward(torch.ones_like(out[0]))


@dataclass
class Bench:
    """A run without a folder, and the calls that one of its steps makes."""

    run: Assembly

    def __post_init__(self) -> None:
        self.plan, self.context = self.run.plan, self.run.context
        model = self.run.policy.model
        self.batch = self.context.step_prompts(0)
        self.rollout = self.collect()
        self.network, self.decoder = Calls(model.transformer), Calls(model.vae.decoder)
        with self.network.recording(), self.decoder.recording():
            self.step()
        self.peak_memory = peak_memory(model.device)
        self.verify_calls()

    def verify_calls(self) -> None:
        """Fail if the step made other calls than its sampler and its objective need."""
        passes = self.plan.images_per_step // self.plan.images_per_pass
        sampled, trained = self.network.count(gradient=False), self.network.count(gradient=True)
        steps, trained_steps = self.run.config.sampler.steps, len(self.rollout.steps)
        assert sampled == passes * steps, f"{sampled} forwards for {passes} passes"
        assert trained == passes * trained_steps, f"{trained} trained forwards for {passes} passes"
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
            "bare forwards": lambda: self.network.replay(gradient=False),
            "bare decode": lambda: self.decoder.replay(gradient=False),
            "reward": lambda: self.context.scorer([self.rollout]),
            "step": self.step,
            "bare backwards": lambda: self.network.replay(gradient=True),
        }
        seconds: Seconds = {name: [] for name in parts}
        for repetition in range(repetitions):
            # The machine's speed may drift: in both orders, no part is always measured last.
            for name in list(parts)[:: -1 if repetition % 2 else 1]:
                # Gradients of a part before would be added to, which takes time of its own.
                self.run.state.optimizer.zero_grad()
                seconds[name].append(timed(parts[name], clock, self.run.policy.model.device))
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


def ratio(numerators: list[float], denominators: list[float]) -> float:
    """Return the median of the ratios of every repetition."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def summarise(bench: Bench, seconds: Seconds) -> dict[str, Any]:
    """Return medians over the repetitions, and ratios of the package's time to the bare work."""
    forwards, decodes = seconds["bare forwards"], seconds["bare decode"]
    bare_rollout = list(map(sum, zip(forwards, decodes, strict=True)))
    bare_step = list(map(sum, zip(bare_rollout, seconds["bare backwards"], strict=True)))
    return {
        "images_per_second": bench.plan.images_per_step / statistics.median(seconds["rollout"]),
        "step_seconds": statistics.median(seconds["step"]),
        "rollout_ratio": ratio(seconds["rollout"], bare_rollout),
        "step_ratio": ratio(seconds["step"], bare_step),
        "decode_share": ratio(decodes, seconds["step"]),
        "reward_share": ratio(seconds["reward"], seconds["step"]),
        "peak_memory_bytes": bench.peak_memory,
        "images_per_step": bench.plan.images_per_step,
        "forwards": bench.network.count(gradient=False),
        "forwards_and_backwards": bench.network.count(gradient=True),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
    }


def build(options: argparse.Namespace) -> Bench:
    """Set up a run without a run folder."""
    config = make_config(options)
    model = make_model(options.architecture, config)
    train, rewards = config.train, load_rewards(config.rewards)
    plan = BatchPlan(
        prompts_per_step=train.prompts_per_step,
        images_per_prompt=train.images_per_prompt,
        updates_per_step=train.updates_per_step,
        max_images_per_pass=train.images_per_pass,
    )
    inputs = Inputs(
        config=config,
        plan=plan,
        prompts=PROMPTS,
        evaluation_prompts=PROMPTS,
        examples=[],
        held_out=[],
        rewards=rewards,
        evaluation_rewards=rewards,
    )
    return Bench(assemble(inputs, model))


def make_model(architecture: str | None, config: Config) -> FlowModel:
    """Load the model of the configuration, or build a published one with random weights."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if architecture is None:
        return load_model(config.model, device)
    model = ARCHITECTURES[architecture][1](config.model, device)
    if config.model.compile:
        compile_blocks(model.blocks)
    return model


def make_config(options: argparse.Namespace) -> Config:
    """Build the configuration that the command line describes."""
    images = options.prompts * options.images_per_prompt
    train = {
        "prompts_per_step": options.prompts,
        "images_per_prompt": options.images_per_prompt,
        "images_per_pass": images // options.passes,
    }
    sampler = {
        "steps": options.steps,
        "guidance": options.guidance,
        "window": {"size": options.window},
        "dynamics": {"name": "flow_sde", "eta": 0.7},
    }
    sections = {
        "model": model_section(options),
        "sampler": sampler,
        "train": train,
        "rewards": {options.reward: 1.0},
        "data": {"prompts": "PROMPTS of this file"},
    }
    return build_config(sections, Path("throughput"))


def model_section(options: argparse.Namespace) -> dict[str, Any]:
    """Return the `model` section: that of the folder or architecture, with the options."""
    if options.architecture:
        section = {
            "name": ARCHITECTURES[options.architecture][0],
            "path": f"random/{options.architecture}",
            "dtype": "bfloat16",
            "height": 512,
            "width": 512,
            "max_sequence_length": 128,
        }
    else:
        section = asdict(describe(options.model))
    overrides = {
        "dtype": options.dtype,
        "height": options.side,
        "width": options.side,
        "max_sequence_length": options.tokens,
    }
    section |= {key: value for key, value in overrides.items() if value is not None}
    switches = {
        "gradient_checkpointing": options.gradient_checkpointing,
        "compile": options.compile,
    }
    return section | switches


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", nargs="?", default="assets/tiny-sd3", metavar="MODEL_FOLDER")
    add("--architecture", choices=ARCHITECTURES, help="random weights instead of a folder")
    add("--steps", type=int, default=10, help="sampler steps")
    add("--prompts", type=int, default=8, help="prompts of a training step")
    add("--images-per-prompt", type=int, default=8)
    add("--passes", type=int, default=1, help="passes that a step's images are split into")
    add("--window", type=int, default=0, help="number of stochastic steps; 0: all but the last")
    add("--guidance", type=float, default=1.0, help="above 1, every call has a doubled batch")
    add("--dtype", choices=("float32", "bfloat16", "float16"))
    add("--side", type=int, help="height and width of the pictures")
    add("--tokens", type=int, help="model.max_sequence_length")
    add("--gradient-checkpointing", action="store_true")
    add("--compile", action="store_true", help="compile the blocks, before anything is timed")
    add("--reward", default="scene_match_graded")
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
    results = summarise(bench, seconds)
    for name, value in results.items():
        if not isinstance(value, dict):
            form = "," if isinstance(value, int) else ".3f"
            print(f"{name:24}{value:>12{form}}")
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
