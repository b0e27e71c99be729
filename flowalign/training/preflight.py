"""Checks before every run that cost no forward of the network."""

import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from flowalign.batch import Batch, Cond, Keys, Prompts
from flowalign.dynamics import is_stochastic
from flowalign.errors import UserError
from flowalign.files import size
from flowalign.flow import Latent, over_latent, PerImage
from flowalign.policy import Policy
from flowalign.rewards.inspection import Finding
from flowalign.rollouts.collect import make_prompts
from flowalign.rollouts.sources import SourceContext
from flowalign.settings.types import settings_of
from flowalign.training.setup import Assembly

SMALLER = 10**5
"""How many times smaller steps are that must keep a sampler's marginals."""
PROMPTS, IMAGES = 2, 4


def before_start(assembly: Assembly) -> Iterator[Finding]:
    """What costs no forward of the network, so that every run can begin with it."""
    policy = assembly.policy
    yield disk_space(assembly)
    times = schedule(policy)
    yield times
    batch = keyed_prompts(assembly.context, policy)
    yield noise(policy, batch)
    if is_stochastic(policy.sampler.dynamics) and not times.wrong:
        yield marginals(policy)
    yield optimized(policy, assembly.state.optimizer)
    yield from guided_twice(assembly)


def refuse_what_is_wrong(assembly: Assembly) -> None:
    """UserError with the first of `before_start` that is wrong."""
    for finding in before_start(assembly):
        if finding.wrong:
            raise UserError(f"{finding.subject}: {finding.text}")


def disk_space(assembly: Assembly) -> Finding:
    """Room for the checkpoints that stay, the one being written and the best."""
    policy, train = assembly.policy, assembly.config.train
    adapter = sum(p.numel() * p.element_size() for p in policy.parameters())
    one = adapter * (3 + len(policy.snapshots))  # with AdamW's two moments
    wanted = one * (train.keep + 2) + 2 * adapter
    place = Path(assembly.config.output).absolute()
    there = next(parent for parent in (place, *place.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    text = f"a checkpoint has {size(one)}; {size(wanted)} are wanted in {assembly.config.output}, {size(free)} are free"
    advice = "; make room, or choose another folder: output=FOLDER" if free < wanted else ""
    return Finding("disk", text + advice, free < wanted)


def schedule(policy: Policy) -> Finding:
    """From noise to picture without a step back."""
    times = policy.times
    falling = all(t > s for t, s in pairwise(times))
    wrong = times[0] != 1 or times[-1] != 0 or not falling or len(times) != policy.sampler.steps + 1
    return Finding(
        "schedule",
        " ".join(f"{t:.3g}" for t in times) + (" does not fall from 1 to 0" if wrong else ""),
        wrong,
    )


def noise(policy: Policy, batch: Batch) -> Finding:
    """Whether images, steps of the sampler and steps of training have noise of their own."""
    shape, start = policy.model.latent_shape, policy.start(batch).cpu()
    later = replace(batch, keys=replace(batch.keys, step=batch.keys.step + 1))
    draws = {
        "rollout/0": start,
        "rollout/1": batch.noise("rollout", 1, shape),
        "next step": later.noise("rollout", 0, shape),
    }
    rows = torch.cat(
        [torch.nn.functional.normalize(draw.flatten(1), dim=1) for draw in draws.values()]
    )
    owner = torch.cat(
        [batch.group if policy.sampler.same_noise else torch.arange(len(batch))]
        + [torch.arange(len(batch))] * 2
    )
    source = torch.arange(len(draws)).repeat_interleave(len(batch))
    same = (owner[:, None] == owner[None]) & (source[:, None] == source[None])
    largest = (rows @ rows.T)[~same].abs().max().item()
    limit = 6 / math.sqrt(rows.shape[1])
    text = f"correlation between images, steps and training steps at most {largest:.2g}, by chance below {limit:.2g}"
    return Finding("noise", text, largest > limit)


class OnePicture:
    """In the place of a model: the exact velocity where all pictures are one, 0, so that x at t is N(0, t²)."""

    def velocity(self, x: Latent, t: PerImage, _: Cond) -> Latent:
        return x / over_latent(t, x)


def marginals(policy: Policy) -> Finding:
    """Whether stochastic steps keep N(0, t²) as they become small, and what noise the configured steps leave in a picture."""
    steps, times = policy.sampler.stochastic_steps(0, 0), policy.times
    middles = [(times[k] + times[k + 1]) / 2 for k in steps]
    small = [
        (t, t - (times[k] - times[k + 1]) / SMALLER) for k, t in zip(steps, middles, strict=True)
    ]
    off = max(abs((after(policy, t, s, t**2) - t**2) / (s**2 - t**2) - 1) for t, s in small)
    variance = 1.0
    for k, (t, s) in enumerate(pairwise(times[:-1])):
        variance = after(policy, t, s, variance, k in steps)
    kept = (
        f"small stochastic steps keep them to {off:.1g}"
        if off < 0.02
        else f"small stochastic steps miss them by {off:.0%}"
    )
    much = f"with {len(steps)} of {len(times) - 1} steps stochastic, the last begins with {math.sqrt(variance) / times[-2]:.3g}"
    return Finding("marginals", f"{kept}; {much} times the noise it expects", off >= 0.02)


def after(policy: Policy, t: float, s: float, variance: float, stochastic: bool = True) -> float:
    """The variance after the policy's own step from t to s."""
    view = policy.at("reference")
    view.model, view.times = OnePicture(), [t, s]  # type: ignore[assignment]
    step = view.step(torch.ones(1, 1, dtype=torch.float64), 0, Cond({}, {}), stochastic)
    return step.mean.item() ** 2 * variance + step.std**2


def optimized(policy: Policy, optimizer: torch.optim.Optimizer) -> Finding:
    """Whether the optimiser holds the adapter that trains, all of it and nothing else."""
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    mine = policy.parameters()
    wrong = sorted(held) != sorted(map(id, mine)) or not all(p.requires_grad for p in mine)
    text = f"{len(mine)} matrices, {sum(p.numel() for p in mine):,} numbers"
    return Finding(
        "optimizer",
        "it does not hold the adapter that trains" if wrong else f"holds the adapter: {text}",
        wrong,
    )


def guided_twice(assembly: Assembly) -> Iterator[Finding]:
    """Where the objective guides a model that is told its guidance, as Flux-dev is."""
    told = assembly.config.sampler.embedded_guidance
    for key, guidance in guidances(settings_of(assembly.config.objective), "objective"):
        if guidance > 1 and assembly.policy.model.has_distilled_guidance:
            text = f"{key} is {guidance:g}, but this model is told its guidance, sampler.embedded_guidance: {told:g}; write {key}: 1"
            yield Finding("guidance", text, wrong=True)


def guidances(settings: dict[str, Any], key: str) -> Iterator[tuple[str, float]]:
    """Those of an objective's settings, with their keys."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from guidances(value, f"{key}.{name}")
        elif name == "guidance" and value is not None:
            yield f"{key}.{name}", value


def keyed_prompts(context: SourceContext, policy: Policy) -> Prompts:
    """Some images of two prompts, with the keys of the first training step."""
    texts = (context.prompts * PROMPTS)[:PROMPTS]
    members = [(slot, image) for slot in range(PROMPTS) for image in range(IMAGES)]
    return make_prompts(
        policy,
        [texts[slot] for slot, _ in members],
        Keys.training(context.seed, 0, members),
    )
