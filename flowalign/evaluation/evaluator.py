"""Score fixed prompts from fixed noise, so that weights can be compared image by image."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product

import torch
from torch import Tensor

from flowalign import distributed
from flowalign.batch import Keys, Rollout
from flowalign.data.prompts import Prompt
from flowalign.errors import RunError
from flowalign.evaluation.drift import drift_metrics
from flowalign.evaluation.held_out import HeldOut
from flowalign.evaluation.results import EvaluationResult
from flowalign.evaluation.thumbnails import make_thumbnail, MOST, pictured_prompts
from flowalign.flow import PerImage
from flowalign.policy import Policy
from flowalign.progress import task
from flowalign.rollouts.collect import collect, make_prompts
from flowalign.rollouts.scoring import RolloutScorer

SHOWN = 18
"""Images of an evaluation that are kept for people to see."""
TUNING_PROMPTS, TUNING_IMAGES = 64, 2
"""The most prompts, and images of each, that settings of an evaluation are chosen on."""


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Samples and scores the same images at every call; each rank takes its share of the prompts.

    All ranks call each method together.
    """

    prompts: Sequence[Prompt]
    images_per_prompt: int
    scorer: RolloutScorer
    images_per_pass: int
    seed: int
    shown: int = SHOWN
    """How many images a result shows, spread over the prompts."""
    pictured: int = MOST
    """How many prompts have a thumbnail of their first image, spread over the prompts."""
    held_out: HeldOut | None = None
    """Pictures that are not trained on, or None."""
    stand_in: Policy | None = None
    """The policy of `evaluation.model`, or None if the model that trains makes the pictures."""
    purpose: str = "evaluation"
    """The stream that noise is drawn from. Another name gives other noise to the same images."""

    def __call__(self, policy: Policy) -> EvaluationResult:
        """Evaluate a policy: rewards, held-out figures and drift.

        Raises:
            RunError: A reward failed, or was infinite for an image.
        """
        rollout, scores = self.scorer.score(self.sample(policy))
        result = self._result(rollout, scores)
        held_out = self.held_out(policy) if self.held_out else {}
        return replace(result, held_out=held_out, figures=drift_metrics(policy, rollout))

    def for_tuning(self, reward: str) -> "Evaluator":
        """Return a cheaper evaluator, which settings of an evaluation are chosen with.

        It has fewer prompts and images, one reward, and other noise: a choice by the images of a
        report would be flattered by the luck of their noise.
        """
        rewards = [entry for entry in self.scorer.rewards if entry.name == reward]
        return replace(
            self,
            prompts=self.prompts[:: math.ceil(len(self.prompts) / TUNING_PROMPTS)],
            # At least two if there are two, because some rewards compare the images of a prompt.
            images_per_prompt=min(TUNING_IMAGES, self.images_per_prompt),
            scorer=replace(self.scorer, rewards=rewards),
            held_out=None,
            pictured=0,
            purpose="tuning",
        )

    def score(self, rollouts: Iterable[Rollout]) -> EvaluationResult:
        """Score the images that `sample` makes. Raises RunError as a call does."""
        return self._result(*self.scorer.score(rollouts))

    def captions(self, result: EvaluationResult) -> list[str]:
        """Return the prompt of each image that a result shows."""
        return [self.prompts[index].text for index in result.shown.tolist()]

    def sample(self, policy: Policy) -> Iterator[Rollout]:
        """Yield the images of this rank, pass by pass, without paths and embeddings."""
        policy = self.on_its_model(policy)
        members = self.members
        texts = [self.prompt_at(position).text for position, _ in members]
        with task("evaluating", total=len(members)) as work:
            for start in range(0, len(members), self.images_per_pass):
                end = min(start + self.images_per_pass, len(members))
                upcoming = islice(texts, end, None)
                yield self._sample_pass(policy, members[start:end], upcoming)
                work.advance(end - start)

    def on_its_model(self, policy: Policy) -> Policy:
        """Return the policy that makes the pictures: this one, or `stand_in` with its adapter."""
        return self.stand_in.with_adapter_of(policy) if self.stand_in else policy

    @property
    def members(self) -> list[tuple[int, int]]:
        """(prompt, image) of every image of this rank: all images of every n-th prompt.

        All ranks have equally many. Numbers beyond the prompts stand for repeated ones.
        """
        share = distributed.share(len(self.prompts))
        return list(product(share, range(self.images_per_prompt)))

    def prompt_at(self, position: int) -> Prompt:
        """Return the prompt of a member."""
        return self.prompts[position % len(self.prompts)]

    def _sample_pass(
        self, policy: Policy, members: list[tuple[int, int]], upcoming: Iterable[str]
    ) -> Rollout:
        prompts = [self.prompt_at(position) for position, _ in members]
        batch = make_prompts(policy, prompts, Keys.evaluation(self.seed, members), upcoming)
        rollout = collect(policy, batch, self.images_per_pass, self.purpose)
        # Latents and embeddings of thousands of images would fill a GPU.
        cond = rollout.cond.without_inputs()
        return replace(rollout.without_path(), x0=rollout.x0.cpu(), cond=cond)

    def _result(self, rollout: Rollout, scores: dict[str, PerImage]) -> EvaluationResult:
        """Gather the scores of all ranks, ordered by prompt and image."""
        members = torch.tensor(self.members).view(-1, 2)
        columns = [values[:, None] for values in scores.values()]
        table = distributed.gather(torch.cat([members, *columns], 1))
        table = table[table[:, 0] < len(self.prompts)]
        table = table[sorted(range(len(table)), key=lambda row: table[row, :2].tolist())]
        rewards = dict(zip(scores, table[:, 2:].T, strict=True))
        infinite = [name for name, values in rewards.items() if values.isinf().any()]
        if infinite:
            raise RunError(
                f"evaluation.rewards.{infinite[0]} was infinite for an image. Return finite "
                "numbers, or NaN for an image that cannot be scored."
            )
        images, shown = self._shown_images(rollout)
        return EvaluationResult(
            prompt=table[:, 0].long(),
            rewards=rewards,
            images=images,
            shown=shown,
            thumbnails=self._thumbnails(rollout),
        )

    def _shown_images(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Gather the images to show, in bytes, and the index of the prompt of each."""
        total = len(self.prompts) * self.images_per_prompt
        positions = range(0, total, max(1, total // self.shown))
        own = [prompt * self.images_per_prompt + image for prompt, image in self.members]
        rows = [row for row, position in enumerate(own) if position in positions]
        images = rollout.images[rows]
        place = torch.tensor([own[row] for row in rows]).view(-1, 1)
        table = distributed.gather(torch.cat([place, images.flatten(1)], 1))
        table = table[table[:, 0].argsort()][: self.shown]
        prompt = table[:, 0].long() // self.images_per_prompt
        return table[:, 1:].byte().view(-1, *images.shape[1:]), prompt

    def _thumbnails(self, rollout: Rollout) -> dict[int, bytes]:
        """Make the thumbnails of this rank and gather those of all ranks, by row."""
        prompts = pictured_prompts(len(self.prompts), self.pictured)
        own = {
            prompt * self.images_per_prompt: make_thumbnail(rollout.images[row], len(prompts))
            for row, (prompt, image) in enumerate(self.members)
            if image == 0 and prompt in prompts
        }
        shares = distributed.gather_objects(own)
        return dict(sorted(entry for share in shares for entry in share.items()))
