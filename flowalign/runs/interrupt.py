"""Ctrl-C and SIGTERM during training: finish the step, save it, and stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from flowalign import distributed
from flowalign.progress import say

TERMINATED = 128 + signal.SIGTERM
"""Exit status of a run that SIGTERM stopped: the one that shells report for the signal."""


class Interrupt:
    """A request to stop after the present step."""

    def __init__(self) -> None:
        self.requested = False
        """True after Ctrl-C or SIGTERM."""
        self.terminated = False
        """True after SIGTERM, with which a scheduler asks the whole process to end."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Request a stop at Ctrl-C or SIGTERM inside this context.

        A Ctrl-C after the request stops at once, by KeyboardInterrupt.

        Python allows signal handlers in the main thread only. In another thread the context does
        nothing, and signals belong to whoever started the thread.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = signal.SIGINT, signal.SIGTERM
        previous = [signal.signal(number, self._on_signal) for number in signals]
        try:
            yield
        finally:
            for number, handler in zip(signals, previous, strict=True):
                # A handler that was not installed from Python is reported as None.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # A repeated SIGTERM changes nothing: a scheduler sends one to every process, and a launcher
        # among them passes it on. A process that must not finish its step gets SIGKILL.
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        first = not self.requested
        self.requested, self.terminated = True, self.terminated or number == signal.SIGTERM
        if first and distributed.is_main():
            hint = " Press Ctrl-C again to stop at once." if number == signal.SIGINT else ""
            say(f"Finishing this step, then saving.{hint}")
