"""YAML from strangers: strict values, and limits that hold before anything is built from a text."""

import itertools
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from flowalign.errors import UserError
from flowalign.settings import yaml_files
from flowalign.settings.merging import escape
from flowalign.settings.yaml_files import (
    _Loader,
    dump_yaml,
    MAX_CHARACTERS,
    MAX_FILES,
    MAX_VALUES,
    parse_yaml,
    read_yaml,
)

LETTERS = "abcdefghi"


def bomb(line: str) -> str:
    """Ten lines, each with nine aliases of the line before."""
    lines = ["a: &a {k: 1}"]
    for before, letter in itertools.pairwise(LETTERS):
        lines.append(f"{letter}: &{letter} " + line.format(", ".join([f"*{before}"] * 9)))
    return "\n".join(lines)


LISTS, MERGES = bomb("[{}]"), bomb("{{<<: [{}]}}")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(LISTS, id="aliases of lists"),
        pytest.param(MERGES, id="aliases of merged mappings"),
        pytest.param("a: &a [1]\nb: [" + "*a, " * 9_000 + "]", id="many aliases"),
        pytest.param("\n".join(f"key{i}: 1" for i in range(30_000)), id="30,000 keys"),
        pytest.param("\n".join(f"k{i}: 1" for i in range(7_000)), id="7,000 keys"),
        pytest.param("[" * 60_000, id="nested lists"),
        pytest.param("{a: " * 15_000, id="nested mappings"),
        pytest.param("- " * 30_000, id="nested entries"),
        pytest.param("? " * 30_000, id="nested keys"),
        pytest.param("[x, " * 15_000, id="a list in a list in a list"),
        pytest.param("x" * (MAX_CHARACTERS + 1), id="a long text"),
    ],
)
def test_a_hostile_text_is_refused_by_its_size(text):
    with pytest.raises(UserError, match=r"^it is too large|^it has over"):
        parse_yaml(text, "it")


NODES = ("compose_scalar_node", "compose_sequence_node", "compose_mapping_node")
"""Methods of PyYAML's composer; each call makes one node."""


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(LISTS, id="aliases of lists"),
        pytest.param(MERGES, id="aliases of merged mappings"),
        pytest.param("\n".join(f"key{i}: 1" for i in range(30_000))[:MAX_CHARACTERS], id="keys"),
        pytest.param("- " * 30_000, id="nested entries"),
    ],
)
def test_a_hostile_text_costs_no_more_work_than_an_honest_one(text, monkeypatch):
    """Counted, not timed: at most as many nodes as the limit, and none of them becomes a value."""
    made = []

    def counting(method):
        def make(*arguments):
            made.append(method)
            return method(*arguments)

        return make

    def never(*_):
        raise AssertionError("a value is built from the text")

    for name in NODES:
        monkeypatch.setattr(_Loader, name, counting(getattr(_Loader, name)))
    monkeypatch.setattr(_Loader, "construct_document", never)
    with pytest.raises(UserError, match="too large"):
        parse_yaml(text, "it")
    assert len(made) <= MAX_VALUES


def test_bombs_are_small():
    assert len(LISTS) < 1_000
    assert len(MERGES) < 1_000


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: &t {b: *t}", "an alias stands inside its own anchor"),
        ("&t [*t]", "an alias stands inside its own anchor"),
        ("a: !!python/object:os.system {}", "could not determine a constructor for the tag"),
        ("a: !!python/name:os.system", "could not determine a constructor for the tag"),
        ("{a: 1, a: 2}", "the key 'a' is written twice"),
        ("? [a]\n: b", "a key is a list or a mapping"),
        ("a: \x00", "special characters are not allowed"),
    ],
)
def test_loops_tags_and_double_keys_are_refused(text, problem):
    with pytest.raises(UserError, match="it is not YAML") as error:
        parse_yaml(text, "it")
    assert problem in str(error.value)


def test_an_error_names_line_and_column():
    with pytest.raises(UserError, match="line 2, column 4"):
        parse_yaml("a: 1\nb: [1\n", "it")


def test_as_many_values_as_the_limit_are_read():
    text = "[" + ", ".join(["1"] * (MAX_VALUES - 1)) + "]"
    assert parse_yaml(text, "it") == [1] * (MAX_VALUES - 1)


def test_an_alias_counts_as_what_it_stands_for():
    half = ", ".join(["1"] * (MAX_VALUES // 2))
    with pytest.raises(UserError, match="too large"):
        parse_yaml(f"a: &a [{half}]\nb: *a", "it")


@pytest.mark.parametrize("text", ["1" * 63_000 + "x", "1_" * 31_000 + "x", "1" * 60_000 + ".e"])
def test_a_long_text_that_begins_as_a_number_is_read_as_text(text):
    # A pattern that backtracks would take minutes here.
    assert parse_yaml(f"a: {text}", "it") == {"a": text}


@pytest.mark.parametrize(
    "text", ["010", "0891234", "010.5", "00", "-01", "01e5", "1:30", "1e", "."]
)
def test_a_text_is_not_taken_for_a_number(text):
    assert parse_yaml(text, "it") == text


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("0", 0), ("-12", -12), ("1_000", 1000), ("1e-4", 1e-4), ("0.5", 0.5), ("0e3", 0.0)),
        *((".5", 0.5), ("5.", 5.0), ("+1.5E+2", 150.0), ("1_0.2_5", 10.25), ("-.inf", -math.inf)),
    ],
)
def test_a_decimal_number_is_read(text, number):
    value = parse_yaml(text, "it")
    assert (value, type(value)) == (number, type(number))


LIKE_OTHER_TYPES = [
    *("12345e67", "1e5", "1e-4", "0891234", "010", "1:30", "1:30.5", "0x10", "0b1", "0o7", "1_0"),
    *("2026-01-02", "2026-01-02 10:00:00", "yes", "on", "off", "y", "null", "~", "", ".5e3", "._"),
    *("-.inf", ".nan", "<<", "=", "!x", "&x", "*x", "# x", "a: b", "- a", "? a", "%", "@", "`"),
    *("\u7ea2\u8272", "caf\xe9", "\U0001f600", "\x85", "\u2028", "\ufeff", "\x7f", "\x00", "a\nb"),
    *(" a", "a ", "a\n", "\ta", "'", '"', "\\", "${a}", "\\${a}", "x" * 200, "a b " * 60),
]
"""Texts that some reader of YAML takes for something else, or that need care to be written."""
TEXTS = st.sampled_from(LIKE_OTHER_TYPES) | st.text()
SCALARS = TEXTS | st.integers() | st.floats() | st.booleans() | st.none()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def same(one, other) -> bool:
    """Equal in value and type, also for NaN and below lists and mappings."""
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and repr(one) == repr(other)


@pytest.mark.parametrize(
    "value", [*LIKE_OTHER_TYPES, 1e-05, 1e16, 1.5, 12, -math.inf, -0.0, True, None, [1, 2.0]]
)
def test_a_value_is_written_so_that_every_reader_returns_it(value):
    text = dump_yaml({"a": value, str(value): 1})
    for read in (parse_yaml(text, "it"), yaml.safe_load(text)):
        assert same(read, {"a": value, str(value): 1})


@given(VALUES)
def test_what_is_written_is_read_back_as_the_same_value(value):
    text = dump_yaml({"a": value})
    assert same(parse_yaml(text, "it"), {"a": value})
    assert same(parse_yaml(text.encode().decode("utf-8-sig"), "it"), {"a": value})


@given(VALUES)
def test_omegaconf_reads_what_is_written_as_the_same_value(value):
    text = dump_yaml({"a": escape(value)})
    # OmegaConf has no lone key of another type, and `???` is its mark for a missing value.
    assume("???" not in text)
    config = OmegaConf.create(text)
    assert same(OmegaConf.to_container(config, resolve=True), {"a": value})


def test_a_file_beside_is_extended_before_one_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "beside").mkdir()
    (tmp_path / "base.yaml").write_text("a: 1\n")
    (tmp_path / "beside" / "base.yaml").write_text("a: 2\n")
    (tmp_path / "beside" / "child.yaml").write_text("extends: base.yaml\n")
    monkeypatch.chdir(tmp_path)
    assert read_yaml(Path("beside/child.yaml")).values == {"a": 2}
    (tmp_path / "beside" / "base.yaml").unlink()
    assert read_yaml(Path("beside/child.yaml")).values == {"a": 1}


def test_a_child_may_not_leave_a_value_of_its_parent_missing(tmp_path):
    (tmp_path / "base.yaml").write_text("train: {steps: 7}\n")
    child = tmp_path / "child.yaml"
    child.write_text("extends: base.yaml\ntrain:\n  steps: ???\n")
    with pytest.raises(UserError, match=r"child.yaml: train.steps is \?\?\?, which stands for"):
        read_yaml(child)


def test_a_child_may_write_a_value_that_its_parent_leaves_missing(tmp_path):
    (tmp_path / "base.yaml").write_text("train:\n  steps: ???\n")
    (tmp_path / "child.yaml").write_text("extends: base.yaml\ntrain: {steps: 7}\n")
    assert read_yaml(tmp_path / "child.yaml").values == {"train": {"steps": 7}}


def test_nested_references_of_a_file_are_refused_before_it_is_merged(tmp_path):
    (tmp_path / "base.yaml").write_text("a: 1\n")
    (tmp_path / "child.yaml").write_text("extends: base.yaml\nb: '" + "${" * 2_000 + "'\n")
    with pytest.raises(UserError, match=r"child.yaml: There are over"):
        read_yaml(tmp_path / "child.yaml")


def test_files_that_extend_each_other_count_as_one(tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("large files are merged")

    monkeypatch.setattr(yaml_files, "merge", never)
    half = {f"k{number}": 1 for number in range(MAX_VALUES // 4)}
    (tmp_path / "0.yaml").write_text(dump_yaml({"extends": "1.yaml", "a": half}))
    (tmp_path / "1.yaml").write_text(dump_yaml({"b": half}))
    with pytest.raises(UserError, match=r"0\.yaml with what it extends is too"):
        read_yaml(tmp_path / "0.yaml")


def test_a_chain_of_files_has_an_end(tmp_path):
    for number in range(MAX_FILES + 1):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\n")
    with pytest.raises(UserError, match=f"leads through over {MAX_FILES} files"):
        read_yaml(tmp_path / "0.yaml")


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/urandom"])
def test_a_device_without_an_end_is_refused(path):
    with pytest.raises(UserError, match=r"cannot be read|not YAML"):
        read_yaml(Path(path))
