"""How far the policy has moved from the model it started from: signs of over-optimisation."""

import math
from dataclasses import replace

import torch
from torch.nn import functional as F

from flowalign import distributed
from flowalign.batch import Rollout
from flowalign.flow import add_noise, mean_square
from flowalign.objectives.draws import ForwardTimes
from flowalign.policy import Policy

COMPARED = 18
"""The most images of each rank whose velocities are compared."""
TIMES = ForwardTimes(count=4)
"""Times at which velocities are compared; with their noise, functions of the images' keys."""
SIDE = 16
"""Pixels. Images are compared at this size, so that diversity measures content and not texture."""


@torch.no_grad()
def drift_metrics(policy: Policy, rollout: Rollout) -> dict[str, float]:
    """Measure diversity and velocities, as means over ranks. All ranks call this together.

    Args:
        policy: The policy under the weights to measure.
        rollout: The evaluation images of this rank.

    Returns:
        `diversity`, if prompts have several images, `velocity_norm` and `velocity_moved`; see
        `diversity` and `velocity_drift`.
    """
    some = rollout[list(range(0, len(rollout), math.ceil(len(rollout) / COMPARED)))]
    own = torch.tensor([[diversity(rollout), *velocity_drift(policy, some)]])
    means = distributed.gather(own).nanmean(0).tolist()
    names = "diversity", "velocity_norm", "velocity_moved"
    return {name: value for name, value in zip(names, means, strict=True) if not math.isnan(value)}


def velocity_drift(policy: Policy, rollout: Rollout) -> tuple[float, float]:
    """Compare the policy's velocities with those of the model without adapter.

    Returns:
        The means of ‖v‖ / ‖v_ref‖ and of ‖v - v_ref‖² / ‖v_ref‖² over images and fixed times.
    """
    cond = policy.encode(rollout.prompts, metadata=rollout.metadata)
    # The latents of an evaluation are on the CPU.
    rollout = replace(rollout, x0=rollout.x0.to(cond.device))
    reference = policy.at("reference")
    norm, moved = [], []
    for draw in TIMES(rollout):
        xt, _ = add_noise(rollout.x0, draw.t, draw.noise)
        v, v_ref = policy.velocity(xt, draw.t, cond), reference.velocity(xt, draw.t, cond)
        norm.append((mean_square(v) / mean_square(v_ref)).sqrt())
        moved.append(mean_square(v - v_ref) / mean_square(v_ref))
    return torch.stack(norm).mean().item(), torch.stack(moved).mean().item()


def diversity(rollout: Rollout) -> float:
    """Measure how different the images of a prompt are.

    Returns:
        The root mean square difference of two images of a prompt, in [0, 1], as the mean over
        pairs and then over prompts. NaN if every prompt has a single image.
    """
    means = []
    for label in rollout.group.unique():
        # Images are bytes; in [0, 1] the difference does not depend on how they are stored. As
        # numbers, all images of an evaluation would take gigabytes.
        images = rollout.images[rollout.group == label].float() / 255
        pixels = F.adaptive_avg_pool2d(images, SIDE).flatten(1)
        if len(pixels) > 1:
            means.append(F.pdist(pixels).mean() / pixels.shape[1] ** 0.5)
    return torch.stack(means).mean().item() if means else math.nan
