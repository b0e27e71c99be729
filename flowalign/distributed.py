"""Processes of a run: which rank this is, the collectives between ranks, and their common end.

accelerate starts and connects the processes. Every function here that exchanges something is a
collective: all ranks must call it, in the same order, or the run hangs.

A rank that fails leaves a note in the store that connected the processes, and closes its
connections. The collectives that other ranks wait in then raise a RunError with the note's message.
In a rank that is elsewhere, its own watchdog raises that error after some seconds, so that it can
still save. One that does not return from a call into a library is ended.
"""

import atexit
import ctypes
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, wraps
from typing import Any, cast, ParamSpec, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, pad_across_processes, parse_flag_from_env
from accelerate.utils import gather as accelerate_gather
from accelerate.utils import gather_object as accelerate_gather_object
from accelerate.utils import reduce as accelerate_reduce
from torch import Tensor

from flowalign.errors import RunError, UserError

T = TypeVar("T")
P = ParamSpec("P")

FAILURE, ENDED = "flowalign/failure", "flowalign/ended"
"""Keys of the store: the message of the rank that failed first, and that rank 0 has ended."""
LOST = "Another process has ended without a message. It may have been killed. ({})"
GRACE = 20.0
"""Seconds before a rank is interrupted after another has failed, and again before it is ended."""
SAVING = 60.0
"""Seconds that rank 0 then gets to save."""
_exiting = threading.Event()
"""Set when the interpreter ends."""


@dataclass
class _Block:
    """The present block of `ending_together`, in the eyes of the watchdog."""

    thread: threading.Thread = field(default_factory=threading.main_thread)
    ends: threading.Event = field(default_factory=threading.Event)
    """Set after the block, and once its thread deals with a failure: nobody needs to end it."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """So that no exception reaches the thread once `ends` is set."""

    def begin(self) -> None:
        """Begin in this thread."""
        self.thread = threading.current_thread()
        self.ends.clear()

    def end(self) -> None:
        """Take back an exception that has not arrived, and send no other."""
        with self.lock:
            self.ends.set()
            self._send(None)

    def interrupt(self) -> None:
        """Raise _OtherRankFailed in the thread, between two of its Python instructions."""
        with self.lock:
            if not self.ends.is_set():
                self._send(_OtherRankFailed)

    def _send(self, error: type[BaseException] | None) -> None:
        # No signal is free for this: schedulers and users have meanings for all of them.
        argument = ctypes.py_object(error) if error else None
        thread = ctypes.c_ulong(self.thread.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, argument)


_block = _Block()


def state() -> PartialState:
    """Return accelerate's state, which connects the processes when it is first asked for."""
    connected = PartialState(cpu=not uses_gpus())
    if connected.num_processes > 1:
        _on_connection()
    return connected


@cache
def _on_connection() -> None:
    # Gloo's threads abort the process, with a status that says that the run failed, if they are
    # still alive when the interpreter is gone.
    atexit.register(_disconnect)
    watchdog = threading.Thread(target=_watch, args=[_store()], name="watchdog", daemon=True)
    watchdog.start()
    # A thread inside the store aborts the process too, if it comes back after the interpreter.
    atexit.register(_end_watch, watchdog)


def _end_watch(watchdog: threading.Thread) -> None:
    _exiting.set()
    _block.end()
    watchdog.join(GRACE)


def _disconnect() -> None:
    # NCCL is left alone: it waits for other ranks.
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


@cache
def _store() -> Any:
    # torch has no public function for it. A store of our own would need another free port.
    return torch.distributed.distributed_c10d._get_default_store()


def _failure(store: Any) -> str | None:
    """Return the message of the rank that failed first, if one has."""
    try:
        return store.get(FAILURE).decode() if store.check([FAILURE]) else None
    except RuntimeError:
        # The store lives in a process that is gone.
        return "Another process has ended. Its message says why, unless it was killed."


class _OtherRankFailed(RunError):
    """Raised in a thread that is busy while another rank fails."""

    def __init__(self) -> None:
        super().__init__(_failure(_store()) or "Another process has failed.")


def _watch(store: Any) -> None:
    """End this process some time after another has failed, wherever its thread is."""
    while not (message := _failure(store)):
        if _exiting.wait(1):
            return
    if _block.ends.wait(GRACE):
        return
    # The thread computes, perhaps for minutes, and only it can save its finished steps.
    _block.interrupt()
    if not _block.ends.wait(GRACE):
        # It does not come back from a call: it waits for a GPU, or for another machine.
        print(f"{message}\nThis process waited, and was ended.", file=sys.stderr, flush=True)
        os._exit(1)


def deal_with_failure() -> None:
    """Tell the watchdog that this process is ending. Saving may take longer than the grace."""
    _block.end()


@contextmanager
def ending_together() -> Iterator[None]:
    """End all ranks within seconds if the block fails on one of them.

    A rank that fails says so to the others and closes its connections. It then waits until rank 0
    has saved, because launchers end all processes when one of them ends.
    """
    _block.begin()
    try:
        yield
    except BaseException as error:
        # First, because the wait for rank 0 may take longer than the grace.
        deal_with_failure()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            _leave(error)
        raise
    finally:
        _block.end()


def _leave(error: BaseException) -> None:
    store, message = _store(), str(error) or type(error).__name__
    with suppress(RuntimeError):  # the store may live in a process that is gone
        # Only the first failure is kept: the others follow from it.
        store.compare_set(FAILURE, "", f"Process {rank()} failed: {message}")
        _disconnect()
        if is_main():
            store.set(ENDED, "")
        deadline = time.monotonic() + 2 * GRACE + SAVING
        while not store.check([ENDED]) and time.monotonic() < deadline:
            time.sleep(0.1)


def _collective(exchange: Callable[P, T]) -> Callable[P, T]:
    """Turn the error of a lost connection into a RunError that says which rank failed, and why."""

    @wraps(exchange)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return exchange(*args, **kwargs)
        # Its handler gives better advice, and it says nothing about another rank.
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if count() == 1:
                raise
            raise RunError(_failure(_store()) or LOST.format(error)) from error

    return guarded


def device() -> torch.device:
    """Return the device of this rank.

    Raises:
        UserError: More processes were started on this machine than it has GPUs.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if uses_gpus() and processes > torch.cuda.device_count():
        raise UserError(
            f"{processes} processes were started, but this machine has "
            f"{torch.cuda.device_count()} GPUs. Start one process for each GPU."
        )
    return cast(torch.device, state().device)


def uses_gpus() -> bool:
    """Return True if the machine has GPUs, unless the run was started by `launch --cpu`."""
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def rank() -> int:
    """Return the index of this process, from 0."""
    return state().process_index


def count() -> int:
    """Return the number of processes."""
    return state().num_processes


def is_main() -> bool:
    """Return True on rank 0, the only rank that prints and writes the run folder."""
    return state().is_main_process


def share(entries: int) -> list[int]:
    """Return this rank's share of some entries: every n-th of them, as many as on other ranks.

    Positions from `entries` on stand for repeated entries, whose results are dropped.
    """
    return [rank() + count() * turn for turn in range(math.ceil(entries / count()))]


@_collective
def barrier() -> None:
    """Wait until every rank has reached this call."""
    state().wait_for_everyone()


@_collective
def gather(rows: Tensor) -> Tensor:
    """Return the rows of all ranks, in the order of ranks, on the CPU.

    Args:
        rows: (n, columns). Ranks may hold different numbers of rows.
    """
    # The collective pads all ranks to the same length. The first column tells rows from padding.
    real = torch.ones(len(rows), 1, device=rows.device)
    padded = pad_across_processes(torch.cat([real, rows.float()], 1).to(device()))
    table = cast(Tensor, accelerate_gather(padded)).cpu()
    return table[table[:, 0] == 1, 1:]


@_collective
def gather_objects(value: T) -> list[T]:
    """Return the values of all ranks, in the order of ranks."""
    return cast(list[T], accelerate_gather_object([value])) if count() > 1 else [value]


@_collective
def mean(values: Tensor) -> Tensor:
    """Return the mean over ranks, element by element, on the device of `values`."""
    if count() == 1:
        return values
    return cast(Tensor, accelerate_reduce(values.to(device()), "mean")).to(values.device)


@_collective
def maximum(values: Tensor) -> Tensor:
    """Return the maximum over ranks, element by element, on the device of this rank."""
    largest = values.clone().to(device())
    if count() > 1:
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return largest


def any_rank(fact: bool) -> bool:
    """Return True on every rank if the fact is true on one of them."""
    return bool(maximum(torch.tensor(float(fact))).item())


def from_main(make: Callable[[], T]) -> T:
    """Return on every rank what `make` returns on rank 0, where alone it is called.

    Files decide on rank 0 only: another machine may see them later. If `make` raises a UserError,
    it is raised on all ranks.
    """
    value, message = None, ""
    if is_main():
        try:
            value = make()
        except UserError as error:
            message = str(error)
    value, message = _broadcast((value, message))
    if message:
        raise UserError(message)
    return cast(T, value)


@_collective
def _broadcast(value: T) -> T:
    """Return the value of rank 0."""
    return cast(list[T], broadcast_object_list([value]))[0] if count() > 1 else value


def raise_everywhere(make: Callable[[], T]) -> T:
    """Return what `make` returns. If it raises a UserError on one rank, raise it on all.

    Only rank 0 prints, so it must know the message; and no rank may wait for one that has failed.
    """
    results, message = [], ""
    try:
        results.append(make())
    except UserError as error:
        message = str(error)
    messages = [text for text in gather_objects(message) if text]
    if messages:
        raise UserError(messages[0])
    return results[0]


def raise_if_any_failed(error: RunError | None) -> None:
    """Raise a RunError on every rank if one rank has failed, so that none waits for it.

    Args:
        error: The failure of this rank, or None.
    """
    if isinstance(error, _OtherRankFailed):
        # The rank that failed is gone, and a GPU would wait for it without end.
        raise error
    if any_rank(error is not None):
        raise error or RunError("Another process failed. Its message says why.")
