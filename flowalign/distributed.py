"""Processes of a run: which rank this is, and the collectives between ranks.

accelerate starts and connects the processes. Every function here that exchanges something is a
collective: all ranks must call it, in the same order, or the run hangs.
"""

import atexit
import os
from collections.abc import Callable
from functools import cache
from typing import cast, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather as accelerate_gather
from accelerate.utils import gather_object as accelerate_gather_object
from accelerate.utils import pad_across_processes, parse_flag_from_env
from accelerate.utils import reduce as accelerate_reduce
from torch import Tensor

from flowalign.errors import RunError, UserError

T = TypeVar("T")


def state() -> PartialState:
    """Return accelerate's state, which connects the processes when it is first asked for."""
    connected = PartialState(cpu=not uses_gpus())
    if connected.num_processes > 1:
        _disconnect_at_exit()
    return connected


@cache
def _disconnect_at_exit() -> None:
    # Gloo's threads abort the process, with a status that says that the run failed, if they are
    # still alive when the interpreter is gone. NCCL is left alone: it waits for other ranks.
    if torch.distributed.get_backend() == "gloo":
        atexit.register(torch.distributed.destroy_process_group)


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


def barrier() -> None:
    """Wait until every rank has reached this call."""
    state().wait_for_everyone()


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


def gather_objects(value: T) -> list[T]:
    """Return the values of all ranks, in the order of ranks."""
    return cast(list[T], accelerate_gather_object([value])) if count() > 1 else [value]


def mean(values: Tensor) -> Tensor:
    """Return the mean over ranks, element by element, on the device of `values`."""
    if count() == 1:
        return values
    return cast(Tensor, accelerate_reduce(values.to(device()), "mean")).to(values.device)


def maximum(values: Tensor) -> Tensor:
    """Return the maximum over ranks, element by element, on the device of this rank."""
    largest = values.clone().to(device())
    if count() > 1:
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return largest


def any_rank(fact: bool) -> bool:
    """Return True on every rank if the fact is true on one of them."""
    return bool(maximum(torch.tensor(float(fact))).item())


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
    if any_rank(error is not None):
        raise error or RunError("Another process failed. Its message says why.")
