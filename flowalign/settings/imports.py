"""Import the users' code that a YAML file names: a file of any folder, or a module."""

import hashlib
import importlib
import importlib.util
import sys
import sysconfig
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

from flowalign.bundled import locate
from flowalign.progress import say


@dataclass(frozen=True)
class Loaded:
    """A file that was imported, with the modules beside it that it imported."""

    modules: dict[str, ModuleType]
    """The modules by name; the file itself comes first."""
    sources: dict[Path, bytes]
    """The content that the files of all modules had then."""

    @property
    def is_current(self) -> bool:
        """True if every file still holds what was imported."""
        return all(_content(path) == source for path, source in self.sources.items())


_files: dict[Path, Loaded] = {}
"""Files that were imported in this process."""
_modules: dict[Path, bytes] = {}
"""The content of the files of named modules when they were first imported."""


def import_file(file: str) -> ModuleType:
    """Import a Python file as it is now; while it is unchanged, the same module is returned.

    Raises FileNotFoundError if it does not exist, or whatever the file raises.
    """
    path = Path(locate(file))
    if not path.is_file():
        raise FileNotFoundError(path)
    path = path.resolve()
    loaded = _files.get(path)
    if loaded and loaded.is_current:
        return next(iter(loaded.modules.values()))
    if loaded:
        _forget(loaded)
    search_in(path.parent)  # the file may import its neighbours
    earlier = set(sys.modules)
    name = _module_name(path)
    module = _execute(name, path)
    added = {n: m for n, m in sys.modules.items() if n not in earlier}
    modules = {name: module} | {n: m for n, m in added.items() if _is_beside(m, path)}
    sources = {_file(m): _content(_file(m)) for m in modules.values()}
    _files[path] = Loaded(modules, sources)
    return module


def import_module(name: str) -> ModuleType:
    """Import a module, also one in the working directory. Raises whatever the module raises."""
    # An installed command does not have the working directory on its path, as `python FILE` has.
    search_in(Path.cwd())
    module = importlib.import_module(name)
    file = _file(module)
    if _modules.setdefault(file, _content(file)) != _content(file):
        # Others may hold its classes, so it is not imported a second time.
        say(
            f"{file} has changed since it was imported, and the older version is used. "
            "Start Python again to use the new one."
        )
    return module


def search_in(folder: Path) -> None:
    """Let modules of a folder be imported; any other module of the same name comes first."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def in_standard_library(source: str) -> bool:
    """Return True for a module or a file of Python's standard library."""
    if not source.endswith(".py"):
        return source.partition(".")[0] in sys.stdlib_module_names
    path = Path(locate(source)).resolve()
    # Installed packages may lie in a folder of the standard library.
    inner = [Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")]
    outer = Path(sysconfig.get_path("stdlib")).resolve()
    return path.is_relative_to(outer) and not any(path.is_relative_to(place) for place in inner)


class CurrentSource(SourceFileLoader):
    """Compiles a file as it is now. Python's cached bytecode knows its date by the second only."""

    def get_code(self, fullname: str):
        """Return the compiled file."""
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def _execute(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path, loader=CurrentSource(name, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Before it runs: dataclasses look up the module of their class.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _module_name(path: Path) -> str:
    """Return the name that a file gets as a module.

    It is the file's own if an import finds the file by it, so that functions of the file can be
    pickled for other processes. Otherwise it is a name that hides no other module.
    """
    own = path.stem
    # A name that was imported already belongs to somebody who keeps using that module.
    if own.isidentifier() and own not in sys.modules and _found_by_import(own) == path:
        return own
    # No dots: pickle would take what stands before them for packages.
    return f"flowalign_user_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"


def _found_by_import(name: str) -> Path | None:
    # The finders remember what folders held, and the file may be new.
    importlib.invalidate_caches()
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).resolve() if spec and spec.origin else None


def _forget(loaded: Loaded) -> None:
    """Let the modules of a file be imported anew. Objects that were made of them stay as they are.

    A name that stands for another module by now is left alone.
    """
    for name, module in loaded.modules.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]


def _is_beside(module: object, path: Path) -> bool:
    """Return True for a module that lies in the folder of a file under the name it is imported by.

    A package of an environment inside that folder does not: its name says nothing of the folder.
    """
    # Libraries put other objects into `sys.modules` as well.
    if not isinstance(module, ModuleType):
        return False
    place = path.parent.joinpath(*module.__name__.split("."))
    return _file(module) in (place.with_suffix(".py"), place / "__init__.py")


def _file(module: ModuleType) -> Path:
    return Path(vars(module).get("__file__") or "").resolve()


def _content(path: Path) -> bytes:
    """Return what a file holds, and nothing for what is not a file."""
    return path.read_bytes() if path.is_file() else b""
