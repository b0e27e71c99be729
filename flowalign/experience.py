"""From prompts to judged rollouts: collect, and judge."""

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from flowalign import processes
from flowalign.advantage import group_statistics, Rewards
from flowalign.batch import Prompts, Rollout
from flowalign.data import Prompt
from flowalign.errors import RunError, UserError
from flowalign.flow import concatenate, PerImage
from flowalign.policy import Policy
from flowalign.rewards.base import Learns, Reward
from flowalign.rewards.combine import Combine


@dataclass(frozen=True)
class Counts:
    """The batch arithmetic of a step: images = prompts_per_step × images_per_prompt, over all processes."""

    prompts_per_step: int
    images_per_prompt: int
    updates_per_step: int
    images_per_pass: int
    processes: int = 1

    def __post_init__(self) -> None:
        shares = self.updates_per_step * self.processes
        if self.prompts_per_step % shares:
            near = sorted({max(1, self.prompts_per_step // shares) * shares, -(-self.prompts_per_step // shares) * shares})
            raise UserError(
                f"train.prompts_per_step is {self.prompts_per_step}, which {self.updates_per_step} updates on {self.processes} "
                f"process(es) cannot share evenly; nearest that can: {' or '.join(map(str, near))}."
            )
        total = self.images_per_update
        if total % self.images_per_pass:
            fitting = sorted({d for n in range(1, math.isqrt(total) + 1) if total % n == 0 for d in (n, total // n)})
            near = [max(n for n in fitting if n <= self.images_per_pass), *(n for n in fitting if n > self.images_per_pass)]
            raise UserError(
                f"train.images_per_pass is {self.images_per_pass}, but an update has {total} images on each "
                f"process; nearest that divide: {' or '.join(map(str, near[:2]))}."
            )

    @property
    def images_per_update(self) -> int:
        """On each process."""
        return self.prompts_per_step // self.updates_per_step // self.processes * self.images_per_prompt

    @property
    def images_per_step(self) -> int:
        """On all processes."""
        return self.prompts_per_step * self.images_per_prompt

    def slots(self, rank: int) -> list[int]:
        """Which of the step's prompts a process takes: an equal share of every update's."""
        share = self.prompts_per_step // self.updates_per_step // self.processes
        starts = [(update * self.processes + rank) * share for update in range(self.updates_per_step)]
        return [slot for start in starts for slot in range(start, start + share)]


class NotFinite(RunError):
    """A reward was infinite, so nothing can be learned from this rollout."""

    def __init__(self, message: str, rollout: Rollout):
        super().__init__(message)
        self.rollout = rollout


def make_prompts(policy: Policy, prompts: list[Prompt], keys: list[tuple[int, int, int, int]]) -> Prompts:
    """Prompts with their embeddings, one row an image."""
    texts = [prompt.text for prompt in prompts]
    return Prompts(texts, [prompt.metadata for prompt in prompts], torch.tensor(keys), policy.encode(texts))


def collect(policy: Policy, prompts: Prompts, images_per_pass: int, purpose: str = "rollout") -> Rollout:
    """Images for the prompts, made by a gradient-free view in passes of equal size; rewards are still 0."""
    return concatenate_rollouts(list(passes(policy, prompts, images_per_pass, purpose)))


def passes(policy: Policy, prompts: Prompts, images_per_pass: int, purpose: str = "rollout") -> Iterator[Rollout]:
    """As `collect`, pass by pass, each made when it is asked for."""
    seed, step = prompts.keys[0, :2].tolist()
    steps = policy.sampler.stochastic_steps(step, seed)
    return (_collect(policy, piece, steps, purpose) for piece in prompts.pieces(images_per_pass))


@torch.no_grad()
def _collect(policy: Policy, prompts: Prompts, steps: range, purpose: str) -> Rollout:
    path = policy.generate(prompts, purpose, steps)
    images = (policy.decode(path.x[:, -1]) * 255).round().byte().cpu()
    unjudged = torch.zeros(len(prompts), device=path.x.device)
    shared = prompts.prompts, prompts.metadata, prompts.keys, prompts.cond
    return Rollout(*shared, path.x, path.log_prob, images, unjudged, unjudged, path.steps)


def concatenate_rollouts(pieces: list[Rollout]) -> Rollout:
    """One rollout of all the pieces' images."""
    if len(pieces) == 1:
        return pieces[0]
    joined = {
        name: concatenate(getattr(p, name) for p in pieces)
        for name in ("keys", "path", "log_prob", "images", "reward", "advantage", "weight", "prepared")
    }
    conds = [piece.cond for piece in pieces]
    embeds, pooled = concatenate(c.embeds for c in conds), concatenate(c.pooled for c in conds)
    null_embeds, null_pooled = conds[0].null_embeds[:1].expand_as(embeds), conds[0].null_pooled[:1].expand_as(pooled)
    cond = replace(conds[0], embeds=embeds, pooled=pooled, null_embeds=null_embeds, null_pooled=null_pooled)
    texts = [text for piece in pieces for text in piece.prompts]
    metadata = [entry for piece in pieces for entry in piece.metadata]
    return replace(pieces[0], prompts=texts, metadata=metadata, cond=cond, **joined)


@dataclass(frozen=True)
class Judge:
    """Scores rollouts and compares the images of each prompt, over all processes."""

    rewards: list[Reward]
    combine: Combine
    advantage: Callable[[Rewards, torch.Tensor], PerImage]
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
            processes.fail_together(error)
            raise
        processes.fail_together(None)
        empty = torch.zeros(0)
        scores = {
            reward.name: by_group.get(reward.name, empty)
            if reward.of_groups
            else concatenate([empty, *(scores[reward.name] for scores in scored)])
            for reward in self.rewards
        }
        return whole, scores

    def _made_and_scored(self, made: Iterable[Rollout]) -> tuple[Rollout | None, list[dict[str, PerImage]]]:
        """The images, and the scores of every pass; no more is made or asked once a reward has failed."""
        pieces, waiting = [], []
        aside = one_thread(self.device)
        try:
            for piece in made:
                pieces.append(piece)
                waiting += [aside.submit(self._pointwise, part) for part in piece.pieces(self.images_per_pass)]
                if any(task.done() and task.exception() for task in waiting):
                    break
            scored = [task.result() for task in waiting]
        finally:
            aside.shutdown(wait=False, cancel_futures=True)
        return concatenate_rollouts(pieces) if pieces else None, scored

    def _pointwise(self, piece: Rollout) -> dict[str, PerImage]:
        images = piece.images.to(self.device).float() / 255
        return {r.name: r(images, piece.prompts, piece.metadata) for r in self.rewards if not r.of_groups}

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
        everyone = processes.gather(torch.stack([*scored.values(), rollout.group.float()], 1))
        scores = dict(zip(names, everyone.T, strict=False))
        group = everyone[:, -1].long()
        if infinite := [name for name, score in scores.items() if score.isinf().any()]:
            raise NotFinite(f"rewards.{infinite[0]} was infinite", rollout)
        if all(score.isnan().all() for score in scores.values()):
            raise NotFinite(f"no image was given a score by {' or '.join(f'rewards.{name}' for name in names)}", rollout)
        self.combine.follow(scores)
        reward = self.combine(scores, self.weights)
        incomplete = lacking(scores, group)
        reward[incomplete] = torch.nan
        compared = {name: score.masked_fill(incomplete, torch.nan) for name, score in scores.items()}
        try:
            advantage = self.advantage(Rewards(reward, compared, self.weights), group)
        except ValueError as error:
            raise RunError(str(error)) from error
        _, deviation = group_statistics(reward, group)
        metrics = {f"reward/{name}": score.nanmean().item() for name, score in scores.items()}
        metrics |= {"reward/combined": reward.nanmean().item(), "reward/spread_in_group": deviation.nanmean().item()}
        metrics |= {"reward/groups_without_spread": (deviation == 0).float().mean().item()}
        metrics |= {"reward/not_scored": reward.isnan().float().mean().item(), **self.combine.metrics()}
        start = processes.rank() * len(rollout)
        mine = slice(start, start + len(rollout))
        _, differing = group_statistics(advantage.masked_fill(reward.isnan(), torch.nan), group)
        taught = ~reward[mine].isnan() & ((differing[mine] > 0) | (not self.drop_equal_groups))
        judged = {"reward": reward[mine].to(self.device), "advantage": advantage[mine].to(self.device)}
        return replace(rollout, weight=taught.float(), **judged), metrics | self._teach(rollout)

    def _teach(self, rollout: Rollout) -> dict[str, float]:
        """Rewards that learn, learn from these images; what to log of it."""
        figures: dict[str, float] = {}
        for name, learner in self.learners.items():
            learned = learner.update(rollout.images.to(self.device).float() / 255)
            figures |= {f"{name}/{figure}": value for figure, value in learned.items()}
        return figures

    @property
    def learners(self) -> dict[str, Learns]:
        return {reward.name: reward.learner for reward in self.rewards if reward.learner}

    def state(self) -> dict[str, torch.Tensor]:
        """What was learned from step to step, as a checkpoint keeps it."""
        parts = {"combine": self.combine.state(), **{f"rewards/{name}": found.state() for name, found in self.learners.items()}}
        return {f"{part}/{name}": value for part, state in parts.items() for name, value in state.items()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Go on exactly from what `state` returned."""
        parts = {"combine": self.combine.load_state, **{f"rewards/{name}": r.load_state for name, r in self.learners.items()}}
        for part, load in parts.items():
            load({name.removeprefix(f"{part}/"): value for name, value in state.items() if name.startswith(f"{part}/")})


def one_thread(device: torch.device) -> ThreadPoolExecutor:
    """Works on the same GPU as this thread; a new thread would begin on the first."""
    if device.type != "cuda":
        return ThreadPoolExecutor(1)
    return ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(torch.cuda.current_device(),))


def lacking(scores: dict[str, PerImage], group: torch.Tensor) -> torch.Tensor:
    """(N,) whether an image lacks a score that another image of its prompt has: it cannot be compared with that one."""
    together = group[:, None] == group[None]
    found = torch.zeros(len(group), dtype=torch.bool)
    for score in scores.values():
        found |= score.isnan() & (together & ~score.isnan()[None]).any(1)
    return found
