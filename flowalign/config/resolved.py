"""A configuration with every default written out, and which of its keys may change when a run is resumed."""

from dataclasses import asdict
from typing import Any

from flowalign.config.sections import Config
from flowalign.settings.types import settings_of

MAY_CHANGE = (
    *(
        "output",
        "train.steps",
        "train.save_every",
        "train.evaluate_every",
        "train.keep",
        "train.stop",
        "train.max_bad_steps",
    ),
    *(
        "train.learning_rate",
        "train.cooldown",
        "train.images_per_pass",
        "model.gradient_checkpointing",
        "model.attention",
    ),
)
"""Keys that may differ, with all below them, when a run goes on."""


def may_change(key: str) -> bool:
    return any(key == known or key.startswith(f"{known}.") for known in MAY_CHANGE)


def resolve(config: Config) -> dict[str, Any]:
    """The configuration with every default written out, as a YAML that loads again."""

    def named(section: str, value: Any) -> dict[str, Any]:
        return {**config.raw[section], **settings_of(value)}

    sampler = {**asdict(config.sampler), "dynamics": named_dynamics(config)}
    sampler["window"] = {**sampler["window"], "range": list(sampler["window"]["range"])}
    return {
        "model": asdict(config.model),
        "sampler": sampler,
        "objective": named("objective", config.objective),
        "advantage": named("advantage", config.advantage),
        "combine": named("combine", config.combine),
        "rewards": config.rewards,
        "data": asdict(config.data),
        "train": asdict(config.train),
        "evaluation": asdict(config.evaluation),
        "output": config.output,
    }


def named_dynamics(config: Config) -> dict[str, Any]:
    """The dynamics with its settings."""
    return {**config.raw["sampler"]["dynamics"], **settings_of(config.sampler.dynamics)}


def differing(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys under which two configurations differ."""
    keys = []
    for key in {*a, *b}:
        one, other = a.get(key), b.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            keys += differing(one, other, f"{prefix}{key}.")
        elif one != other:
            keys.append(prefix + key)
    return keys
