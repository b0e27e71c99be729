"""Failures of a run, turned into messages that say what to do and where the finished steps are."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from flowalign import distributed
from flowalign.config.sections import Config
from flowalign.errors import OutOfMemory, RunError
from flowalign.runs.checkpoint import checkpoints


@contextmanager
def advise_on_out_of_memory(config: Config) -> Iterator[None]:
    """Turn PyTorch's out-of-memory error into advice on which setting to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        advice = (
            f"Lower train.images_per_pass (now {config.train.images_per_pass}), so that a step has "
            "the same images in smaller passes"
        )
        if not config.model.gradient_checkpointing:
            advice += ", or set model.gradient_checkpointing: true"
        raise OutOfMemory(
            f"The device ran out of memory. {advice}. `flowalign plan` estimates what a run needs."
        ) from error


@contextmanager
def keep_finished_steps(run: Path, save: Callable[[], None]) -> Iterator[None]:
    """Save the finished steps when a run fails, and say where they are.

    Args:
        run: The run folder.
        save: Saves the steps that are finished but not saved yet. It must not wait for other ranks,
            which may not know of the failure.

    Raises:
        RunError: The run failed. The message ends with the last checkpoint.
        KeyboardInterrupt: The user stopped the run at once. The message is the last checkpoint.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(describe_finished_steps(run)) from None
    except RunError as error:
        distributed.deal_with_failure()
        save()
        raise RunError(f"{error}\n{describe_finished_steps(run)}") from error
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"A file could not be written or read: {error}. Free some space in {run} and check "
            f"that it is writable.\n{describe_finished_steps(run)}"
        ) from error


def describe_finished_steps(run: Path) -> str:
    """Say which checkpoint a run resumes from."""
    saved = checkpoints(run)
    if not saved:
        return "No step is saved yet."
    return f"The finished steps are in {saved[-1]}. The same command resumes from there."
