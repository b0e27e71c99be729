"""Checks of the gradient, and of what an update of the optimizer changes."""

import math
from collections.abc import Iterator

import torch
from torch import nn

from flowalign.batch import Batch
from flowalign.diagnostics.check.probes import matrix_names, whole_pass_size
from flowalign.diagnostics.check.ratios import losses
from flowalign.objectives.base import Objective
from flowalign.policy import Policy
from flowalign.rewards.inspection import Finding
from flowalign.training.gradient import compute_gradient, Meter


def check_gradients(policy: Policy, objective: Objective, batch: Batch) -> Finding:
    """Check that a gradient reaches every matrix of the adapter, and no other parameter.

    Matrices that the velocity does not depend on are excused. The gradient stays in place for
    `check_optimizer_step`.
    """
    matrices = dict(zip(matrix_names(policy), policy.parameters(), strict=True))
    for parameter in matrices.values():
        parameter.grad = None
    compute_gradient(policy, objective, batch, whole_pass_size(policy, batch), Meter())
    without = {name for name, p in matrices.items() if p.grad is None or not p.grad.any()}
    unused = {name for name in without if not affects_velocity(policy, matrices[name], batch)}
    text = f"{len(matrices) - len(without)} of {len(matrices)} matrices receive one"
    if unused:
        text += f"; the velocity does not depend on {len(unused)}, for example {min(unused)}"
    problem = gradient_problem(policy, matrices, without - unused)
    if problem:
        return Finding("gradient", f"{text}; {problem}", wrong=True)
    return Finding("gradient", f"{text}, and nothing else does")


def gradient_problem(
    policy: Policy, matrices: dict[str, nn.Parameter], missing: set[str]
) -> str | None:
    """Describe the first problem of the gradients, or return None."""
    if missing:
        return f"none reaches {min(missing)}"
    trained = {id(parameter) for parameter in matrices.values()}
    for network in policy.model.networks().values():
        for name, parameter in network.named_parameters():
            if parameter.grad is not None and id(parameter) not in trained:
                return f"{name} receives one too"
    for name, parameter in matrices.items():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"that of {name} is not finite"
    return None


def affects_velocity(policy: Policy, parameter: nn.Parameter, batch: Batch) -> bool:
    """True if velocities depend on a matrix.

    A frozen matrix counts as one they depend on, because its gradient should not be missing.
    """
    if not parameter.requires_grad:
        return True
    x, t = policy.initial_noise(batch)[:1], torch.full((1,), 0.5, device=policy.model.device)
    v = policy.velocity(x, t, batch.cond[:1])
    # Uneven weights: the plain sum of a velocity may not depend on a matrix that its parts do.
    weights = torch.linspace(-1, 2, v.numel(), device=v.device).view_as(v)
    (gradient,) = torch.autograd.grad((v * weights).sum(), parameter, allow_unused=True)
    return gradient is not None and bool(gradient.any())


def check_kl_gradient(policy: Policy, objective: Objective, batch: Batch) -> Iterator[Finding]:
    """Check that the KL has a gradient, if the loss has a KL."""
    first = next(losses(policy, objective, batch, whole_pass_size(policy, batch)), None)
    if first is None or "kl" not in first[1].stats:
        return
    loss = first[1]
    kl = loss.stats["kl"].values.mean()
    norm = gradient_norm(kl, policy) if kl.requires_grad else 0.0
    text = f"norm {norm:.2g} where kl is {kl.item():.2g}" if norm else "kl has no gradient"
    yield Finding("kl gradient", text, wrong=not norm)


def gradient_norm(value: torch.Tensor, policy: Policy) -> float:
    """Return the norm of a scalar's gradient with respect to the adapter."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    return math.sqrt(sum(g.double().square().sum().item() for g in gradients if g is not None))


def check_optimizer_step(policy: Policy, optimizer: torch.optim.Optimizer) -> Finding:
    """Check that an update changes the adapter that trains, and no snapshot."""
    names = ["policy", *policy.snapshots]
    before = {name: [p.detach().clone() for p in policy.parameters(name)] for name in names}
    optimizer.step()
    changed = [name for name in names if differs(policy.parameters(name), before[name])]
    text = f"an update changes {', '.join(changed) or 'nothing'}"
    if changed == ["policy"]:
        return Finding("update", f"{text} alone")
    return Finding("update", f"{text} instead of policy alone", wrong=True)


def differs(parameters: list[nn.Parameter], values: list[torch.Tensor]) -> bool:
    """True if a parameter has other values than these."""
    pairs = zip(parameters, values, strict=True)
    return any(not torch.equal(parameter, value) for parameter, value in pairs)
