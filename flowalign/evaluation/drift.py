"""How far the policy has moved from the model it started from."""

import math

import torch

from flowalign import distributed
from flowalign.batch import Rollout
from flowalign.flow import add_noise, mean_square
from flowalign.objectives.draws import ForwardTimes
from flowalign.policy import Policy

SHOWN = 18


@torch.no_grad()
def drift_metrics(policy: Policy, rollout: Rollout | None) -> dict[str, float]:
    """How different the pictures of a prompt are, and how far the velocities stand from the base model's, over all processes.

    `diversity`: the mean over prompts of the root mean square difference of two of its pictures, of 16 × 16 pixels in [0, 1],
    where prompts have several. `velocity_norm`: ‖v‖ / ‖v_ref‖, `velocity_moved`: ‖v - v_ref‖² / ‖v_ref‖²; the means over
    `SHOWN` pictures of each process, evenly taken, at fixed times and noise.
    """
    mine = []
    if rollout:
        few = rollout[list(range(0, len(rollout), math.ceil(len(rollout) / SHOWN)))]
        mine = [[diversity(rollout), *velocity_drift(policy, few)]]
    everyone = distributed.gather(torch.tensor(mine).view(-1, 3)).nanmean(0)
    names = "diversity", "velocity_norm", "velocity_moved"
    return {
        name: value
        for name, value in zip(names, everyone.tolist(), strict=True)
        if not math.isnan(value)
    }


def velocity_drift(policy: Policy, rollout: Rollout) -> tuple[float, float]:
    """`velocity_norm` and `velocity_moved` of a few pictures."""
    cond = policy.encode(rollout.prompts)
    norm, moved = [], []
    for draw in ForwardTimes(count=4)(rollout):
        xt, _ = add_noise(rollout.x0, draw.t, draw.noise)
        v, v_ref = (
            policy.velocity(xt, draw.t, cond),
            policy.at("reference").velocity(xt, draw.t, cond),
        )
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
