"""Rewards of fixed prompts and noise, before and after, and the interval of their paired difference."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save
from scipy import stats
from torch import Tensor

from flowalign import processes
from flowalign.batch import Examples, Pairs, Rollout
from flowalign.checkpoint import read_tensors, write_file
from flowalign.data import Prompt
from flowalign.errors import RunError, UserError
from flowalign.experience import collect, Judge, make_prompts
from flowalign.flow import add_noise, mean_square, PerImage
from flowalign.objectives.base import ForwardTimes
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
    held_out: dict[str, Tensor] = field(default_factory=dict)
    """(M,) each: figures of every entry of evaluation.pairs."""
    figures: dict[str, float] = field(default_factory=dict)
    """What tells of over-optimisation: `diversity`, `velocity_norm` and `velocity_moved`."""

    @property
    def means(self) -> dict[str, float]:
        return {name: score.nanmean().item() for name, score in (self.rewards | self.held_out).items()}

    def save(self, path: Path) -> None:
        figures = {"reward": self.rewards, "held_out": self.held_out}
        named = {f"{kind}/{name}": score.contiguous() for kind, scores in figures.items() for name, score in scores.items()}
        write_file(path, save({"prompt": self.prompt, "images": self.images, "shown": self.shown, **named}))

    @classmethod
    def load(cls, path: Path) -> "Scores":
        """UserError when the file is damaged."""
        try:
            found = read_tensors(path)
            if missing := {"prompt", "images", "shown"} - set(found):
                raise UserError(f"{path} is damaged: it has no {min(missing)}")
        except UserError as error:
            raise UserError(f"{error}. Remove it: the same command makes it again.") from None
        rewards, held_out = (
            {name.removeprefix(kind): found[name] for name in found if name.startswith(kind)} for kind in ("reward/", "held_out/")
        )
        return cls(found["prompt"], rewards, found["images"], found["shown"], held_out)


@dataclass(frozen=True)
class Evaluator:
    """The same prompts and noise every time it is called; each process makes its share of the pictures."""

    prompts: Sequence[Prompt]
    images_per_prompt: int
    judge: Judge
    images_per_pass: int
    seed: int
    shown: int = SHOWN
    """How many pictures are kept to look at, spread over the prompts."""
    held_out: "HeldOut | None" = None

    def __call__(self, policy: Policy) -> Scores:
        rollout, scores = self._judged(self.passes(policy))
        held_out = self.held_out(policy) if self.held_out else {}
        return replace(scores, held_out=held_out, figures=watched(policy, rollout))

    @property
    def members(self) -> list[tuple[int, int]]:
        """(prompt, image) of this process's pictures: all those of every n-th prompt."""
        mine = range(processes.rank(), len(self.prompts), processes.count())
        return [(prompt, image) for prompt in mine for image in range(self.images_per_prompt)]

    def judged(self, made: Iterable[Rollout]) -> Scores:
        """The scores of this process's pictures, pass by pass. RunError when one is infinite."""
        return self._judged(made)[1]

    def _judged(self, made: Iterable[Rollout]) -> tuple[Rollout | None, Scores]:
        names = [reward.name for reward in self.judge.rewards]
        rollout, scores = self.judge.score(made)
        keys = torch.tensor(self.members).view(-1, 2)
        table = processes.gather(torch.cat([keys, *(score[:, None] for score in scores.values())], 1))
        table = table[sorted(range(len(table)), key=lambda row: table[row, :2].tolist())]
        by_name = dict(zip(names, table[:, 2:].T, strict=True))
        if infinite := [name for name, score in by_name.items() if score.isinf().any()]:
            raise RunError(f"evaluation.rewards.{infinite[0]} was infinite for a picture.")
        images, shown = self.pictures([rollout] if rollout else [])
        return rollout, Scores(table[:, 0].long(), by_name, images, shown)

    def passes(self, policy: Policy) -> Iterator[Rollout]:
        """This process's pictures, without their paths."""
        mine = self.members
        policy.model.remember([self.prompts[prompt].text for prompt, _ in mine])
        pieces = [mine[start : start + self.images_per_pass] for start in range(0, len(mine), self.images_per_pass)]
        return (self._collect(policy, piece) for piece in pieces)

    def _collect(self, policy: Policy, piece: list[tuple[int, int]]) -> Rollout:
        keys = [(self.seed, EVALUATION_STEP, prompt, image) for prompt, image in piece]
        batch = make_prompts(policy, [self.prompts[prompt] for prompt, _ in piece], keys)
        rollout = collect(policy, batch, self.images_per_pass, "evaluation")
        without = rollout.cond.map(lambda embeds: embeds[..., :0])  # of thousands of pictures they would fill a GPU
        return replace(rollout, path=rollout.path[:, -1:], cond=without)

    def pictures(self, rollouts: list[Rollout]) -> tuple[Tensor, Tensor]:
        """The pictures to look at, of all processes, as bytes, and the index of their prompts."""
        count = len(self.prompts) * self.images_per_prompt
        chosen = set(range(0, count, max(1, count // self.shown)))
        place = torch.tensor([prompt * self.images_per_prompt + image for prompt, image in self.members])
        kept = torch.tensor([int(p) in chosen for p in place], dtype=torch.bool)
        shape = rollouts[0].images.shape[1:] if rollouts else (3, 1, 1)
        images = torch.cat([torch.zeros(0, *shape).byte(), *(rollout.images for rollout in rollouts)])
        rows = processes.gather(torch.cat([place[kept, None], images[kept].flatten(1)], 1))
        rows = rows[rows[:, 0].argsort()][: self.shown]
        return rows[:, 1:].byte().view(-1, *shape), rows[:, 0].long() // self.images_per_prompt


@dataclass(frozen=True)
class HeldOut:
    """Figures of pairs or pictures that were not trained on, at fixed times and noise.

    Of velocities without guidance. `reconstruction_error`: ‖v - (noise - x0)‖² of the (better) picture, less is better.
    `chosen_preferred`, of pairs: 1 where against the model without adapter the better picture's error has risen less than the
    worse one's; ½ where equally.
    """

    batch: Examples | Pairs
    """This process's share: every entry whose number is its rank, modulo the number of processes."""
    times: ForwardTimes = field(default_factory=lambda: ForwardTimes(count=8))

    @torch.no_grad()
    def __call__(self, policy: Policy) -> dict[str, Tensor]:
        cond = self.batch.cond.unguided()
        pictures = self.batch.x0 if isinstance(self.batch, Pairs) else (self.batch.x0,)
        error, moved = torch.zeros(2, len(pictures), len(self.batch), device=self.batch.device)
        for draw in self.times(self.batch):
            for i, x0 in enumerate(pictures):
                xt, target = add_noise(x0, draw.t, draw.noise)
                found = mean_square(policy.velocity(xt, draw.t, cond) - target)
                error[i] += found / self.times.count
                if len(pictures) == 2:
                    moved[i] += found - mean_square(policy.at("reference").velocity(xt, draw.t, cond) - target)
        figures = {"reconstruction_error": error[0]}
        if len(pictures) == 2:
            figures["chosen_preferred"] = (moved[0] < moved[1]).float() + 0.5 * (moved[0] == moved[1])
        number = self.batch.keys[:, 2].to(self.batch.device)
        table = processes.gather(torch.stack([number, *figures.values()], 1))
        return dict(zip(figures, table[table[:, 0].argsort()][:, 1:].T, strict=True))


@torch.no_grad()
def watched(policy: Policy, rollout: Rollout | None) -> dict[str, float]:
    """How different the pictures of a prompt are, and how far the velocities stand from the base model's, over all processes.

    `diversity`: the mean over prompts of the root mean square difference of two of its pictures, of 16 × 16 pixels in [0, 1],
    where prompts have several. `velocity_norm`: ‖v‖ / ‖v_ref‖, `velocity_moved`: ‖v - v_ref‖² / ‖v_ref‖²; the means over
    `SHOWN` pictures of each process, evenly taken, at fixed times and noise.
    """
    mine = []
    if rollout:
        few = rollout[list(range(0, len(rollout), math.ceil(len(rollout) / SHOWN)))]
        mine = [[diversity(rollout), *departure(policy, few)]]
    everyone = processes.gather(torch.tensor(mine).view(-1, 3)).nanmean(0)
    names = "diversity", "velocity_norm", "velocity_moved"
    return {name: value for name, value in zip(names, everyone.tolist(), strict=True) if not math.isnan(value)}


def departure(policy: Policy, rollout: Rollout) -> tuple[float, float]:
    """`velocity_norm` and `velocity_moved` of a few pictures."""
    cond = policy.encode(rollout.prompts)
    norm, moved = [], []
    for draw in ForwardTimes(count=4)(rollout):
        xt, _ = add_noise(rollout.x0, draw.t, draw.noise)
        v, v_ref = policy.velocity(xt, draw.t, cond), policy.at("reference").velocity(xt, draw.t, cond)
        norm.append((mean_square(v) / mean_square(v_ref)).sqrt())
        moved.append(mean_square(v - v_ref) / mean_square(v_ref))
    return torch.stack(norm).mean().item(), torch.stack(moved).mean().item()


def diversity(rollout: Rollout) -> float:
    """Of this process's pictures; NaN where no prompt has two."""
    small = torch.nn.functional.adaptive_avg_pool2d(rollout.images.float() / 255, 16).flatten(1)
    means = []
    for label in rollout.group.unique():
        pixels = small[rollout.group == label]
        if len(pixels) > 1:
            means.append(torch.nn.functional.pdist(pixels).mean() / pixels.shape[1] ** 0.5)
    return torch.stack(means).mean().item() if means else math.nan


def paired_difference(before: Scores, after: Scores) -> dict[str, tuple[float, float, float]]:
    """{reward: (low, mean, high)}: the 95 % t-interval of the mean difference.

    Pictures of one prompt are not independent, so prompts are the units; pictures are where there is one prompt only.
    Pictures that were not scored before or after are left out.
    """
    differences = {name: _interval((score - before.held_out[name]).double()) for name, score in after.held_out.items()}
    for name, score in after.rewards.items():
        difference = (score - before.rewards[name]).double()
        scored = ~difference.isnan()
        difference, (_, unit) = difference[scored], before.prompt[scored].unique(return_inverse=True)
        if unit.numel() and unit.max() > 0:
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
