"""How a sampler steps from t to s < t: each dynamics is a pure function (x, v, t, s) -> Gaussian.

`flow_sde` and `dance_sde` keep the marginals of the ODE as steps become small. By the reverse-time
Fokker-Planck equation, any diffusion c(t) does so with the drift v - c²/2 · score, where
score = -(x + (1 - t) v) / t. So does `ddim`, whose c(t)² tends to eta² · 2 t / (1 - t). `cps` keeps
the noise that the schedule expects, not the marginals.
"""

import builtins
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
    """A sampler step x_{k+1} ~ N(mean, std²) with independent elements and one std for all.

    std = 0 is a deterministic step.

    Example:
        >>> step = flowalign.Gaussian(mean=torch.zeros(2, 16), std=0.5)
        >>> step.log_prob(step.sample(torch.zeros(2, 16))).shape
        torch.Size([2])
    """

    mean: Latent
    std: float

    def sample(self, noise: Latent) -> Latent:
        """Return the sample that standard normal noise leads to."""
        return self.mean + self.std * noise

    def log_prob(self, x: Latent) -> PerImage:
        """Return the log-density of x, as a mean over latent elements.

        Raises ValueError if the step is deterministic.
        """
        if self.std == 0:
            raise ValueError("A deterministic step has no log-probability.")
        # The mean and not the sum, as the released code of the field: clip ranges mean this.
        normaliser = math.log(self.std) + math.log(2 * math.pi) / 2
        return -mean_square(x - self.mean) / (2 * self.std**2) - normaliser

    def kl(self, other: "Gaussian") -> PerImage:
        """Return KL(self ‖ other) for equal std, as a mean over latent elements."""
        return mean_square(self.mean - other.mean) / (2 * self.std**2)


def ode(x: Latent, v: Latent, t: float, s: float) -> Gaussian:
    """Return Euler's step, as diffusers' FlowMatchEulerDiscreteScheduler makes it."""
    return Gaussian(x + (s - t) * v, std=0.0)


def flow_sde(x: Latent, v: Latent, t: float, s: float, eta: Eta = 0.7) -> Gaussian:
    """Return Flow-GRPO's step (arXiv 2505.05470), with diffusion eta · sqrt(t / (1 - t))."""
    # At t = 1 the diffusion diverges. The released code takes the next time there, as here.
    variance = eta**2 * t / (1 - (s if t == 1 else t))
    drift = v + variance / (2 * t) * (x + (1 - t) * v)
    return Gaussian(x + (s - t) * drift, std=math.sqrt(variance * (t - s)))


def dance_sde(x: Latent, v: Latent, t: float, s: float, eta: Eta = 0.3) -> Gaussian:
    """Return DanceGRPO's step (arXiv 2505.07818), with constant diffusion eta."""
    drift = v + eta**2 / (2 * t) * (x + (1 - t) * v)
    return Gaussian(x + (s - t) * drift, std=eta * math.sqrt(t - s))


def cps(x: Latent, v: Latent, t: float, s: float, eta: Share = 0.7) -> Gaussian:
    """Return Flow-CPS's step (arXiv 2509.05952), in which a share sin(eta π/2) of the noise is new.

    eta = 0 is the ODE. The step to s = 0 is deterministic.
    """
    x0, noise = x - t * v, x + (1 - t) * v
    new, old = math.sin(eta * math.pi / 2), math.cos(eta * math.pi / 2)
    return Gaussian((1 - s) * x0 + s * old * noise, std=s * new)


def ddim(x: Latent, v: Latent, t: float, s: float, eta: Share = 1.0) -> Gaussian:
    """Return DDIM's step (arXiv 2010.02502, equation 16) for the signal 1 - t and the noise t.

    eta = 0 is the ODE. eta = 1 is the step of DDPM, which draws from the forward process between
    xt and the predicted x0. The step to s = 0 is deterministic.
    """
    x0, noise = x - t * v, x + (1 - t) * v
    # The share of the variance s² that is new. `old` is the signal-to-noise ratio at t over that
    # at s; it is below 1, because the signal grows.
    old = s * (1 - t) / (t * (1 - s))
    new = eta**2 * (1 - old**2)
    return Gaussian((1 - s) * x0 + s * math.sqrt(1 - new) * noise, std=s * math.sqrt(new))


Dynamics = Callable[[Tensor, Tensor, float, float], Gaussian]
"""(x, v, t, s) -> the step from t to s."""
DYNAMICS: dict[str, Callable[..., Gaussian]] = {
    "ode": ode,
    "flow_sde": flow_sde,
    "dance_sde": dance_sde,
    "cps": cps,
    "ddim": ddim,
}


def is_stochastic(dynamics: Dynamics) -> bool:
    """Return True if a step from the middle of the path draws noise."""
    function = dynamics.func if isinstance(dynamics, partial) else dynamics
    eta = dynamics.keywords.get("eta") if isinstance(dynamics, partial) else None
    return function is not ode and eta != 0


@dataclass
class Window(Settings):
    """The steps that are stochastic; the others follow the ODE and are not trained on.

    The last step never is stochastic. See Flow-GRPO-Fast and MixGRPO (arXiv 2507.21802).
    """

    size: CountOrZero = 0
    """How many consecutive steps are stochastic; 0 for all in the range."""
    range: tuple[int, int] = (0, 0)
    """First step and the one after the last that may be stochastic; (0, 0) for all but the last."""
    moves: Literal["random", "progressive"] = "random"
    """How a window that is smaller than the range moves over it.

    random draws its start evenly in each training step. progressive starts at the noisiest step
    and moves on by one after every `stay` training steps. At the end it starts again, as in
    MixGRPO, whose last windows are cut short.
    """
    stay: Count = 25
    """How many training steps a progressive window stays in its place."""

    def __post_init__(self) -> None:
        super().__post_init__()
        first, end = self.range
        if first < 0 or (end and end <= first):
            raise WrongSetting(
                f"range is {[first, end]}. Write [first, end] with 0 <= first < end."
            )
        if end and self.size > end - first:
            raise WrongSetting(
                f"size is {self.size}, but range {[first, end]} has {end - first} steps. "
                f"Write at most {end - first}."
            )

    def reach(self, count: int) -> builtins.range:
        """Return all steps of a path of `count` steps that may be stochastic."""
        first, end = self.range
        return range(first, min(end or count - 1, count - 1))

    def starts(self, count: int) -> builtins.range:
        """Return the steps at which the window starts, one as often as the other."""
        reach = self.reach(count)
        return reach[: len(reach) - self.size + 1] if self.size else reach[:1]

    def steps(self, count: int, step: int, seed: int) -> builtins.range:
        """Return the stochastic steps of a path of `count` steps in a training step.

        Raises UserError if the path has too few steps.
        """
        first, end = self.range
        if end > count:
            raise UserError(
                f"sampler.window.range is {[first, end]}, but sampler.steps is {count} and the "
                f"last step is an ODE step. Write an end of at most {count}."
            )
        end = self.reach(count).stop
        if first + max(self.size, 1) > end:
            raise UserError(
                f"sampler.window needs {max(self.size, 1)} stochastic steps from step {first} on, "
                f"but sampler.steps is {count} and the last step is an ODE step. Write "
                f"{first + max(self.size, 1) + 1} or more."
            )
        if not self.size:
            return range(first, end)
        starts = self.starts(count)
        # The key is the same on all processes, so that one window serves the whole step.
        move = WINDOW_STARTS[self.moves]
        start = starts[move(len(starts), step // self.stay, step * 1_000_003 + seed)]
        return range(start, start + self.size)


def random_start(starts: int, moves: int, key: int) -> int:
    """Draw one of the possible starts evenly."""
    return Random(key).randrange(starts)


def progressive_start(starts: int, moves: int, key: int) -> int:
    """Return the start after a number of moves, around the end."""
    return moves % starts


WINDOW_STARTS = {"random": random_start, "progressive": progressive_start}
