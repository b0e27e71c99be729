"""Kill runs at random moments, continue them, and compare them with runs that were never killed.

    python benchmarks/interruptions.py [--objectives crd dpo] [--kills 100] [--processes 1]
                                       [--seed 0] [--output FILE.json]

Each run trains a small form of a file in configs/tiny; the runs take the files in turn. A run is
killed with SIGKILL one to four times and resumed by the same command. A kill comes at any moment,
or while a checkpoint is being written, or, for files with given pictures, while these are being
encoded. Each run has a latent cache of its own. Its adapter and its last checkpoint must have the
SHA-256 of those of the run that was never killed. The exit status is 1 if one differs.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

import psutil
import torch
from datasets import Dataset

from flowalign.cli import main as flowalign
from flowalign.config.load import load_config
from flowalign.runs.checkpoint import checkpoints

ROOT = Path(__file__).parents[1]
OBJECTIVES = [
    file.stem
    for file in sorted((ROOT / "configs" / "tiny").glob("*.yaml"))
    # The same objectives as crd and d3po: one for longer, and one that makes many pictures anew.
    if file.stem not in {"crd_long", "votes"}
]
SMALL = [
    "train.steps=4",
    "train.prompts_per_step=2",
    "train.images_per_prompt=8",
    "train.images_per_pass=8",
    "train.save_every=1",
    "train.evaluate_every=2",
    "train.ema.decay=0.5",
    "sampler.steps=6",
    "evaluation.sampler.steps=4",
    "evaluation.images_per_prompt=1",
    "evaluation.guidance_sweep=[]",
    "evaluation.prompts=tests/prompts.jsonl",
]
GIVEN = ["train.prompts_per_step=4", "train.images_per_prompt=1", "evaluation.pairs=''"]
"""In addition, for files that learn from given pictures."""
PAIRS = 24
"""Given pairs to learn from."""


@dataclass(frozen=True)
class Work:
    """What is trained, and where."""

    name: str
    """Name of a file in configs/tiny."""
    processes: int
    folder: Path
    """Holds the run folder and the latent cache."""

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "run"

    def command(self) -> list[str]:
        """Return the arguments of the command line."""
        file = ROOT / "configs" / "tiny" / f"{self.name}.yaml"
        given = []
        if load_config(file).data.pairs:
            given = [*GIVEN, f"data.pairs={self.folder.parent / 'pairs.parquet'}"]
        return ["train", str(file), *SMALL, *given, f"output={self.run}"]

    def latents(self) -> int:
        """Return the number of pictures that are encoded."""
        return len(list(self.folder.glob("cache/latents/*/*.safetensors")))

    def is_writing(self) -> bool:
        """Return True while a checkpoint is being written."""
        return any(self.run.glob("checkpoints/.step-*.part/*"))


@dataclass
class Outcome:
    """What became of a run that was killed."""

    name: str
    kills: list[str] = field(default_factory=list)
    """The moment of each kill: "any", "writing" or "encoding"."""
    sha256: str = ""
    same: bool = False


def main() -> None:
    """Kill and resume runs, and print how many end with the expected adapter."""
    options = parse_options()
    # Sums over several threads may be taken in another order, and the hashes would differ.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(ROOT)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        make_pairs(Path(folder) / "pairs.parquet")
        while sum(len(outcome.kills) for outcome in outcomes) < options.kills:
            outcomes.append(interrupted_run(len(outcomes), Path(folder), options))
            print(describe(len(outcomes), outcomes[-1]), flush=True)
            if options.output:
                record = {"processes": options.processes, "seed": options.seed}
                runs = [asdict(outcome) for outcome in outcomes]
                options.output.write_text(json.dumps(record | {"runs": runs}, indent=2))
    same = sum(outcome.same for outcome in outcomes)
    moments = Counter(moment for outcome in outcomes for moment in outcome.kills)
    print(
        f"{same} of {len(outcomes)} runs end with the adapter of the run that was never killed; "
        f"{moments.total()} kills, {moments['writing']} of them while a checkpoint was being "
        f"written and {moments['encoding']} while pictures were being encoded"
    )
    sys.exit(same != len(outcomes))


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--objectives", nargs="+", choices=OBJECTIVES, default=OBJECTIVES, metavar="NAME")
    add("--kills", type=int, default=100, help="the last run starts before this many kills")
    add("--processes", type=int, default=1)
    add("--seed", type=int, default=0)
    add("--output", type=Path, metavar="FILE.json")
    return parser.parse_args()


def make_pairs(file: Path) -> None:
    """Write the first of the bundled pairs to a file of their own."""
    pairs = Dataset.from_parquet(str(ROOT / "assets" / "pairs" / "train.parquet"))
    pairs.select(range(PAIRS)).to_parquet(file)


def interrupted_run(number: int, folder: Path, options: argparse.Namespace) -> Outcome:
    """Start a run, kill and resume it, and compare its result."""
    # Seeded by its number, so that one run can be repeated by itself.
    random = Random(f"{options.seed}/{number}")
    name = options.objectives[number % len(options.objectives)]
    whole = Work(name, options.processes, folder / f"{name}-whole")
    duration = duration_of(whole)
    outcome = Outcome(name)
    # The folder goes when the run is compared: a thousand of them would fill a disk.
    with tempfile.TemporaryDirectory(dir=folder) as own:
        work = Work(name, options.processes, Path(own))
        for _ in range(random.randint(1, 4)):
            moment, has_come = draw_moment(random, work, whole, duration)
            if kill(start(work), has_come):
                outcome.kills.append(moment)
        assert succeeded(start(work)), f"run {number} ({name}) failed after resuming"
        outcome.sha256 = digest(work.run)
    outcome.same = outcome.sha256 == digest(whole.run)
    return outcome


def duration_of(work: Work) -> float:
    """Return the seconds of a run that is not killed. The first call trains it."""
    record = work.folder / "seconds"
    if not record.exists():
        work.folder.mkdir()
        began = time.monotonic()
        assert succeeded(start(work)), f"{work.name} failed without being killed"
        record.write_text(str(time.monotonic() - began))
    return float(record.read_text())


def draw_moment(
    random: Random, work: Work, whole: Work, duration: float
) -> tuple[str, Callable[[], bool]]:
    """Draw when to kill a run: a name, and a function that is True once the moment has come."""
    moments = ["any", "writing"]
    if work.latents() < whole.latents():
        moments.append("encoding")
    moment = random.choice(moments)
    when = time.monotonic() + duration * random.random()
    encoded = random.randrange(work.latents(), whole.latents()) if moment == "encoding" else 0

    def has_come() -> bool:
        if moment == "encoding":
            return work.latents() > encoded
        return time.monotonic() >= when and (moment == "any" or work.is_writing())

    return moment, has_come


def start(work: Work) -> int:
    """Start a run, and return the id of its first process."""
    environment = {"FLOWALIGN_CACHE": str(work.folder / "cache")}
    if work.processes > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launch = [*torchrun, f"--nproc-per-node={work.processes}", "train.py", *work.command()[1:]]
        nowhere = subprocess.DEVNULL
        all_variables = os.environ | environment
        return subprocess.Popen(launch, env=all_variables, stdout=nowhere, stderr=nowhere).pid
    # A fork already has everything imported, which would otherwise take most of the run's time.
    if first := os.fork():
        return first
    os.environ.update(environment)
    sys.stdout = sys.stderr = Path(os.devnull).open("w")
    os._exit(flowalign(work.command()))


def kill(first: int, has_come: Callable[[], bool]) -> bool:
    """Kill a run's processes once the moment has come. Returns False if the run ended before."""
    while not has_come():
        if os.waitpid(first, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    leader = psutil.Process(first)
    # SIGKILL cannot be handled: the run gets no chance to finish what it is writing. torchrun puts
    # every process into a group of its own, so that one signal does not reach all.
    processes = [leader, *leader.children(recursive=True)]
    for process in processes:
        process.kill()
    os.waitpid(first, 0)
    psutil.wait_procs(processes)
    return True


def succeeded(first: int) -> bool:
    """Wait for a run, and return True if its exit status is 0."""
    return os.waitpid(first, 0)[1] == 0


def digest(run: Path) -> str:
    """Hash the exported adapter and the last checkpoint of a run."""
    adapter = run / "adapter" / "pytorch_lora_weights.safetensors"
    files = [adapter, *sorted(checkpoints(run)[-1].rglob("*.safetensors"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def describe(number: int, outcome: Outcome) -> str:
    """Say what became of a run."""
    kills = ", ".join(outcome.kills) or "never"
    result = "the same adapter" if outcome.same else "ANOTHER ADAPTER"
    return f"run {number:3} ({outcome.name}): killed {kills}; {result}"


if __name__ == "__main__":
    main()
