"""A reward is a function (images, prompts, metadata) -> (B,), or a class whose instances are: built in, or yours by path."""

import math
import os
import sysconfig
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable, TypeVar

import torch
from torch import Tensor

from flowalign.errors import RunError, UserError
from flowalign.flow import PerImage

RewardFunction = Callable[[Tensor, list[str], list[dict[str, Any]]], Any]
Written = TypeVar("Written", bound=Callable[..., Any])
LIBRARIES = ("<frozen", *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))
PACKAGE = os.path.join(Path(__file__).parents[1], "")


@dataclass(frozen=True)
class Traits:
    """What a reward says of itself; a decorator that says it of a function or a class."""

    level: Literal["pointwise", "pairwise", "group"] = "pointwise"
    """pointwise: every image by itself. group: called with all images of one prompt. pairwise: called with two lists of images,
    returns how likely each of the first is the better one, in [0, 1]; an image's score is the mean over its group."""
    images: Literal["tensor", "pil"] = "tensor"
    """What it is given: (B, 3, H, W) in [0, 1], or a list of PIL pictures."""
    range: tuple[float, float] = (-math.inf, math.inf)
    """Between what its scores lie."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("level", ("pointwise", "pairwise", "group")),
            ("images", ("tensor", "pil")),
        ):
            if (value := getattr(self, name)) not in choices:
                raise UserError(
                    f"traits: {name} is {value!r}; write for example @traits({name}={choices[-1]!r}), of {choices}."
                )
        low, high = self.range
        if not low < high:
            raise UserError(f"traits: range is {self.range}; write the lower end first.")

    def __call__(self, written: Written) -> Written:
        setattr(written, "traits", self)  # noqa: B010  functions have no such attribute for the type checker
        return written


traits = Traits


@runtime_checkable
class LearnedReward(Protocol):
    """A reward that learns as the policy does. A call is a pure function; what was learned changes in `update` only."""

    def update(self, images: Tensor) -> dict[str, float]:
        """Learn from this process's images (B, 3, H, W) in [0, 1] of a training step; returns what to log.

        Once a step, after they were scored, never in evaluation, and on all processes alike: they exchange what they need
        and learn the same.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """All that was learned, on the CPU, as a checkpoint keeps it."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on exactly from what `state` returned. UserError when it is of another reward."""
        ...


def numbers(scores: Any) -> Tensor:
    """As float32 on the CPU; NaN for None."""
    if isinstance(scores, list | tuple):
        scores = [math.nan if score is None else score for score in scores]
    return torch.as_tensor(scores, dtype=torch.float32).detach().cpu()


@dataclass(frozen=True)
class Reward:
    """A scoring function with its name and weight."""

    name: str
    function: RewardFunction
    weight: float = 1.0
    traits: Traits = Traits()
    learner: LearnedReward | None = None
    """What learns as training goes, where the reward does."""

    @property
    def of_groups(self) -> bool:
        """Whether it must see all images of a prompt at once."""
        return self.traits.level != "pointwise"

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> PerImage:
        """Scores of images (B, 3, H, W) in [0, 1], float32 on the CPU; NaN where an image was not scored.

        RunError when there is not one number an image within the range the reward declares.
        """
        try:
            with torch.no_grad():  # it may write into its own
                scores = self.function(images.clone(), prompts, [dict(entry) for entry in metadata])
        except RunError:
            raise
        except Exception as error:
            raise self._failed(error) from error
        return self._checked(scores, len(images))

    def with_gradient(
        self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> PerImage:
        """As a call, on the images' device and with the gradient. RunError when the scores carry none."""
        try:
            scores = self.function(images.clone(), prompts, [dict(entry) for entry in metadata])
        except (RunError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise self._failed(error) from error
        if not isinstance(scores, Tensor) or not scores.requires_grad:
            raise RunError(
                f"rewards.{self.name} carries no gradient from its scores to the images, and the objective needs one."
            )
        if self._checked(scores, len(images)).isnan().any():
            raise RunError(
                f"rewards.{self.name} did not score an image; the objective needs the gradient of every one."
            )
        return scores.float()

    def _failed(self, error: Exception) -> RunError:
        frames = [
            f
            for f in traceback.extract_tb(error.__traceback__)
            if not f.filename.startswith(LIBRARIES)
        ]
        frame = ([f for f in frames if not f.filename.startswith(PACKAGE)] or frames)[-1]
        return RunError(
            f"rewards.{self.name} raised {type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"
        )

    def _checked(self, scores: Any, count: int) -> PerImage:
        expected = f"expected {count} numbers, one an image"
        try:
            scores = numbers(scores)
        except (TypeError, ValueError, RuntimeError) as error:
            raise RunError(
                f"rewards.{self.name} returned a {type(scores).__name__} ({error}); {expected}."
            ) from error
        if scores.shape != (count,):
            raise RunError(
                f"rewards.{self.name} returned shape {tuple(scores.shape)}; {expected}: shape ({count},)."
            )
        low, high = self.traits.range
        slack = 1e-4 * max([1.0, *(abs(end) for end in (low, high) if math.isfinite(end))])
        if (outside := scores[(scores < low - slack) | (scores > high + slack)]).numel():
            given, said = f"{outside[0].item():g}", f"[{low:g}, {high:g}]"
            raise RunError(
                f"rewards.{self.name} returned {given}, outside the range {said} it declares."
            )
        return scores
