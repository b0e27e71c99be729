"""The run folder: which run may go on in it, its resolved configuration, and what it hands over."""

import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, IO

import yaml

from flowalign import distributed
from flowalign.config.resolved import differing, may_change, resolve
from flowalign.config.sections import Config
from flowalign.errors import UserError
from flowalign.files import sha256, write_file
from flowalign.runs.checkpoint import (
    checkpoints,
    remove_unfinished,
    load_checkpoint,
    Progress,
    TrainState,
)
from flowalign.runs.environment import environment

BEFORE = Path("evaluation") / "before.safetensors"
LOCKS: list[IO[bytes]] = []
"""Held, by being open, until this process ends."""


def open_folder(folder: Path, config: Config, learned: TrainState) -> Progress:
    """A new run folder, or the state of the run that is there. UserError when that run was another experiment."""
    resolved = resolve(config)
    on_main(folder, lambda: claim(folder))
    if saved := checkpoints(folder):
        if changed := sorted(
            key for key in differing(read_config(folder), resolved) if not may_change(key)
        ):
            another = f"{folder} holds a run with another {', '.join(changed)}"
            raise UserError(f"{another}. Choose another folder, output=outputs/NAME, or remove it.")
        try:
            state = load_checkpoint(learned, saved[-1])
        except UserError as error:
            then = f"to go on from {saved[-2]}" if saved[1:] else "to begin again"
            raise UserError(f"{error} Remove {saved[-1]} {then}.") from None
        if other := [
            key for key, sum_now in named_files(config).items() if state.files.get(key) != sum_now
        ]:
            began = f"the file is not as it was when the run in {folder} began"
            raise UserError(f"{other[0]}: {began}. Choose another folder, output=outputs/NAME.")
        if distributed.is_main():
            print(f"Going on from {saved[-1]}.")
    else:
        state = Progress(files=named_files(config))
    distributed.barrier()  # until all have read
    on_main(folder, lambda: begin(folder, resolved, anew=not saved))
    distributed.barrier()
    return state


def named_files(config: Config) -> dict[str, str]:
    """SHA-256 of the files of prompts and pairs, by their keys."""
    data, evaluation = config.data, config.evaluation
    named = {"data.prompts": data.prompts, "data.pairs": data.pairs}
    named |= {"evaluation.prompts": evaluation.prompts, "evaluation.pairs": evaluation.pairs}
    return {key: sha256(Path(path)) for key, path in named.items() if Path(path).is_file()}


def on_main(folder: Path, work: Callable[[], None]) -> None:
    """Let the main process work in the folder; where it cannot, UserError on all."""

    def attempt() -> None:
        try:
            if distributed.is_main():
                work()
        except OSError as error:
            raise UserError(
                f"output: {folder} cannot be written: {error}. Choose another folder, output=FOLDER."
            ) from None

    distributed.raise_everywhere(attempt)


def claim(folder: Path) -> None:
    """Take the folder for this process. UserError where it is another's, or holds what no run wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    theirs = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if theirs and "environment.json" not in theirs and not checkpoints(folder):
        raise UserError(
            f"output: {folder} holds {theirs[0]}, but no run. Choose another folder, output=outputs/NAME."
        )
    LOCKS.append((folder / ".lock").open("ab"))
    try:
        fcntl.lockf(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"another run works in {folder}. Wait until it ends, or choose another folder, output=FOLDER."
        ) from None
    except OSError:
        pass  # a file system without locks


def begin(folder: Path, resolved: dict[str, Any], anew: bool) -> None:
    """Write what a run is started with; environment.json comes first, by which the folder is known to be a run's."""
    if anew:
        (folder / BEFORE).unlink(missing_ok=True)
    remove_unfinished(folder)
    about = environment(distributed.device(), distributed.count())
    write_file(folder / "environment.json", json.dumps(about, indent=2).encode())
    write_file(folder / "config.yaml", yaml.safe_dump(resolved, sort_keys=False).encode())


def read_config(folder: Path) -> dict[str, Any]:
    """What a run in the folder was started with."""
    file = folder / "config.yaml"
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        found = error
    if not isinstance(found, dict):
        raise UserError(
            f"{file} is missing or damaged; choose another folder, output=outputs/NAME, or remove {folder}."
        )
    return found
