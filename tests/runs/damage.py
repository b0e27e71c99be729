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


def train_again(run, *overrides):
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


def pickled_with_its_checksum(file):
    """Tamper with a file as someone who knows the format would."""
    file.write_bytes(pickle.dumps(Path))
    renew_checksum(file)


def renew_checksum(file):
    folder = next(parent for parent in file.parents if parent.name.startswith("step-"))
    checksums = json.loads((folder / CHECKSUMS).read_text())
    checksums[str(file.relative_to(folder))] = sha256(file)
    (folder / CHECKSUMS).write_text(json.dumps(checksums))


def removed(file):
    file.unlink()


def tensors(change):
    """Return a way to change the tensors of a file."""

    def tamper(file):
        content = load_file(file)
        change(content)
        save_file(content, file)

    return tamper


def values(**changed):
    """Return a way to change a JSON object; None removes a key."""

    def tamper(file):
        content = json.loads(file.read_text()) | changed
        kept = {key: value for key, value in content.items() if value is not None}
        file.write_text(json.dumps(kept))

    return tamper
