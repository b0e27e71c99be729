"""The global state that users' code may change, such as grad mode or the default dtype.

Sampling and training depend on it, so it is restored after a file is imported and after each call.
"""

import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any


@dataclass(frozen=True)
class State:
    """A part of the global state: how it is read, and how it is written."""

    read: Callable[[], Any]
    write: Callable[[Any], object]


@contextmanager
def restored_state() -> Iterator[set[str]]:
    """Restore the global state that code in the block changes, also if it raises.

    Yields a set. After the block it holds the names of the changed settings that threads share: the
    other threads saw the change. The rest is restored without a name, as it affects nobody else.
    """
    # Imported here, because reading a YAML file must not import it.
    import torch

    shared, own, generators = _shared_settings(), _thread_settings(), _generators()
    shared_before = {name: state.read() for name, state in shared.items()}
    own_before = [(state, state.read()) for state in own]
    drawn = [(state, state.read()) for state in generators]
    changed: set[str] = set()
    # Inference mode has no setter, so the end of this guard restores it. Its beginning sets grad
    # mode as well, which is among the settings of the thread.
    with torch.inference_mode(torch.is_inference_mode_enabled()):
        _write_changed(own_before)
        try:
            yield changed
        finally:
            changed |= {name for name in shared if shared[name].read() != shared_before[name]}
            _write_changed([(shared[name], shared_before[name]) for name in changed])
            _write_changed(own_before)
            for state, value in drawn:
                state.write(value)


@contextmanager
def hidden_arguments() -> Iterator[None]:
    """Hide the arguments of the command line in the block.

    A YAML file may name the main function of an installed program. It would take the arguments for
    its own, and some programs execute the file that is named there: the YAML file.
    """
    arguments, sys.argv = sys.argv, sys.argv[:1]
    try:
        yield
    finally:
        sys.argv = arguments


def _write_changed(values: list[tuple[State, Any]]) -> None:
    for state, value in values:
        if state.read() != value:
            state.write(value)


@cache
def _shared_settings() -> dict[str, State]:
    import torch

    cudnn = torch.backends.cudnn
    return {
        "the default dtype": State(torch.get_default_dtype, torch.set_default_dtype),
        "the number of threads": State(torch.get_num_threads, torch.set_num_threads),
        "deterministic algorithms": State(
            torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms
        ),
        "anomaly detection": State(torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
        "the precision of float32": State(_read_precisions, _write_precisions),
        "cuDNN's benchmark": _attribute(cudnn, "benchmark"),
        "cuDNN's determinism": _attribute(cudnn, "deterministic"),
        "the working directory": State(os.getcwd, os.chdir),
    }


@cache
def _thread_settings() -> list[State]:
    import numpy as np
    import torch

    return [
        State(torch.is_grad_enabled, torch.set_grad_enabled),
        *(
            State(
                partial(torch.is_autocast_enabled, device),
                partial(torch.set_autocast_enabled, device),
            )
            for device in ("cpu", "cuda")
        ),
        State(torch.get_default_device, _set_default_device),
        State(np.geterr, lambda errors: np.seterr(**errors)),
    ]


def _generators() -> list[State]:
    import numpy as np
    import torch

    generators = [
        State(torch.get_rng_state, torch.set_rng_state),
        State(np.random.get_state, np.random.set_state),
        State(random.getstate, random.setstate),
    ]
    # Asking a GPU that nobody uses would start it, which takes seconds and memory.
    if torch.cuda.is_initialized():
        generators.append(State(torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all))
        generators.append(State(torch.cuda.current_device, torch.cuda.set_device))
    return generators


def _attribute(owner: object, name: str) -> State:
    return State(partial(getattr, owner, name), partial(setattr, owner, name))


@cache
def _precisions() -> list[State]:
    """Return PyTorch's old settings of precision, then the new ones, from general to special.

    An old setting that is written last would change the new ones of the same library.
    """
    import torch

    # Attributes that these modules get at run time, which a type checker cannot know.
    backends: Any = torch.backends
    return [
        State(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        _attribute(backends.cudnn, "allow_tf32"),
        *(
            _attribute(owner, "fp32_precision")
            for owner in (
                *(backends, backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn),
                *(backends.cuda.matmul, backends.mkldnn.matmul),
            )
        ),
    ]


def _read_precisions() -> list[Any]:
    values = []
    for state in _precisions():
        try:
            values.append(state.read())
        # An old setting cannot be read after code has written the new one alone.
        except RuntimeError:
            values.append(None)
    return values


def _write_precisions(values: list[Any]) -> None:
    for state, value in zip(_precisions(), values, strict=True):
        if value is not None:
            state.write(value)


def _set_default_device(device: Any) -> None:
    import torch

    # A default of "cpu" that was set slows every call down. None is no default at all.
    torch.set_default_device(None if device.type == "cpu" else device)
