"""Read reward maps, as YAML files and the command line write them.

Checking a map imports neither torch nor a reward, so that a misspelt name is answered at once.
"""

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TYPE_CHECKING

from flowalign.bundled import locate, locate_spec
from flowalign.errors import did_you_mean, UserError
from flowalign.global_state import restored_state
from flowalign.rewards import REWARDS
from flowalign.settings.by_name import imported, refuse_standard_library
from flowalign.settings.types import configure, mapping
from flowalign.settings.yaml_files import parse_yaml

if TYPE_CHECKING:
    from flowalign.rewards.base import Reward

Section = dict[str, Any]
"""A mapping of a YAML file. Its values are checked where they are used."""
REMOTE = "flowalign.rewards.remote.client:RemoteReward"
ADDRESSES = ("http://", "https://")
"""Beginnings of a reward that is an address."""
OWN_KEYS = ("reward", "weight", "time_limit")
"""Keys of an entry that are not settings of its reward."""


@dataclass(frozen=True, kw_only=True)
class RewardEntry:
    """One line of a reward map."""

    name: str
    """The name in logs."""
    spec: str
    """A built-in name, `file.py:name`, `package.module:name`, or an address."""
    weight: float
    """The factor in the combined reward."""
    time_limit: float | None = None
    """How many seconds a call may take; None for any time."""
    settings: Section
    """The reward's own settings."""


def reward_entry(key: str, value: object) -> RewardEntry:
    """Read `key: weight`, or `key: {weight, reward, time_limit, ...}` with settings.

    With `reward`, the key is a name that the user chose.
    """
    settings = _settings(value)
    return RewardEntry(
        name=reward_name(key),
        spec=settings.get("reward", key),
        weight=float(settings.get("weight", 1.0)),
        time_limit=settings.get("time_limit"),
        settings={name: entry for name, entry in settings.items() if name not in OWN_KEYS},
    )


def reward_name(spec: str) -> str:
    """Return the name in logs: the part after the path, module or scheme."""
    return spec.partition("://")[2] or spec.rpartition(":")[2]


def checked_rewards(section: object, key: str) -> Section:
    """Check a map of names to weights or settings, without loading a reward.

    Raises UserError for an unknown name, two equal names, a weight that is not a number, or a time
    limit that is not above 0.
    """
    section = mapping(section, key)
    _check_names_differ(list(section), key)
    for name, value in section.items():
        settings = _settings(value)
        _check_spec(settings.get("reward", name), key)
        if not _is_weight(settings.get("weight", 1.0)):
            raise UserError(
                f"{key}.{name} is {value!r}. "
                "Write a weight, or {weight: 1.0, ...} with the reward's own settings."
            )
        limit = settings.get("time_limit")
        if limit is not None and not (_is_weight(limit) and limit > 0):
            raise UserError(
                f"{key}.{name}.time_limit is {limit!r}. Write the seconds that a call may take."
            )
    return section


def _settings(value: object) -> Section:
    return dict(value) if isinstance(value, dict) else {"weight": value}


def _check_names_differ(specs: list[str], key: str) -> None:
    first: dict[str, str] = {}
    for spec in specs:
        name = reward_name(spec)
        if name in first:
            raise UserError(
                f"{key}: two rewards are called {name!r}, and metrics are logged by name. "
                f"Give one a name of its own: {{my_name: {{reward: {spec!r}}}}}."
            )
        first[name] = spec


def _check_spec(spec: object, key: str) -> None:
    if not isinstance(spec, str) or (spec not in REWARDS and ":" not in spec):
        raise UserError(
            f"{key}: there is no reward {spec!r}. Choose from {', '.join(REWARDS)}, "
            f'or name your own: "my_rewards.py:{spec}".{did_you_mean(str(spec), REWARDS)}'
        )
    if not spec.startswith(ADDRESSES):
        refuse_standard_library(spec, f"{key}.{spec}")


def _is_weight(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)


def load_rewards(section: Section, key: str = "rewards") -> "list[Reward]":
    """Import and configure the rewards of a checked map. Raises UserError if one cannot be made."""
    return [_load(reward_entry(name, value), f"{key}.{name}") for name, value in section.items()]


def _load(entry: RewardEntry, key: str) -> "Reward":
    from flowalign.rewards.adapters import check_form, make_reward  # imports torch

    location, settings = REWARDS.get(entry.spec, entry.spec), entry.settings
    if location.startswith(ADDRESSES):
        location, settings = REMOTE, {"url": location, **settings}
    reward = imported(location, key, REWARDS)
    # First, because a class or a factory is called with the settings of a file.
    check_form(entry.name, reward)
    with restored_state():
        made = configure(reward, settings, key, OWN_KEYS)
        return make_reward(entry.name, made, entry.weight, entry.time_limit)


def reward_identities(section: Section) -> list[str]:
    """Return for each reward of a map what its scores depend on: its code and its settings.

    Own code is known by the content of its file, not by its path.
    """
    entries = [reward_entry(key, value) for key, value in section.items()]
    return [f"{entry.name} {_code(entry.spec)} {entry.settings!r}" for entry in entries]


def _code(spec: str) -> str:
    file = Path(spec.rpartition(":")[0])
    return sha256(file.read_bytes()).hexdigest() if file.is_file() else spec


def locate_rewards(rewards: object, folders: Sequence[Path] = ()) -> object:
    """Return a reward map with the files of its keys and settings located."""
    if not isinstance(rewards, dict):
        return rewards
    return {
        locate_spec(str(name), folders): locate_settings(value, folders)
        for name, value in rewards.items()
    }


def locate_settings(value: object, folders: Sequence[Path] = ()) -> object:
    """Return a reward's settings with the texts that are paths located.

    Rewards, and users' own rewards, have files under any name. A text counts as a path if it has a
    slash or a suffix; another word, such as the name of a model, could be a folder's by accident.
    """
    if isinstance(value, dict):
        return {name: locate_settings(entry, folders) for name, entry in value.items()}
    if isinstance(value, list):
        return [locate_settings(entry, folders) for entry in value]
    if isinstance(value, str) and is_path(value):
        return locate(locate_spec(value, folders), folders)
    return value


def is_path(text: str) -> bool:
    """Return True for a text that a reward's settings mean as the path of a file or folder."""
    return "/" in text or bool(Path(text).suffix)


def load_reward(spec: str) -> "Reward":
    """Load one reward as the command line names it: a name, or a YAML map with its settings.

    Example:
        >>> reward = flowalign.load_reward("brightness")
        >>> reward(torch.ones(2, 3, 8, 8), ["a", "b"], [{}, {}])
        tensor([1., 1.])
    """
    rewards = load_specs([spec])
    if len(rewards) != 1:
        raise UserError(
            f"{spec} names {len(rewards)} rewards. "
            "Write one, such as '{clip_score: {path: FOLDER}}'."
        )
    return rewards[0]


def load_specs(specs: Sequence[str]) -> "list[Reward]":
    """Load rewards as the command line names them, each as for `load_reward`."""
    section: Section = {}
    for spec in specs:
        is_map = spec.lstrip().startswith("{")
        section |= mapping(parse_yaml(spec, repr(spec)), "reward") if is_map else {spec: 1.0}
    return load_rewards(checked_rewards(locate_rewards(section), "reward"), "reward")


def describe_rewards() -> dict[str, str]:
    """Return the first line of each built-in reward's docstring.

    The docstrings are read from the source: importing all rewards would import transformers.
    """
    return {name: _summary(location) for name, location in REWARDS.items()}


def _summary(location: str) -> str:
    module, _, name = location.partition(":")
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    raise AssertionError(f"{module} has no {name}")
