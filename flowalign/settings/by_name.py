"""Find what a `name` in a YAML file means: an entry of a table, or the user's own code.

Own code is named `file.py:name` or `package.module:name`. It is imported, and nothing of it is
called before its type or its parameters are those of the section: a file must not be able to call
whatever its author likes.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, overload, TypeVar

from flowalign.errors import did_you_mean, similar_file, UserError
from flowalign.global_state import hidden_arguments, restored_state
from flowalign.progress import say
from flowalign.settings.imports import import_file, import_module, in_standard_library
from flowalign.settings.types import configure, mapping

T = TypeVar("T")

RELATIVES = {
    "grpo": "objective: {name: flow_grpo}",
    "dancegrpo": "objective: {name: flow_grpo} with sampler: {dynamics: {name: dance_sde}}",
    "flowgrpofast": "objective: {name: flow_grpo} with sampler: {window: {size: 3}}",
    "mixgrpo": "objective: {name: flow_grpo} with "
    "sampler: {window: {size: 4, moves: progressive, stay: 25}, same_noise: true}",
    "grpoguard": "objective: {name: flow_grpo, ratio: normalised, step_weight: inverse_time}",
    "tempflowgrpo": "objective: {name: flow_grpo, step_weight: noise} with "
    "sampler: {window: {size: 1}, same_noise: true}",
    "diffusionnft": "objective: {name: nft}",
    "diffusionopsd": "objective: {name: opsd}",
    "flowdpo": "objective: {name: dpo}",
    "diffusiondpo": "objective: {name: dpo, beta_over_time: of_noise_error}",
    "onlinedpo": "objective: {name: dpo} with data.prompts",
    "dp2o": "objective: {name: dpo} with data: {ranking: {top: 8, weighted: true}}",
    "ipo": "objective: {name: dpo, form: ipo}",
    "diffusionkto": "objective: {name: kto}",
    "draft": "objective: {name: alignprop, depth: K}, K the number of steps; sampler.steps for all",
    "draftk": "objective: {name: alignprop, depth: K}, K the number of steps",
    "gdpo": "advantage: {name: gdpo}",
    "prefgrpo": 'a reward with @traits(level="pairwise"), and advantage: {std: group}',
    "paco": "advantage: {name: log_tamed}",
    "pacogrpo": "advantage: {name: log_tamed}",
}
"""Methods that are settings here, by their papers' names in small letters and digits."""


@overload
def build_named(table: Mapping[str, object], section: object, key: str, kind: type[T]) -> T: ...
@overload
def build_named(
    table: Mapping[str, object], section: object, key: str, kind: tuple[str, ...]
) -> Callable[..., Any]: ...
def build_named(
    table: Mapping[str, object], section: object, key: str, kind: type | tuple[str, ...]
) -> object:
    """Return what a section's `name` means, made with the section's other keys.

    Args:
        table: the built-in entries; a text is imported when it is asked for.
        section: what the YAML holds: a mapping with `name`.
        key: the dotted key of the section, for messages.
        kind: the base class of the result, or the names of the arguments if it is a function.

    Raises:
        UserError: the name or a setting is wrong, or the result is not of this kind.
    """
    if isinstance(section, str):
        raise UserError(f"{key} is {section!r}; write {key}: {{name: {section}}}.")
    section = mapping(section, key)
    name = section.pop("name", None)
    if not isinstance(name, str):
        problem = "missing" if name is None else repr(name)
        raise UserError(f"{key}.name is {problem}; choose from {', '.join(table)}.")
    entry = table.get(name, name)
    if isinstance(entry, str):
        entry = imported(entry, f"{key}.name", table)
    _check_kind(entry, kind, f"{key}.name: {name}")
    with restored_state():
        result = configure(entry, section, key, ("name",))
    # Once more, because a setting that is bound may be one of the arguments.
    if isinstance(kind, tuple):
        _check_kind(result, kind, f"{key}.name: {name}")
    return result


def _check_kind(entry: object, kind: type | tuple[str, ...], where: str) -> None:
    """Raise UserError unless calls of the entry, or of its instances, suit the section."""
    if isinstance(kind, type):
        if not isinstance(entry, type) or not issubclass(entry, kind):
            raise UserError(f"{where} must be a subclass of {kind.__module__}.{kind.__name__}.")
    elif not takes(entry, len(kind)):
        raise UserError(f"{where} must be a function of ({', '.join(kind)}).")


def takes(entry: object, count: int) -> bool:
    """Return True if a function, or a class's instances, can be called with `count` arguments."""
    try:
        signature = instance_signature(entry) if isinstance(entry, type) else _signature(entry)
        return bool(signature and signature.bind(*range(count)))
    except (TypeError, ValueError):
        return False


def instance_signature(cls: type, method: str = "__call__") -> inspect.Signature | None:
    """Return the parameters of a method, or None without it. By default of a call of instances."""
    if not any(method in vars(base) for base in cls.__mro__):
        return None
    signature = _signature(getattr(cls, method))
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _signature(function: object) -> inspect.Signature:
    """Return the parameters. Raises TypeError or ValueError if the function has none to read."""
    if not callable(function):
        raise TypeError(f"{function!r} is not a function")
    return inspect.signature(function)


def imported(spec: str, key: str, table: Mapping[str, object]) -> Any:
    """Return the function or class that `file.py:name` or `package.module:name` names.

    Raises:
        UserError: the file, module or name does not exist, the code cannot be imported, or it
            belongs to Python's standard library.
    """
    source, colon, name = spec.rpartition(":")
    if not colon:
        raise UserError(unknown_name(spec, key, table))
    refuse_standard_library(spec, key)
    module = _import(source, key)
    if name not in vars(module):
        public = defined_in(module)
        raise UserError(
            f"{key}: {source} has no {name!r}; it has {', '.join(public) or 'no functions'}."
            f"{did_you_mean(name, public)}"
        )
    value = vars(module)[name]
    # The names of a module include those of all that it imports.
    if callable(value) and in_standard_library(home_of(value)):
        raise UserError(_standard_library_message(key, spec))
    return value


def _import(source: str, key: str) -> ModuleType:
    """Import a file or a module. Raises UserError with the key if that fails."""
    try:
        with restored_state() as changed, hidden_arguments():
            module = import_file(source) if source.endswith(".py") else import_module(source)
    except FileNotFoundError:
        raise UserError(
            f"{key}: there is no file {source} (looked in {Path.cwd()}).{similar_file(source)}"
        ) from None
    # A user's file may be a script that ends the program when it is imported.
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{key}: {source} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if changed:
        say(
            f"{source} changed global state when it was imported: {', '.join(sorted(changed))}. "
            "It was restored; set it inside your functions."
        )
    return module


def refuse_standard_library(spec: str, key: str) -> None:
    """Refuse `module:name` by the name of its module. Importing some would have effects already.

    Raises UserError if the module belongs to Python's standard library.
    """
    source = spec.rpartition(":")[0]
    if in_standard_library(source):
        raise UserError(_standard_library_message(key, spec))


def _standard_library_message(key: str, spec: str) -> str:
    return (
        f"{key}: {spec} belongs to Python's standard library, which has nothing for this section. "
        'Name your own code: "my_file.py:my_name".'
    )


def home_of(value: object) -> str:
    """Return the module in which a function, a class or an instance's class is defined."""
    while isinstance(value, partial):
        value = value.func
    owner = value if inspect.isroutine(value) or isinstance(value, type) else type(value)
    # Methods of built-in types have no module, and others none that is known.
    return getattr(owner, "__module__", None) or ""


def unknown_name(name: str, key: str, table: Mapping[str, object]) -> str:
    """Return the message for an unknown name: how it is written here, or the nearest name."""
    known = RELATIVES.get("".join(filter(str.isalnum, name.lower())))
    nearest = f" Here it is {known}." if known else did_you_mean(name, table)
    return (
        f"{key}: there is no {name!r}; choose from {', '.join(table)}, "
        f'or name your own: "my_file.py:{name}".{nearest}'
    )


def defined_in(module: ModuleType) -> list[str]:
    """Return the names of what a module defines itself."""
    return [
        name
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__
    ]
