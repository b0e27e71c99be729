"""Score rollouts by rewards, and compare the images of each prompt.

Scores become a table of rewards, and the table becomes advantages: `score_passes`,
`combined_table` and `advantages` are functions of values. `RolloutScorer` holds the rewards and
settings of a run and calls them in this order.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowalign import distributed
from flowalign.advantages import group_statistics, RewardTable
from flowalign.batch import Batch, EVALUATION_STEP, Rollout
from flowalign.errors import RunError
from flowalign.flow import concatenate, PerImage
from flowalign.rewards.base import LearnedReward, Reward
from flowalign.rewards.combine import Combine
from flowalign.rewards.worker import has_ended, Worker

Metrics = dict[str, float]
"""Values to log, by name."""
Scores = dict[str, PerImage]
"""The scores of each reward by its name; NaN for an image that was not scored."""
AdvantageFunction = Callable[[RewardTable, Tensor], PerImage]
"""From the rewards of a step and the group of each image to advantages."""


class NotFinite(RunError):
    """A reward was infinite, or no image was scored, so that a rollout cannot be trained on."""

    def __init__(self, message: str, rollout: Rollout):
        super().__init__(message)
        self.rollout = rollout


@dataclass(frozen=True)
class RolloutScorer:
    """The rewards of a run, and how their scores are made into advantages."""

    rewards: list[Reward]
    combine: Combine
    advantage: AdvantageFunction
    images_per_pass: int
    device: torch.device
    drop_equal_groups: bool = False
    """True to leave out images of a prompt whose advantages are all equal."""

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each reward by its name."""
        return {reward.name: reward.weight for reward in self.rewards}

    @property
    def learners(self) -> dict[str, LearnedReward]:
        """The rewards that learn as training goes, by name."""
        return {reward.name: reward.learner for reward in self.rewards if reward.learner}

    def score(self, passes: Iterable[Rollout]) -> tuple[Rollout, Scores]:
        """Return this process's images, and their scores; see `score_passes`."""
        return score_passes(self.rewards, passes, self.images_per_pass, self.device)

    def __call__(self, passes: Iterable[Rollout]) -> tuple[Rollout, Metrics]:
        """Return one rollout with rewards and advantages, and its metrics.

        Images without a score get weight 0. All processes call it together. Raises NotFinite if a
        reward is infinite or no image was scored.
        """
        rollout, own_scores = self.score(passes)
        scores, group = gather_scores(rollout, own_scores)
        check_finite(scores, rollout)
        table = combined_table(self.combine, scores, self.weights, group)
        values = advantages(self.advantage, table, group)
        metrics = reward_metrics(scores, table, group) | self.combine.metrics()
        weight = row_weights(table, values, group, self.drop_equal_groups)
        # All processes hold equally many images, in the order of their ranks.
        start = distributed.rank() * len(rollout)
        own = slice(start, start + len(rollout))
        scored = replace(
            rollout,
            reward=table.combined[own].to(self.device),
            advantage=values[own].to(self.device),
            weight=weight[own],
            rewards={
                name: (self.weights[name] * values[own]).to(self.device)
                for name, values in table.by_name.items()
            },
        )
        return scored, metrics | update_learned_rewards(self.rewards, rollout, self.device)

    def take_logged(self) -> Metrics:
        """Return the means of what rewards have logged in training since the last call.

        All processes call it together.
        """
        journals = {reward.name: reward.journal for reward in self.rewards if reward.journal}
        if not journals:
            return {}
        own = {name: journal.take() for name, journal in journals.items()}
        values: dict[str, list[float]] = {}
        for of_process in distributed.gather_objects(own):
            for reward, logged in of_process.items():
                for name, entries in logged.items():
                    values.setdefault(f"{reward}/{name}", []).extend(entries)
        return {name: sum(entries) / len(entries) for name, entries in values.items()}

    def state(self) -> dict[str, Tensor]:
        """Return what was learned from step to step, for a checkpoint."""
        parts = {"combine": self.combine.state()}
        parts |= {f"rewards/{name}": learner.state() for name, learner in self.learners.items()}
        tensors: dict[str, Tensor] = {}
        for part, state in parts.items():
            tensors |= {f"{part}/{name}": value for name, value in state.items()}
        return tensors

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self.combine.load_state(_part(state, "combine/"))
        for name, learner in self.learners.items():
            learner.load_state(_part(state, f"rewards/{name}/"))


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): value for k, value in state.items() if k.startswith(prefix)}


def score_passes(
    rewards: Sequence[Reward], passes: Iterable[Rollout], images_per_pass: int, device: torch.device
) -> tuple[Rollout, Scores]:
    """Return the images of all passes, and their scores on the CPU.

    A pass is scored while the next is sampled; rewards of groups are called at the end. If a
    reward fails on one process, RunError is raised on all.
    """
    of_groups = [reward for reward in rewards if reward.of_groups]
    of_images = [reward for reward in rewards if not reward.of_groups]
    try:
        rollout, parts = _score_while_sampling(of_images, passes, images_per_pass, device)
        by_group = _score_groups(of_groups, rollout, device)
    except RunError as error:
        distributed.raise_if_any_failed(error)
        raise
    distributed.raise_if_any_failed(None)
    scores = {r.name: concatenate([part[r.name] for part in parts]) for r in of_images} | by_group
    return rollout, {reward.name: scores[reward.name] for reward in rewards}


def _score_while_sampling(
    rewards: Sequence[Reward], passes: Iterable[Rollout], images_per_pass: int, device: torch.device
) -> tuple[Rollout, list[Scores]]:
    """Return the images, and the scores of each part. A failed reward ends sampling soon."""
    rollouts: list[Rollout] = []
    tasks: list[Future[Scores]] = []
    # A new thread begins with the first GPU, so that of this thread is named.
    device, worker = torch.empty(0, device=device).device, Worker()
    try:
        for rollout in passes:
            rollouts.append(rollout)
            for part in rollout.pieces(images_per_pass):
                tasks.append(worker.submit(_score_images, rewards, device, part))
            failed = any(task.done() and task.exception() for task in tasks)
            # Ranks that share the weights of a model must all make the same forwards.
            if failed and distributed.count() == 1:
                break
        for task in tasks:
            has_ended(task)
        scores = [task.result() for task in tasks]
    finally:
        # After Ctrl-C nothing waits for a reward that may take minutes.
        for task in tasks:
            task.cancel()
        worker.close()
    return Rollout.concatenate(rollouts), scores


def _score_images(rewards: Sequence[Reward], device: torch.device, part: Rollout) -> Scores:
    images, step = part.images.to(device).float() / 255, training_step(part)
    return {reward.name: reward(images, part.prompts, part.metadata, step) for reward in rewards}


def training_step(batch: Batch) -> int | None:
    """Return the training step that a batch belongs to, or None in an evaluation."""
    _, step = batch.keys.of_step
    return None if step == EVALUATION_STEP else step


def _score_groups(rewards: Sequence[Reward], rollout: Rollout, device: torch.device) -> Scores:
    scores = {reward.name: torch.zeros(len(rollout)) for reward in rewards}
    for label in rollout.group.unique().tolist() if rewards else []:
        rows = (rollout.group == label).nonzero().flatten().tolist()
        for name, values in _score_images(rewards, device, rollout[rows]).items():
            scores[name][rows] = values
    return scores


def gather_scores(rollout: Rollout, scores: Scores) -> tuple[Scores, Tensor]:
    """Return the scores and the groups of all processes' images, in the order of ranks."""
    columns = [*scores.values(), rollout.group.float()]
    # One message for all columns, since processes wait for each other in each message.
    table = distributed.gather(torch.stack(columns, 1))
    return dict(zip(scores, table.T, strict=False)), table[:, -1].long()


def check_finite(scores: Scores, rollout: Rollout) -> None:
    """Raise NotFinite if a reward is infinite or no image was scored."""
    infinite = [name for name, values in scores.items() if values.isinf().any()]
    if infinite:
        raise NotFinite(f"rewards.{infinite[0]} was infinite", rollout)
    if all(values.isnan().all() for values in scores.values()):
        names = " or ".join(f"rewards.{name}" for name in scores)
        raise NotFinite(f"no image was given a score by {names}", rollout)


def combined_table(
    method: Combine, scores: Scores, weights: dict[str, float], group: Tensor
) -> RewardTable:
    """Return the rewards of a step, after `method` has learned from them."""
    method.observe(scores)
    return RewardTable.of_scores(method(scores, weights), scores, weights, group)


def advantages(function: AdvantageFunction, table: RewardTable, group: Tensor) -> PerImage:
    """Return the advantages (N,). Raises RunError if the rewards do not suit the function."""
    try:
        return function(table, group)
    except ValueError as error:
        raise RunError(str(error)) from error


def row_weights(
    table: RewardTable, values: PerImage, group: Tensor, drop_equal_groups: bool
) -> PerImage:
    """Return the weight (N,) of each image: 0 without a score, or if its group is dropped."""
    scored = table.scored
    _, deviation = group_statistics(values.masked_fill(~scored, torch.nan), group)
    return (scored & ((deviation > 0) | (not drop_equal_groups))).float()


def reward_metrics(scores: Scores, table: RewardTable, group: Tensor) -> Metrics:
    """Return what to log about the rewards of a step."""
    _, deviation = group_statistics(table.combined, group)
    return {
        **{f"reward/{name}": values.double().nanmean().item() for name, values in scores.items()},
        "reward/combined": table.combined.double().nanmean().item(),
        "reward/spread_in_group": deviation.nanmean().item(),
        "reward/groups_without_spread": (deviation == 0).float().mean().item(),
        "reward/not_scored": (~table.scored).float().mean().item(),
    }


def update_learned_rewards(
    rewards: Sequence[Reward], rollout: Rollout, device: torch.device
) -> Metrics:
    """Let the rewards that learn, learn from these images. Returns what to log of it."""
    metrics: Metrics = {}
    # Only now, so that all images of a step are scored by the same reward.
    for reward in rewards:
        if reward.learner:
            learned = reward.learn(rollout.images.to(device).float() / 255)
            metrics |= {f"{reward.name}/{figure}": value for figure, value in learned.items()}
    return metrics
