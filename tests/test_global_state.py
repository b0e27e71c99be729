"""The global state of the process is what it was, whatever a user's code does to it."""

import os
import random
from typing import Any

import numpy as np
import pytest
import torch

from flowalign.global_state import restored_state


def enter_inference_mode(tmp_path):
    guards.append(torch.inference_mode())
    guards[-1].__enter__()


guards: list[torch.inference_mode] = []

BACKENDS: Any = torch.backends
"""Some attributes exist at run time only."""
CHANGES = {
    "grad mode": lambda _: torch.set_grad_enabled(False),
    "inference mode": enter_inference_mode,
    "autocast": lambda _: torch.set_autocast_enabled("cpu", True),
    "default dtype": lambda _: torch.set_default_dtype(torch.float64),
    "default device": lambda _: torch.set_default_device("meta"),
    "threads": lambda _: torch.set_num_threads(torch.get_num_threads() + 1),
    "determinism": lambda _: torch.use_deterministic_algorithms(True),
    "anomalies": lambda _: torch.autograd.set_detect_anomaly(True),
    "matmul precision": lambda _: torch.set_float32_matmul_precision("medium"),
    "tf32": lambda _: setattr(BACKENDS.cuda.matmul, "allow_tf32", True),
    "tf32 by its new name": lambda _: setattr(BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
    "convolutions": lambda _: setattr(BACKENDS.cudnn.conv, "fp32_precision", "ieee"),
    "every precision": lambda _: setattr(torch.backends, "fp32_precision", "tf32"),
    "benchmark": lambda _: setattr(BACKENDS.cudnn, "benchmark", True),
    "torch's seed": lambda _: torch.manual_seed(5),
    "numpy's seed": lambda _: np.random.seed(5),
    "python's seed": lambda _: random.seed(5),
    "numpy's errors": lambda _: np.seterr(all="raise"),
    "working directory": lambda tmp_path: os.chdir(tmp_path),
}


PRECISIONS = [
    *(torch.backends, BACKENDS.cudnn, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn),
    *(BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul),
]


def observed():
    """What a run would notice: modes, what new tensors are, and what is drawn next."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    drawn = [torch.rand(1, device="cpu").item(), np.random.rand(), random.random()]
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
    weight = torch.ones(1, requires_grad=True)
    return [
        *(drawn, torch.zeros(1).dtype, torch.zeros(1).device, (weight * 2).requires_grad),
        *(torch.is_inference_mode_enabled(), torch.get_num_threads(), np.geterr()),
        (torch.ones(1, 1) @ torch.ones(1, 1)).dtype,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_anomaly_enabled(),
        *(of.fp32_precision for of in PRECISIONS),
        BACKENDS.cudnn.benchmark,
        os.getcwd(),
    ]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_taken_back_also_after_an_error(change, tmp_path):
    before = observed()
    for error in (None, ValueError):
        try:
            with restored_state():
                change(tmp_path)
                assert observed() != before
                if error:
                    raise error
        except ValueError:
            pass
        assert observed() == before
        # PyTorch refuses to read them if old and new settings contradict each other.
        assert (torch.get_float32_matmul_precision(), BACKENDS.cudnn.allow_tf32) == (
            *("highest", True),
        )


def test_a_change_that_other_threads_see_is_named():
    with restored_state() as changed:
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.manual_seed(3)
    assert changed == {"the default dtype"}


@pytest.mark.parametrize("enabled", [True, False])
def test_the_block_begins_with_the_modes_of_its_caller(enabled):
    with torch.set_grad_enabled(enabled), restored_state():
        assert torch.is_grad_enabled() is enabled
    with torch.inference_mode(enabled), restored_state():
        assert torch.is_inference_mode_enabled() is enabled
