"""AdamW with 8-bit moments: near AdamW, in a quarter of its state, restored bit for bit."""

import pytest
import torch
from torch import nn

from flowalign.files import load_optimizer_tensors, optimizer_tensors, tensors_after_a_step
from flowalign.training.adamw8bit import AdamW8bit, BLOCK

SHAPES = [(64, 128), (3, 100)]
SETTINGS = {"lr": 1e-3, "weight_decay": 1e-2}


def start():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) / 10 for shape in SHAPES]


def take_steps(parameters, optimizer, steps, first=0, smallest=1.0):
    """Take steps whose gradients differ by this factor within a row."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            sizes = torch.logspace(0, torch.tensor(smallest).log10(), parameter.shape[1])
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad = noise * (1 + parameter.detach()) * sizes
        optimizer.step()


def trained(kind, steps=40, **settings):
    """Parameters after some steps, and their optimizer."""
    parameters = [nn.Parameter(values) for values in start()]
    optimizer = kind(parameters, **SETTINGS)
    take_steps(parameters, optimizer, steps, **settings)
    return parameters, optimizer


def compare(**settings):
    """How far the results of both are apart, as a share of AdamW's way from the start."""
    ours, theirs = (trained(kind, **settings)[0] for kind in (AdamW8bit, torch.optim.AdamW))
    ways = zip(ours, theirs, start(), strict=True)
    return max(((a - b).norm() / (b - s).norm()).item() for a, b, s in ways)


def test_the_first_step_is_that_of_adamw():
    """Moments are rounded after their step."""
    assert compare(steps=1) < 1e-6


@pytest.mark.parametrize(("smallest", "bound"), [(1.0, 0.04), (1e-3, 0.2)])
def test_forty_steps_end_near_those_of_adamw(smallest, bound):
    """Also if squares of the gradients in a block differ by a million."""
    assert 0.1 * bound < compare(smallest=smallest) < bound


def test_no_parameter_moves_further_than_adam_s_steps_because_its_square_was_rounded_to_zero():
    parameters, _ = trained(AdamW8bit, steps=20, smallest=1e-5)
    largest = max((a - s).abs().max().item() for a, s in zip(parameters, start(), strict=True))
    assert largest < 1.5 * 20 * SETTINGS["lr"]


def test_the_moments_take_eight_bits_and_a_share_of_a_scale():
    sizes = {}
    for kind in (AdamW8bit, torch.optim.AdamW):
        parameter = nn.Parameter(torch.zeros(32, BLOCK))
        state = tensors_after_a_step(kind([parameter]))
        sizes[kind] = sum(value.nbytes for name, value in state.items() if name != "0.step")
    assert sizes[torch.optim.AdamW] == 2 * 4 * parameter.numel()
    assert sizes[AdamW8bit] == 2 * (1 + 4 / BLOCK) * parameter.numel()


def test_what_an_optimizer_will_remember_is_what_it_remembers():
    for kind in (AdamW8bit, torch.optim.AdamW):
        _, optimizer = trained(kind, steps=1)
        real, planned = optimizer_tensors(optimizer), tensors_after_a_step(optimizer)
        assert {name: (value.shape, value.dtype) for name, value in real.items()} == {
            name: (value.shape, value.dtype) for name, value in planned.items()
        }


def test_a_restored_state_continues_bit_for_bit():
    whole, _ = trained(AdamW8bit, steps=6)
    half, optimizer = trained(AdamW8bit, steps=3)
    saved = {name: value.clone() for name, value in optimizer_tensors(optimizer).items()}
    parameters = [nn.Parameter(parameter.detach().clone()) for parameter in half]
    other = AdamW8bit(parameters, **SETTINGS)
    load_optimizer_tensors(other, saved)
    take_steps(parameters, other, 3, first=3)
    for ours, theirs in zip(parameters, whole, strict=True):
        assert torch.equal(ours, theirs)


def test_a_parameter_without_a_gradient_stays():
    parameter = nn.Parameter(torch.ones(3))
    AdamW8bit([parameter]).step()
    assert torch.equal(parameter, torch.ones(3))
