"""Rewards of fixed prompts and noise, before and after, and the interval of their paired difference."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import Tensor

from flowalign import processes
from flowalign.data import Prompt
from flowalign.experience import collect, Judge, make_prompts
from flowalign.flow import PerImage
from flowalign.policy import Policy

EVALUATION_STEP = -1
"""Stands in the noise keys for the training step, so that evaluation noise is never training noise."""
SHOWN = 18


@dataclass
class Scores:
    """Every reward of every evaluation picture, in the order prompt, image, and some of the pictures."""

    prompt: Tensor  # (N,)  index of the prompt
    rewards: dict[str, PerImage]
    images: Tensor  # (n, 3, H, W)  bytes, of prompts spread over all
    shown: Tensor  # (n,)  index of their prompts

    @property
    def means(self) -> dict[str, float]:
        return {name: score.mean().item() for name, score in self.rewards.items()}

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        rewards = {f"reward/{name}": score.contiguous() for name, score in self.rewards.items()}
        save_file({"prompt": self.prompt, "images": self.images, "shown": self.shown, **rewards}, path)

    @classmethod
    def load(cls, path: Path) -> "Scores":
        found = load_file(path)
        rewards = {name.removeprefix("reward/"): found[name] for name in found if name.startswith("reward/")}
        return cls(found["prompt"], rewards, found["images"], found["shown"])


@dataclass(frozen=True)
class Evaluator:
    """The same prompts and noise every time it is called; each process makes its share of the pictures."""

    prompts: Sequence[Prompt]
    images_per_prompt: int
    judge: Judge
    images_per_pass: int
    seed: int

    def __call__(self, policy: Policy) -> Scores:
        members = [(p, i) for p in range(len(self.prompts)) for i in range(self.images_per_prompt)]
        mine = members[processes.rank() :: processes.count()]
        pieces = [mine[start : start + self.images_per_pass] for start in range(0, len(mine), self.images_per_pass)]
        scored = [self._score(policy, piece) for piece in pieces]
        names = [reward.name for reward in self.judge.rewards]
        rows = torch.cat([torch.zeros(0, len(names)), *(torch.stack(list(scores.values()), 1) for scores, _ in scored)])
        keys = torch.tensor(mine).view(-1, 2)
        images = torch.cat(
            [torch.zeros(0, 3, policy.model.config.height, policy.model.config.width).byte(), *(i for _, i in scored)]
        )
        stride = max(1, len(mine) // SHOWN)
        table = processes.gather(torch.cat([keys, rows], 1))
        order = sorted(range(len(table)), key=lambda row: table[row, :2].tolist())
        scores = dict(zip(names, table[order, 2:].T, strict=True))
        return Scores(table[order, 0].long(), scores, images[::stride][:SHOWN].clone(), keys[::stride, 0][:SHOWN].clone())

    def _score(self, policy: Policy, piece: list[tuple[int, int]]) -> tuple[dict[str, PerImage], Tensor]:
        keys = [(self.seed, EVALUATION_STEP, prompt, image) for prompt, image in piece]
        batch = make_prompts(policy, [self.prompts[prompt] for prompt, _ in piece], keys)
        rollout = collect(policy, batch, self.images_per_pass, "evaluation")
        return self.judge.score(rollout), rollout.images


def paired_difference(before: Scores, after: Scores) -> dict[str, tuple[float, float, float]]:
    """{reward: (low, mean, high)}: the 95 % t-interval of the mean difference.

    Pictures of one prompt are not independent, so prompts are the units; pictures are where there is one prompt only.
    """
    differences = {}
    for name, score in after.rewards.items():
        difference = (score - before.rewards[name]).double()
        _, unit = before.prompt.unique(return_inverse=True)
        if unit.max() > 0:
            total = torch.zeros(int(unit.max()) + 1, dtype=torch.float64).index_add_(0, unit, difference)
            difference = total / torch.bincount(unit)
        differences[name] = _interval(difference)
    return differences


def _interval(values: Tensor) -> tuple[float, float, float]:
    mean, count = values.mean().item(), len(values)
    if count < 2:
        return -math.inf, mean, math.inf
    half = float(stats.t.ppf(0.975, count - 1)) * values.std().item() / math.sqrt(count)
    return mean - half, mean, mean + half
