"""Show a run on the console: a header, progress, messages, and a table of results.

On a terminal, rich draws progress in place. Everywhere else (a pipe, a log file) it is
printed as plain lines, at most one every few seconds, without colours or carriage returns.
"""

import io
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from flowalign import progress
from flowalign.reporting.summary import Baseline, Interval

SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def shown(console: Console | None = None) -> Iterator[Console]:
    """Show the progress of everything inside this context on the console.

    Processes other than the first show nothing, so that a distributed run prints each line once.
    """
    console = console or make_console()
    with _replacing_unprintable(), _display_on(console):
        yield console


@contextmanager
def _replacing_unprintable() -> Iterator[None]:
    """Let standard output replace characters that its encoding lacks, so that none ends a run."""
    stream = sys.stdout
    if not isinstance(stream, io.TextIOWrapper):
        yield
        return
    errors = stream.errors
    stream.reconfigure(errors="replace")
    try:
        yield
    finally:
        stream.reconfigure(errors=errors)


@contextmanager
def _display_on(console: Console) -> Iterator[None]:
    # In a notebook rich reports no terminal, so training prints plain lines there.
    if console.is_terminal and not console.quiet:
        # `transient` removes finished bars: what stays on the screen are messages and results.
        # Four frames a second look alive; ten would take a share of a small CPU.
        with Progress(*_columns(), console=console, transient=True, refresh_per_second=4) as bars:
            with progress.shown_on(TerminalDisplay(bars)):
                yield
    else:
        with progress.shown_on(PlainDisplay(console)):
            yield


def make_console(stderr: bool = False) -> Console:
    """Make a console that writes to standard output, on the first process only.

    With `stderr` it writes to standard error instead, and only if that is a terminal: in a pipe,
    standard error is for error messages alone.
    """
    # torchrun and accelerate set RANK. Asking torch would cost seconds before the first line.
    # Prompts and paths contain brackets and numbers, which rich would take for markup and colour.
    quiet = os.environ.get("RANK", "0") != "0" or (stderr and not sys.stderr.isatty())
    return Console(stderr=stderr, quiet=quiet, highlight=False, markup=False)


def print_facts(console: Console, title: str, facts: Mapping[str, str]) -> None:
    """Print what is about to run: a title and one line per fact."""
    console.print(title, style="bold")
    width = max(map(len, facts))
    for name, value in facts.items():
        # Lines are not wrapped here, so that a path can be copied whole.
        console.print(Text.assemble((f"  {name:{width}}  ", "cyan"), value), soft_wrap=True)


def print_differences(
    trained: Mapping[str, float],
    baselines: Sequence[Baseline],
    prompts: int,
    held_out: int = 0,
    console: Console | None = None,
) -> None:
    """Print the mean of each reward, and what training adds to each baseline.

    Args:
        trained: Mean of each reward with the adapter.
        baselines: What it is compared with. The first has all rewards.
        prompts: Number of prompts that the intervals of rewards rest on.
        held_out: Number of held-out entries that the intervals of the other figures rest on.
        console: Where to print; standard output by default.
    """
    heads = [*(baseline.label for baseline in baselines), "trained"]
    heads += [f"trained - {baseline.label}" for baseline in baselines]
    table = Table(
        Column("reward", overflow="fold"),
        *(Column(head, justify="right") for head in heads),
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="bold",
    )
    for name in baselines[0].difference:
        means = [format_mean(baseline.means, name) for baseline in baselines]
        differences = [format_difference(baseline.difference, name) for baseline in baselines]
        table.add_row(name, *means, format_mean(trained, name), *differences)
    console = console or make_console()
    console.print(table)
    console.print(interval_note(prompts, held_out), style="dim", soft_wrap=True)


def print_strip(means: Mapping[float, Mapping[str, float]], console: Console) -> None:
    """Print the mean of each reward at each strength of an adapter. Without rewards, nothing."""
    names = list(dict.fromkeys(name for each in means.values() for name in each))
    if not names:
        return
    heads = (Column(f"{strength:g}", justify="right") for strength in means)
    table = Table(Column("reward", overflow="fold"), *heads, box=None, header_style="bold")
    for name in names:
        table.add_row(name, *(format_mean(each, name) for each in means.values()))
    console.print(table)


def format_mean(means: Mapping[str, float], name: str) -> str:
    """Return a mean, or a dash if it was not measured."""
    return f"{means[name]:.3f}" if name in means else "-"


def format_difference(differences: Mapping[str, Interval], name: str) -> str:
    """Return a difference and half the width of its interval, or a dash if it was not measured."""
    if name not in differences:
        return "-"
    _, mean, high = differences[name]
    # One image of one prompt has no spread, so nothing bounds its interval.
    margin = f"{high - mean:.3f}" if math.isfinite(high) else "unknown"
    return f"{mean:+.3f} ± {margin}"


def interval_note(prompts: int, held_out: int = 0) -> str:
    """Say how many prompts and held-out entries the intervals rest on, and warn if they are few."""
    # A run on given pictures may have no reward, and then no interval rests on prompts.
    if held_out and not prompts:
        note = f"The 95 % intervals (±) rest on {_entries(held_out)}."
        return note + (" Use 20 or more for a narrow interval." if held_out < 20 else "")
    if prompts == 1:
        note = "The 95 % intervals (±) rest on 1 prompt. Use several prompts to compare models."
    else:
        few = " Use 20 or more prompts for a narrow interval." if prompts < 20 else ""
        note = f"The 95 % intervals (±) rest on {prompts} prompts.{few}"
    if held_out:
        few = " Use 20 or more entries for a narrow interval." if held_out < 20 else ""
        note += f" Those of held-out figures rest on {_entries(held_out)}.{few}"
    return note


def _entries(count: int) -> str:
    return f"{count} held-out {'entry' if count == 1 else 'entries'}"


class TerminalDisplay:
    """Draw tasks as bars that update in place, and print messages above them."""

    def __init__(self, bars: Progress):
        self.bars = bars

    @contextmanager
    def task(self, description: str, total: int | None, done: int) -> Iterator["TerminalTask"]:
        """Show a bar until the context ends."""
        bar = self.bars.add_task(description, total=total, completed=done, count="", note="")
        work = TerminalTask(self.bars, bar, total, done)
        work.advance(0)
        try:
            yield work
        finally:
            self.bars.remove_task(bar)

    def say(self, text: str) -> None:
        """Print a message above the bars."""
        # rich moves the bars down and prints above them, on the same console only.
        self.bars.console.print(text, soft_wrap=True)


class TerminalTask:
    """One bar."""

    def __init__(self, bars: Progress, bar: TaskID, total: int | None, done: int):
        self.bars, self.bar, self.total, self.done = bars, bar, total, done

    def advance(self, count: int = 1, note: str = "") -> None:
        """Move the bar."""
        self.done += count
        text = "" if self.total is None else f"{self.done}/{self.total}"
        self.bars.update(self.bar, completed=self.done, count=text, note=note)


class PlainDisplay:
    """Print tasks as lines, at most one every few seconds."""

    def __init__(self, console: Console, seconds: float = SECONDS_BETWEEN_LINES):
        self.console, self.seconds = console, seconds
        self.open_tasks = 0
        self.last_line = time.monotonic()

    @contextmanager
    def task(self, description: str, total: int | None, done: int) -> Iterator["PlainTask"]:
        """Print the start and the end of a task, unless it is part of another or has one item."""
        work = PlainTask(self, description, total, done)
        # A log that repeats "evaluating: 0 of 43" in every step hides the training.
        outermost = self.open_tasks == 0 and total != 1
        self.open_tasks += 1
        try:
            if outermost:
                work.print_line()
            yield work
            # Not in `finally`: after an error, the last line must not look like success.
            if outermost and not work.is_printed:
                work.print_line()
        finally:
            self.open_tasks -= 1

    def say(self, text: str) -> None:
        """Print a line. Lines are never wrapped, so that paths in a log file stay whole."""
        self.console.print(text, soft_wrap=True)
        # Standard output in a pipe is buffered, and a log that lags by minutes shows no progress.
        self.console.file.flush()
        self.last_line = time.monotonic()


class PlainTask:
    """A task whose count is printed now and then."""

    def __init__(self, display: PlainDisplay, description: str, total: int | None, done: int):
        self.display, self.description = display, description
        self.total, self.done, self.note = total, done, ""
        self.is_printed = False

    def advance(self, count: int = 1, note: str = "") -> None:
        """Print a line if the last one was long ago, or if this is the first item."""
        # The first note, such as the reward of step 1, tells a reader how long the run will take.
        first = bool(note) and not self.note
        self.done, self.note, self.is_printed = self.done + count, note, False
        late = time.monotonic() - self.display.last_line >= self.display.seconds
        if first or (late and self.total != 1):
            self.print_line()

    def print_line(self) -> None:
        """Print the description, the count and the note."""
        count = "" if self.total is None else f": {self.done} of {self.total}"
        note = f"  {self.note}" if self.note else ""
        self.display.say(f"{self.description}{count}{note}")
        self.is_printed = True


def _columns() -> tuple[ProgressColumn, ...]:
    return (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}", style="dim"),
    )
