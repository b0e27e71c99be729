"""Train every configs/tiny/*.yaml for three steps, and print hashes of its results.

The hashes are SHA-256 of the adapter and of the evaluation scores. A change that should not change
any number is verified by equal output before and after, on the same machine:

    python benchmarks/fingerprints.py > before.txt
    python benchmarks/fingerprints.py > after.txt && diff before.txt after.txt
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETTINGS = [
    "train.steps=3",
    "train.evaluate_every=0",
    "train.save_every=3",
    "train.stop={}",
    "evaluation.images_per_prompt=2",
    "evaluation.guidance_sweep=[]",
]


def main() -> None:
    """Print one line for every configuration."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="configurations, such as crd; all by default")
    parser.add_argument(
        "--processes", type=int, default=2, help="configurations trained at a time, one thread each"
    )
    options = parser.parse_args()
    names = options.names or sorted(
        file.stem for file in (ROOT / "configs" / "tiny").glob("*.yaml")
    )
    # One thread in every process: sums over several threads may be taken in another order.
    os.environ["OMP_NUM_THREADS"] = "1"
    # The processes inherit the path, so that they import this tree and not an installed package.
    sys.path.insert(0, str(ROOT))
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        for line in pool.map(fingerprint, names):
            print(line, flush=True)


def fingerprint(name: str) -> str:
    """Train one configuration, and return its name and the two hashes as a line."""
    import torch

    from flowalign.cli import main as flowalign

    torch.set_num_threads(1)
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run = Path(folder) / "run"
        status = flowalign(["train", f"configs/tiny/{name}.yaml", *SETTINGS, f"output={run}"])
        if status:
            raise SystemExit(f"{name} ended with status {status}")
        return f"{name:16} adapter {hash_of_adapter(run)}  scores {hash_of_scores(run)}"


def hash_of_adapter(run: Path) -> str:
    """Hash the names and values of the trained matrices, whatever their order in the file."""
    from safetensors.torch import load_file

    from flowalign.runs.checkpoint import find_checkpoint, trained_weights

    tensors = load_file(trained_weights(find_checkpoint(run)) / "pytorch_lora_weights.safetensors")
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].numpy().tobytes())
    return digest.hexdigest()[:32]


def hash_of_scores(run: Path) -> str:
    """Hash every mean of the evaluation, before and after, to its last digit."""
    summary = json.loads((run / "summary.json").read_text())
    scores = json.dumps([summary["before"], summary["after"]], sort_keys=True)
    return hashlib.sha256(scores.encode()).hexdigest()[:32]


if __name__ == "__main__":
    sys.exit(main())
