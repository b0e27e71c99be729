"""What a `name` in a YAML stands for: an entry of a table, or something of the user's own, by file or module."""

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

from flowalign.errors import did_you_mean, similar_file, UserError
from flowalign.settings.types import configure, mapping

RELATIVES = {
    "grpo": "objective: {name: flow_grpo}",
    "dancegrpo": "objective: {name: flow_grpo} with sampler: {dynamics: {name: dance_sde}}",
    "flowgrpofast": "objective: {name: flow_grpo} with sampler: {window: {size: 2}}",
    "mixgrpo": "objective: {name: flow_grpo} with sampler: {window: {size: 4, moves: progressive}}",
    "grpoguard": "objective: {name: flow_grpo, ratio: normalised, step_weight: inverse_time}",
    "tempflowgrpo": "objective: {name: flow_grpo, step_weight: noise} with sampler: {window: {size: 1}, same_noise: true}",
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
    "prefgrpo": "advantage: {name: win_rate}",
    "paco": "advantage: {name: log_tamed}",
    "pacogrpo": "advantage: {name: log_tamed}",
}
"""Methods that are settings here, by their papers' names in small letters alone."""


def build_named(table: dict[str, Any], section: Any, key: str, kind: type | tuple[str, ...]) -> Any:
    """What `name` asks for, with the section's other fields as its settings: of a class, or a function of these arguments."""
    if isinstance(section, str):
        raise UserError(f"{key} is {section!r}; write {key}: {{name: {section}}}.")
    section = mapping(section, key)
    name = section.get("name")
    if not isinstance(name, str):
        raise UserError(
            f"{key}.name is {'missing' if name is None else repr(name)}; choose from {', '.join(table)}."
        )
    place = table.get(name, name)
    entry = imported(place, f"{key}.name", table) if isinstance(place, str) else place
    made = configure(entry, {k: v for k, v in section.items() if k != "name"}, key, ("name",))
    if isinstance(kind, type) and not isinstance(made, kind):
        raise UserError(
            f"{key}.name: {type(made).__name__} must be a subclass of {kind.__module__}.{kind.__name__}."
        )
    if isinstance(kind, tuple) and not takes(made, len(kind)):
        raise UserError(f"{key}.name: {name} must be a function of ({', '.join(kind)}).")
    return made


def takes(function: Any, count: int) -> bool:
    """Whether it can be called with so many arguments."""
    try:
        return bool(inspect.signature(function).bind(*range(count)))
    except (TypeError, ValueError):
        return False


def imported(spec: str, key: str, table: dict[str, Any]) -> Any:
    """What `file.py:name` or `package.module:name` stands for."""
    place, colon, name = spec.rpartition(":")
    if not colon:
        written = RELATIVES.get("".join(filter(str.isalnum, spec.lower())))
        near = f" Here it is {written}." if written else did_you_mean(spec, table)
        raise UserError(
            f'{key}: there is no {spec!r}; choose from {", ".join(table)}, or name your own: "my_file.py:{spec}".{near}'
        )
    try:
        module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    except FileNotFoundError:
        raise UserError(
            f"{key}: there is no file {place} (looked in {Path.cwd()}).{similar_file(place)}"
        ) from None
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{key}: {place} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if name not in vars(module):
        public = [
            n
            for n, value in vars(module).items()
            if getattr(value, "__module__", None) == module.__name__
        ]
        raise UserError(
            f"{key}: {place} has no {name!r}; it has {', '.join(public) or 'no functions'}.{did_you_mean(name, public)}"
        )
    return vars(module)[name]


def _import_module(name: str) -> Any:
    _look_in(Path.cwd())  # which is not looked in where an installed script was started
    return importlib.import_module(name)


def _look_in(folder: Path) -> None:
    """Modules of this folder can be imported, where no other has their name."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(path)
    name = f"flowalign_user_{path.resolve()}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    _look_in(path.resolve().parent)  # so that it can import its neighbours
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
