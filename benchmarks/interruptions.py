"""Kill runs at random moments, continue them, and compare them with runs that were never killed.

    python benchmarks/interruptions.py [--runs 30] [--processes 1] [--seed 0] [--output FILE.json]

Each run trains a small configuration of the bundled model. It is killed with SIGKILL one to three
times, every third time while a checkpoint is being written, and resumed by the same command. Its
adapter must have the SHA-256 of the run that was never killed. The exit status is 1 if one differs.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random

import torch

from flowalign.cli import main as flowalign
from flowalign.runs.checkpoint import checkpoints

ROOT = Path(__file__).parents[1]
NAMES = "flow_grpo", "crd"
SMALL = [
    "train.steps=8",
    "train.prompts_per_step=4",
    "train.images_per_prompt=3",
    "train.images_per_pass=6",
    "train.save_every=1",
    "train.evaluate_every=3",
    "train.ema.decay=0.5",
    "sampler.steps=4",
    "evaluation.images_per_prompt=1",
    "evaluation.guidance_sweep=[]",
    "evaluation.prompts=tests/prompts.jsonl",
]


def main() -> None:
    """Kill and resume runs, and print how many end with the expected adapter."""
    options = parse_options()
    # Sums over several threads may be taken in another order, and the hashes would differ.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        runs = [interrupted_run(number, Path(folder), options) for number in range(options.runs)]
    same = sum(run["same"] for run in runs)
    kills = sum(run["kills"] for run in runs)
    while_writing = sum(run["while_writing"] for run in runs)
    print(
        f"{same} of {len(runs)} runs end with the adapter of the run that was never killed; "
        f"{kills} kills, {while_writing} of them while a checkpoint was being written"
    )
    if options.output:
        record = {"processes": options.processes, "seed": options.seed, "runs": runs}
        options.output.write_text(json.dumps(record, indent=2))
    sys.exit(same != len(runs))


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    return parser.parse_args()


def interrupted_run(
    number: int, folder: Path, options: argparse.Namespace
) -> dict[str, int | bool | str]:
    """Start a run, kill and resume it, and compare its result."""
    # Seeded by its number, so that one run can be repeated by itself.
    random, name = Random(f"{options.seed}/{number}"), NAMES[number % len(NAMES)]
    reference, run = folder / f"{name}-whole", folder / f"run-{number}"
    duration = reference_duration(name, reference, options.processes)
    kills = while_writing = 0
    for _ in range(random.randint(1, 3)):
        leader = start(name, run, options.processes)
        writing = random.randrange(3) == 0
        if kill(leader, run, time.monotonic() + duration * random.random(), writing):
            kills, while_writing = kills + 1, while_writing + writing
    assert succeeded(start(name, run, options.processes)), f"run {number} failed after resuming"
    same = digest(run) == digest(reference)
    result = "the same adapter" if same else "ANOTHER ADAPTER"
    print(f"run {number:2} ({name}): killed {kills} times, {result}", flush=True)
    return {
        "name": name,
        "kills": kills,
        "while_writing": while_writing,
        "same": same,
        "sha256": digest(run),
    }


def reference_duration(name: str, folder: Path, processes: int) -> float:
    """Return the seconds of a run that is not killed. The first call trains it."""
    record = folder / "took"
    if not record.exists():
        start_time = time.monotonic()
        assert succeeded(start(name, folder, processes)), f"{name} failed without being killed"
        record.write_text(str(time.monotonic() - start_time))
    return float(record.read_text())


def start(name: str, folder: Path, processes: int) -> int:
    """Start a run in a process group of its own, and return the id of its leader."""
    command = ["train", f"configs/tiny/{name}.yaml", *SMALL, f"output={folder}"]
    if processes > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        launch = [*torchrun, f"--nproc-per-node={processes}", "train.py", *command[1:]]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(launch, start_new_session=True, **quiet).pid
    # A fork already has everything imported, which would otherwise take most of the run's time.
    if leader := os.fork():
        return leader
    # The same group as torchrun gets above, so that `killpg` reaches both.
    os.setsid()
    sys.stdout = sys.stderr = Path(os.devnull).open("w")
    os._exit(flowalign(command))


def kill(leader: int, run: Path, when: float, writing: bool) -> bool:
    """Kill the group at a time, or with `writing` while the next checkpoint is written after it.

    Returns False if the run ended first.
    """
    while time.monotonic() < when or (writing and not any(run.glob("checkpoints/.step-*.part/*"))):
        if os.waitpid(leader, os.WNOHANG)[0]:
            return False
        time.sleep(0.0005)
    # SIGKILL cannot be handled: the run gets no chance to finish what it is writing.
    os.killpg(leader, signal.SIGKILL)
    os.waitpid(leader, 0)
    return True


def succeeded(leader: int) -> bool:
    """Wait for a run, and return True if its exit status is 0."""
    return os.waitpid(leader, 0)[1] == 0


def digest(run: Path) -> str:
    """Hash the exported adapter and the last checkpoint of a run."""
    adapter = run / "adapter" / "pytorch_lora_weights.safetensors"
    files = [adapter, *sorted(checkpoints(run)[-1].rglob("*.safetensors"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


if __name__ == "__main__":
    main()
