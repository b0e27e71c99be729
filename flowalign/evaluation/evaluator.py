"""Rewards of fixed prompts and noise, before and after, and the interval of their paired difference."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowalign import distributed
from flowalign.batch import Keys, Rollout
from flowalign.data.prompts import Prompt
from flowalign.errors import RunError
from flowalign.evaluation.drift import drift_metrics, SHOWN
from flowalign.evaluation.held_out import HeldOut
from flowalign.evaluation.results import EvaluationResult
from flowalign.policy import Policy
from flowalign.progress import task
from flowalign.rollouts.collect import collect, make_prompts
from flowalign.rollouts.scoring import RolloutScorer


@dataclass(frozen=True)
class Evaluator:
    """The same prompts and noise every time it is called; each process makes its share of the pictures."""

    prompts: Sequence[Prompt]
    images_per_prompt: int
    judge: RolloutScorer
    images_per_pass: int
    seed: int
    shown: int = SHOWN
    """How many pictures are kept to look at, spread over the prompts."""
    held_out: HeldOut | None = None

    def __call__(self, policy: Policy) -> EvaluationResult:
        rollout, scores = self._judged(self.passes(policy))
        held_out = self.held_out(policy) if self.held_out else {}
        return replace(scores, held_out=held_out, figures=drift_metrics(policy, rollout))

    @property
    def members(self) -> list[tuple[int, int]]:
        """(prompt, image) of this process's pictures: all those of every n-th prompt."""
        mine = range(distributed.rank(), len(self.prompts), distributed.count())
        return [(prompt, image) for prompt in mine for image in range(self.images_per_prompt)]

    def judged(self, made: Iterable[Rollout]) -> EvaluationResult:
        """The scores of this process's pictures, pass by pass. RunError when one is infinite."""
        return self._judged(made)[1]

    def _judged(self, made: Iterable[Rollout]) -> tuple[Rollout | None, EvaluationResult]:
        names = [reward.name for reward in self.judge.rewards]
        rollout, scores = self.judge.score(made)
        keys = torch.tensor(self.members).view(-1, 2)
        table = distributed.gather(
            torch.cat([keys, *(score[:, None] for score in scores.values())], 1)
        )
        table = table[sorted(range(len(table)), key=lambda row: table[row, :2].tolist())]
        by_name = dict(zip(names, table[:, 2:].T, strict=True))
        if infinite := [name for name, score in by_name.items() if score.isinf().any()]:
            raise RunError(f"evaluation.rewards.{infinite[0]} was infinite for a picture.")
        images, shown = self.pictures([rollout] if rollout else [])
        return rollout, EvaluationResult(table[:, 0].long(), by_name, images, shown)

    def captions(self, result: EvaluationResult) -> list[str]:
        """Return the prompt of each picture that a result shows."""
        return [self.prompts[index].text for index in result.shown.tolist()]

    def passes(self, policy: Policy) -> Iterator[Rollout]:
        """This process's pictures, without their paths."""
        mine = self.members
        policy.model.remember([self.prompts[prompt].text for prompt, _ in mine])
        pieces = [
            mine[start : start + self.images_per_pass]
            for start in range(0, len(mine), self.images_per_pass)
        ]
        with task("evaluating", total=len(mine)) as work:
            for piece in pieces:
                yield self._collect(policy, piece)
                work.advance(len(piece))

    def _collect(self, policy: Policy, piece: list[tuple[int, int]]) -> Rollout:
        keys = Keys.evaluation(self.seed, piece)
        batch = make_prompts(policy, [self.prompts[prompt] for prompt, _ in piece], keys)
        rollout = collect(policy, batch, self.images_per_pass, "evaluation")
        # The embeddings of thousands of pictures would fill a GPU; only the number of rows stays.
        without = rollout.cond.map(lambda rows: rows.new_empty(len(rows), 0))
        return replace(rollout, path=rollout.path[:, -1:], cond=without)

    def pictures(self, rollouts: list[Rollout]) -> tuple[Tensor, Tensor]:
        """The pictures to look at, of all processes, as bytes, and the index of their prompts."""
        count = len(self.prompts) * self.images_per_prompt
        chosen = set(range(0, count, max(1, count // self.shown)))
        place = torch.tensor(
            [prompt * self.images_per_prompt + image for prompt, image in self.members]
        )
        kept = torch.tensor([int(p) in chosen for p in place], dtype=torch.bool)
        shape = rollouts[0].images.shape[1:] if rollouts else (3, 1, 1)
        images = torch.cat(
            [torch.zeros(0, *shape).byte(), *(rollout.images for rollout in rollouts)]
        )
        rows = distributed.gather(torch.cat([place[kept, None], images[kept].flatten(1)], 1))
        rows = rows[rows[:, 0].argsort()][: self.shown]
        return rows[:, 1:].byte().view(-1, *shape), rows[:, 0].long() // self.images_per_prompt
