"""References `${...}` are filled in once, and a merge replaces what has another name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowalign.errors import UserError
from flowalign.settings.merging import (
    escape,
    interpolate,
    MAX_REFERENCES,
    merge,
    parse_override,
)
from flowalign.settings.yaml_files import parse_yaml


def refusal(values) -> str:
    with pytest.raises(UserError) as error:
        interpolate(values)
    return str(error.value)


def test_a_reference_takes_the_value_and_its_type():
    values = {"a": "${b.c}", "b": {"c": 1e-4, "d": "${a}"}, "e": ["${b.c}", "x${b.c}"]}
    assert interpolate(values) == {
        "a": 1e-4,
        "b": {"c": 1e-4, "d": 1e-4},
        "e": [1e-4, "x0.0001"],
    }


def test_a_reference_to_a_section_takes_all_of_it():
    values = {"a": "${b}", "b": {"c": {"d": "${e}"}}, "e": 3}
    assert interpolate(values)["a"] == {"c": {"d": 3}}


def test_a_reference_may_be_relative_and_a_key_may_have_dots():
    assert interpolate({"a": {"b.c": "${.d}", "d": 2}})["a"] == {"b.c": 2, "d": 2}


def test_the_environment_is_read(monkeypatch):
    monkeypatch.setenv("FLOWALIGN_TEST", "here")
    assert interpolate({"a": "${oc.env:FLOWALIGN_TEST}/b"}) == {"a": "here/b"}
    assert interpolate({"a": "${oc.env:NOT_SET_ANYWHERE,there}"}) == {"a": "there"}


def test_an_escaped_reference_is_plain_text():
    assert interpolate({"a": "\\${b}"}) == {"a": "${b}"}


@given(st.lists(st.sampled_from(["\\", "${", "}", "{", "$", "x", "'", ":", " "]), max_size=8))
def test_an_escaped_text_is_read_back_as_it_is(parts):
    text = "".join(parts)
    values = {"a": escape(text), "b": "${a}", "c": "${d}", "d": {"e": "${a}"}}
    assert interpolate(values) == {"a": text, "b": text, "c": {"e": text}, "d": {"e": text}}


def test_a_text_with_half_a_reference_is_plain_once_escaped():
    values = {"a": "costs \\${5 each", "b": "${a}", "c": "write \\${ here"}
    text = "costs ${5 each"
    assert interpolate(values) == {"a": text, "b": text, "c": "write ${ here"}


def test_escaping_makes_lists_of_tuples():
    assert escape({"a": (1, ("${",))}) == {"a": [1, ["\\${"]]}


def test_an_override_with_nested_references_is_refused_by_their_number():
    with pytest.raises(UserError, match=f"over {MAX_REFERENCES} references"):
        parse_override("a=" + "${" * 2_000, parse_yaml)


def test_references_that_are_nested_too_deep_for_a_parser_are_refused():
    with pytest.raises(UserError, match="nested too deep"):
        merge({}, {"a": "${a:" * 2_000 + "}" * 2_000})


def test_values_without_references_stay_as_they_are():
    values = {"a": [1, {"b": None}], "c": "$d {e}"}
    assert interpolate(values) == values


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("${c.d}", "but there is no key c.d. Refer to a key"),
        ("${oc.env:NOT_SET_ANYWHERE}", "but the environment variable NOT_SET_ANYWHERE is not set"),
        ("${nothing:3}", "Unsupported interpolation type nothing"),
        ("${a.b}", "refers to itself|Recursive interpolation"),
    ],
)
def test_a_reference_that_leads_nowhere_is_named_by_its_key(text, problem):
    message = refusal({"a": {"b": text}})
    assert message.startswith(f"a.b is {text!r}, ")
    assert any(part in message for part in problem.split("|"))


def test_a_malformed_reference_is_named_by_its_key():
    with pytest.raises(UserError, match=r"^a cannot be used: .* references are \$\{section.key\}"):
        merge({}, {"a": "x${"})


def test_references_in_a_circle_are_refused():
    assert "a is '${b}', which refers to itself" in refusal({"a": "${b}", "b": "${a}"})


def grown(value, form) -> dict[str, object]:
    """Ten keys, each a few references to the next."""
    return {f"k{i}": form(f"${{k{i + 1}}}") for i in range(9)} | {"k9": value}


@pytest.mark.parametrize(
    "values",
    [
        grown("x" * 900, lambda reference: reference * 5),
        grown({str(i): i for i in range(300)}, lambda one: {"x": one, "y": one, "z": one}),
        grown([1] * 1000, lambda reference: [reference] * 5),
        {"a": ["${b}"] * (MAX_REFERENCES + 1), "b": 1},
        {"a": "${" * 5_000},
        {"a": "${oc.env:HOME}" + "x" * 50_000},
    ],
    ids=["text", "sections", "lists", "many", "nested", "long"],
)
def test_references_that_grow_are_refused(values):
    assert refusal(values)


def test_a_list_replaces_a_section_and_the_reverse():
    assert merge({"a": {"b": 1}}, {"a": [1]}) == {"a": [1]}
    assert merge({"a": [1]}, {"a": {"b": 1}}) == {"a": {"b": 1}}
    assert merge({"a": [1, 2, 3]}, {"a": [4]}) == {"a": [4]}


def test_a_section_keeps_its_settings_while_its_name_stays():
    parent = {"a": {"name": "x", "b": 1}}
    assert merge(parent, {"a": {"c": 2}}) == {"a": {"name": "x", "b": 1, "c": 2}}
    assert merge(parent, {"a": {"name": "x", "c": 2}}) == {"a": {"name": "x", "b": 1, "c": 2}}
    assert merge(parent, {"a": {"name": "y", "c": 2}}) == {"a": {"name": "y", "c": 2}}


def test_a_missing_value_does_not_hide_that_of_the_parent():
    assert merge({"a": 1}, {"a": "???"}) == {"a": 1}
