"""Read YAML files as mappings, with strict values, small limits, and errors with file and line.

A configuration may come from a stranger. Text is measured before anything is built from it, so that
a hostile file is refused at once.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from flowalign.bundled import CONFIGS, locate
from flowalign.errors import naming, similar_file, UserError
from flowalign.settings.merging import check_limits, check_written, count, merge, Section

MAX_CHARACTERS = 64_000
MAX_VALUES = 2_000
"""Keys and values of a file, with aliases written out."""
MAX_DEPTH = 20
MAX_FILES = 10
"""Files in one chain of `extends`."""


@dataclass(frozen=True)
class YamlFile:
    """A file merged over what it extends."""

    values: Section
    folders: tuple[Path, ...]
    """Folders of the file and of those it extends: relative paths are looked up there."""
    parent: tuple[Path, Section] | None = None
    """The file that it extends and what that holds, with what it extends in turn."""


def read_yaml(path: Path, children: tuple[Path, ...] = ()) -> YamlFile:
    """Read a YAML file and what it extends.

    Args:
        path: the file.
        children: the files whose `extends` led here, the first one first.

    Raises:
        UserError: a file does not exist, is not a mapping, or extends itself.
    """
    # Resolved, because a loop may pass through links or `..`.
    if path.resolve() in [child.resolve() for child in children]:
        chain = " -> ".join(map(str, children))
        raise UserError(f"{path}: the file extends itself, through {chain}. Remove one `extends`.")
    if len(children) >= MAX_FILES:
        raise UserError(f"{path}: `extends` leads through over {MAX_FILES} files. Merge some.")
    values = parse_yaml(read_text(path), str(path))
    if not isinstance(values, dict):
        kind = "nothing" if values is None else type(values).__name__
        raise UserError(f"{path}: expected sections such as `model:` and `train:`, found {kind}.")
    # OmegaConf parses references when it merges, so their limits come first.
    with naming(path):
        check_limits(values)
    if "extends" not in values:
        return YamlFile(values, (path.parent,))
    parent_path = locate_parent(path, values.pop("extends"))
    # Merged, `???` would leave the parent's value.
    with naming(path):
        check_written(values)
    parent = read_yaml(parent_path, (*children, path))
    # A merge costs as much as both files, so ten large ones would take seconds.
    if count(parent.values) + count(values) > MAX_VALUES:
        raise too_large(f"{path} with what it extends")
    folders = (path.parent, *parent.folders)
    return YamlFile(merge(parent.values, values), folders, (parent_path, parent.values))


def locate_parent(path: Path, parent: object) -> Path:
    """Return the file that `extends` names: beside this file first, then as `locate` looks."""
    if not isinstance(parent, str):
        raise UserError(
            f"{path}: extends is {parent!r}. Write one file, such as base/tiny-sd3.yaml."
        )
    # Not the working directory first: a file must mean the same wherever it is loaded.
    beside = os.path.abspath(path.parent / os.path.expanduser(parent))
    located = beside if os.path.isfile(beside) else locate(parent)
    if not os.path.isfile(located):
        nearest = similar_file(path.parent / parent) or similar_file(CONFIGS / parent)
        raise UserError(
            f"{path}: extends: there is no file {parent} next to this file, in the working "
            f"directory, or under {CONFIGS}.{nearest}"
        )
    return Path(located)


def read_text(path: Path) -> str:
    """Return the text of a file of at most MAX_CHARACTERS characters."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            # Never the whole file: it may be gigabytes of weights, or a device without an end.
            text = file.read(MAX_CHARACTERS + 1)
    except FileNotFoundError:
        nearest = similar_file(path) or similar_file(CONFIGS / path)
        raise UserError(f"There is no file {path}.{nearest}") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read: {error}. Give a YAML file, saved as UTF-8."
        ) from None
    if len(text) > MAX_CHARACTERS:
        raise UserError(
            f"{path} cannot be read: it has more than {MAX_CHARACTERS:,} characters. "
            "Give a YAML file, saved as UTF-8."
        )
    return text


class _Loader(yaml.SafeLoader):
    """SafeLoader with decimal numbers only: 1e-4 is a number, and 010 and 1:30 are text."""

    def __init__(self, text: str, source: str):
        super().__init__(text)
        self.source, self.values, self.depth = source, 0, 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a value, and stop at the limits: the rest of a large text is never read."""
        self.values, self.depth = self.values + 1, self.depth + 1
        # PyYAML composes while it scans, so an error here saves scanning the rest.
        if self.values > MAX_VALUES or self.depth > MAX_DEPTH:
            raise too_large(self.source)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: dict[str, yaml.Node]) -> yaml.MappingNode:
        """Compose a mapping, and refuse a key that is written twice."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        # PyYAML would let the last one win, and a setting would be lost without a word.
        keys: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem="a key is a list or a mapping; write a word",
                    problem_mark=key.start_mark,
                )
            if key.value in keys:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is written twice", problem_mark=key.start_mark
                )
            keys.add(key.value)
        return node


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes texts which `_Loader` would read as numbers."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Represent a text."""
        # PyYAML writes these line breaks of Unicode as they are, and then reads them as spaces.
        style = '"' if {*text} & {"\x85", "\u2028", "\u2029"} else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


# PyYAML looks representers up in a table, not on the class.
_Dumper.add_representer(str, _Dumper.represent_text)


def _number_resolvers() -> None:
    """Replace YAML 1.1's numbers, in which 010 is 8, 1:30 is 90 and 1e-4 is a text."""
    numbers = ("int", "float", "timestamp")
    resolvers = yaml.SafeLoader.yaml_implicit_resolvers
    _Loader.yaml_implicit_resolvers = {
        first: [rule for rule in rules if rule[0].rpartition(":")[2] not in numbers]
        for first, rules in resolvers.items()
    }
    integer = re.compile(r"^[-+]?(0|[1-9][0-9_]*)$")
    # No digit can belong to two parts of the pattern, so that matching takes linear time.
    decimal = re.compile(
        r"^[-+]?(((0|[1-9][0-9_]*)(\.[0-9_]*)?|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?"
        r"|\.(inf|Inf|INF))$|^\.(nan|NaN|NAN)$"
    )
    # The dumper keeps YAML 1.1's numbers too: it quotes a text that either reader would change.
    for user in (_Loader, _Dumper):
        user.add_implicit_resolver("tag:yaml.org,2002:int", integer, list("-+0123456789"))
        user.add_implicit_resolver("tag:yaml.org,2002:float", decimal, list("-+0123456789."))


_number_resolvers()


def dump_yaml(values: Section) -> str:
    """Return a mapping as YAML that `parse_yaml` and every reader of YAML 1.1 reads as the same.

    OmegaConf is one of these readers. Text of any script stays as it is, so write it as UTF-8.
    """
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_yaml(text: str, source: str) -> object:
    """Return the value of a YAML text.

    Args:
        text: the YAML.
        source: where it stands, as the message of an error begins.

    Raises:
        UserError: it is not YAML, has a key twice, a tag that is not plain data, or is too large.
    """
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{source} has over {MAX_CHARACTERS:,} characters. Write a shorter one.")
    try:
        return construct(text, source)
    # PyYAML itself fails with the last three on some malformed tags.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).replace('in "<unicode string>", ', "").split())
        raise UserError(f"{source} is not YAML: {reason}") from None


def construct(text: str, source: str) -> object:
    """Return the value of a YAML text, or raise PyYAML's errors."""
    # In two steps, so that the tree is measured before aliases and merge keys are written out.
    loader = _Loader(text, source)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if measure(node, {}, ()) > MAX_VALUES:
            raise too_large(source)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def too_large(source: str) -> UserError:
    """Return the error of a text with more values than a configuration needs."""
    return UserError(
        f"{source} is too large. Write at most {MAX_VALUES:,} keys and values, with aliases "
        f"written out, nested at most {MAX_DEPTH} deep."
    )


def measure(node: yaml.Node, known: dict[int, int], parents: tuple[int, ...]) -> int:
    """Count the nodes of a YAML tree as if every alias were written out.

    An alias costs the parser nothing, but everything after it: nine lines of nine aliases each
    stand for 400 million values. Each node is visited once, so counting them is quick.
    """
    if id(node) in parents:
        raise yaml.MarkedYAMLError(
            problem="an alias stands inside its own anchor", problem_mark=node.start_mark
        )
    if id(node) not in known:
        inside = (*parents, id(node))
        known[id(node)] = 1 + sum(measure(child, known, inside) for child in children_of(node))
    return known[id(node)]


def children_of(node: yaml.Node) -> list[yaml.Node]:
    """Return the keys and values of a mapping, or the entries of a list."""
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []
