"""How often a reward agrees with people on which of two pictures is better."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from flowalign.data.examples import Drawn, Example, Picture
from flowalign.data.pictures import named_picture
from flowalign.errors import UserError
from flowalign.rewards.base import Reward
from flowalign.rewards.reference_pictures import as_images

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Accuracy:
    """How often a score orders the pictures of a question as people do."""

    right: float
    """Sum of the questions' shares of pairs in the same order; equal scores count as half."""
    questions: int
    """Questions with a score. Pairs of one question are not independent, so it counts as one."""

    @property
    def share(self) -> float:
        """Mean share of pairs in the same order; NaN without questions."""
        return self.right / self.questions if self.questions else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % interval."""
        return proportion_interval(self.right, self.questions)

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{self.share:.3f} (95 % interval {low:.3f} to {high:.3f}, {self.questions} questions)"
        )


def proportion_interval(successes: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share (E. B. Wilson, 1927); (0, 1) without any count."""
    if not count:
        return 0.0, 1.0
    z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    share, scale = successes / count, 1 + z**2 / count
    centre = (share + z**2 / (2 * count)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def accuracy_of(margins: Tensor, questions: Sequence[str] | None = None) -> Accuracy:
    """Return the accuracy of scores of the chosen minus those of the rejected pictures.

    Args:
        margins: The difference of each pair (N,); NaN if one was not scored.
        questions: Which question each pair belongs to; by default each is one of its own.
    """
    right = (margins > 0).float() + 0.5 * (margins == 0)
    by_question: dict[str, list[float]] = defaultdict(list)
    for number, (margin, share) in enumerate(zip(margins.tolist(), right.tolist(), strict=True)):
        if not math.isnan(margin):
            by_question[questions[number] if questions else str(number)].append(share)
    shares = [sum(each) / len(each) for each in by_question.values()]
    return Accuracy(sum(shares), len(shares))


def reward_accuracy(reward: Reward, examples: Sequence[Example]) -> Accuracy:
    """Score both pictures of each pair. Pairs without a score do not count.

    Raises UserError if a picture was not stored.
    """
    margins = []
    for example in examples:
        assert example.rejected is not None
        scores = [
            reward(
                stored_images(picture, example.where),
                [example.prompt.text],
                [example.prompt.metadata],
            )
            for picture in (example.chosen, example.rejected)
        ]
        margins.append(scores[0] - scores[1])
    return accuracy_of(torch.cat(margins), [example.where for example in examples])


def stored_images(picture: Picture, where: str) -> Tensor:
    """Return a picture as images (1, 3, H, W) in [0, 1]. Raises UserError without a file."""
    read = picture.stored if isinstance(picture, Drawn) else picture
    if read is None:
        raise UserError(
            f"{where}: the picture was not stored, and a reward has no model to make it again. "
            "Vote without --keys-only."
        )
    return as_images_of(read(), where)


def as_images_of(content: bytes, where: str = "votes") -> Tensor:
    """Return an image file as images (1, 3, H, W) in [0, 1]."""
    return as_images(named_picture(content, where))
