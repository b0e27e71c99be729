"""The console: plain lines in a pipe, bars on a terminal, and tables that fit 80 columns."""

import io
import math
import re
import sys
import time

import pytest
from rich.console import Console
from rich.text import Text

from flowalign import progress
from flowalign.reporting.console import (
    interval_note,
    make_console,
    PlainDisplay,
    print_differences,
    print_facts,
    shown,
)
from flowalign.reporting.summary import Baseline


def plain_console():
    return Console(file=io.StringIO(), width=80, highlight=False, markup=False)


def terminal_console():
    return Console(file=io.StringIO(), width=80, force_terminal=True, highlight=False, markup=False)


def test_in_a_pipe_progress_is_plain_lines():
    console = plain_console()
    with shown(console), progress.task("training", total=3) as work:
        for _ in range(3):
            work.advance(note="loss 0.5")
        progress.say("a message with [brackets]")
    text = console.file.getvalue()
    assert "\x1b" not in text
    assert "\r" not in text
    assert text.splitlines() == [
        "training: 0 of 3",
        "training: 1 of 3  loss 0.5",
        "a message with [brackets]",
        "training: 3 of 3  loss 0.5",
    ]


def test_in_a_pipe_a_line_comes_whenever_enough_time_has_passed():
    console = plain_console()
    display = PlainDisplay(console, seconds=0.0)
    with progress.shown_on(display), progress.task("encoding prompts", total=2) as work:
        work.advance()
        work.advance()
    lines = console.file.getvalue().splitlines()
    assert lines == [f"encoding prompts: {done} of 2" for done in range(3)]


def test_a_task_inside_another_one_prints_no_start_and_no_end():
    console = plain_console()
    with shown(console), progress.task("training", total=2) as work:
        assert list(progress.track([1, 2], "evaluating")) == [1, 2]
        work.advance(2)
    assert console.file.getvalue() == "training: 0 of 2\ntraining: 2 of 2\n"


def test_a_task_of_one_item_prints_nothing():
    console = plain_console()
    with progress.shown_on(PlainDisplay(console, seconds=0.0)):
        assert list(progress.track(["a"], "encoding prompts")) == ["a"]
    assert console.file.getvalue() == ""


def test_a_training_of_one_step_still_prints_its_result():
    console = plain_console()
    with shown(console), progress.task("training", total=1) as work:
        work.advance(note="reward 0.43")
    assert console.file.getvalue() == "training: 1 of 1  reward 0.43\n"


def test_a_task_of_unknown_length_prints_its_description_once():
    console = plain_console()
    with shown(console), progress.task("loading the model"):
        pass
    assert console.file.getvalue() == "loading the model\n"


def test_on_a_terminal_progress_is_a_bar_that_fits_80_columns():
    console = terminal_console()
    with shown(console), progress.task("training", total=300, done=299) as work:
        work.advance(note="reward 0.43, 12 images/s")
        progress.say("a message")
        time.sleep(0.6)  # the bar is drawn four times a second
    drawn = [Text.from_ansi(part) for part in re.split(r"[\r\n]", console.file.getvalue())]
    assert any("a message" in line.plain for line in drawn)
    bars = [line for line in drawn if "300/300" in line.plain]
    assert bars
    assert "reward 0.43, 12 images/s" in bars[-1].plain
    assert max(bar.cell_len for bar in bars) <= 80


def test_messages_are_printed_without_a_display(capsys):
    progress.say("resuming")
    with progress.task("nothing to see", total=1) as work:
        work.advance()
    assert capsys.readouterr().out == "resuming\n"


def test_only_the_first_process_prints(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with shown() as console, progress.task("training", total=1) as work:
        work.advance(note="loss 1")
        progress.say("a message")
        print_facts(console, "flowalign train", {"model": "tiny"})
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    assert not make_console().quiet


def test_progress_on_standard_error_is_for_terminals_alone(capsys):
    with shown(make_console(stderr=True)), progress.task("loading", total=2) as work:
        work.advance(note="half")
    assert capsys.readouterr() == ("", "")


LONG = "a_reward_with_a_name_that_is_far_longer_than_a_column_of_the_table"


def table(*baselines):
    """The lines of a table of these baselines, each with what training adds to it."""
    console = plain_console()
    scores = {"scene_match": 0.25, LONG: 12.5}
    columns = [Baseline(label=label, means=scores, difference=gain) for label, gain in baselines]
    print_differences(
        {name: score + 1 for name, score in scores.items()}, columns, 43, console=console
    )
    return console.file.getvalue().splitlines()


GAIN = {"scene_match": (0.1, 0.2, 0.3), LONG: (-math.inf, 0.5, math.inf)}


def test_the_table_of_differences_fits_80_columns_and_says_what_it_rests_on():
    lines = table(("base", GAIN))
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["reward", "base", "trained", "trained", "-", "base"]
    assert lines[1].split() == ["scene_match", *"0.250 1.250 +0.200 ± 0.100".split()]
    assert any("+0.500 ± unknown" in line for line in lines)
    assert lines[-1] == "The 95 % intervals (±) rest on 43 prompts."


def test_the_table_of_a_run_has_a_column_and_an_interval_for_each_baseline():
    lines = table(("base", GAIN), ("guided", {"scene_match": (-0.2, -0.1, 0.0)}))
    assert max(map(len, lines)) <= 80
    heads = ["base", "guided", "trained", "trained", "-", "base", "trained", "-", "guided"]
    assert lines[0].split() == ["reward", *heads]
    row = next(line for line in lines if line.startswith("scene_match"))
    assert row.split()[1:] == "0.250 0.250 1.250 +0.200 ± 0.100 -0.100 ± 0.100".split()
    # What the guided base has no figure for is a dash, such as the error of held-out pictures.
    long = next(line for line in lines if "12.500" in line)
    assert long.split()[-1] == "-"


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [(1, "Use several prompts"), (2, "Use 20 or more prompts"), (20, "20 prompts.")],
)
def test_few_prompts_are_named_as_a_weakness(prompts, expected):
    assert interval_note(prompts).endswith(expected) or expected in interval_note(prompts)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((0, 3), "rest on 3 held-out entries. Use 20 or more for a narrow interval."),
        ((0, 1), "rest on 1 held-out entry. Use 20 or more for a narrow interval."),
        ((0, 60), "rest on 60 held-out entries."),
        ((43, 60), "rest on 43 prompts. Those of held-out figures rest on 60 held-out entries."),
        ((43, 3), "rest on 3 held-out entries. Use 20 or more entries for a narrow interval."),
    ],
)
def test_the_note_says_how_many_held_out_entries_an_interval_rests_on(counts, expected):
    assert interval_note(*counts).endswith(expected)


def test_facts_are_one_line_each_however_long():
    console = plain_console()
    print_facts(console, "flowalign train", {"model": "x" * 200, "output": "outputs/a"})
    lines = console.file.getvalue().splitlines()
    assert lines == ["flowalign train", f"  model   {'x' * 200}", "  output  outputs/a"]


def test_text_that_standard_output_cannot_encode_is_replaced(monkeypatch):
    file = io.BytesIO()
    stream = io.TextIOWrapper(file, encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    with shown():
        progress.say("a caf\xe9 sign")
    assert file.getvalue() == b"a caf? sign\n"
    assert stream.errors == "strict"
