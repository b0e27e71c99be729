"""Locate the files that a configuration names: prompts, pairs, models, code and rewards' files."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flowalign.bundled import locate, locate_spec
from flowalign.rewards.registry import is_path, locate_rewards
from flowalign.settings.merging import Section

FILES = (
    ("model", "path"),
    ("model", "adapter"),
    ("model", "merge"),
    ("data", "prompts"),
    ("data", "pairs"),
    ("evaluation", "model"),
    ("evaluation", "prompts"),
    ("evaluation", "pairs"),
    ("data", "prompts", "path"),
    ("data", "pairs", "path"),
    ("evaluation", "prompts", "path"),
    ("evaluation", "pairs", "path"),
)
"""Keys whose value is a file or folder, or a list of them."""
SPECS = (
    ("model", "name"),
    ("objective", "name"),
    ("advantage", "name"),
    ("combine", "name"),
    ("sampler", "dynamics", "name"),
)
"""Keys whose value may be `my_file.py:name`."""
ENVIRONMENT, STARTED_IN = "environment.json", "started_in"
"""The file of a run folder, and its key, that say where relative paths of its YAML began."""


def locate_files(values: Section, folders: Sequence[Path]) -> Section:
    """Return the configuration with every file that exists written so that it can be opened.

    Args:
        values: the merged configuration; it does not change.
        folders: the folders of the YAML files it came from.
    """
    # Every key is looked up next to all files of the chain of `extends`: after a merge, a value
    # does not remember which of them it came from.
    return _with_files(
        values,
        file=lambda text: locate(text, folders),
        spec=lambda text: locate_spec(text, folders),
        rewards=lambda rewards: locate_rewards(rewards, folders),
    )


def _with_files(
    values: Section,
    file: Callable[[str], str],
    spec: Callable[[str], str],
    rewards: Callable[[Any], object],
) -> Section:
    """Return the values with each file, each `file.py:name` and each map of rewards changed."""
    for key in FILES:
        values = with_text(values, key, file)
    for key in SPECS:
        values = with_text(values, key, spec)
    changed = dict(values)
    evaluation = values.get("evaluation")
    if "tracking" in values:
        changed["tracking"] = with_specs(values["tracking"], spec)
    if "rewards" in values:
        changed["rewards"] = rewards(values["rewards"])
    if isinstance(evaluation, dict) and "rewards" in evaluation:
        changed["evaluation"] = evaluation | {"rewards": rewards(evaluation["rewards"])}
    return changed


def with_text(values: Section, key: Sequence[str], change: Callable[[str], str]) -> Section:
    """Return the values with one text, or each text of a list, changed if it exists."""
    name, *rest = key
    value = values.get(name)
    if rest and isinstance(value, dict):
        return values | {name: with_text(value, rest, change)}
    if not rest and isinstance(value, str):
        return values | {name: change(value)}
    if not rest and isinstance(value, list):
        return values | {name: [change(v) if isinstance(v, str) else v for v in value]}
    return values


def with_specs(names: object, change: Callable[[str], str]) -> object:
    """Return one name, or the names of a list or a mapping, each changed."""
    if isinstance(names, dict):
        return {change(str(name)): settings for name, settings in names.items()}
    if isinstance(names, list):
        return [with_specs(name, change) for name in names]
    return change(names) if isinstance(names, str) else names


def belongs_to_run(path: Path) -> bool:
    """Return True for the `config.yaml` that a run wrote into its folder."""
    return path.name == "config.yaml" and (path.parent / ENVIRONMENT).is_file()


def started_in(run: Path) -> list[Path]:
    """Return the working directory in which a run was started, or nothing if it is not known."""
    try:
        content = json.loads((run / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    folder = content.get(STARTED_IN) if isinstance(content, dict) else None
    # It is relative to the run folder, so that a project can be moved with its runs.
    return [Path(os.path.normpath(run.resolve() / folder))] if isinstance(folder, str) else []


def directory_seen_from(run: Path) -> str:
    """Return the working directory relative to a run folder, for `started_in` to read."""
    try:
        return Path(os.path.relpath(Path.cwd().resolve(), run.resolve())).as_posix()
    except ValueError:  # another drive of Windows
        return Path.cwd().as_posix()


def absolute_files(values: Section, base: Path) -> Section:
    """Return a configuration whose existing files are absolute, to compare it with another.

    Args:
        values: the merged configuration; it does not change.
        base: the working directory that relative paths refer to.
    """
    return _with_files(
        values,
        file=lambda text: _absolute(text, base),
        spec=lambda text: _absolute_spec(text, base),
        rewards=lambda rewards: _absolute_settings(rewards, base),
    )


def _absolute_settings(value: object, base: Path) -> object:
    """Return rewards and their settings with absolute files in keys and values."""
    if isinstance(value, dict):
        return {
            _absolute_spec(str(name), base): _absolute_settings(entry, base)
            for name, entry in value.items()
        }
    if isinstance(value, list):
        return [_absolute_settings(entry, base) for entry in value]
    # The texts that are looked up as paths, and no other word that a folder may have as its name.
    if isinstance(value, str) and is_path(value):
        return _absolute(_absolute_spec(value, base), base)
    return value


def _absolute(text: str, base: Path) -> str:
    path = os.path.join(base, text)
    # Resolved, because a working directory may be reached through a link.
    return os.path.realpath(path) if text and os.path.exists(path) else text


def _absolute_spec(text: str, base: Path) -> str:
    file, colon, name = text.rpartition(":")
    return f"{_absolute(file, base)}:{name}" if colon and file.endswith(".py") else text
