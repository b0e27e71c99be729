"""Maps of rewards, as YAML files and the command line name them."""

import inspect
import math
from dataclasses import dataclass
from typing import Any

from flowalign.errors import did_you_mean, UserError
from flowalign.rewards import REWARDS
from flowalign.rewards.adapters import make_reward
from flowalign.rewards.base import Reward
from flowalign.settings.by_name import imported
from flowalign.settings.types import configure, mapping
from flowalign.settings.yaml_files import parse_yaml


@dataclass(frozen=True)
class RewardEntry:
    """One line of a reward map."""

    name: str
    """What it is logged by."""
    spec: str
    """A built-in's name, `file.py:name`, `package.module:name`, or an address."""
    weight: float
    settings: dict[str, Any]


def reward_entry(key: str, value: Any) -> RewardEntry:
    """`key: weight`, or `key: {weight, reward, ...}` with settings; `reward` where the key is a name of the user's own."""
    settings = dict(value) if isinstance(value, dict) else {"weight": value}
    return RewardEntry(
        reward_name(key), settings.pop("reward", key), float(settings.pop("weight", 1.0)), settings
    )


def reward_name(spec: str) -> str:
    """What a reward is logged by."""
    return spec.partition("://")[2] or spec.rpartition(":")[2]


def checked_rewards(section: Any, key: str) -> dict[str, Any]:
    """A map of names to weights or settings, checked but not loaded."""
    section = mapping(section, key)
    names = [reward_name(name) for name in section]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"{key}: two rewards are called {twice[0]!r}; they are logged by name, so give one a name of its own: "
            f"{{mine: {{reward: {[name for name in section if reward_name(name) == twice[0]][1]!r}}}}}."
        )
    for name, value in section.items():
        weight, spec = (
            (value.get("weight", 1.0), value.get("reward", name))
            if isinstance(value, dict)
            else (value, name)
        )
        if not isinstance(spec, str) or (spec not in REWARDS and ":" not in spec):
            raise UserError(
                f"{key}: there is no reward {spec!r}; choose from {', '.join(REWARDS)}, "
                f'or name your own: "my_rewards.py:{spec}".{did_you_mean(str(spec), REWARDS)}'
            )
        if (
            isinstance(weight, bool)
            or not isinstance(weight, int | float)
            or not math.isfinite(weight)
        ):
            raise UserError(
                f"{key}.{name} is {value!r}; write a weight, or {{weight: 1.0, ...}} with the reward's own settings."
            )
    return section


def load_rewards(section: dict[str, Any], key: str = "rewards") -> list[Reward]:
    """The rewards of a checked map, imported and configured. UserError where that fails."""
    rewards = []
    for name, value in section.items():
        entry = reward_entry(name, value)
        place, settings = REWARDS.get(entry.spec, entry.spec), entry.settings
        if place.startswith(("http://", "https://")):
            place, settings = (
                "flowalign.rewards.remote.client:WebReward",
                {"url": place, **settings},
            )
        function = configure(
            imported(place, f"{key}.{name}", REWARDS),
            settings,
            f"{key}.{name}",
            ("weight", "reward"),
        )
        rewards.append(make_reward(entry.name, function, entry.weight))
    return rewards


def load_reward(spec: str) -> Reward:
    """One reward as the command line names it: its name, or a map of it with its settings."""
    section = parse_yaml(spec, repr(spec)) if spec.lstrip().startswith("{") else {spec: 1.0}
    rewards = load_rewards(checked_rewards(section, "reward"), "reward")
    if len(rewards) != 1:
        raise UserError(
            f"{spec} names {len(rewards)} rewards; write one, such as '{{clip_score: {{path: FOLDER}}}}'."
        )
    return rewards[0]


def describe_rewards() -> dict[str, str]:
    """The first sentence of every built-in reward."""
    entries = {name: imported(place, name, REWARDS) for name, place in REWARDS.items()}
    return {name: (inspect.getdoc(entry) or "").splitlines()[0] for name, entry in entries.items()}
