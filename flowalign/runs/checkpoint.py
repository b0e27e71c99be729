"""Checkpoints of a run: complete or absent, in safetensors and JSON, never pickle."""

import json
import re
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

from flowalign.errors import UserError
from flowalign.files import (
    load_optimizer_tensors,
    optimizer_tensors,
    read_json,
    read_matching_tensors,
    read_tensors,
    require_types,
    save_tensors,
    tensors_after_a_step,
    verify_checksums,
    write_checksums,
    write_folder,
)
from flowalign.policy import Policy
from flowalign.rollouts.scoring import RolloutScorer
from flowalign.runs.adapter import ADAPTER_FILE, load_adapter, save_adapter
from flowalign.settings.types import build, NonNegative

OPTIMIZER_FILE = "optimizer.safetensors"
REWARDS_FILE = "rewards.safetensors"
PROGRESS_FILE = "state.json"

Counter = Annotated[int, Field(ge=0)]


@dataclass
class Progress:
    """How far a run has come. Its fields are the keys of a checkpoint's `state.json`."""

    step: Counter = 0
    """Training steps that are complete."""
    updates: Counter = 0
    """Updates that the optimizer has applied."""
    images: Counter = 0
    """Images that were generated for training."""
    seconds: NonNegative = 0.0
    """Seconds spent in training steps, without evaluations."""
    bad_steps: Counter = 0
    """Updates in a row that were skipped as not finite. In a dump, those before its step."""
    idle_steps: Counter = 0
    """Steps in a row whose gradient was exactly 0."""
    evaluations: list[dict[str, int | Annotated[float, Field(allow_inf_nan=True)]]] = field(
        default_factory=list
    )
    """Metrics of every step that was evaluated, oldest first."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the prompt and preference files of the run, by configuration key."""

    @property
    def totals(self) -> dict[str, float]:
        """The counts that are logged with every step."""
        return {"step": self.step, "images": self.images, "seconds": self.seconds}

    @property
    def is_evaluated(self) -> bool:
        """True if the present step has been evaluated."""
        return bool(self.evaluations) and self.evaluations[-1]["step"] == self.step

    def count_update(self, applied: bool) -> None:
        """Count an update that was applied or skipped."""
        self.updates += applied
        self.bad_steps = 0 if applied else self.bad_steps + 1

    def advance(
        self, outcomes: list[bool], has_gradient: bool, images: int, seconds: float
    ) -> None:
        """Count a complete step.

        Args:
            outcomes: Whether each update of the step was applied.
            has_gradient: False if no update of the step had a gradient other than 0.
            images: Images that the step generated.
            seconds: Seconds that the step took.
        """
        self.idle_steps = 0 if has_gradient else self.idle_steps + 1
        self.step += 1
        self.images += images
        self.seconds += seconds
        # Last, so that an exception in between leaves counts that tell an incomplete step.
        for applied in outcomes:
            self.count_update(applied)


@dataclass(frozen=True)
class TrainState:
    """Everything that training changes, and a checkpoint therefore holds."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    scorer: RolloutScorer

    @property
    def updates(self) -> int:
        """Updates that the optimizer has applied, counted by the optimizer itself."""
        slots = self.optimizer.state.get(self.optimizer.param_groups[0]["params"][0], {})
        return int(slots["step"].item()) if "step" in slots else 0


def save_checkpoint(
    state: TrainState, progress: Progress, run: Path, keep: int, best: int | None = None
) -> Path:
    """Write `checkpoints/step-000100` unless it exists, and remove old checkpoints.

    Args:
        state: The weights, the optimizer and the learned rewards.
        progress: How far the run has come; its step names the folder.
        run: The run folder.
        keep: How many of the newest checkpoints stay.
        best: The step of the best evaluation, whose checkpoint also stays.

    Returns:
        The folder of the checkpoint.
    """
    folder = checkpoint_folder(run, progress.step)
    # A step is saved again when a resumed run stops at once; its checkpoint would be the same.
    if not folder.exists():
        write_folder(folder, lambda unfinished: write_checkpoint(state, progress, unfinished))
    for old in checkpoints(run)[:-keep]:
        if best is None or old != checkpoint_folder(run, best):
            # Renamed first, so that a run killed here leaves no half-removed checkpoint.
            hidden = old.with_name(f".{old.name}.gone")
            old.rename(hidden)
            shutil.rmtree(hidden)
    return folder


def write_checkpoint(state: TrainState, progress: Progress, folder: Path) -> None:
    """Write the files of a checkpoint, and their checksums, into an existing folder."""
    policy = state.policy
    save_adapter(policy, folder)
    for name in policy.snapshots:
        save_adapter(policy, folder / "snapshots" / name, name)
    save_tensors(optimizer_tensors(state.optimizer), folder / OPTIMIZER_FILE)
    save_tensors(state.scorer.state(), folder / REWARDS_FILE)
    text = json.dumps(asdict(progress), indent=2)
    (folder / PROGRESS_FILE).write_text(text, encoding="utf-8")
    write_checksums(folder)


def load_checkpoint(state: TrainState, folder: Path) -> Progress:
    """Restore what `save_checkpoint` wrote, bit for bit, and return the progress of that moment.

    Raises:
        UserError: A file is missing or damaged, belongs to another model or other rewards, or
            holds values of another type or weights that are not finite. The message names it.
    """
    policy = state.policy
    snapshots = {name: f"snapshots/{name}" for name in policy.snapshots}
    adapters = [ADAPTER_FILE, *(f"{path}/{ADAPTER_FILE}" for path in snapshots.values())]
    verify_checksums(folder, [*adapters, OPTIMIZER_FILE, REWARDS_FILE, PROGRESS_FILE])
    # Weights of another type would be rounded as they are loaded, and the run would not be exact.
    for name in adapters:
        require_types(folder / name)
    moments = tensors_after_a_step(state.optimizer)
    require_types(folder / OPTIMIZER_FILE, {name: value.dtype for name, value in moments.items()})
    load_adapter(policy, folder)
    for name, path in snapshots.items():
        load_adapter(policy, folder / path, name)
    progress = read_progress(folder / PROGRESS_FILE)
    # An optimizer remembers nothing before its first update.
    shapes = {name: value.shape for name, value in moments.items() if progress.updates}
    tensors = read_matching_tensors(folder / OPTIMIZER_FILE, shapes)
    load_optimizer_tensors(state.optimizer, tensors)
    if state.updates != progress.updates:
        raise UserError(
            f"{folder / PROGRESS_FILE} is damaged: it counts {progress.updates} updates, but the "
            f"optimizer has made {state.updates}."
        )
    _load_rewards(state.scorer, folder / REWARDS_FILE)
    return progress


def read_progress(file: Path) -> Progress:
    """Read `state.json`.

    Raises UserError if a key is missing or unknown, or a value is of another type or range.
    """
    content = read_json(file)
    missing = [f.name for f in fields(Progress) if f.name not in content]
    if missing:
        raise UserError(f"{file} is damaged: the key {missing[0]} is missing.")
    progress = build(Progress, content, str(file))
    for number, entry in enumerate(progress.evaluations):
        step = entry.get("step")
        if not isinstance(step, int) or not 0 <= step <= progress.step:
            raise UserError(
                f"{file} is damaged: evaluations.{number} has the step {step} of {progress.step}."
            )
    return progress


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first. Copies under other names do not count."""
    folders = [
        folder
        for folder in (run / "checkpoints").glob("step-*")
        if re.fullmatch(r"step-\d{6,}", folder.name)
    ]
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("step-")))


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return the folder in which the checkpoint of a step stands, or would stand."""
    return run / "checkpoints" / f"step-{step:06d}"


def find_checkpoint(run: Path, step: int | None = None) -> Path:
    """Return the checkpoint of a step, or the last one. Raises UserError if it is not kept."""
    saved = checkpoints(run)
    if not saved:
        raise UserError(f"{run} has no checkpoint yet. Train it first: python train.py CONFIG.")
    folder = saved[-1] if step is None else checkpoint_folder(run, step)
    if folder not in saved:
        steps = ", ".join(str(int(kept.name.removeprefix("step-"))) for kept in saved)
        raise UserError(
            f"{run} does not keep step {step}; it keeps {steps}. Choose one of these, or keep more "
            "checkpoints in the next run: train.keep."
        )
    return folder


def trained_weights(checkpoint: Path) -> Path:
    """Return the weights that a run would export: the moving average if there is one."""
    average = checkpoint / "snapshots" / "ema"
    return average if average.is_dir() else checkpoint


def verify_checkpoint(checkpoint: Path) -> None:
    """Verify the checksums of a checkpoint. Raises UserError naming a damaged file."""
    weights = trained_weights(checkpoint).relative_to(checkpoint) / ADAPTER_FILE
    verify_checksums(checkpoint, [weights.as_posix()])


def remove_unfinished(run: Path) -> None:
    """Remove checkpoints that a killed run had not finished writing or removing."""
    for folder in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(folder)


def _load_rewards(scorer: RolloutScorer, file: Path) -> None:
    """Restore learned rewards. Raises UserError if the file holds anything else."""
    tensors = read_tensors(file)
    try:
        scorer.load_state(tensors)
    except (UserError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{file} does not fit the rewards: {error}") from error
    # What the rewards hold now is what they took from the file; a stranger's extra tensor is not.
    # Values may be NaN here: a reward decides what that means in its own state.
    loaded = {name: (value.shape, value.dtype) for name, value in scorer.state().items()}
    stored = {name: (value.shape, value.dtype) for name, value in tensors.items()}
    different = sorted(name for name in {*stored, *loaded} if stored.get(name) != loaded.get(name))
    if different:
        raise UserError(f"{file} does not fit the rewards: for example, {different[0]} differs.")
