"""Score rollouts by rewards and compare the images of each prompt."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from flowalign import distributed
from flowalign.advantages import group_statistics, RewardTable
from flowalign.batch import Rollout
from flowalign.errors import RunError
from flowalign.flow import concatenate, PerImage
from flowalign.rewards.base import LearnedReward, Reward
from flowalign.rewards.combine import Combine

Metrics = dict[str, float]
"""What to log, by name."""


class NotFinite(RunError):
    """A reward was infinite, so nothing can be learned from this rollout."""

    def __init__(self, message: str, rollout: Rollout):
        super().__init__(message)
        self.rollout = rollout


@dataclass(frozen=True)
class RolloutScorer:
    """Scores rollouts and compares the images of each prompt, over all processes."""

    rewards: list[Reward]
    combine: Combine
    advantage: Callable[[RewardTable, torch.Tensor], PerImage]
    images_per_pass: int
    device: torch.device
    drop_equal_groups: bool = False
    """Whether images of a prompt whose advantages are all equal are left out of training."""

    @property
    def weights(self) -> dict[str, float]:
        return {reward.name: reward.weight for reward in self.rewards}

    def score(self, made: Iterable[Rollout]) -> tuple[Rollout | None, dict[str, PerImage]]:
        """All the images and every reward of them, on the CPU: pass by pass, while the next is being made.

        Rewards of groups are asked when all is made. RunError on all processes when a reward fails on one.
        """
        try:
            whole, scored = self._made_and_scored(made)
            by_group = self._by_group(whole) if whole else {}
        except RunError as error:
            distributed.raise_if_any_failed(error)
            raise
        distributed.raise_if_any_failed(None)
        empty = torch.zeros(0)
        scores = {
            reward.name: by_group.get(reward.name, empty)
            if reward.of_groups
            else concatenate([empty, *(scores[reward.name] for scores in scored)])
            for reward in self.rewards
        }
        return whole, scores

    def _made_and_scored(
        self, made: Iterable[Rollout]
    ) -> tuple[Rollout | None, list[dict[str, PerImage]]]:
        """The images, and the scores of every pass; no more is made or asked once a reward has failed."""
        pieces, waiting = [], []
        aside = scoring_thread(self.device)
        try:
            for piece in made:
                pieces.append(piece)
                waiting += [
                    aside.submit(self._pointwise, part)
                    for part in piece.pieces(self.images_per_pass)
                ]
                if any(task.done() and task.exception() for task in waiting):
                    break
            scored = [task.result() for task in waiting]
        finally:
            aside.shutdown(wait=False, cancel_futures=True)
        return Rollout.concatenate(pieces) if pieces else None, scored

    def _pointwise(self, piece: Rollout) -> dict[str, PerImage]:
        images = piece.images.to(self.device).float() / 255
        return {
            r.name: r(images, piece.prompts, piece.metadata)
            for r in self.rewards
            if not r.of_groups
        }

    def _by_group(self, rollout: Rollout) -> dict[str, PerImage]:
        asked = [reward for reward in self.rewards if reward.of_groups]
        scores = {reward.name: torch.zeros(len(rollout)) for reward in asked}
        for label in rollout.group.unique().tolist() if asked else []:
            members = (rollout.group == label).nonzero().flatten().tolist()
            part = rollout[members]
            images = part.images.to(self.device).float() / 255
            for reward in asked:
                scores[reward.name][members] = reward(images, part.prompts, part.metadata)
        return scores

    def __call__(self, made: Iterable[Rollout]) -> tuple[Rollout, dict[str, float]]:
        """The whole rollout with rewards and advantages, and what to log of them. Images without a score teach nothing.

        NotFinite, on all processes, when a reward is infinite or no image was scored.
        """
        rollout, scored = self.score(made)
        assert rollout is not None
        names = [reward.name for reward in self.rewards]
        everyone = distributed.gather(torch.stack([*scored.values(), rollout.group.float()], 1))
        scores = dict(zip(names, everyone.T, strict=False))
        group = everyone[:, -1].long()
        if infinite := [name for name, score in scores.items() if score.isinf().any()]:
            raise NotFinite(f"rewards.{infinite[0]} was infinite", rollout)
        if all(score.isnan().all() for score in scores.values()):
            raise NotFinite(
                f"no image was given a score by {' or '.join(f'rewards.{name}' for name in names)}",
                rollout,
            )
        self.combine.observe(scores)
        reward = self.combine(scores, self.weights)
        incomplete = missing_scores(scores, group)
        reward[incomplete] = torch.nan
        compared = {
            name: score.masked_fill(incomplete, torch.nan) for name, score in scores.items()
        }
        try:
            advantage = self.advantage(RewardTable(reward, compared, self.weights), group)
        except ValueError as error:
            raise RunError(str(error)) from error
        _, deviation = group_statistics(reward, group)
        metrics = {f"reward/{name}": score.nanmean().item() for name, score in scores.items()}
        metrics |= {
            "reward/combined": reward.nanmean().item(),
            "reward/spread_in_group": deviation.nanmean().item(),
        }
        metrics |= {"reward/groups_without_spread": (deviation == 0).float().mean().item()}
        metrics |= {
            "reward/not_scored": reward.isnan().float().mean().item(),
            **self.combine.metrics(),
        }
        start = distributed.rank() * len(rollout)
        mine = slice(start, start + len(rollout))
        _, differing = group_statistics(advantage.masked_fill(reward.isnan(), torch.nan), group)
        taught = ~reward[mine].isnan() & ((differing[mine] > 0) | (not self.drop_equal_groups))
        judged = {
            "reward": reward[mine].to(self.device),
            "advantage": advantage[mine].to(self.device),
        }
        return replace(rollout, weight=taught.float(), **judged), metrics | self._teach(rollout)

    def _teach(self, rollout: Rollout) -> dict[str, float]:
        """Rewards that learn, learn from these images; what to log of it."""
        figures: dict[str, float] = {}
        for name, learner in self.learners.items():
            learned = learner.update(rollout.images.to(self.device).float() / 255)
            figures |= {f"{name}/{figure}": value for figure, value in learned.items()}
        return figures

    @property
    def learners(self) -> dict[str, LearnedReward]:
        return {reward.name: reward.learner for reward in self.rewards if reward.learner}

    def state(self) -> dict[str, torch.Tensor]:
        """What was learned from step to step, as a checkpoint keeps it."""
        parts = {
            "combine": self.combine.state(),
            **{f"rewards/{name}": found.state() for name, found in self.learners.items()},
        }
        return {
            f"{part}/{name}": value
            for part, state in parts.items()
            for name, value in state.items()
        }

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Go on exactly from what `state` returned."""
        parts = {
            "combine": self.combine.load_state,
            **{f"rewards/{name}": r.load_state for name, r in self.learners.items()},
        }
        for part, load in parts.items():
            load(
                {
                    name.removeprefix(f"{part}/"): value
                    for name, value in state.items()
                    if name.startswith(f"{part}/")
                }
            )


def scoring_thread(device: torch.device) -> ThreadPoolExecutor:
    """Works on the same GPU as this thread; a new thread would begin on the first."""
    if device.type != "cuda":
        return ThreadPoolExecutor(1)
    return ThreadPoolExecutor(
        1, initializer=torch.cuda.set_device, initargs=(torch.cuda.current_device(),)
    )


def missing_scores(scores: dict[str, PerImage], group: torch.Tensor) -> torch.Tensor:
    """(N,) whether an image lacks a score that another image of its prompt has: it cannot be compared with that one."""
    together = group[:, None] == group[None]
    found = torch.zeros(len(group), dtype=torch.bool)
    for score in scores.values():
        found |= score.isnan() & (together & ~score.isnan()[None]).any(1)
    return found
