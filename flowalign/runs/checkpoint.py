"""Checkpoints that appear whole or not at all, adapters in diffusers' LoRA format; safetensors and JSON, never pickle."""

import json
import re
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from flowalign.errors import UserError
from flowalign.files import (
    files_in,
    read_fitting,
    read_json,
    read_tensors,
    sha256,
    SUMS,
    verify,
    write_whole,
)
from flowalign.policy import Policy
from flowalign.rollouts.scoring import RolloutScorer
from flowalign.runs.adapter import load_adapter, save_adapter
from flowalign.settings.types import build, NonNegative

Done = Annotated[int, Field(ge=0)]


@dataclass
class Progress:
    """Where a run stands."""

    step: Done = 0
    """Steps done."""
    updates: Done = 0
    images: Done = 0
    seconds: NonNegative = 0.0
    bad_steps: Done = 0
    """Updates in a row that were not applied."""
    evaluations: list[dict[str, int | Annotated[float, Field(allow_inf_nan=True)]]] = field(
        default_factory=list
    )
    """Metrics of every step that was evaluated."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of what the run reads prompts and pairs from, by key."""


@dataclass(frozen=True)
class TrainState:
    """All that a run changes."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    judge: RolloutScorer


def save_checkpoint(
    learned: TrainState, state: Progress, run: Path, keep: int, best: int | None = None
) -> Path:
    """checkpoints/step-000100 with adapter, snapshots, optimiser, rewards and state.

    Older ones beyond `keep` are removed, but not that of step `best`.
    """
    folder = place_of(run, state.step)
    if not folder.exists():
        write_whole(folder, lambda beside: write_train_state(learned, state, beside))
    for old in checkpoints(run)[:-keep]:
        if best is None or old != place_of(run, best):
            old.rename(
                gone := old.with_name(f".{old.name}.gone")
            )  # never half removed under its name
            shutil.rmtree(gone)
    return folder


def write_train_state(learned: TrainState, state: Progress, folder: Path) -> None:
    """What a checkpoint holds, into a folder that is there."""
    policy = learned.policy
    save_adapter(policy, folder)
    for name in policy.snapshots:
        save_adapter(policy, folder / "snapshots" / name, name)
    save_file(_optimizer_tensors(learned.optimizer), folder / "optimizer.safetensors")
    save_file(learned.judge.state(), folder / "rewards.safetensors")
    (folder / "state.json").write_text(json.dumps(asdict(state), indent=2))
    sums = {name: sha256(folder / name) for name in files_in(folder)}
    (folder / SUMS).write_text(json.dumps(sums, indent=2))


def load_checkpoint(learned: TrainState, folder: Path) -> Progress:
    """Put everything back as `save_checkpoint` found it. UserError that names the file where it is damaged or another."""
    verify(folder)
    policy = learned.policy
    load_adapter(policy, folder)
    for name in policy.snapshots:
        load_adapter(policy, folder / "snapshots" / name, name)
    state = read_state(folder / "state.json")
    expected = _optimizer_shapes(learned.optimizer) if state.updates else {}
    _load_optimizer(learned.optimizer, read_fitting(folder / "optimizer.safetensors", expected))
    _load_judge(learned.judge, folder / "rewards.safetensors")
    return state


def read_state(file: Path) -> Progress:
    """UserError when something is missing or of another type."""
    found = read_json(file)
    if missing := [f.name for f in fields(Progress) if f.name not in found]:
        raise UserError(f"{file} is damaged: it has no {missing[0]}.")
    return build(Progress, found, str(file))


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [
        folder
        for folder in (run / "checkpoints").glob("step-*")
        if re.fullmatch(r"step-\d{6,}", folder.name)
    ]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("step-")))


def place_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def clear_unfinished(run: Path) -> None:
    """Remove what a run that was killed had not finished writing or removing."""
    for left in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(left)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{index}.{name}": value
        for index, slots in optimizer.state_dict()["state"].items()
        for name, value in slots.items()
    }


def _optimizer_shapes(optimizer: torch.optim.Optimizer) -> dict[str, torch.Size]:
    """Of what AdamW remembers after an update."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shapes = [{"step": torch.Size(), "exp_avg": p.shape, "exp_avg_sq": p.shape} for p in parameters]
    return {
        f"{index}.{name}": shape
        for index, slots in enumerate(shapes)
        for name, shape in slots.items()
    }


def _load_judge(judge: RolloutScorer, file: Path) -> None:
    """UserError where the file holds anything but what the rewards and their combination take from it."""
    found = read_tensors(file)
    try:
        judge.load_state(found)
    except (UserError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{file} does not fit the rewards: {error}") from error
    taken = {key: value.shape for key, value in judge.state().items()}
    if differ := sorted(
        key for key in {*found, *taken} if key not in found or taken.get(key) != found[key].shape
    ):
        raise UserError(f"{file} does not fit the rewards: {differ[0]} for one.")


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".")
        slots.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": slots})
