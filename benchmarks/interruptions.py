"""Runs killed at random moments: python benchmarks/interruptions.py [--runs 30] [--processes 1] [--seed 0] [--output FILE.json]

Each run of a small configuration of the bundled model is killed with SIGKILL one to three times, every third time while a
checkpoint is being written, and continued by the same command. Its adapter must have the SHA-256 of the run that was never
killed. Exit status 1 when one has not.
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
    *(
        "train.steps=8",
        "train.prompts_per_step=4",
        "train.images_per_prompt=3",
        "train.images_per_pass=6",
    ),
    *(
        "sampler.steps=4",
        "train.save_every=1",
        "train.evaluate_every=3",
        "train.ema.decay=0.5",
        "evaluation.images_per_prompt=1",
    ),
    "evaluation.prompts=tests/prompts.jsonl",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        found = [interrupted(number, Path(folder), options) for number in range(options.runs)]
    same = sum(run["same"] for run in found)
    kills, while_writing = (sum(run[key] for run in found) for key in ("kills", "while_writing"))
    print(
        f"{same} of {len(found)} runs end with the adapter of the run that was never killed; {kills} kills, ",
        end="",
    )
    print(f"{while_writing} of them while a checkpoint was being written")
    if options.output:
        options.output.write_text(
            json.dumps(
                {"processes": options.processes, "seed": options.seed, "runs": found}, indent=2
            )
        )
    sys.exit(same != len(found))


def interrupted(
    number: int, folder: Path, options: argparse.Namespace
) -> dict[str, int | bool | str]:
    """One run, killed and continued to its end."""
    random, name = Random(f"{options.seed}/{number}"), NAMES[number % len(NAMES)]
    whole, run = folder / f"{name}-whole", folder / f"run-{number}"
    if not whole.exists():
        began = time.monotonic()
        assert finished(start(name, whole, options.processes)), (
            f"{name} failed without being killed"
        )
        (whole / "took").write_text(str(time.monotonic() - began))
    took, kills, while_writing = float((whole / "took").read_text()), 0, 0
    for _ in range(random.randint(1, 3)):
        running = start(name, run, options.processes)
        writing = random.randrange(3) == 0
        if killed(running, run, time.monotonic() + took * random.random(), writing):
            kills, while_writing = kills + 1, while_writing + writing
    assert finished(start(name, run, options.processes)), f"run {number} did not go on"
    same = digest(run) == digest(whole)
    print(
        f"run {number:2} ({name}): killed {kills} times, {'the same adapter' if same else 'ANOTHER ADAPTER'}",
        flush=True,
    )
    return {
        "name": name,
        "kills": kills,
        "while_writing": while_writing,
        "same": same,
        "sha256": digest(run),
    }


def start(name: str, folder: Path, processes: int) -> int:
    """The run, in a process group of its own: its leader."""
    command = ["train", f"configs/tiny/{name}.yaml", *SMALL, f"output={folder}"]
    if processes > 1:
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc-per-node={processes}",
            "train.py",
            *command[1:],
        ]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(launch, start_new_session=True, **quiet).pid
    if leader := os.fork():  # what is imported need not be imported again
        return leader
    os.setsid()
    sys.stdout = sys.stderr = Path(os.devnull).open("w")
    os._exit(flowalign(command))


def killed(leader: int, run: Path, at: float, writing: bool) -> bool:
    """Kill the group at a time, or while the next checkpoint is written. Whether that came before the run ended."""
    while time.monotonic() < at or (writing and not any(run.glob("checkpoints/.step-*.part/*"))):
        if os.waitpid(leader, os.WNOHANG)[0]:
            return False
        time.sleep(0.0005)
    os.killpg(leader, signal.SIGKILL)
    os.waitpid(leader, 0)
    return True


def finished(leader: int) -> bool:
    return os.waitpid(leader, 0)[1] == 0


def digest(run: Path) -> str:
    """Of what the run handed over and of its last checkpoint."""
    files = [
        run / "adapter" / "pytorch_lora_weights.safetensors",
        *sorted(checkpoints(run)[-1].rglob("*.safetensors")),
    ]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


if __name__ == "__main__":
    main()
