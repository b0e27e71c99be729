"""The reward: a function (images, prompts, metadata) -> (B,), wrapped once as a `Reward`.

The wrapper checks what goes in and what comes out, keeps the function's side effects from the run,
and turns every exception into one message with the reward's name, its file and its line.
"""

import copy
import math
import os
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable, TypeVar

import torch
from torch import Tensor

from flowalign.data.prompts import Metadata
from flowalign.errors import RunError, UserError
from flowalign.flow import PerImage
from flowalign.global_state import restored_state
from flowalign.rewards.journal import Journal
from flowalign.rewards.worker import has_ended, in_background

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
    """Copy numbers in a tensor, array, list or tuple to float32 on the CPU; None becomes NaN."""
    # None is how rewards written for TRL leave an image out.
    if isinstance(values, list | tuple):
        values = [math.nan if value is None else value for value in values]
    # A copy, because a reward may return a buffer that its next call fills again.
    return torch.as_tensor(values, dtype=torch.float32).detach().cpu().clone()


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
    journal: Journal | None = None
    """The place where the function logs; None if it logs nothing."""
    time_limit: float | None = None
    """How many seconds a call may take; None for any time. It does not hold with a gradient."""
    changed: set[str] = field(default_factory=set, compare=False, repr=False)
    """The global settings that calls have changed. They were restored after each call."""

    @property
    def of_groups(self) -> bool:
        """True if a call needs all images of one prompt."""
        return self.traits.level != "pointwise"

    def __call__(
        self,
        images: Tensor,
        prompts: list[str],
        metadata: list[Metadata],
        step: int | None = None,
    ) -> PerImage:
        """Score images (B, 3, H, W) in [0, 1]: float32 on the CPU, NaN for an image without score.

        Args:
            images: The images. The function gets a copy, as of the other inputs.
            prompts: The prompt of each image.
            metadata: The further fields of each prompt.
            step: The training step that the images are of; None outside training.

        Raises:
            RunError: Images lie outside [0, 1], or the function raises, exceeds its time limit, or
                does not return one number per image within its declared range.
        """
        # The main thread must only wait: Python delivers Ctrl-C to it, between two lines of its
        # own. A reward that hangs there, or catches every exception, could not be stopped.
        task = in_background(self._score, images, prompts, metadata, step)
        if not has_ended(task, self.time_limit):
            raise RunError(
                f"rewards.{self.name} has not returned after {self.time_limit:g} s, its "
                "time_limit. Set a longer one, or find out where the reward waits."
            )
        return task.result()

    def _score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], step: int | None
    ) -> PerImage:
        # Grad mode and the present GPU belong to a thread, and this one is new.
        with torch.no_grad(), torch.cuda.device_of(images), self._failures():
            scores = self._call(images, prompts, metadata, step)
        return self._checked(scores, len(images))

    def with_gradient(
        self,
        images: Tensor,
        prompts: list[str],
        metadata: list[Metadata],
        step: int | None = None,
    ) -> PerImage:
        """Score images as a call does, but keep the gradient and the device.

        Raises RunError as a call does, and if the scores have no gradient or one is missing.
        """
        # This runs inside the training step, whose handler of memory errors gives better advice.
        with self._failures(torch.OutOfMemoryError):
            scores = self._call(images, prompts, metadata, step)
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
        return scores.to(torch.float32, copy=True)

    def learn(self, images: Tensor) -> dict[str, float]:
        """Let a reward that learns learn from a copy of a step's images; see `LearnedReward`.

        Returns metrics to log. Raises RunError if `update` raises.
        """
        assert self.learner
        with self._failures(torch.OutOfMemoryError), restored_state():
            return dict(self.learner.update(images.clone()))

    def _call(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], step: int | None
    ) -> object:
        """Call the function with copies, so that it changes neither the run nor other rewards."""
        self._check_images(images)
        if self.journal:
            self.journal.begin(step)
        inputs = images.clone(), list(prompts), copy.deepcopy(metadata)
        with restored_state() as changed:
            scores = self.function(*inputs)
        self.changed.update(changed)
        return scores

    @contextmanager
    def _failures(self, *passed: type[BaseException]) -> Iterator[None]:
        """Turn everything that the function raises into a RunError, apart from the given types."""
        try:
            yield
        # A RunError explains itself, such as one about a missing reference image.
        except (RunError, KeyboardInterrupt, *passed):
            raise
        # Not only an Exception: after a reward's `sys.exit()` the run would end as if it were done.
        except BaseException as error:
            raise self._failure(error) from error

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

    def _failure(self, error: BaseException) -> RunError:
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
