"""YAML files as mappings: `extends`, overrides of the command line, and errors that name the file and the line."""

import os
import re
from pathlib import Path
from typing import Any

import yaml

from flowalign.bundled import CONFIGS
from flowalign.errors import similar_file, UserError

REPLACED = ("rewards",)
"""Maps that a child YAML or an override replaces as a whole."""


def read_yaml(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML file merged over what it extends."""
    if path.resolve() in [child.resolve() for child in children]:
        raise UserError(f"{path}: extends itself, through {' -> '.join(map(str, children))}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"there is no file {path}.{similar_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read: {error}; give a YAML file, saved as UTF-8."
        ) from None
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else type(raw).__name__
        raise UserError(f"{path}: expected sections such as `model:` and `train:`, found {found}.")
    if "extends" not in raw:
        return raw
    parent = raw.pop("extends")
    if not isinstance(parent, str):
        raise UserError(
            f"{path}: extends is {parent!r}; write one file, such as base/tiny-sd3.yaml."
        )
    for place in (path.parent / parent, CONFIGS / parent):
        if os.path.isfile(place):
            return merge(read_yaml(place, (*children, path)), raw)
    raise UserError(
        f"{path}: extends: there is no file {parent} beside it or under configs/.{similar_file(CONFIGS / parent)}"
    )


class _Loader(yaml.SafeLoader):
    """Numbers are decimal: 1e-4 is one, and neither 010 nor 1:30 is 8 or 90. Keys written twice are refused, and loops."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value]
        for i, (key, _) in enumerate(node.value):
            if key.value in keys[:i]:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is written twice", problem_mark=key.start_mark
                )
        return node

    def construct_document(self, node: Any) -> Any:
        return self.construct_object(node, deep=True)


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in rules
        if tag.rpartition(":")[2] not in ("int", "float", "timestamp")
    ]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))$|^\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str, what: str) -> Any:
    """UserError where it is not YAML, or has a value that its tag cannot read."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).replace('in "<unicode string>", ', "").split())
        raise UserError(f"{what} is not YAML: {reason}") from None


def overridden(raw: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A file with overrides laid over it, in their order. UserError for one that would have no effect."""
    given = [(text.partition("=")[0], text, parse_override(text)) for text in overrides]
    for key, _, nested in given:
        raw = merge(raw, nested, replaced=() if {*key.split(".")[:-1]} & {*REPLACED} else REPLACED)
    for i, (key, text, nested) in enumerate(given):
        if key not in [later for later, _, _ in given[i + 1 :]] and not _holds(raw, nested):
            raise UserError(
                f"{text!r} would have no effect: an empty map changes nothing, and a section whose name changes later loses "
                f"its other keys; name a key of {key.partition('.')[0]}, and a section's name before its other keys."
            )
    return raw


def _holds(raw: Any, asked: Any) -> bool:
    """Whether every key that was asked for is there; what is asked for as an empty map must be one."""
    if not isinstance(asked, dict):
        return True
    return isinstance(raw, dict) and (
        all(key in raw and _holds(raw[key], asked[key]) for key in asked) if asked else not raw
    )


def parse_override(text: str) -> dict[str, Any]:
    """`train.steps=10` as the nested mapping it stands for; values are YAML."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(
            f"{text!r} is not an override; write section.key=value, for example train.steps=10."
        )
    nested: Any = parse_yaml(value, f"{text!r}: the value")
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return nested


def merge(
    parent: dict[str, Any], child: dict[str, Any], replaced: tuple[str, ...] = REPLACED
) -> dict[str, Any]:
    """The child over the parent. Reward maps replace; so does a section whose `name` changes; others merge."""
    merged = dict(parent)
    for key, value in child.items():
        before = merged.get(key)
        if isinstance(before, dict) and isinstance(value, dict) and key not in replaced:
            renamed = "name" in value and value["name"] != before.get("name")
            merged[key] = value if renamed else merge(before, value, replaced)
        else:
            merged[key] = value
    return merged
