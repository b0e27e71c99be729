"""AdamW whose two moments take 8 bits per number (arXiv 2110.02861)."""

import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256
"""Numbers that share a scale."""
SIGNED = {"exp_avg": True, "exp_avg_sq": False}
"""The moments, and whether they may be negative."""


@cache
def dynamic_values(signed: bool, device: torch.device) -> Tensor:
    """Return the values of the 256 codes from small to large, in [-1, 1] or [0, 1].

    They are 0, 1, and means of steps between 0.1 and 1, times powers of ten down to 1e-6. Each
    smaller power has half as many. bitsandbytes has the same.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        steps = torch.linspace(0.1, 1, 2 ** (exponent + (not signed)) + 1, device="cpu")
        means = 10.0 ** (exponent - 6) * (steps[1:] + steps[:-1]) / 2
        values += [*means.tolist(), *(-means if signed else means[:0]).tolist()]
    return torch.tensor(sorted(values), device=device)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with 8-bit moments. Weights and arithmetic are float32.

    The state of a parameter is `step`, and for each moment its codes (blocks, BLOCK) and the scales
    of their blocks. It takes about a quarter of the memory of AdamW's state.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        settings = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore
        """Apply the gradients. A parameter without one stays as it is."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device="cpu")
            for name in SIGNED:
                _store(state, name, torch.zeros_like(parameter))
        state["step"] += 1
        step, (beta1, beta2) = state["step"].item(), group["betas"]
        m, v = (_load(state, name, parameter.shape) for name in SIGNED)
        m.lerp_(gradient, 1 - beta1)
        v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        deviation = v.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(m, deviation, value=-group["lr"] / (1 - beta1**step))
        _store(state, "exp_avg", m)
        _store(state, "exp_avg_sq", v)


def _store(state: dict[str, Tensor], name: str, moment: Tensor) -> None:
    numbers = moment.flatten()
    blocks = F.pad(numbers, (0, -len(numbers) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    values = dynamic_values(SIGNED[name], moment.device)
    # A block of zeros has the code of zero, whatever it is divided by.
    shares = blocks / (scale + (scale == 0))
    nearest = torch.bucketize(shares, (values[1:] + values[:-1]) / 2, out_int32=True)
    # A small square that became 0 would be divided by. Code 0 of the signed moment is -1.
    nearest = nearest.maximum((shares > 0).int())
    state[name], state[f"{name}_scale"] = nearest.to(torch.uint8), scale


def _load(state: dict[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    codes, scale = state[name], state[f"{name}_scale"]
    numbers = dynamic_values(SIGNED[name], codes.device)[codes.int()] * scale
    return numbers.flatten()[: shape.numel()].view(shape)
