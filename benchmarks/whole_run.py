"""Measure where the time of a whole run goes, and on a GPU the memory of its parts.

    python benchmarks/whole_run.py [CONFIG.yaml] [key=value ...] [--output FILE.json]

Trains a file, by default configs/tiny/crd.yaml, in a temporary folder. Every second of the main
thread belongs to one part. Rewards are called in another thread while the next images are sampled,
so their part is the time that the main thread waits for them.

`model.name=benchmarks/architectures.py:RandomSD35Medium` trains a network of published size with
random weights.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from flowalign import distributed
from flowalign.config.load import load_config
from flowalign.config.sections import Config
from flowalign.files import format_bytes
from flowalign.models.text_cache import TextCache
from flowalign.policy import Policy
from flowalign.rollouts.scoring import RolloutScorer
from flowalign.runs.environment import environment
from flowalign.training import trainer
from flowalign.training.run import Run

START, ENCODING, SAMPLING, REWARDS = "start", "text encoding", "sampling", "rewards, advantages"
UPDATES, EVALUATIONS, CHECKPOINTS, END = "updates", "evaluations", "checkpoints", "report, export"
REST = "the rest"
CALLS = (
    (trainer, "prepare", START),
    (TextCache, "keep", ENCODING),
    (TextCache, "rows", ENCODING),
    (Policy, "generate", SAMPLING),
    (Policy, "decode", SAMPLING),
    (RolloutScorer, "__call__", REWARDS),
    (trainer, "update", UPDATES),
    (Run, "evaluate", EVALUATIONS),
    (Run, "evaluate_reference", EVALUATIONS),
    (Run, "evaluate_guided", EVALUATIONS),
    (Run, "save", CHECKPOINTS),
    (trainer, "finish", END),
)
"""Functions, where they are looked up, and the part of a run that they do."""
WHOLE = (START, EVALUATIONS, UPDATES)
"""Parts that include the sampling inside them."""


@dataclass
class Stopwatch:
    """Seconds of the parts of a run, and the most memory allocated on a GPU in each."""

    device: torch.device
    seconds: Counter[str] = field(default_factory=Counter)
    memory: dict[str, int] = field(default_factory=dict)
    parts: list[str] = field(default_factory=lambda: [REST])
    since: float = field(default_factory=time.perf_counter)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside as a part, and not as the part around it."""
        inside = self.parts[-1] if self.parts[-1] in WHOLE and name == SAMPLING else name
        self.stop()
        self.parts.append(inside)
        try:
            yield
        finally:
            self.stop()
            self.parts.pop()

    def stop(self) -> None:
        """Add the time since the last call to the present part."""
        part = self.parts[-1]
        if self.device.type == "cuda":
            # Calls return before their work is done.
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
            self.memory[part] = max(self.memory.get(part, 0), peak)
            torch.cuda.reset_peak_memory_stats(self.device)
        now = time.perf_counter()
        self.seconds[part] += now - self.since
        self.since = now

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Return a function whose calls count as a part."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call


def measure(config: Config) -> Stopwatch:
    """Train a configuration and time its parts."""
    watch = Stopwatch(distributed.device())
    with ExitStack() as patches:
        for owner, name, part in CALLS:
            timed = watch.timed(getattr(owner, name), part)
            patches.enter_context(patch.object(owner, name, timed))
        trainer.train(config)
    watch.stop()
    return watch


def main() -> None:
    """Print the parts, and write them where --output says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", default="tiny/crd.yaml", metavar="CONFIG.yaml")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(options.config, [*options.settings, f"output={folder}/run"])
        watch = measure(config)
    total = watch.seconds.total()
    print(f"{'part':22}{'seconds':>10}{'share':>8}{'memory':>12}")
    for part, seconds in watch.seconds.most_common():
        memory = format_bytes(watch.memory[part]) if part in watch.memory else ""
        print(f"{part:22}{seconds:>10.1f}{seconds / total:>8.1%}{memory:>12}")
    print(f"{'all':22}{total:>10.1f}")
    if options.output:
        record = {
            "config": options.config,
            "settings": options.settings,
            "environment": environment(watch.device, 1),
            "seconds": watch.seconds,
            "memory": watch.memory,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
