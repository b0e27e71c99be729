"""Find what a `name` in a YAML file means: an entry of a table, or the user's own code.

Own code is named `file.py:name` or `package.module:name`.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, overload, TypeVar

from flowalign.bundled import locate
from flowalign.errors import did_you_mean, similar_file, UserError
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
    result = configure(entry, section, key, ("name",))
    if isinstance(kind, type) and not isinstance(result, kind):
        raise UserError(
            f"{key}.name: {type(result).__name__} must be a subclass of "
            f"{kind.__module__}.{kind.__name__}."
        )
    if isinstance(kind, tuple) and not takes(result, len(kind)):
        raise UserError(f"{key}.name: {name} must be a function of ({', '.join(kind)}).")
    return result


def takes(function: Callable[..., object], count: int) -> bool:
    """Return True if the function can be called with this number of arguments."""
    try:
        return bool(inspect.signature(function).bind(*range(count)))
    except (TypeError, ValueError):
        return False


def imported(spec: str, key: str, table: Mapping[str, object]) -> Any:
    """Return the function or class that `file.py:name` or `package.module:name` names.

    Raises:
        UserError: the file, module or name does not exist, or the code cannot be imported.
    """
    source, colon, name = spec.rpartition(":")
    if not colon:
        raise UserError(unknown_name(spec, key, table))
    try:
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
    if name not in vars(module):
        public = defined_in(module)
        raise UserError(
            f"{key}: {source} has no {name!r}; it has {', '.join(public) or 'no functions'}."
            f"{did_you_mean(name, public)}"
        )
    return vars(module)[name]


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


def import_module(name: str) -> ModuleType:
    """Import a module, also one in the working directory."""
    # An installed command does not have the working directory on its path, as `python FILE` has.
    search_in(Path.cwd())
    return importlib.import_module(name)


def search_in(folder: Path) -> None:
    """Let modules of a folder be imported; any other module of the same name comes first."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def import_file(file: str) -> ModuleType:
    """Import a Python file once; later calls return the same module."""
    path = Path(locate(file))
    if not path.is_file():
        raise FileNotFoundError(path)
    # By its whole path: two users' files may have one name, and none may hide a real module.
    name = f"flowalign_user_{path.resolve()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Before it runs: dataclasses look up the module of their class.
    sys.modules[name] = module
    search_in(path.resolve().parent)  # the file may import its neighbours
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
