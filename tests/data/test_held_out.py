"""Holding out a tenth of the given pictures."""

import pytest

from flowalign.data.examples import Example
from flowalign.data.held_out import hold_out, MOST
from flowalign.data.prompts import Prompt


def examples_of(*prompts: str) -> list[Example]:
    return [
        Example(prompt=Prompt(prompt), chosen=bytes, where=f"line {row}")
        for row, prompt in enumerate(prompts)
    ]


def numbered(count: int) -> list[Example]:
    return examples_of(*(f"prompt {i}" for i in range(count)))


@pytest.mark.parametrize(
    ("entries", "held_out"), [(0, 0), (1, 0), (2, 1), (10, 1), (11, 2), (24, 3), (600, 60)]
)
def test_a_tenth_is_held_out_and_the_rest_is_trained_on(entries, held_out):
    given = numbered(entries)
    trained, held = hold_out(given)
    assert len(held) == held_out
    # Both keep the order of the file, and nothing is lost or used twice.
    assert [e for e in given if e in trained] == trained
    assert [e for e in given if e in held] == held
    assert sorted(e.where for e in trained + held) == sorted(e.where for e in given)


def test_no_more_is_held_out_than_an_evaluation_can_compare():
    assert len(hold_out(numbered(MOST * 10 + 1000))[1]) == MOST


def test_the_entries_of_a_prompt_stay_together():
    given = examples_of(*(f"prompt {i % 30}" for i in range(100)))
    trained, held = hold_out(given)
    assert len(held) >= 6
    assert not {e.prompt.text for e in held} & {e.prompt.text for e in trained}


@pytest.mark.parametrize("prompts", [["one"] * 24, ["one"] * 12 + ["two"] * 12])
def test_entries_are_held_out_one_by_one_if_no_prompt_fits(prompts):
    trained, held = hold_out(examples_of(*prompts))
    assert (len(trained), len(held)) == (21, 3)


def test_the_choice_depends_on_the_data_alone():
    assert hold_out(numbered(50)) == hold_out(numbered(50))


def test_the_choice_is_spread_over_the_file():
    """The entries of a file are often sorted by kind."""
    rows = [int(e.where.removeprefix("line ")) for e in hold_out(numbered(1000))[1]]
    assert all(sum(start <= row < start + 250 for row in rows) > 10 for start in (0, 250, 500, 750))
