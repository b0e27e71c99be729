"""What a `name` in a YAML stands for: an entry of a table, or something of the user's own, by file or module."""

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

from flowalign.errors import did_you_mean, similar_file, UserError
from flowalign.settings import configure, mapping


def build_named(table: dict[str, Any], section: Any, key: str, kind: type | tuple[str, ...]) -> Any:
    """What `name` asks for, with the section's other fields as its settings: of a class, or a function of these arguments."""
    if isinstance(section, str):
        raise UserError(f"{key} is {section!r}; write {key}: {{name: {section}}}.")
    section = mapping(section, key)
    name = section.get("name")
    if not isinstance(name, str):
        raise UserError(f"{key}.name is {'missing' if name is None else repr(name)}; choose from {', '.join(table)}.")
    place = table.get(name, name)
    entry = imported(place, f"{key}.name", table) if isinstance(place, str) else place
    made = configure(entry, {k: v for k, v in section.items() if k != "name"}, key, ("name",))
    if isinstance(kind, type) and not isinstance(made, kind):
        raise UserError(f"{key}.name: {type(made).__name__} must be a subclass of {kind.__module__}.{kind.__name__}.")
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
        raise UserError(
            f"{key}: there is no {spec!r}; choose from {', '.join(table)}, "
            f'or name your own: "my_file.py:{spec}".{did_you_mean(spec, table)}'
        )
    try:
        module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    except FileNotFoundError:
        raise UserError(f"{key}: there is no file {place} (looked in {Path.cwd()}).{similar_file(place)}") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"{key}: {place} cannot be imported: {type(error).__name__}: {error}") from error
    if name not in vars(module):
        public = [n for n, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
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
