"""From prompts to judged rollouts: collect, and judge."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from flowalign import processes
from flowalign.advantage import group_statistics, Rewards
from flowalign.batch import Prompts, Rollout
from flowalign.data import Prompt
from flowalign.errors import RunError, UserError
from flowalign.flow import concatenate, PerImage
from flowalign.policy import Policy
from flowalign.rewards.base import Reward, score_all


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
            fitting = [n for n in range(1, total + 1) if total % n == 0]
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


def make_prompts(policy: Policy, prompts: list[Prompt], keys: list[tuple[int, int, int, int]]) -> Prompts:
    """Prompts with their embeddings, one row an image."""
    texts = [prompt.text for prompt in prompts]
    return Prompts(texts, [prompt.metadata for prompt in prompts], torch.tensor(keys), policy.encode(texts))


def collect(policy: Policy, prompts: Prompts, images_per_pass: int, purpose: str = "rollout") -> Rollout:
    """Images for the prompts, made by a gradient-free view in passes of equal size; rewards are still 0."""
    seed, step = prompts.keys[0, :2].tolist()
    steps = policy.sampler.stochastic_steps(step, seed)
    return concatenate_rollouts([_collect(policy, piece, steps, purpose) for piece in prompts.pieces(images_per_pass)])


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
        for name in ("keys", "path", "log_prob", "images", "reward", "advantage")
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
    combine: Callable[[dict[str, PerImage], dict[str, float]], PerImage]
    advantage: Callable[[Rewards, torch.Tensor], PerImage]
    images_per_pass: int
    device: torch.device
    drop_equal_groups: bool = False
    """Whether images of a prompt whose rewards are all equal are left out of training."""

    @property
    def weights(self) -> dict[str, float]:
        return {reward.name: reward.weight for reward in self.rewards}

    def score(self, rollouts: list[Rollout]) -> dict[str, PerImage]:
        """Every reward of this process's images, on the CPU. RunError on all processes when a reward fails on one."""
        pieces = [piece for rollout in rollouts for piece in rollout.pieces(self.images_per_pass)]
        try:
            scored = [
                score_all(self.rewards, piece.images.to(self.device).float() / 255, piece.prompts, piece.metadata)
                for piece in pieces
            ]
        except RunError as error:
            processes.fail_together(error)
            raise
        processes.fail_together(None)
        empty = torch.zeros(0)
        return {reward.name: concatenate([empty, *(scores[reward.name] for scores in scored)]) for reward in self.rewards}

    def __call__(self, rollout: Rollout) -> tuple[Rollout, dict[str, float]]:
        """The rollout with rewards and advantages, and what to log of them."""
        names = [reward.name for reward in self.rewards]
        local = torch.stack([*self.score([rollout]).values(), rollout.group.float()], 1)
        everyone = processes.gather(local)
        scores = dict(zip(names, everyone.T, strict=False))
        group = everyone[:, -1].long()
        reward = self.combine(scores, self.weights)
        try:
            advantage = self.advantage(Rewards(reward, scores, self.weights), group)
        except ValueError as error:
            raise RunError(str(error)) from error
        _, deviation = group_statistics(reward, group)
        metrics = {f"reward/{name}": score.mean().item() for name, score in scores.items()}
        metrics |= {"reward/combined": reward.mean().item(), "reward/spread_in_group": deviation.mean().item()}
        metrics |= {"reward/groups_without_spread": (deviation == 0).float().mean().item()}
        start = processes.rank() * len(rollout)
        mine = slice(start, start + len(rollout))
        weight = (deviation[mine] > 0).float() if self.drop_equal_groups else torch.ones(len(rollout))
        judged = replace(rollout, reward=reward[mine].to(self.device), advantage=advantage[mine].to(self.device), weight=weight)
        return judged, metrics
