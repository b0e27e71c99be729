"""Ways to damage the files of a run, and to train it again."""

import json
import pickle
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from flowalign.cli import main
from flowalign.files import CHECKSUMS, sha256
from tests.tiny import SMALL, TINY

STEPS = [
    "train.steps=4",
    "train.save_every=1",
    "train.keep=3",
    "train.ema.decay=0.5",
    "train.learning_rate=1e-2",
]


ADAPTER = Path("adapter") / "pytorch_lora_weights.safetensors"


FILES = [
    "pytorch_lora_weights.safetensors",
    "snapshots/ema/pytorch_lora_weights.safetensors",
    "optimizer.safetensors",
    "rewards.safetensors",
    "state.json",
    "sha256.json",
]


def again(run, *overrides):
    return main(["train", str(TINY), *SMALL, *STEPS, f"output={run}", *overrides])


def same_adapter(run, finished):
    return (run / ADAPTER).read_bytes() == (finished / ADAPTER).read_bytes()


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    file.write_bytes(bytes(content))


def pickled(file):
    torch.save({"weights": torch.zeros(3)}, file)


def pickled_with_its_sum(file):
    """As one who knows the format would tamper with it."""
    file.write_bytes(pickle.dumps(Path))
    sum_again(file)


def sum_again(file):
    sums = file.parents[[p.name.startswith("step-") for p in file.parents].index(True)] / CHECKSUMS
    listed = json.loads(sums.read_text())
    listed[str(file.relative_to(sums.parent))] = sha256(file)
    sums.write_text(json.dumps(listed))


def removed(file):
    file.unlink()


def tensors(change):
    """Change the tensors of a file."""

    def tamper(file):
        found = load_file(file)
        change(found)
        save_file(found, file)

    return tamper


def values(**changed):
    """Change an object; None removes a key."""

    def tamper(file):
        found = json.loads(file.read_text()) | changed
        file.write_text(
            json.dumps({key: value for key, value in found.items() if value is not None})
        )

    return tamper
