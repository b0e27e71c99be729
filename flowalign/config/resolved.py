"""Write a configuration with every default, and say which keys may change when a run is resumed."""

from dataclasses import asdict

from flowalign.config.sections import Config
from flowalign.settings.merging import escape, Section
from flowalign.settings.types import settings_of

MAY_CHANGE = (
    # How long the run takes, and what is kept of it.
    "output",
    "train.steps",
    "train.save_every",
    "train.evaluate_every",
    "train.keep",
    "train.stop",
    "train.export",
    "train.max_bad_steps",
    # What the result is compared with.
    "evaluation.guidance_sweep",
    # What a user adjusts after looking at the first curves.
    "train.learning_rate",
    "train.cooldown",
    # Memory and speed.
    "train.images_per_pass",
    "model.gradient_checkpointing",
    "model.text_cache_gb",
    "model.keep_text_encoders",
    "model.offload",
    "model.attention",
    "model.compile",
    "distributed",
    # Where the run is recorded.
    "tracking",
)
"""Keys that may change, with all below them, when a run is resumed."""


def may_change(key: str) -> bool:
    """Return True if a dotted key may change when a run is resumed."""
    return any(key == known or key.startswith(f"{known}.") for known in MAY_CHANGE)


def resolve(config: Config) -> Section:
    """Return the configuration with every default written out, as a YAML file that loads again."""
    raw, sampler = config.raw, asdict(config.sampler)
    assert isinstance(raw["sampler"], dict)
    sampler["dynamics"] = with_settings(raw["sampler"]["dynamics"], config.sampler.dynamics)
    resolved: Section = {
        "model": asdict(config.model),
        "sampler": sampler,
        "objective": with_settings(raw["objective"], config.objective),
        "advantage": with_settings(raw["advantage"], config.advantage),
        "combine": with_settings(raw["combine"], config.combine),
        "rewards": config.rewards,
        "data": asdict(config.data),
        "train": asdict(config.train),
        "evaluation": asdict(config.evaluation),
        "distributed": asdict(config.distributed),
        "tracking": config.tracking,
        "output": config.output,
    }
    # Escaping also makes lists of tuples: this must equal what a run's file is read back as.
    return {key: escape(value) for key, value in resolved.items()}


def with_settings(section: object, value: object) -> Section:
    """Return a section as written, over which the settings of the object made from it are laid.

    A user's class that is not a dataclass has no settings to read back: what is written remains.
    """
    assert isinstance(section, dict)
    return {**section, **settings_of(value)}


def differing(one: Section, other: Section, prefix: str = "") -> list[str]:
    """Return the dotted keys whose values differ between two configurations."""
    keys = []
    for key in one | other:
        ours, theirs = one.get(key), other.get(key)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            keys += differing(ours, theirs, f"{prefix}{key}.")
        elif ours != theirs:
            keys.append(prefix + key)
    return keys
