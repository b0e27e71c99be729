"""The run folder: who may work in it, what it resumes from, and what a run writes at its start."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowalign import distributed
from flowalign.config.changes import CHANGES
from flowalign.config.paths import (
    absolute_files,
    directory_seen_from,
    ENVIRONMENT,
    locate_files,
    STARTED_IN,
    started_in,
)
from flowalign.config.resolved import differing, may_change, resolve
from flowalign.config.sections import Config
from flowalign.data.prompts import Prompt
from flowalign.data.source import data_source
from flowalign.errors import UserError
from flowalign.files import sha256, to_json, write_file
from flowalign.models.given_adapters import find_file
from flowalign.progress import say
from flowalign.runs.checkpoint import (
    checkpoints,
    load_checkpoint,
    Progress,
    remove_unfinished,
    TrainState,
)
from flowalign.runs.environment import environment
from flowalign.runs.lock import FolderLock
from flowalign.settings.yaml_files import dump_yaml, parse_yaml

BEFORE = Path("evaluation") / "before.safetensors"
"""The evaluation of the model without adapter, below the run folder."""
GUIDED = Path("evaluation") / "guided"
"""The evaluation of the model without adapter at its best guidance, below the run folder."""
AFTER = Path("evaluation") / "after.safetensors"
"""The evaluation of the exported weights, below the run folder."""
PROMPTS = Path("evaluation") / "prompts.jsonl"
"""The evaluation prompts with their metadata, below the run folder."""
ANOTHER_FOLDER = "Choose another folder: output=outputs/NAME"


def write_prompts(run: Path, prompts: Sequence[Prompt]) -> None:
    """Write the evaluation prompts, whose own file may change or be on another machine later."""
    lines = (to_json({"prompt": prompt.text, **prompt.metadata}) for prompt in prompts)
    write_file(run / PROMPTS, "".join(f"{line}\n" for line in lines).encode())


def evaluation_file(run: Path, step: int) -> Path:
    """Return the file of the scores of an evaluated step."""
    return run / "evaluation" / f"step-{step:06d}.safetensors"


def open_folder(folder: Path, config: Config, state: TrainState) -> tuple[FolderLock, Progress]:
    """Create a run folder, or resume the run in it. All ranks call this together.

    Args:
        folder: The run folder.
        config: The configuration of the run.
        state: Filled from the last checkpoint, if there is one.

    Returns:
        The lock, which only the main process holds, and the progress of the run.

    Raises:
        UserError: The folder cannot be written, belongs to another run or to no run, or holds a
            run with other settings or other prompts.
    """
    lock = FolderLock(folder)
    _on_main(folder, lambda: claim(folder, lock))
    try:
        resolved = resolve(config)
        saved = distributed.from_main(lambda: checkpoints(folder))
        progress = _resume(folder, config, resolved, state, saved) if saved else _begin(config)
        # The main process may not remove or replace files that another rank still reads.
        distributed.barrier()
        _on_main(folder, lambda: _write_start(folder, config, resolved, is_new=not saved))
        distributed.barrier()
    except BaseException:
        lock.release()
        raise
    return lock, progress


def claim(folder: Path, lock: FolderLock) -> None:
    """Create the folder and lock it.

    Raises:
        UserError: Another run works in the folder, or it holds files but not a run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if names and ENVIRONMENT not in names and not checkpoints(folder):
        raise UserError(f"output: {folder} holds {names[0]}, but not a run. {ANOTHER_FOLDER}.")
    lock.acquire()


def _begin(config: Config) -> Progress:
    return Progress(files=input_checksums(config))


def _resume(
    folder: Path, config: Config, resolved: dict[str, Any], state: TrainState, saved: list[Path]
) -> Progress:
    """Load the last checkpoint, if its run had the same settings, prompts and preferences."""
    distributed.from_main(lambda: _refuse_other_settings(folder, resolved))
    progress = _load_last_checkpoint(state, saved)
    _refuse_changed_files(folder, config, progress)
    if distributed.is_main():
        say(f"Resuming from {saved[-1]}.")
    return progress


def _refuse_other_settings(folder: Path, resolved: dict[str, Any]) -> None:
    # A run may be resumed from another working directory, in which its files have other names.
    here = Path.cwd()
    stored = read_config(folder)
    for origin in started_in(folder):
        stored = absolute_files(stored, origin)
    stored = absolute_files(locate_files(stored, [folder]), here)
    different = differing(stored, absolute_files(resolved, here))
    fixed = sorted(key for key in different if not may_change(key))
    if fixed:
        raise UserError(
            f"{folder} holds a run with another {', '.join(fixed)}. {ANOTHER_FOLDER}, or remove "
            "this one."
        )


def _load_last_checkpoint(state: TrainState, saved: list[Path]) -> Progress:
    try:
        return load_checkpoint(state, saved[-1])
    except UserError as error:
        fallback = f"to resume from {saved[-2]}" if saved[1:] else "to begin again"
        raise UserError(f"{error} Remove {saved[-1]} {fallback}.") from None


def _refuse_changed_files(folder: Path, config: Config, progress: Progress) -> None:
    # A step takes prompts and examples by their number, so another file would mix them up.
    for key, checksum in input_checksums(config).items():
        if progress.files.get(key) != checksum:
            raise UserError(
                f"{key}: the file has changed since the run in {folder} began. {ANOTHER_FOLDER}."
            )


def input_checksums(config: Config) -> dict[str, str]:
    """Return the SHA-256 of the files that a run begins with, by configuration key."""
    paths = {
        "data.prompts": config.data.prompts,
        "data.pairs": config.data.pairs,
        "evaluation.prompts": config.evaluation.prompts,
        "evaluation.pairs": config.evaluation.pairs,
    }
    files = {key: data_source(path, key).location for key, path in paths.items()}
    adapters = {f"model.merge[{n}]": path for n, path in enumerate(config.model.merge)}
    if config.model.adapter:
        adapters["model.adapter"] = config.model.adapter
    files |= {key: find_file(path, key) for key, path in adapters.items()}
    # Votes that a reward is fitted to: with more of them it would be another reward.
    for name, settings in config.rewards.items():
        if isinstance(settings, Mapping) and "votes" in settings:
            files[f"rewards.{name}.votes"] = Path(str(settings["votes"]))
    return {key: sha256(file) for key, file in files.items() if file.is_file()}


def _on_main(folder: Path, work: Callable[[], None]) -> None:
    """Let the main process work in the folder. If it fails, all ranks raise the same UserError."""

    def attempt() -> None:
        try:
            work()
        except OSError as error:
            raise UserError(
                f"output: {folder} cannot be written: {error}. Choose another folder: "
                "output=FOLDER."
            ) from None

    distributed.from_main(attempt)


def _write_start(folder: Path, config: Config, resolved: dict[str, Any], is_new: bool) -> None:
    if is_new:
        (folder / BEFORE).unlink(missing_ok=True)
    # The run may go on to more steps, and its end replaces this file.
    (folder / AFTER).unlink(missing_ok=True)
    remove_unfinished(folder)
    about = {
        **environment(distributed.device(), distributed.count()),
        STARTED_IN: directory_seen_from(folder),
    }
    # environment.json comes first because it marks the folder as that of a run.
    write_file(folder / ENVIRONMENT, json.dumps(about, indent=2).encode())
    write_file(folder / "config.yaml", dump_yaml(resolved).encode())
    # The file of the run folder extends nothing, so a run that it resumes keeps what is there.
    if config.changes:
        write_file(folder / CHANGES, config.changes.to_json())


def read_config(folder: Path) -> dict[str, Any]:
    """Read the configuration that a run was started with.

    Raises:
        UserError: `config.yaml` is missing or damaged.
    """
    file = folder / "config.yaml"
    try:
        # The folder may come from a stranger, so the limits of every YAML file hold here too.
        content = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    except (OSError, ValueError, UserError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{file} is missing or damaged. {ANOTHER_FOLDER}, or remove {folder}.")
    return content
