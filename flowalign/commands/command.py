"""The form of a command: its name, its help, and the function that carries it out."""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Action = Callable[[argparse.Namespace], int]
MANY = 10**6
"""The largest count that a command takes."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command: its help, and the function that carries it out."""

    name: str
    """Word on the command line."""
    summary: str
    """One line for the list of commands."""
    examples: str
    """Command lines that work in a clone of the repository."""
    action: Action
    """Function of the parsed options. Returns the exit status."""

    def add_to(self, commands: Commands) -> argparse.ArgumentParser:
        """Add a parser for the command."""
        parser = commands.add_parser(
            self.name,
            help=self.summary,
            description=f"{self.summary[:1].upper()}{self.summary[1:]}.",
            epilog=f"examples:\n{self.examples}",
            # Examples keep their line breaks.
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.set_defaults(action=self.action)
        return parser


def positive(text: str) -> int:
    """Convert a count on the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    if number > MANY:
        raise argparse.ArgumentTypeError(f"{text} is more than {MANY:,}")
    return number


def numbers(text: str) -> tuple[float, ...]:
    """Convert numbers with commas between them on the command line."""
    return tuple(float(part) for part in text.split(","))


def port(text: str) -> int:
    """Convert a TCP port on the command line."""
    number = int(text)
    if not 0 < number < 2**16:
        raise argparse.ArgumentTypeError(f"{text} is not a port from 1 to 65535")
    return number


def gigabytes(text: str) -> float:
    """Convert an amount of memory on the command line."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number
