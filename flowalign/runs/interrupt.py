"""Ctrl-C during training: finish the step, save it, and stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from flowalign import distributed
from flowalign.progress import say


class Interrupt:
    """A request to stop after the present step."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Request a stop at the first Ctrl-C inside this context, and stop at once at the second.

        Python allows signal handlers in the main thread only. In another thread the context does
        nothing, and Ctrl-C belongs to whoever started the thread.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            # A handler that was not installed from Python is reported as None.
            signal.signal(signal.SIGINT, signal.SIG_DFL if previous is None else previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if distributed.is_main():
            say("Finishing this step, then saving. Press Ctrl-C again to stop at once.")
