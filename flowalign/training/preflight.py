"""Checks that run before every training run. They need no forward of the network.

`flowalign check` prints them too, and adds checks that run the model.
"""

import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from flowalign.batch import Batch, Keys, Prompts
from flowalign.dynamics import Dynamics, is_stochastic, ode
from flowalign.errors import UserError
from flowalign.files import format_bytes
from flowalign.policy import Policy
from flowalign.rewards.inspection import Finding
from flowalign.rollouts.collect import make_prompts
from flowalign.rollouts.sources import SourceContext
from flowalign.settings.types import settings_of
from flowalign.training.setup import Assembly

STEP_SHARE = 1e-5
"""Share of a configured step that a step is reduced to, to test that it keeps the marginals."""
MAX_ERROR = 0.02
"""Relative error of the variance of a small step, above which its dynamics is wrong."""
PROMPTS, IMAGES = 2, 4
"""Prompts, and images of each, that the checks use."""


def preflight_findings(assembly: Assembly) -> Iterator[Finding]:
    """Yield the findings of all checks that need no forward of the network."""
    policy = assembly.policy
    yield check_disk(assembly)
    schedule = check_schedule(policy.times, policy.sampler.steps)
    yield schedule
    yield check_noise(policy, keyed_prompts(assembly.context, policy))
    if is_stochastic(policy.sampler.dynamics) and not schedule.wrong:
        steps = policy.sampler.stochastic_steps(0, 0)
        yield check_marginals(policy.sampler.dynamics, policy.times, steps)
    yield check_optimizer(policy, assembly.state.optimizer)
    yield from check_guidance(assembly)
    yield from check_few_steps(assembly)


def require_preflight(assembly: Assembly) -> None:
    """Raise UserError with the first problem that the checks find, if there is one."""
    for finding in preflight_findings(assembly):
        if finding.wrong:
            raise UserError(f"{finding.subject}: {finding.text}")


def check_disk(assembly: Assembly) -> Finding:
    """Check that the disk has room for the checkpoints of the run."""
    policy, train, output = assembly.policy, assembly.config.train, assembly.config.output
    adapter = sum(p.numel() * p.element_size() for p in policy.parameters())
    # The adapter, AdamW's two moments, and the copies.
    checkpoint = adapter * (3 + len(policy.snapshots))
    # Those that are kept, the one being written and the best, and two exported adapters.
    needed = checkpoint * (train.keep + 2) + 2 * adapter
    path = Path(output).absolute()
    folder = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    text = f"a checkpoint has {format_bytes(checkpoint)}; {output} needs {format_bytes(needed)}"
    text += f", and {format_bytes(free)} are free"
    if free >= needed:
        return Finding("disk", text)
    return Finding("disk", f"{text}. Make room or choose output=FOLDER elsewhere.", wrong=True)


def check_schedule(times: list[float], steps: int) -> Finding:
    """Check that the times fall from 1 (noise) to 0 (image), with one step between two times."""
    falls = all(t > s for t, s in pairwise(times))
    wrong = times[0] != 1 or times[-1] != 0 or not falls or len(times) != steps + 1
    text = " ".join(f"{t:.3g}" for t in times)
    return Finding("schedule", f"{text} does not fall from 1 to 0" if wrong else text, wrong)


def check_noise(policy: Policy, batch: Batch) -> Finding:
    """Check that images, sampler steps and training steps have independent noise.

    With `same_noise`, the images of a group share the noise they start from.
    """
    shape = policy.model.latent_shape
    later = replace(batch, keys=replace(batch.keys, step=batch.keys.step + 1))
    draws = [
        policy.initial_noise(batch).cpu(),
        batch.noise("rollout", 1, shape),
        later.noise("rollout", 0, shape),
    ]
    rows = torch.cat([F.normalize(draw.flatten(1), dim=1) for draw in draws])
    images = torch.arange(len(batch))
    owner = torch.cat([batch.group if policy.sampler.same_noise else images, images, images])
    source = torch.arange(len(draws)).repeat_interleave(len(batch))
    same = (owner[:, None] == owner[None]) & (source[:, None] == source[None])
    largest = (rows @ rows.T)[~same].abs().max().item()
    # A correlation of independent noise has the deviation 1 / sqrt(elements).
    limit = 6 / math.sqrt(rows.shape[1])
    text = f"largest correlation between images, steps and training steps is {largest:.2g}"
    return Finding("noise", f"{text}; below {limit:.2g} by chance", wrong=largest > limit)


def check_marginals(dynamics: Dynamics, times: list[float], steps: range) -> Finding:
    """Check that small stochastic steps keep the marginals of the ODE.

    Also describes how much noise the configured steps leave in an image. `steps` are the
    stochastic ones.
    """
    error = max(marginal_error(dynamics, times[k], times[k + 1]) for k in steps)
    variance = 1.0
    for k, (t, s) in enumerate(pairwise(times[:-1])):
        variance = variance_after(dynamics if k in steps else ode, t, s, variance)
    excess = math.sqrt(variance) / times[-2]
    wrong = error >= MAX_ERROR
    verb = f"miss them by {error:.0%}" if wrong else f"keep them to {error:.1g}"
    share = f"with {len(steps)} of {len(times) - 1} steps stochastic"
    text = f"small stochastic steps {verb}; {share}, the last starts with {excess:.3g} times"
    return Finding("marginals", f"{text} the noise it expects", wrong)


def marginal_error(dynamics: Dynamics, t: float, s: float) -> float:
    """Return the relative error of the change in variance, for a small step between t and s."""
    start = (t + s) / 2
    end = start - (t - s) * STEP_SHARE
    change = variance_after(dynamics, start, end, start**2) - start**2
    return abs(change / (end**2 - start**2) - 1)


def variance_after(dynamics: Dynamics, t: float, s: float, variance: float) -> float:
    """Return the variance of x after a step from t to s, if all images are 0.

    Then x at time t is N(0, t²), and its exact velocity is x / t.
    """
    x = torch.ones(1, 1, dtype=torch.float64)
    step = dynamics(x, x / t, t, s)
    return step.mean.item() ** 2 * variance + step.std**2


def check_optimizer(policy: Policy, optimizer: torch.optim.Optimizer) -> Finding:
    """Check that the optimizer holds the adapter that trains, and nothing else."""
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    matrices = policy.parameters()
    trainable = all(p.requires_grad for p in matrices)
    if sorted(held) != sorted(map(id, matrices)) or not trainable:
        text = "the optimizer does not hold the adapter that trains, or holds more"
        return Finding("optimizer", text, wrong=True)
    text = f"{len(matrices)} matrices, {sum(p.numel() for p in matrices):,} numbers"
    return Finding("optimizer", f"holds the adapter: {text}")


def check_guidance(assembly: Assembly) -> Iterator[Finding]:
    """Check that no objective guides a model whose guidance is distilled into it."""
    if not assembly.policy.model.has_distilled_guidance:
        return
    embedded = assembly.config.sampler.embedded_guidance
    for key, guidance in guidance_settings(settings_of(assembly.config.objective), "objective"):
        if guidance > 1:
            yield Finding(
                "guidance",
                f"{key} is {guidance:g}, but guidance is distilled into this model and set by "
                f"sampler.embedded_guidance: {embedded:g}. Set {key} to 1.",
                wrong=True,
            )


def check_few_steps(assembly: Assembly) -> Iterator[Finding]:
    """Check that a model of few steps is not guided, and whether it will blur."""
    config, model = assembly.config, assembly.policy.model
    drawing = assembly.evaluator.on_its_model(assembly.policy.at("reference")).model
    if drawing.is_step_distilled:
        highest = max([1.0, *config.evaluation.guidance_sweep])
        yield from _unguided({"evaluation.sampler.guidance": config.evaluation_sampler.guidance})
        if config.target_reward and highest > 1:
            text = f"evaluation.guidance_sweep tries {highest:g}, but the model is made for few"
            yield Finding("few steps", f"{text} steps without guidance. Set it to [].", wrong=True)
    if not model.is_step_distilled:
        return
    scales = dict(guidance_settings(settings_of(config.objective), "objective"))
    yield from _unguided({**scales, "sampler.guidance": config.sampler.guidance})
    if config.objective.matches_velocities:
        yield Finding(
            "few steps",
            "this model was distilled to few steps, and the objective teaches it the velocities of "
            "many: its pictures of few steps will blur. Train the base model, with this one as "
            "evaluation.model, or choose the objective opsd.",
        )


def _unguided(scales: Mapping[str, float]) -> Iterator[Finding]:
    """Yield a finding for each guidance, by its key, under which a model of few steps would be."""
    for key, guidance in scales.items():
        if guidance > 1:
            text = f"{key} is {guidance:g}, but the model is made for few steps without guidance"
            yield Finding("few steps", f"{text}. Set {key} to 1.", wrong=True)


def guidance_settings(settings: dict[str, Any], key: str) -> Iterator[tuple[str, float]]:
    """Yield the key and the value of every guidance among an objective's settings."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from guidance_settings(value, f"{key}.{name}")
        elif name == "guidance" and value is not None:
            yield f"{key}.{name}", value


def keyed_prompts(context: SourceContext, policy: Policy) -> Prompts:
    """Return IMAGES rows for each of PROMPTS prompts, with keys of the first training step."""
    prompts = (context.prompts * PROMPTS)[:PROMPTS]
    members = [(slot, image) for slot in range(PROMPTS) for image in range(IMAGES)]
    keys = Keys.training(context.seed, 0, members)
    return make_prompts(policy, [prompts[slot] for slot, _ in members], keys)
