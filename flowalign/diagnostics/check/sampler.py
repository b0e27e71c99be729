"""A check of the sampler: its deterministic steps are those of the pipeline's own scheduler."""

from dataclasses import replace

import torch

from flowalign.diagnostics.check.probes import Probe
from flowalign.flow import mean_square
from flowalign.models.base import Scheduler
from flowalign.policy import Policy
from flowalign.rewards.inspection import Finding

MAX_ERROR = 1e-3
"""Relative error of the final latents above which rounding is ruled out."""


@torch.no_grad()
def matches_scheduler(policy: Policy, scheduler: Scheduler, probe: Probe) -> Finding:
    """Compare the policy's ODE steps with those of the pipeline's scheduler.

    Both start from the same noise, and take velocities of the model without adapters.
    """
    sampler = replace(policy.sampler, dynamics=None)
    view = policy.at("reference").sampling(sampler)
    x = x_scheduler = probe.x
    for k, timestep in enumerate(scheduler.timesteps):
        x = view.step(x, k, probe.cond).mean
        t = x.new_full((len(x),), float(scheduler.sigmas[k]))
        v = view.velocity(x_scheduler, t, probe.cond)
        x_scheduler = scheduler.step(v, timestep, x_scheduler, return_dict=False)[0]
    error = (mean_square(x - x_scheduler) / mean_square(x_scheduler)).sqrt().max().item()
    name = type(scheduler).__name__
    # Written so that NaN is wrong too.
    if error < MAX_ERROR:
        return Finding("sampler", f"{sampler.steps} ODE steps agree with {name} to {error:.1g}")
    return Finding("sampler", f"ODE steps differ from {name} by {error:.2g}", wrong=True)
