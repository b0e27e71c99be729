"""Which process this is, of how many, and what they tell each other; accelerate starts them."""

import os
from collections.abc import Callable
from typing import Any, cast, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather as accelerate_gather
from accelerate.utils import gather_object as accelerate_gather_object
from accelerate.utils import pad_across_processes
from accelerate.utils import reduce as accelerate_reduce
from torch import Tensor

from flowalign.errors import RunError, UserError

Made = TypeVar("Made")


def state() -> PartialState:
    return PartialState(cpu=not torch.cuda.is_available())


def device() -> torch.device:
    """This process's. UserError when there are more processes than GPUs."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if torch.cuda.is_available() and here > torch.cuda.device_count():
        raise UserError(
            f"{here} processes were started, but there are {torch.cuda.device_count()} GPUs; start one for each."
        )
    return cast(torch.device, state().device)


def rank() -> int:
    return state().process_index


def count() -> int:
    return state().num_processes


def is_main() -> bool:
    return state().is_main_process


def barrier() -> None:
    """Until every process is here."""
    state().wait_for_everyone()


def gather(rows: Tensor) -> Tensor:
    """All processes' rows (n, columns), in the order of ranks, on the CPU. Processes may hold different numbers of rows."""
    present = torch.ones(len(rows), 1)
    padded = pad_across_processes(torch.cat([present, rows.float()], 1).to(device()))
    everyone = cast(Tensor, accelerate_gather(padded)).cpu()
    return everyone[everyone[:, 0] == 1, 1:]


def gather_objects(value: Any) -> list[Any]:
    """All processes' values, in the order of ranks."""
    return cast(list[Any], accelerate_gather_object([value])) if count() > 1 else [value]


def mean(values: Tensor) -> Tensor:
    """Element by element over processes."""
    return (
        cast(Tensor, accelerate_reduce(values.to(device()), "mean")).to(values.device)
        if count() > 1
        else values
    )


def raise_everywhere(make: Callable[[], Made]) -> Made:
    """What `make` returns; a UserError of one process is raised on all, so that the first, which prints, can say it."""
    made, message = [], ""
    try:
        made.append(make())
    except UserError as error:
        message = str(error)
    if messages := [text for text in gather_objects(message) if text]:
        raise UserError(messages[0])
    return made[0]


def raise_if_any_failed(error: RunError | None) -> None:
    """Raise on every process when one failed, so that none waits for it."""
    if maximum(torch.tensor(float(error is not None))).item():
        raise error or RunError("another process failed; its message says why.")


def maximum(values: Tensor) -> Tensor:
    """Element by element over processes."""
    largest = values.clone().to(device())
    if count() > 1:
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return largest
