"""A reward is a function (images, prompts, metadata) -> (B,), or a class whose instances are: built in, or yours by path."""

import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowalign.errors import RunError
from flowalign.flow import PerImage

RewardFunction = Callable[[Tensor, list[str], list[dict[str, Any]]], Any]


@dataclass(frozen=True)
class Reward:
    """A scoring function with its name and weight."""

    name: str
    function: RewardFunction
    weight: float = 1.0

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> PerImage:
        """Scores of images (B, 3, H, W) in [0, 1], float32 on the CPU. RunError when there is not one finite score an image."""
        try:
            with torch.no_grad():
                scores = self.function(images, prompts, metadata)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            frame = [f for f in frames if "site-packages" not in f.filename][-1]
            raise RunError(
                f"rewards.{self.name} raised {type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"
            ) from error
        return self._checked(scores, len(images))

    def with_gradient(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> PerImage:
        """As a call, on the images' device and with the gradient. RunError when the scores carry none."""
        scores = self.function(images, prompts, metadata)
        if not isinstance(scores, Tensor) or not scores.requires_grad:
            raise RunError(f"rewards.{self.name} carries no gradient from its scores to the images, and the objective needs one.")
        self._checked(scores, len(images))
        return scores.float()

    def _checked(self, scores: Any, count: int) -> PerImage:
        expected = f"expected {count} numbers, one an image"
        try:
            scores = torch.as_tensor(scores, dtype=torch.float32).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise RunError(f"rewards.{self.name} returned a {type(scores).__name__} ({error}); {expected}.") from error
        if scores.shape != (count,):
            raise RunError(f"rewards.{self.name} returned shape {tuple(scores.shape)}; {expected}: shape ({count},).")
        if not scores.isfinite().all():
            raise RunError(f"rewards.{self.name} returned {scores[~scores.isfinite()][0].item()}; {expected}, all finite.")
        return scores


def weighted_sum(scores: dict[str, PerImage], weights: dict[str, float]) -> PerImage:
    """Σ weight · score."""
    return torch.stack([weights[name] * score for name, score in scores.items()]).sum(0)


COMBINE = {"weighted_sum": weighted_sum}


def score_all(
    rewards: Iterable[Reward], images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
) -> dict[str, PerImage]:
    """Every reward's scores by its name."""
    return {reward.name: reward(images, prompts, metadata) for reward in rewards}
