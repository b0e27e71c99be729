"""Find files: in the working directory, next to a configuration, or among those of the package.

`configs/` and `assets/` come with flowalign, in a clone and in an installed wheel.
"""

import os
from collections.abc import Iterable
from pathlib import Path

PACKAGE = Path(__file__).parent
# A wheel holds the two folders inside the package, a clone next to it. The inside comes first: next
# to an installed package, a folder named `configs` belongs to somebody else.
ROOT = PACKAGE if (PACKAGE / "configs").is_dir() else PACKAGE.parent
CONFIGS = ROOT / "configs"
ASSETS = ROOT / "assets"


def locate(path: str, folders: Iterable[Path] = ()) -> str:
    """Return where a file or folder that a user named exists.

    The working directory comes first, then `folders` in their order, then what comes with
    flowalign: `assets/...`, `configs/...`, and YAML files under `configs/`. A path that exists in
    the working directory, or nowhere, is returned as written, apart from `~`. A name that exists
    nowhere may be a repository on the Hugging Face hub.
    """
    path = os.path.expanduser(path)
    if not path or os.path.isabs(path) or os.path.exists(path):
        return path
    for candidate in (*(folder / path for folder in folders), *bundled_candidates(path)):
        if os.path.exists(candidate):
            return os.path.abspath(candidate)
    return path


def bundled_candidates(path: str) -> list[Path]:
    """Return where a relative path could be among the files of the package."""
    candidates = []
    # Only these two folders: in a wheel, `models` or `data` would be found as Python packages.
    if Path(path).parts[:1] in (("assets",), ("configs",)):
        candidates.append(ROOT / path)
    if path.endswith(".yaml"):
        candidates.append(CONFIGS / path)
    return candidates


def portable(path: str) -> str:
    """Return the name under which another machine may find a file or folder.

    That is `assets/...` for what comes with flowalign, wherever it is installed. A path in the
    working directory becomes relative to it. Any other text is returned as it is.
    """
    if not os.path.exists(path):
        return path  # a repository on the hub
    absolute = Path(os.path.abspath(path))
    base = ROOT if absolute.is_relative_to(ASSETS) else Path.cwd()
    return absolute.relative_to(base).as_posix() if absolute.is_relative_to(base) else path


def locate_spec(spec: str, folders: Iterable[Path] = ()) -> str:
    """Return `file.py:name` with its file located; any other text as it is."""
    file, colon, name = spec.rpartition(":")
    return f"{locate(file, folders)}:{name}" if colon and file.endswith(".py") else spec
