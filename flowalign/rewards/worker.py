"""A thread for rewards, which a user wrote and which may hang."""

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextvars import copy_context
from functools import partial
from queue import SimpleQueue
from threading import enumerate as all_threads
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")

THREAD = "flowalign-reward"
"""Name of the threads."""


class Worker:
    """Runs functions one after another in a thread that never keeps the process alive.

    The threads of an executor do: Python waits for them before it exits, also for one that hangs.
    """

    def __init__(self) -> None:
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        Thread(target=self._run, name=THREAD, daemon=True).start()

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Call the function after those that were submitted earlier."""
        future: Future[T] = Future()
        # In a copy of the context, so that progress is shown where the caller shows it.
        call = partial(copy_context().run, function, *arguments)
        self._tasks.put(partial(_fulfil, future, call))
        return future

    def close(self) -> None:
        """End the thread once all submitted functions have returned or were cancelled."""
        self._tasks.put(None)

    def _run(self) -> None:
        while task := self._tasks.get():
            task()


def in_background(function: Callable[..., T], *arguments: Any) -> Future[T]:
    """Call the function in a worker of its own."""
    worker = Worker()
    task = worker.submit(function, *arguments)
    worker.close()
    return task


def has_ended(task: Future[Any], seconds: float | None = None) -> bool:
    """Wait for a function, at most for some seconds. Returns True if it has ended.

    It waits in steps of a second: another thread can interrupt this one only between two of its
    instructions, and a single wait may take minutes.
    """
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    while not wait([task], max(0.0, min(1.0, deadline - time.monotonic()))).done:
        if time.monotonic() >= deadline:
            return False
    return True


def is_any_busy() -> bool:
    """Return True if a function is still running in a worker, such as a reward that hangs."""
    return any(thread.name == THREAD for thread in all_threads())


def _fulfil(future: Future[T], function: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    # Whatever it is, it is raised again where the result is read.
    except BaseException as error:
        future.set_exception(error)
