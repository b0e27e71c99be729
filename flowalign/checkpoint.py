"""Checkpoints that appear whole or not at all, adapters in diffusers' LoRA format; safetensors and JSON, never pickle."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowalign.errors import UserError
from flowalign.experience import Judge
from flowalign.policy import Policy
from flowalign.settings import build, NonNegative

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
SUMS = "sha256.json"
"""Of every file beside it, so that one changed bit is found."""
Done = Annotated[int, Field(ge=0)]


@dataclass
class State:
    """Where a run stands."""

    step: Done = 0
    """Steps done."""
    updates: Done = 0
    images: Done = 0
    seconds: NonNegative = 0.0
    bad_steps: Done = 0
    """Updates in a row that were not applied."""
    evaluations: list[dict[str, int | Annotated[float, Field(allow_inf_nan=True)]]] = field(default_factory=list)
    """Metrics of every step that was evaluated."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of what the run reads prompts and pairs from, by key."""


@dataclass(frozen=True)
class Learned:
    """All that a run changes."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    judge: Judge


def write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder beside its place, flush it, then put it there under its name; what stood there stays until then."""
    beside, before = (folder.with_name(f".{folder.name}.{end}") for end in ("part", "before"))
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        write(beside)
        for path in (*beside.rglob("*"), beside):
            flush(path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    shutil.rmtree(before, ignore_errors=True)
    if folder.exists():
        folder.rename(before)
    beside.rename(folder)
    flush(folder.parent)
    shutil.rmtree(before, ignore_errors=True)


def write_file(file: Path, content: bytes) -> None:
    """As `write_whole`, one file; where it holds this already, nothing is written."""
    if file.exists() and file.read_bytes() == content:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.part")
    beside.write_bytes(content)
    flush(beside)
    beside.replace(file)
    flush(file.parent)


def flush(path: Path) -> None:
    """Onto the disk, a file or a folder's list of names."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def verify(folder: Path) -> None:
    """UserError that names the file unless every file is as `save_checkpoint` left it, and no other is there."""
    sums = read_json(folder / SUMS)
    for name in sorted(set(sums) ^ set(files_in(folder))):
        missing = f"{folder / name} is missing."
        raise UserError(missing if name in sums else f"{folder / SUMS} is damaged: it does not list {name}.")
    for name, expected in sums.items():
        if sha256(folder / name) != expected:
            raise UserError(f"{folder / name} is damaged: it is not what was written.")


def files_in(folder: Path) -> list[str]:
    """The names of all files in and below it that have a sum."""
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file() and file != folder / SUMS)


def read_json(file: Path) -> dict[str, Any]:
    """An object. UserError when it is missing or damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} is damaged: it holds no object.")
    return found


def save_adapter(policy: Policy, folder: Path, name: str = "policy") -> None:
    """One adapter as diffusers' `load_lora_weights` reads it, its alpha in the metadata. Equal adapters are equal files."""
    policy.model.pipeline_class.save_lora_weights(
        folder,
        transformer_lora_layers={key: value.contiguous().cpu() for key, value in policy.state(name).items()},
        transformer_lora_adapter_metadata={**policy.lora.to_dict(), "target_modules": sorted(policy.lora.target_modules or [])},
    )
    order_header(Path(folder) / ADAPTER_FILE)


def order_header(file: Path) -> None:
    """safetensors writes the entries of its header in any order; sort them."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])


def load_adapter(policy: Policy, folder: Path, name: str = "policy") -> None:
    """The adapter of a folder that `save_adapter` wrote. UserError when it is damaged or does not fit."""
    expected = {f"transformer.{key}": value.shape for key, value in policy.state(name).items()}
    state = read_fitting(folder / ADAPTER_FILE, expected)
    policy.load_state({key.removeprefix("transformer."): value for key, value in state.items()}, name)


def read_fitting(file: Path, expected: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The tensors of a file. UserError unless they have these names and shapes."""
    found = read_tensors(file)
    shapes = {key: value.shape for key, value in found.items()}
    if differ := sorted(key for key in {*expected, *found} if shapes.get(key) != expected.get(key)):
        one, other = (str(tuple(table[differ[0]])) if differ[0] in table else "not there" for table in (shapes, expected))
        raise UserError(f"{file} does not fit the model: {len(differ)} tensors differ; {differ[0]} is {one}, here {other}.")
    return found


def read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except FileNotFoundError:
        raise UserError(f"{file} is missing.") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged: {error}") from None


def save_checkpoint(learned: Learned, state: State, run: Path, keep: int, best: int | None = None) -> Path:
    """checkpoints/step-000100 with adapter, snapshots, optimiser, rewards and state.

    Older ones beyond `keep` are removed, but not that of step `best`.
    """
    folder = place_of(run, state.step)
    if not folder.exists():
        write_whole(folder, lambda beside: write_learned(learned, state, beside))
    for old in checkpoints(run)[:-keep]:
        if best is None or old != place_of(run, best):
            old.rename(gone := old.with_name(f".{old.name}.gone"))  # never half removed under its name
            shutil.rmtree(gone)
    return folder


def write_learned(learned: Learned, state: State, folder: Path) -> None:
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


def load_checkpoint(learned: Learned, folder: Path) -> State:
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


def read_state(file: Path) -> State:
    """UserError when something is missing or of another type."""
    found = read_json(file)
    if missing := [f.name for f in fields(State) if f.name not in found]:
        raise UserError(f"{file} is damaged: it has no {missing[0]}.")
    return build(State, found, str(file))


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [folder for folder in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{6,}", folder.name)]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("step-")))


def place_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def clear_unfinished(run: Path) -> None:
    """Remove what a run that was killed had not finished writing or removing."""
    for left in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(left)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {f"{index}.{name}": value for index, slots in optimizer.state_dict()["state"].items() for name, value in slots.items()}


def _optimizer_shapes(optimizer: torch.optim.Optimizer) -> dict[str, torch.Size]:
    """Of what AdamW remembers after an update."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shapes = [{"step": torch.Size(), "exp_avg": p.shape, "exp_avg_sq": p.shape} for p in parameters]
    return {f"{index}.{name}": shape for index, slots in enumerate(shapes) for name, shape in slots.items()}


def _load_judge(judge: Judge, file: Path) -> None:
    """UserError where the file holds anything but what the rewards and their combination take from it."""
    found = read_tensors(file)
    try:
        judge.load_state(found)
    except (UserError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{file} does not fit the rewards: {error}") from error
    taken = {key: value.shape for key, value in judge.state().items()}
    if differ := sorted(key for key in {*found, *taken} if key not in found or taken.get(key) != found[key].shape):
        raise UserError(f"{file} does not fit the rewards: {differ[0]} for one.")


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".")
        slots.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": slots})
