"""How much of a training step is the model's own work: python benchmarks/throughput.py [MODEL_FOLDER] [options]

Measures rollouts (`experience.collect`) and whole steps (`source` and `update`), and in the same process, turn by turn, the
bare work they consist of: the very same transformer and decoder calls, with the adapter on, in a loop with nothing else.
`--architecture sd3.5-medium` or `flux-dev` builds the published network with random weights instead of loading a folder.
"""

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
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
from flowalign.models.loading import describe
from flowalign.rewards.registry import load_rewards
from flowalign.rollouts.batch_plan import BatchPlan
from flowalign.rollouts.collect import collect
from flowalign.runs.environment import environment, peak_memory
from flowalign.runs.failures import SkippedUpdate
from flowalign.training.setup import assemble, Assembly, Inputs
from flowalign.training.update import update

PROMPTS = [
    Prompt(f"a {color} {shape}")
    for color in ("red", "green", "blue", "yellow")
    for shape in ("circle", "square", "triangle")
]


@dataclass
class Calls:
    """The calls of a module while something else runs: an example of every kind, and how often."""

    module: nn.Module
    kinds: dict[Any, tuple[Any, dict[str, Any]]] = field(default_factory=dict)
    counts: Counter[Any] = field(default_factory=Counter)

    @contextmanager
    def recording(self) -> Iterator[None]:
        def remember(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            tensors = [x for x in [*args, *kwargs.values()] if isinstance(x, Tensor)]
            kind = torch.is_grad_enabled(), *(x.shape for x in tensors)
            self.kinds.setdefault(kind, (args, kwargs))
            self.counts[kind] += 1

        handle = self.module.register_forward_pre_hook(remember, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def count(self, gradient: bool) -> int:
        return sum(count for kind, count in self.counts.items() if kind[0] == gradient)

    def replay(self, gradient: bool) -> None:
        """The same calls again and nothing else; with `gradient`, those that were trained, and their backward passes."""
        for kind, (args, kwargs) in self.kinds.items():
            if kind[0] != gradient:
                continue
            for _ in range(self.counts[kind]):
                with torch.set_grad_enabled(gradient):
                    out = self.module(*args, **kwargs)
                if gradient:
                    out[0].backward(torch.ones_like(out[0]))


@dataclass
class Bench:
    """A run without a folder, and the calls that one of its steps makes."""

    run: Assembly

    def __post_init__(self) -> None:
        self.counts, self.context = self.run.counts, self.run.context
        model, train = self.run.policy.model, self.run.config.train
        self.batch = self.context.step_prompts(0)
        self.rollout = self.collect()
        self.network, self.decoder = Calls(model.transformer), Calls(model.vae.decoder)
        with self.network.recording(), self.decoder.recording():
            self.step()
        self.peak_memory = peak_memory(model.device)
        passes = self.counts.images_per_step // train.images_per_pass
        made, trained = self.network.count(gradient=False), self.network.count(gradient=True)
        assert made == passes * self.run.config.sampler.steps, (
            f"{made} forwards for {passes} passes"
        )
        assert trained == passes * len(self.rollout.steps), (
            f"{trained} trained forwards for {passes} passes"
        )
        assert self.decoder.count(gradient=False) in (passes, self.counts.images_per_step)

    def step(self) -> None:
        """Make the first training step, as the trainer does."""
        batch, _ = self.run.source(0)
        update(self.run.state, self.run.config.objective, batch, self.run.config.train, fail)

    def collect(self) -> Rollout:
        return collect(
            self.run.policy.at("policy"), self.batch, self.run.config.train.images_per_pass
        )

    def measure(self, repetitions: int, clock: Callable[[], float]) -> dict[str, list[float]]:
        """Seconds of every part, turn by turn, in an order that is reversed every other time."""
        parts: dict[str, Callable[[], Any]] = {
            "rollout": self.collect,
            "bare forwards": lambda: self.network.replay(gradient=False),
            "bare decode": lambda: self.decoder.replay(gradient=False),
            "reward": lambda: self.context.judge([self.rollout]),
            "step": self.step,
            "bare backwards": lambda: self.network.replay(gradient=True),
        }
        seconds: dict[str, list[float]] = {name: [] for name in parts}
        for repetition in range(repetitions):
            for name in list(parts)[:: -1 if repetition % 2 else 1]:
                self.run.state.optimizer.zero_grad()
                seconds[name].append(timed(parts[name], clock, self.run.policy.model.device))
        return seconds


def fail(skipped: SkippedUpdate) -> None:
    """Raise RuntimeError: a step that trains nothing would be measured too fast."""
    raise RuntimeError(skipped.reason)


def timed(action: Callable[[], Any], clock: Callable[[], float], device: torch.device) -> float:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock()

    began = now()
    action()
    return now() - began


def results(bench: Bench, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians over the repetitions; a ratio is the median of every repetition's own."""
    sums = [dict(zip(seconds, row, strict=True)) for row in zip(*seconds.values(), strict=True)]
    bare_rollout = [row["bare forwards"] + row["bare decode"] for row in sums]
    bare_step = [bare + row["bare backwards"] for bare, row in zip(bare_rollout, sums, strict=True)]

    def ratio(above: list[float], below: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(above, below, strict=True))

    return {
        "images_per_second": bench.counts.images_per_step / statistics.median(seconds["rollout"]),
        "step_seconds": statistics.median(seconds["step"]),
        "rollout_ratio": ratio(seconds["rollout"], bare_rollout),
        "step_ratio": ratio(seconds["step"], bare_step),
        "decode_share": ratio(seconds["bare decode"], seconds["step"]),
        "reward_share": ratio(seconds["reward"], seconds["step"]),
        "peak_memory_bytes": bench.peak_memory,
        "images_per_step": bench.counts.images_per_step,
        "forwards": bench.network.count(gradient=False),
        "forwards_and_backwards": bench.network.count(gradient=True),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
    }


def build(options: argparse.Namespace) -> Bench:
    """Build a run without a folder."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = configuration(options)
    family = ARCHITECTURES[options.architecture][1] if options.architecture else None
    model = family(config.model, device) if family else load_model(config.model, device)
    train, rewards = config.train, load_rewards(config.rewards)
    counts = BatchPlan(
        train.prompts_per_step,
        train.images_per_prompt,
        train.updates_per_step,
        train.images_per_pass,
    )
    inputs = Inputs(
        config=config,
        counts=counts,
        prompts=PROMPTS,
        evaluation_prompts=PROMPTS,
        examples=[],
        held_out=[],
        rewards=rewards,
        evaluation_rewards=rewards,
    )
    return Bench(assemble(inputs, model))


def configuration(options: argparse.Namespace) -> Config:
    if options.architecture:
        family, path = ARCHITECTURES[options.architecture][0], f"random/{options.architecture}"
        model = {
            "name": family,
            "path": path,
            "dtype": "bfloat16",
            "height": 512,
            "width": 512,
            "max_sequence_length": 128,
        }
    else:
        model = asdict(describe(options.model))
    asked = {
        "dtype": options.dtype,
        "height": options.side,
        "width": options.side,
        "max_sequence_length": options.tokens,
    }
    model |= {key: value for key, value in asked.items() if value is not None}
    model |= {"gradient_checkpointing": options.gradient_checkpointing}
    images = options.prompts * options.images_per_prompt
    train = {
        "prompts_per_step": options.prompts,
        "images_per_prompt": options.images_per_prompt,
        "images_per_pass": images // options.passes,
        "max_bad_steps": 10**6,
    }
    dynamics = {"name": "flow_sde", "eta": 0.7}
    sampler = {
        "steps": options.steps,
        "guidance": options.guidance,
        "window": {"size": options.window},
        "dynamics": dynamics,
    }
    sections = {
        "model": model,
        "sampler": sampler,
        "train": train,
        "rewards": {options.reward: 1.0},
        "data": {"prompts": "those above"},
    }
    return build_config(sections, Path("throughput"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="assets/tiny-sd3", metavar="MODEL_FOLDER")
    parser.add_argument(
        "--architecture", choices=ARCHITECTURES, help="random weights instead of a folder"
    )
    parser.add_argument("--steps", type=int, default=10, help="of the sampler")
    parser.add_argument("--prompts", type=int, default=8, help="a step")
    parser.add_argument("--images-per-prompt", type=int, default=8)
    parser.add_argument(
        "--passes", type=int, default=1, help="in which a step's images are made and trained"
    )
    parser.add_argument(
        "--window",
        type=int,
        default=0,
        help="stochastic steps, which are the trained ones; 0 for all but the last",
    )
    parser.add_argument(
        "--guidance", type=float, default=1.0, help="above 1, every call has a doubled batch"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--side", type=int, help="height and width of the pictures")
    parser.add_argument("--tokens", type=int, help="model.max_sequence_length")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--reward", default="scene_match_graded")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="the process's own time, where others share the processor",
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    try:
        bench = build(options)
    except UserError as error:
        parser.error(str(error))
    device = bench.run.policy.model.device
    measured = bench.measure(
        options.repetitions, time.process_time if options.cpu_time else time.perf_counter
    )
    found = results(bench, measured)
    for name, value in found.items():
        if not isinstance(value, dict):
            print(
                f"{name:24}{value:>12,}" if isinstance(value, int) else f"{name:24}{value:>12.3f}"
            )
    if options.output:
        settings = {key: value for key, value in vars(options).items() if key != "output"}
        about = {
            "settings": settings,
            "environment": environment(device, 1),
            "results": found,
            "repetitions": measured,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(about, indent=2))


if __name__ == "__main__":
    main()
