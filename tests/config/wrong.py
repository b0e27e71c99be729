"""Wrong configurations for tests: files, their keys and types, mistakes, and the answer to them."""

import copy
import dataclasses
import inspect
import io
import re
import string
from contextlib import redirect_stderr, redirect_stdout
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, get_args, get_origin, get_type_hints, Literal

import yaml
from hypothesis import settings
from hypothesis import strategies as st

from flowalign.bundled import CONFIGS
from flowalign.cli import main
from flowalign.config.load import load_config
from flowalign.config.resolved import resolve
from flowalign.config.sections import Config

Key = tuple[str, ...]
"""Names of sections, from the top."""

SHIPPED = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent != CONFIGS / "base")
SCENE = {"rewards": {"scene_match": 1.0}, "evaluation": {"rewards": {"scene_match": 1.0}}}
"""Rewards that cost milliseconds."""
ADVICE = re.compile(
    "write|choose|must be|Did you mean|has |missing|give|rename|nearest|name |It belongs|use "
    "|take |are |remove|set ",
    re.IGNORECASE,
)
"""How a message says what to type."""


def examples(count: int) -> Any:
    """The same examples in every run."""
    return settings(max_examples=count, derandomize=True, deadline=None, database=None)


@cache
def loaded(path: Path) -> Config:
    return load_config(path)


@cache
def resolved_once(path: Path) -> dict[str, Any]:
    return resolve(loaded(path))


def resolved(path: Path) -> dict[str, Any]:
    """The file with every key that it could have."""
    return copy.deepcopy(resolved_once(path))


def refusal(wrong: dict[str, Any] | str | bytes, *overrides: str) -> str:
    """The error of `flowalign train` for a file with this content; nothing may be written."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "wrong.yaml"
        if isinstance(wrong, dict):
            wrong = yaml.safe_dump({"output": f"{folder}/run", **wrong}, sort_keys=False)
        path.write_bytes(wrong.encode() if isinstance(wrong, str) else wrong)
        message = train_error(path, *overrides)
        assert message.startswith((f"{path}: ", f"{path} ")), message
        assert [file.name for file in Path(folder).iterdir()] == ["wrong.yaml"]
    return message


def train_error(path: Path, *overrides: str) -> str:
    """The one line that `flowalign train` ends with."""
    with redirect_stderr(io.StringIO()) as stderr, redirect_stdout(io.StringIO()):
        status = main(["train", str(path), *overrides])
    message = stderr.getvalue()
    assert status == 2
    assert "Traceback" not in message
    assert message.count("\n") == 1, message
    return message


def explains(message: str, *keys: str) -> bool:
    """True if the message names the keys and says what to type."""
    return bool(ADVICE.search(message)) and all(key in message for key in keys)


@cache
def keys_of(path: Path) -> dict[Key, dict[str, Any]]:
    """The types of all keys, by section."""
    config, raw = loaded(path), resolved_once(path)
    types: dict[Key, dict[str, Any]] = {(): dict.fromkeys(raw, dict) | {"output": str}}
    for name in ("model", "sampler", "objective", "combine", "data", "train", "evaluation"):
        collect_fields((name,), type(getattr(config, name)), types)
    for key, function in (
        (("advantage",), config.advantage),
        (("sampler", "dynamics"), config.sampler.dynamics),
    ):
        function = function.func if isinstance(function, partial) else function
        arguments = inspect.signature(function).parameters.values()
        types[key] = {p.name: p.annotation for p in arguments if p.default is not p.empty}
    for key in (("objective",), ("combine",), ("advantage",), ("sampler", "dynamics")):
        types[key] = {"name": Literal["a name"], **types[key]}
    types["evaluation", "sampler"] = {
        k: v
        for k, v in types["sampler",].items()
        if k in ("steps", "guidance", "embedded_guidance")
    }
    return types


def collect_fields(key: Key, cls: type, types: dict[Key, dict[str, Any]]) -> None:
    """Add the fields of a dataclass, and of those inside it, to the types."""
    hints = get_type_hints(cls, include_extras=True)
    types[key] = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    for name, kind in types[key].items():
        if dataclasses.is_dataclass(kind):
            collect_fields((*key, name), kind, types)


def plain(kind: Any) -> Any:
    """The type without its range."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def at(raw: dict[str, Any], section: Key) -> dict[str, Any]:
    for name in section:
        raw = raw[name]
    return raw


@st.composite
def keys(draw, files=SHIPPED, kinds=()):
    """A file, a section of it, a key of that section, and its type."""
    path = draw(st.sampled_from(files))
    written = [
        (section, name, kind)
        for section, names in keys_of(path).items()
        for name, kind in names.items()
        if name in at(resolved_once(path), section) and (not kinds or plain(kind) in kinds)
    ]
    return path, *draw(st.sampled_from(written))


@st.composite
def misspelt(draw, word):
    """A letter inserted, left out, replaced, or two swapped."""
    i, letter = (
        draw(st.integers(0, len(word) - 1)),
        draw(st.sampled_from(string.ascii_lowercase + "_")),
    )
    forms = [
        word[:i] + letter + word[i:],
        word[:i] + word[i + 1 :],
        word[:i] + letter + word[i + 1 :],
    ]
    return draw(st.sampled_from([*forms, word[:i] + word[i : i + 2][::-1] + word[i + 2 :]]))


def renamed(section: dict[str, Any], name: str, wrong: str) -> dict[str, Any]:
    return {wrong if key == name else key: value for key, value in section.items()}


def with_section(raw: dict[str, Any], section: Key, new: dict[str, Any]) -> dict[str, Any]:
    if not section:
        return new
    at(raw, section[:-1])[section[-1]] = new
    return raw
