"""Checkpoints that appear whole or not at all, adapters in diffusers' LoRA format; safetensors and JSON, never pickle."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowalign.errors import UserError
from flowalign.experience import Judge
from flowalign.policy import Policy

ADAPTER_FILE = "pytorch_lora_weights.safetensors"


@dataclass
class State:
    """Where a run stands."""

    step: int = 0
    """Steps done."""
    updates: int = 0
    images: int = 0
    seconds: float = 0.0
    bad_steps: int = 0


@dataclass(frozen=True)
class Learned:
    """All that a run changes."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    judge: Judge


def write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder beside its place, flush it, then put it there under its name."""
    beside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    write(beside)
    for file in beside.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    if folder.exists():
        shutil.rmtree(folder)
    beside.rename(folder)


def save_adapter(policy: Policy, folder: Path, name: str = "policy") -> None:
    """One adapter as diffusers' `load_lora_weights` reads it, its alpha in the metadata."""
    policy.model.pipeline_class.save_lora_weights(
        folder,
        transformer_lora_layers={key: value.contiguous().cpu() for key, value in policy.state(name).items()},
        transformer_lora_adapter_metadata=policy.lora.to_dict(),
    )


def load_adapter(policy: Policy, folder: Path, name: str = "policy") -> None:
    """The adapter of a folder that `save_adapter` wrote. UserError when it is damaged or does not fit."""
    state = read_tensors(folder / ADAPTER_FILE)
    policy.load_state({key.removeprefix("transformer."): value for key, value in state.items()}, name)


def read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except FileNotFoundError:
        raise UserError(f"{file} is missing.") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged: {error}") from None


def save_checkpoint(learned: Learned, state: State, run: Path, keep: int) -> Path:
    """checkpoints/step-000100 with adapter, snapshots, optimiser, rewards and state; older ones beyond `keep` are removed."""
    policy = learned.policy

    def write(folder: Path) -> None:
        save_adapter(policy, folder)
        for name in policy.snapshots:
            save_adapter(policy, folder / "snapshots" / name, name)
        save_file(_optimizer_tensors(learned.optimizer), folder / "optimizer.safetensors")
        save_file(learned.judge.state(), folder / "rewards.safetensors")
        (folder / "state.json").write_text(json.dumps(asdict(state), indent=2))

    folder = run / "checkpoints" / f"step-{state.step:06d}"
    write_whole(folder, write)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return folder


def load_checkpoint(learned: Learned, folder: Path) -> State:
    """Put everything back as `save_checkpoint` found it."""
    policy = learned.policy
    load_adapter(policy, folder)
    for name in policy.snapshots:
        load_adapter(policy, folder / "snapshots" / name, name)
    _load_optimizer(learned.optimizer, read_tensors(folder / "optimizer.safetensors"))
    learned.judge.load_state(read_tensors(folder / "rewards.safetensors"))
    try:
        return State(**json.loads((folder / "state.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / 'state.json'} is damaged: {error}") from None


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {f"{index}.{name}": value for index, slots in optimizer.state_dict()["state"].items() for name, value in slots.items()}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".")
        slots.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": slots})
