"""A personal reward: a linear head on frozen image features, fitted to votes.

With φ the features of a picture and Δ = φ(A) - φ(B) for a pair of which a share p prefers A,
    loss(w) = Σ -p log σ(w · Δ) - (1 - p) log σ(-w · Δ) + λ/2 ‖w‖²,   λ = E ‖Δ‖² / s²
where s is the expected standard deviation of w · Δ (Bradley and Terry 1952, with a ridge). The
features are the main directions of the backbone's, whitened on the pictures of the votes. If the
backbone reads texts, the product of picture and prompt is part of them, since a choice may depend
on the prompt; and so is their cosine, which few votes would not find among the main directions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from flowalign import distributed
from flowalign.data.examples import Example
from flowalign.data.prompts import Metadata
from flowalign.data.votes import pair_examples, read_votes
from flowalign.errors import UserError
from flowalign.flow import PerImage
from flowalign.progress import say
from flowalign.rewards.accuracy import accuracy_of, stored_images
from flowalign.rewards.base import traits
from flowalign.rewards.features import Backbone, BUNDLED_CLIP
from flowalign.rewards.prompt_features import PromptFeatures
from flowalign.settings.types import Count, NonNegative, Positive

FOLDS = 5
"""Parts of the votes that are held out one after another, to measure the accuracy."""
LEAST_QUESTIONS = 25
"""The fewest questions from which an accuracy can be told."""
NEWTON_STEPS = 20


class Head(NamedTuple):
    """A fitted head."""

    weight: Tensor  # (D,)
    covariance: Tensor  # (D, D)
    """Inverse of the loss's Hessian: how uncertain the weight is."""


def fit_head(difference: Tensor, preference: Tensor, deviation: float) -> Head:
    """Return the head that minimises the loss, by Newton's method.

    Args:
        difference: Δ of each pair, (N, D).
        preference: Share p of voters for the first picture of each pair, (N,).
        deviation: The expected standard deviation s of w · Δ.
    """
    width = difference.shape[1]
    ridge = difference.square().sum(1).mean().clamp(min=1e-12) / deviation**2
    weight = difference.new_zeros(width)
    hessian = ridge * torch.eye(width, dtype=difference.dtype)
    for _ in range(NEWTON_STEPS):
        won = (difference @ weight).sigmoid()
        gradient = difference.T @ (won - preference) + ridge * weight
        slope = (won * (1 - won))[:, None] * difference
        hessian = difference.T @ slope + ridge * torch.eye(width, dtype=difference.dtype)
        weight = weight - torch.linalg.solve(hessian, gradient)
    return Head(weight, torch.linalg.inv(hessian))


class Whitening(NamedTuple):
    """Directions of features, each with variance 1."""

    mean: Tensor  # (W,)
    directions: Tensor  # (W, D)

    def __call__(self, features: Tensor) -> Tensor:
        """Return (B, D) of features (B, W)."""
        mean, directions = (part.to(features) for part in self)
        return (features - mean) @ directions


def whiten(features: Tensor, width: int, given: Tensor | None = None) -> Whitening:
    """Return the `width` main directions of features (N, W), and given directions (W, G)."""
    mean = features.mean(0)
    centred = features - mean
    _, _, main = torch.linalg.svd(centred, full_matrices=False)
    directions = main[:width].T
    if given is not None:
        directions = torch.cat([directions, given.to(features)], 1)
    deviations = (centred @ directions).std(0, correction=0)
    # Directions that do not vary would be divided by 0.
    varies = deviations > 1e-6 * deviations.max()
    return Whitening(mean, directions[:, varies] / deviations[varies])


class TasteFeatures:
    """Features of pictures, with their product with the prompts if the backbone reads texts."""

    def __init__(self, path: str, key: str):
        self.backbone = Backbone(path, key)
        self.prompts = PromptFeatures(path, self.backbone)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Return features (B, W) of images (B, 3, H, W) in [0, 1]."""
        image = self.backbone(images)
        return torch.cat([image, *self.prompts(image, prompts)], 1)

    def whiten(self, features: Tensor, width: int) -> Whitening:
        """Return the `width` main directions of features (N, W), and that of the cosine."""
        if not self.prompts.reads_texts:
            return whiten(features, width)
        # The product is the second half of the features, and its sum is the cosine.
        image, product = features[0].chunk(2)
        cosine = torch.cat([torch.zeros_like(image), torch.ones_like(product)])
        return whiten(features, width, cosine[:, None])


def folds_of(examples: Sequence[Example]) -> Tensor:
    """Return the fold (N,) of each pair. All pairs of a prompt are in one fold.

    With fewer prompts than folds, all pairs of a question are.
    """
    prompts = [example.prompt.text for example in examples]
    many = len(set(prompts)) >= FOLDS
    labels = prompts if many else [example.where for example in examples]
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    return torch.tensor([numbers[label] % FOLDS for label in labels])


def held_out_margins(
    difference: Tensor, preference: Tensor, folds: Tensor, deviation: float
) -> Tensor:
    """Return w · Δ (N,) of each pair, by a head that was fitted to the other folds alone.

    It is positive if the head agrees with the votes, and NaN for a tie.
    """
    margins = torch.empty(len(folds), dtype=torch.float64)
    for fold in folds.unique():
        held = folds == fold
        head = fit_head(difference[~held], preference[~held], deviation)
        margins[held] = difference[held] @ head.weight
    margins[preference == 0.5] = math.nan
    return margins * (preference - 0.5).sign()


@traits(range=(-3, 3))
@dataclass
class Taste:
    """The preference of one or several voters, from their votes; mostly -2 to 2.

    It prints how often it agrees with votes that it was not fitted to, and refuses to be a reward
    if that may be chance. Fit it anew after each round, because it knows only pictures like those
    that were voted on. Memory and licence are those of the backbone.
    """

    votes: str = ""
    """A vote file (flowalign label) whose pictures are stored."""
    path: str = BUNDLED_CLIP
    """The backbone: a local folder or hub repository; by default the bundled CLIP."""
    dimensions: Count = 16
    """Main directions of the features; about ten votes are needed for each."""
    deviation: Positive = 2.0
    """Expected standard deviation of the difference of two scores, before scaling."""
    doubt: NonNegative = 0.0
    """How many standard deviations of its own uncertainty are subtracted from a score."""
    limit: Annotated[float, Field(gt=0, le=3)] = 3.0
    """Scores are limited to ± this many standard deviations of those of the voted pictures."""
    name: ClassVar[str] = "taste"

    def __post_init__(self) -> None:
        examples = self._read()
        self.features = TasteFeatures(self.path, "rewards.taste.path")
        features = [self._embed(examples, side) for side in (0, 1)]
        self.whitening = self.features.whiten(torch.cat(features), self.dimensions)
        chosen, rejected = map(self.whitening, features)
        difference, preference = chosen - rejected, _preferences(examples)
        margins = held_out_margins(difference, preference, folds_of(examples), self.deviation)
        self.accuracy = accuracy_of(margins, [example.where for example in examples])
        self._judge()
        self.head = fit_head(difference, preference, self.deviation)
        scores = torch.cat([chosen, rejected]) @ self.head.weight
        self.centre, self.spread = scores.mean().item(), scores.std().item() or 1.0

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> PerImage:
        phi = self.whitening(self.features(images, prompts).double())
        weight, covariance = (part.to(phi) for part in self.head)
        scores = (phi @ weight - self.centre) / self.spread
        if self.doubt:
            variance = (phi @ covariance * phi).sum(1).clamp(min=0)
            scores = scores - self.doubt * variance.sqrt() / self.spread
        return scores.clamp(-self.limit, self.limit).float()

    def _read(self) -> list[Example]:
        if not self.votes:
            raise UserError(
                "rewards.taste.votes is missing. Write the file of flowalign label: "
                "{taste: {votes: votes.jsonl}}."
            )
        examples = pair_examples(read_votes(self.votes, "rewards.taste.votes"), ties=True)
        questions = len({example.where for example in examples})
        if questions < LEAST_QUESTIONS:
            raise UserError(
                f"rewards.taste.votes: {self.votes} has {questions} questions with several "
                f"pictures, from which no taste can be told. Answer {LEAST_QUESTIONS} or more."
            )
        return examples

    @torch.no_grad()
    def _embed(self, examples: Sequence[Example], side: int) -> Tensor:
        rows = [
            self.features(
                stored_images(example.pictures[side], example.where), [example.prompt.text]
            )
            for example in examples
        ]
        return torch.cat(rows).double().cpu()

    def _judge(self) -> None:
        """Say how accurate the head is. Raises UserError if it may be no better than chance."""
        low, _high = self.accuracy.interval
        if distributed.is_main():
            say(f"taste agrees with held-out votes in {self.accuracy}.")
        if low <= 0.5:
            raise UserError(
                f"rewards.taste agrees with held-out votes in {self.accuracy}, which may be "
                "chance. Answer more questions, or choose another backbone with rewards.taste.path."
            )


def _preferences(examples: Sequence[Example]) -> Tensor:
    """Return the share of voters for the chosen picture of each pair (N,). Ties count half."""
    shares = [(1 - one.tie) * one.preference + one.tie / 2 for one in examples]
    return torch.tensor(shares, dtype=torch.float64)
