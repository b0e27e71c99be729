"""Progress of long work: any module reports it here, and the display of the caller shows it.

Modules of every layer call `task`, `track` and `say`. The command line and the Python API install a
display with `shown_on`; without one, progress is silent and messages are printed.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Task(Protocol):
    """Work that a display shows until it is done."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """Report `count` further items. `note` is a short text to show, such as the loss."""
        ...


class Display(Protocol):
    """A place that shows tasks and messages."""

    def task(self, description: str, total: int | None, done: int) -> AbstractContextManager[Task]:
        """Show a task until the context ends. `total` is None if the number of items is unknown."""
        ...

    def say(self, text: str) -> None:
        """Print a message without disturbing the tasks on display."""
        ...


class SilentTask:
    """A task that nobody watches."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """Show nothing."""


class Silent:
    """The default display: no progress, and plain messages."""

    def task(self, description: str, total: int | None, done: int) -> AbstractContextManager[Task]:
        """Show nothing."""
        return nullcontext(SilentTask())

    def say(self, text: str) -> None:
        """Print the message."""
        print(text, flush=True)


SILENT = Silent()
# A context variable rather than a global: two runs in two threads each keep their own display.
_display: ContextVar[Display] = ContextVar("display", default=SILENT)


@contextmanager
def shown_on(display: Display) -> Iterator[None]:
    """Show the progress of everything inside this context on a display."""
    token = _display.set(display)
    try:
        yield
    finally:
        _display.reset(token)


def task(description: str, total: int | None = None, done: int = 0) -> AbstractContextManager[Task]:
    """Report work of `total` items, of which `done` are done already.

    Example:
        >>> with task("encoding prompts", total=2) as encoding:
        ...     for _ in range(2):
        ...         encoding.advance()
    """
    return _display.get().task(description, total, done)


def track(items: Sequence[Item], description: str) -> Iterator[Item]:
    """Yield the items and report each one when the next is requested.

    Example:
        >>> list(track(["a", "b"], "reading"))
        ['a', 'b']
    """
    with task(description, len(items)) as work:
        for item in items:
            # An item counts when the caller asks for the next one, that is, when it is done.
            yield item
            work.advance()


def say(text: str) -> None:
    """Print a message on the display of the caller.

    Example:
        >>> say("Resuming from outputs/crd/checkpoints/step-000100.")
        Resuming from outputs/crd/checkpoints/step-000100.
    """
    _display.get().say(text)
