"""Active choice: ask next what would teach a taste the most.

With the head of `rewards.taste` fitted to the votes so far, H the Hessian of its loss and p the
probability that it prefers the first picture of a pair with the feature difference Δ, the next pair
is that of the largest p (1 - p) Δᵀ H⁻¹ Δ: one whose outcome is open and whose direction is not yet
known. The smallest margin alone would pick pairs of near twins, from which less is learned than
from random ones.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowalign.data.votes import Vote
from flowalign.labelling.albums import Album
from flowalign.rewards.accuracy import as_images_of
from flowalign.rewards.taste import fit_head, Head, TasteFeatures

Load = Callable[[int], list[bytes]]

CANDIDATES = 8
"""Questions whose pictures are made for one choice."""
RANDOM_EVERY = 5
"""One question in five is asked as it comes: chosen pairs alone would bias an accuracy."""
LEAST_VOTES = 10
"""Votes before which nothing is known, and questions are asked as they come."""


def information(head: Head, difference: Tensor) -> Tensor:
    """Return p (1 - p) Δᵀ H⁻¹ Δ of pairs with the differences Δ (N, D)."""
    preferred = (difference @ head.weight).sigmoid()
    variance = ((difference @ head.covariance) * difference).sum(1)
    return preferred * (1 - preferred) * variance


class ActiveChoice:
    """Chooses among the next questions by what the votes so far leave open."""

    def __init__(self, album: Album, features: TasteFeatures, dimensions: int, deviation: float):
        self.album, self.features = album, features
        self.dimensions, self.deviation = dimensions, deviation
        self._embedded: dict[int, Tensor] = {}

    def __call__(
        self, questions: Sequence[int], answered: Sequence[tuple[int, Vote]], load: Load
    ) -> int:
        """Return which of some questions to ask next, as a place in the list.

        Args:
            questions: Numbers of questions that were not asked yet, in their random order.
            answered: Questions with the votes on them, whose pictures have two labels.
            load: Returns the image files of a question.
        """
        decided = [(number, vote) for number, vote in answered if vote.labels is not None]
        if len(decided) < LEAST_VOTES or len(answered) % RANDOM_EVERY == 0:
            return 0
        voted = torch.stack([self._of(number, load) for number, _ in decided])
        open_pairs = torch.stack([self._of(number, load) for number in questions[:CANDIDATES]])
        features = torch.cat([voted, open_pairs]).flatten(0, 1)
        white = self.features.whiten(features, self.dimensions)
        shares = torch.tensor([self._share(*entry) for entry in decided], dtype=torch.float64)
        head = fit_head(_difference(white(voted)), shares, self.deviation)
        return int(information(head, _difference(white(open_pairs))).argmax())

    def _of(self, number: int, load: Load) -> Tensor:
        """Return the features (2, W) of the pictures of a question."""
        if number not in self._embedded:
            prompt = self.album.question(number).prompt.text
            rows = [self.features(as_images_of(content), [prompt]) for content in load(number)]
            self._embedded[number] = torch.cat(rows).double().cpu()
        return self._embedded[number]

    def _share(self, number: int, vote: Vote) -> float:
        """Return 1 if the vote prefers the first picture of the question, ½ for a tie, else 0."""
        first, second = (vote.label_of(one) for one in self.album.question(number).pictures)
        return 0.5 if first == second else float(first > second)


def _difference(features: Tensor) -> Tensor:
    return features[:, 0] - features[:, 1]
