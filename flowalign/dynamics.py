"""How a sampler steps from t to s < t: each dynamics is a pure function (x, v, t, s) -> Gaussian.

`flow_sde` and `dance_sde` keep the marginals of the ODE as steps become small (reverse-time Fokker-Planck: any
diffusion c(t) with drift v - c²/2 · score, where score = -(x + (1 - t) v) / t). `cps` keeps the noise content that the
schedule expects, not the marginals.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from flowalign.errors import UserError
from flowalign.flow import Latent, mean_square, PerImage
from flowalign.settings.types import Count, CountOrZero, Settings, Share, WrongSetting

Eta = Annotated[float, Field(ge=0, le=10)]


@dataclass(frozen=True)
class Gaussian:
    """A sampler step: x_{k+1} ~ N(mean, std²), independent elements, one std for all. std = 0 is a deterministic step."""

    mean: Latent
    std: float

    def sample(self, noise: Latent) -> Latent:
        return self.mean + self.std * noise

    def log_prob(self, x: Latent) -> PerImage:
        """Mean over latent elements, as the field publishes it: the clip ranges of papers mean this. ValueError at std 0."""
        if self.std == 0:
            raise ValueError("a deterministic step has no log-probability")
        normaliser = math.log(self.std) + math.log(2 * math.pi) / 2
        return -mean_square(x - self.mean) / (2 * self.std**2) - normaliser

    def kl(self, other: "Gaussian") -> PerImage:
        """KL(self ‖ other) for equal std; mean over latent elements."""
        return mean_square(self.mean - other.mean) / (2 * self.std**2)


def ode(x: Latent, v: Latent, t: float, s: float) -> Gaussian:
    """Euler's step; what diffusers' FlowMatchEulerDiscreteScheduler does."""
    return Gaussian(x + (s - t) * v, std=0.0)


def flow_sde(x: Latent, v: Latent, t: float, s: float, eta: Eta = 0.7) -> Gaussian:
    """Flow-GRPO (arXiv 2505.05470): diffusion eta · sqrt(t / (1 - t))."""
    variance = eta**2 * t / (1 - (s if t == 1 else t))  # finite at t = 1, as in Flow-GRPO
    drift = v + variance / (2 * t) * (x + (1 - t) * v)
    return Gaussian(x + (s - t) * drift, std=math.sqrt(variance * (t - s)))


def dance_sde(x: Latent, v: Latent, t: float, s: float, eta: Eta = 0.3) -> Gaussian:
    """DanceGRPO (arXiv 2505.07818): constant diffusion eta."""
    drift = v + eta**2 / (2 * t) * (x + (1 - t) * v)
    return Gaussian(x + (s - t) * drift, std=eta * math.sqrt(t - s))


def cps(x: Latent, v: Latent, t: float, s: float, eta: Share = 0.7) -> Gaussian:
    """Flow-CPS (arXiv 2509.05952): a share sin(eta π/2) of the noise is new. eta = 0 is the ODE; deterministic at s = 0."""
    x0, noise = x - t * v, x + (1 - t) * v
    return Gaussian(
        (1 - s) * x0 + s * math.cos(eta * math.pi / 2) * noise, std=s * math.sin(eta * math.pi / 2)
    )


Dynamics = Callable[[Tensor, Tensor, float, float], Gaussian]
DYNAMICS: dict[str, Callable[..., Gaussian]] = {
    "ode": ode,
    "flow_sde": flow_sde,
    "dance_sde": dance_sde,
    "cps": cps,
}


def is_stochastic(dynamics: Dynamics) -> bool:
    """Whether a step from the middle of the path draws noise."""
    function = dynamics.func if isinstance(dynamics, partial) else dynamics
    eta = dynamics.keywords.get("eta") if isinstance(dynamics, partial) else None
    return function is not ode and eta != 0


Steps = range
"""Indices of steps; `Window.range` hides the name in its class."""


@dataclass
class Window(Settings):
    """Which steps are stochastic; the others follow the ODE and are not trained (Flow-GRPO-Fast, MixGRPO). The last never is."""

    size: CountOrZero = 0
    """Consecutive stochastic steps; 0 for all in the range."""
    range: tuple[int, int] = (0, 0)
    """First step and the one after the last that may be stochastic; (0, 0) for all but the last."""
    moves: Literal["random", "progressive"] = "random"
    """Where `size` is smaller, whether the window's start is drawn evenly once a training step, or goes on from the noisiest
    by one step after every `stay` training steps, and around where it no longer fits (MixGRPO; there its end is cut off)."""
    stay: Count = 25

    def __post_init__(self) -> None:
        super().__post_init__()
        first, end = self.range
        if first < 0 or (end and end <= first):
            raise WrongSetting(
                f"range is {[first, end]}; write [first, end] with 0 <= first < end."
            )
        if end and self.size > end - first:
            raise WrongSetting(
                f"size is {self.size}, but range {[first, end]} has {end - first} steps; write at most that."
            )

    def reach(self, count: int) -> Steps:
        """All steps of a path of `count` steps that the window may come to."""
        first, end = self.range
        return range(first, min(end or count - 1, count - 1))

    def steps(self, count: int, step: int, seed: int) -> Steps:
        """The stochastic steps of a path of `count` steps, in this training step."""
        first, end = self.range
        if end > count:
            found = f"sampler.window.range is {[first, end]}, but sampler.steps is {count} and the last step is an ODE step"
            raise UserError(f"{found}; write an end of at most {count}.")
        end = self.reach(count).stop
        if first + max(self.size, 1) > end:
            wanted = f"{max(self.size, 1)} stochastic steps from step {first} on"
            raise UserError(
                f"sampler.window asks for {wanted}, but sampler.steps is {count} and the last step is an ODE step; take more."
            )
        if not self.size:
            return range(first, end)
        start = first + WINDOW_STARTS[self.moves](
            end - self.size - first + 1, step // self.stay, step * 1_000_003 + seed
        )
        return range(start, start + self.size)


WINDOW_STARTS: dict[str, Callable[[int, int, int], int]] = {
    "random": lambda places, moved, key: Random(key).randrange(places),
    "progressive": lambda places, moved, key: moved % places,
}
