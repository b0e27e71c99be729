"""Merge configurations, apply overrides, and fill in `${...}`, with OmegaConf.

Two rules differ from OmegaConf's: reward maps replace each other, and a section whose `name`
changes replaces the other one. Settings of one reward or objective mean nothing to another.
"""

import re
from collections.abc import Callable, Iterator

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    InterpolationKeyError,
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from flowalign.errors import UserError

Section = dict[str, object]
Key = tuple[str | int, ...]
"""Names of sections and positions in lists, from the top to a value."""

REPLACED = ("rewards", "tracking")
"""Maps that a child or an override replaces as a whole."""
MISSING = "???"
"""OmegaConf's mark for a value that must still be written."""
MAX_REFERENCES = 50
"""Occurrences of `${` in a configuration."""
MAX_REFERENCE_LENGTH = 1_000
MAX_ROUNDS = 10
"""References to values that are themselves references, and so on."""
MAX_VALUES = 4_000
"""Keys and values that references may add."""


def merge(parent: Section, child: Section, replaced: tuple[str, ...] = REPLACED) -> Section:
    """Return the child over the parent; neither changes.

    Reward maps replace, and so does a section whose `name` changes. Other sections merge.
    """
    # OmegaConf is slow, so it gets only the sections that change.
    changing = {key: value for key, value in parent.items() if key in child}
    kept = without_replaced(changing, child, replaced)
    try:
        # "Unsafe" as it may reuse its arguments, which are copies here; it takes half the time.
        merged = OmegaConf.unsafe_merge(OmegaConf.create(kept), OmegaConf.create(child))
        return parent | to_plain(merged)
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from None
    # OmegaConf parses `${` by recursion.
    except RecursionError:
        raise UserError("References `${...}` are nested too deep. Write values.") from None


def without_replaced(parent: Section, child: Section, replaced: tuple[str, ...]) -> Section:
    """Return what stays of the parent: no section that the child replaces."""
    kept: Section = {}
    for key, value in parent.items():
        update = child.get(key)
        # OmegaConf merges neither a list into a mapping nor the reverse: the child's stands alone.
        if isinstance(update, dict | list) and not isinstance(value, type(update)):
            continue
        if isinstance(value, dict) and isinstance(update, dict):
            # A child without `name` adjusts the parent's choice, whatever that is.
            renamed = "name" in update and update["name"] != value.get("name")
            if renamed or key in replaced:
                continue
            value = without_replaced(value, update, replaced)
        kept[key] = value
    return kept


def to_plain(config: object, resolve: bool = False) -> Section:
    """Return OmegaConf's mapping as dictionaries and lists.

    Args:
        config: a DictConfig.
        resolve: whether `${...}` is filled in, and not left as written.
    """
    plain = OmegaConf.to_container(config, resolve=resolve)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def explain(error: OmegaConfBaseException) -> str:
    """Return an error of OmegaConf as a problem and a fix."""
    key, reason = error.full_key or "a section", str(error).partition("\n")[0]
    return (
        f"{key} cannot be used: {reason}. Write text, numbers, lists and mappings with keys; "
        "references are ${section.key} or ${oc.env:NAME}, and \\${ is a plain ${."
    )


Parse = Callable[[str, str], object]
"""Reads the YAML of a value; its second argument says where the text stands."""


def overridden(values: Section, overrides: list[str], parse: Parse) -> Section:
    """Return a file's values with overrides applied in their order.

    Raises:
        UserError: an override would have no effect, or cannot be read.
    """
    nested = [parse_override(text, parse) for text in overrides]
    keys = [text.partition("=")[0] for text in overrides]
    for key, update in zip(keys, nested, strict=True):
        # `rewards.clip_score=2` sets one entry of the map; `rewards={...}` replaces the map.
        inside = {*key.split(".")[:-1]} & {*REPLACED}
        values = merge(values, update, () if inside else REPLACED)
    # Only now: a later override may have removed what an earlier one set.
    for number, (text, update) in enumerate(zip(overrides, nested, strict=True)):
        if keys[number] not in keys[number + 1 :] and not is_applied(update, values):
            raise UserError(
                f"{text!r} would have no effect: an empty map changes nothing, and a section whose "
                f"name changes later loses its other keys. Name a key of "
                f"{keys[number].partition('.')[0]}, and a section's name before its other keys."
            )
    return values


def is_applied(update: object, values: object) -> bool:
    """Return True if every key of the update exists; an empty map must be one."""
    if not isinstance(update, dict):
        return True
    if not isinstance(values, dict):
        return False
    if not update:
        return not values
    return all(key in values and is_applied(update[key], values[key]) for key in update)


def parse_override(text: str, parse: Parse) -> Section:
    """Return `train.steps=10` as the nested mapping that it stands for; values are YAML."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(
            f"{text!r} is not an override; write section.key=value, for example train.steps=10."
        )
    # Parsed here and not by OmegaConf, for which 010 is 8 and a key may be written twice.
    parsed = parse(value, f"{text!r}: the value")
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    assert isinstance(parsed, dict)
    # OmegaConf would keep the value below it, so that the override had no effect.
    check_written(parsed)
    check_limits(parsed)
    return parsed


def check_written(values: object, key: str = "") -> None:
    """Refuse the text `???`, OmegaConf's mark for a value that must still be written."""
    if values == MISSING:
        raise UserError(f"{key} is ???, which stands for a missing value. Write {key}=VALUE.")
    if isinstance(values, dict):
        for name, value in values.items():
            check_written(value, f"{key}.{name}" if key else str(name))


def interpolate(values: Section) -> Section:
    """Return the configuration with every `${...}` filled in.

    Each round fills in the references to plain values, so that no value is computed twice:
    OmegaConf alone follows them anew each time, and ten lines can ask for gigabytes.

    Raises:
        UserError: a reference names a key or an environment variable that does not exist, refers to
            itself, or the limits of this file are exceeded.
    """
    pending = dict(references(values))
    if not pending:
        return values
    check_limits(values)
    config = OmegaConf.create(values)
    # A pending value counts as missing, so that a reference to it waits for the next round.
    for key in pending:
        assign(config, key, MISSING)
    for _ in range(MAX_ROUNDS):
        ready = [key for key, text in pending.items() if fill_in(config, key, text)]
        if not ready:
            break
        pending = {key: text for key, text in pending.items() if key not in ready}
        check_size(config)
    for key, text in pending.items():
        raise UserError(
            f"{dotted(key)} is {text!r}, which refers to itself, to a missing value, or through "
            f"more than {MAX_ROUNDS} other references. Write the value."
        )
    # Every text with a `${` is escaped by now, so that this only takes the backslashes away.
    return to_plain(config, resolve=True)


def references(value: object, key: Key = ()) -> Iterator[tuple[Key, str]]:
    """Yield the key and text of every value that has a `${`."""
    if isinstance(value, str) and "${" in value:
        yield key, value
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from references(entry, (*key, name))
    if isinstance(value, list):
        for number, entry in enumerate(value):
            yield from references(entry, (*key, number))


def check_limits(values: Section) -> None:
    """Refuse more references than anybody writes; OmegaConf parses them slowly, by recursion."""
    pending = dict(references(values))
    if sum(text.count("${") for text in pending.values()) > MAX_REFERENCES:
        raise UserError(f"There are over {MAX_REFERENCES} references `${{...}}`. Write values.")
    for key, text in pending.items():
        if len(text) > MAX_REFERENCE_LENGTH:
            raise UserError(
                f"{dotted(key)} has a `${{...}}` and over {MAX_REFERENCE_LENGTH:,} characters. "
                "Shorten it, or write \\${ for a plain ${."
            )


def check_size(config: DictConfig) -> None:
    """Refuse references that copy sections into sections without end."""
    if count(OmegaConf.to_container(config, resolve=False)) > MAX_VALUES:
        raise UserError(f"References `${{...}}` make over {MAX_VALUES:,} values. Write fewer.")


def count(value: object) -> int:
    """Count keys and values; a text counts by its length too, so that it cannot grow either."""
    if isinstance(value, dict):
        return sum(1 + count(entry) for entry in value.values())
    if isinstance(value, list):
        return sum(map(count, value))
    return 1 + len(value) // 100 if isinstance(value, str) else 1


def assign(config: DictConfig, key: Key, value: object) -> None:
    """Set one value. Keys may hold dots, so OmegaConf's dotted paths will not do."""
    section: DictConfig = config
    for part in key[:-1]:
        section = section[part]
    section[key[-1]] = value


def fill_in(config: DictConfig, key: Key, text: str) -> bool:
    """Replace one reference by its value. Return False if it refers to one that is pending."""
    section: DictConfig = config
    for part in key[:-1]:
        section = section[part]
    try:
        section[key[-1]] = text
        # Reading the value is what makes OmegaConf fill it in.
        value = section[key[-1]]
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
    except (InterpolationToMissingValueError, MissingMandatoryValue):
        section[key[-1]] = MISSING
        return False
    except OmegaConfBaseException as error:
        raise UserError(f"{dotted(key)} is {text!r}, {problem_of(error)}") from None
    # OmegaConf parses what is assigned: a value with a plain `${` would be a reference again.
    section[key[-1]] = escape(value)
    return True


def escape(value: object) -> object:
    """Return a value whose texts OmegaConf reads back as they are, with lists for tuples."""
    if isinstance(value, dict):
        return {key: escape(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [escape(entry) for entry in value]
    # Two backslashes before `${` are read as one, so those of the text are doubled.
    text = r"(\\*)\$\{"
    return re.sub(text, r"\1\1\\${", value) if isinstance(value, str) else value


def problem_of(error: OmegaConfBaseException) -> str:
    """Return why a reference cannot be filled in, and what to write."""
    reason = str(error).partition("\n")[0]
    if isinstance(error, InterpolationKeyError):
        name = reason.partition("'")[2].partition("'")[0]
        return f"but there is no key {name}. Refer to a key that this file or its parent writes."
    if "Environment variable" in reason:
        name = reason.partition("variable '")[2].partition("'")[0]
        return (
            f"but the environment variable {name} is not set. "
            f"Set it, or write ${{oc.env:{name},DEFAULT}}."
        )
    return f"which cannot be filled in: {reason}. Write ${{section.key}} or ${{oc.env:NAME}}."


def dotted(key: Key) -> str:
    """Return a key as messages write it."""
    return ".".join(map(str, key))
