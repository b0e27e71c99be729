"""The reward: a function (images, prompts, metadata) -> (B,), wrapped once as a `Reward`.

The wrapper checks what goes in and what comes out, and turns every exception of the function into
one message with the reward's name, its file and its line.
"""

import math
import os
import sysconfig
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable, TypeVar

import torch
from torch import Tensor

from flowalign.data.prompts import Metadata
from flowalign.errors import RunError, UserError
from flowalign.flow import PerImage

RewardFunction = Callable[[Tensor, list[str], list[Metadata]], object]
"""(images, prompts, metadata) -> one number per image. `as_scores` says what may hold them."""
LEVELS = ("pointwise", "pairwise", "group")
IMAGE_FORMATS = ("tensor", "pil")
ROUNDING = 0.01
"""How far pixels may lie outside [0, 1]: rounding in bfloat16 is 0.004 near 1."""
LIBRARIES = ("<frozen", *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))
PACKAGE = os.path.join(Path(__file__).parents[1], "")

Decorated = TypeVar("Decorated", bound=Callable[..., object])


@dataclass(frozen=True)
class Traits:
    """Declare what a reward takes and returns; `@traits(...)` decorates a function or class.

    Example:
        >>> @flowalign.traits(range=(0, 1))
        ... def redness(images, prompts, metadata):
        ...     return images[:, 0].mean((1, 2))
        >>> redness.traits.range
        (0, 1)
    """

    level: Literal["pointwise", "pairwise", "group"] = "pointwise"
    """The input of a call: any images, two lists of images to compare, or one prompt's images.

    A pairwise reward returns the probability that each first image is better than the second one;
    an image's score is its mean over the other images of the prompt.
    """
    images: Literal["tensor", "pil"] = "tensor"
    """The format of images: a tensor (B, 3, H, W) in [0, 1], or a list of PIL images."""
    range: tuple[float, float] = (-math.inf, math.inf)
    """The lowest and the highest possible score."""

    def __post_init__(self) -> None:
        _check_choice("level", self.level, LEVELS)
        _check_choice("images", self.images, IMAGE_FORMATS)
        low, high = self.range
        if not low < high:
            raise UserError(f"traits: range is {self.range}. Write the lower end first.")

    def __call__(self, decorated: Decorated) -> Decorated:
        # `setattr`, because functions have no such attribute for a type checker.
        setattr(decorated, "traits", self)  # noqa: B010
        return decorated


traits = Traits


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(
            f"traits: {name} is {value!r}. "
            f"Choose from {', '.join(choices)}, for example @traits({name}={choices[-1]!r})."
        )


@runtime_checkable
class LearnedReward(Protocol):
    """A reward that learns while the policy trains.

    Calling it is a pure function of its state, and only `update` changes the state.
    """

    def update(self, images: Tensor) -> dict[str, float]:
        """Learn from this rank's images (B, 3, H, W) in [0, 1] of a step, and return metrics.

        Called once per training step on every rank, after the images were scored, and never in an
        evaluation. Ranks gather what they need, so that all of them learn the same.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """Return all that was learned, on the CPU, for a checkpoint."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned. Raises UserError if it belongs to another reward."""
        ...


def as_scores(values: object) -> PerImage:
    """Convert numbers in a tensor, array, list or tuple to float32 on the CPU; None becomes NaN."""
    # None is how rewards written for TRL leave an image out.
    if isinstance(values, list | tuple):
        values = [math.nan if value is None else value for value in values]
    return torch.as_tensor(values, dtype=torch.float32).detach().cpu()


@dataclass(frozen=True)
class Reward:
    """A reward function with its name, weight and traits, called in one way whatever its form."""

    name: str
    """The name in logs and messages."""
    function: RewardFunction
    """The scoring function, adapted by `make_reward`."""
    weight: float = 1.0
    """The factor in the combined reward."""
    traits: Traits = Traits()
    """The level, image format and range that the function declares."""
    learner: LearnedReward | None = None
    """The object whose `update` is called once per step; None if the reward does not learn."""

    @property
    def of_groups(self) -> bool:
        """True if a call needs all images of one prompt."""
        return self.traits.level != "pointwise"

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> PerImage:
        """Score images (B, 3, H, W) in [0, 1]: float32 on the CPU, NaN for an image without score.

        Raises RunError if images lie outside [0, 1], if the function raises, or if it does not
        return one number per image within its declared range.
        """
        try:
            with torch.no_grad():
                scores = self._call(images, prompts, metadata)
        # A RunError explains itself, such as one about a missing reference image.
        except RunError:
            raise
        except Exception as error:
            raise self._failure(error) from error
        return self._checked(scores, len(images))

    def with_gradient(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata]
    ) -> PerImage:
        """Score images as a call does, but keep the gradient and the device.

        Raises RunError as a call does, and if the scores have no gradient or one is missing.
        """
        try:
            scores = self._call(images, prompts, metadata)
        # This runs inside the training step, whose handler of memory errors gives better advice.
        except (RunError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise self._failure(error) from error
        if not isinstance(scores, Tensor) or not scores.requires_grad:
            raise RunError(
                f"rewards.{self.name} carries no gradient from its scores to the images, but the "
                "objective needs one. Use a differentiable reward or another objective."
            )
        if self._checked(scores, len(images)).isnan().any():
            raise RunError(
                f"rewards.{self.name} did not score an image, but the objective needs the gradient "
                "of every score. Use prompts whose images it can score."
            )
        return scores.float()

    def _call(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> object:
        self._check_images(images)
        # Copies, so that a function that writes into its inputs does not change the next one's.
        return self.function(images.clone(), prompts, [dict(entry) for entry in metadata])

    def _check_images(self, images: Tensor) -> None:
        """Raise RunError for images that are not floats in [0, 1], such as bytes.

        Rewards clamp or normalise their input, so bytes would get plausible but wrong scores.
        """
        if not images.is_floating_point():
            raise RunError(
                f"rewards.{self.name} was given images of {images.dtype}. "
                "Convert them to floats in [0, 1]: bytes.float() / 255."
            )
        if not images.numel():
            return
        low, high = torch.stack(images.detach().aminmax()).tolist()
        if low < -ROUNDING or high > 1 + ROUNDING:
            raise RunError(
                f"rewards.{self.name} was given images with values from {low:g} to {high:g}. "
                "Scale them to [0, 1]; bytes from 0 to 255 need a division by 255."
            )

    def _failure(self, error: Exception) -> RunError:
        """Name the line of the user's code that raised, or else the last one of this package."""
        # The innermost frame is often in a library, which says nothing about the mistake.
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if not frame.filename.startswith(LIBRARIES)
        ]
        own = [frame for frame in frames if not frame.filename.startswith(PACKAGE)]
        last = (own or frames)[-1]
        return RunError(
            f"rewards.{self.name} raised {type(error).__name__}: {error} "
            f"({last.filename}, line {last.lineno})"
        )

    def _checked(self, values: object, count: int) -> PerImage:
        try:
            scores = as_scores(values)
        except (TypeError, ValueError, RuntimeError) as error:
            raise RunError(
                f"rewards.{self.name} returned a {type(values).__name__} ({error}). "
                f"Return {count} numbers, one per image."
            ) from error
        if scores.shape != (count,):
            raise RunError(
                f"rewards.{self.name} returned shape {tuple(scores.shape)}. "
                f"Return {count} numbers, one per image: shape ({count},)."
            )
        low, high = self.traits.range
        # Sums in float32 or bfloat16 may end just outside, so the tolerance grows with the range.
        tolerance = 1e-4 * max([1.0, *(abs(end) for end in (low, high) if math.isfinite(end))])
        outside = scores[(scores < low - tolerance) | (scores > high + tolerance)]
        if outside.numel():
            raise RunError(
                f"rewards.{self.name} returned {outside[0].item():g}, outside its declared range "
                f"[{low:g}, {high:g}]. Correct the score or the range in @traits."
            )
        return scores
