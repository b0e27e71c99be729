"""Locate the files that a configuration names: prompts, pairs, models, code and rewards' files."""

from collections.abc import Callable, Sequence
from pathlib import Path

from flowalign.bundled import locate, locate_spec
from flowalign.rewards.registry import locate_rewards
from flowalign.settings.merging import Section

FILES = (
    ("model", "path"),
    ("data", "prompts"),
    ("data", "pairs"),
    ("evaluation", "prompts"),
    ("evaluation", "pairs"),
)
"""Keys whose value is a file or folder."""
SPECS = (
    ("model", "name"),
    ("objective", "name"),
    ("advantage", "name"),
    ("combine", "name"),
    ("sampler", "dynamics", "name"),
)
"""Keys whose value may be `my_file.py:name`."""


def locate_files(values: Section, folders: Sequence[Path]) -> Section:
    """Return the configuration with every file that exists written so that it can be opened.

    Args:
        values: the merged configuration; it does not change.
        folders: the folders of the YAML files it came from.
    """
    # Every key is looked up next to all files of the chain of `extends`: after a merge, a value
    # does not remember which of them it came from.
    for key in FILES:
        values = with_text(values, key, lambda text: locate(text, folders))
    for key in SPECS:
        values = with_text(values, key, lambda text: locate_spec(text, folders))
    located = dict(values)
    evaluation = values.get("evaluation")
    if "rewards" in values:
        located["rewards"] = locate_rewards(values["rewards"], folders)
    if isinstance(evaluation, dict) and "rewards" in evaluation:
        rewards = locate_rewards(evaluation["rewards"], folders)
        located["evaluation"] = evaluation | {"rewards": rewards}
    return located


def with_text(values: Section, key: Sequence[str], change: Callable[[str], str]) -> Section:
    """Return the values with one text changed, if it exists and is a text."""
    name, *rest = key
    value = values.get(name)
    if rest and isinstance(value, dict):
        return values | {name: with_text(value, rest, change)}
    if not rest and isinstance(value, str):
        return values | {name: change(value)}
    return values
