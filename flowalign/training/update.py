"""The updates of one training step: gradient, clipping, apply or skip, and the copies.

A step may make several updates (`train.updates_per_step`), each on its share of the step's batch.
The updates after the first are off-policy: their images were sampled before it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from flowalign.batch import Batch
from flowalign.config.sections import Train
from flowalign.objectives.base import Objective
from flowalign.policy import Policy
from flowalign.runs.checkpoint import TrainState
from flowalign.runs.failures import SkippedUpdate
from flowalign.training.gradient import compute_gradient, Meter


@dataclass(frozen=True)
class UpdateResult:
    """The outcome of the updates of one step."""

    metrics: dict[str, float]
    """Means of the loss and of the objective's statistics over the step, and `grad_norm`."""
    outcomes: list[bool]
    """True for each update that was applied, False for each that was skipped, in their order."""
    has_gradient: bool
    """False if the gradient of every update was exactly 0, or no row was trained on.

    A batch without rows, in place of one that was not finite, says nothing of gradients: True.
    """


def update(
    state: TrainState,
    objective: Objective,
    batch: Batch,
    train: Train,
    skip_update: Callable[[SkippedUpdate], None],
) -> UpdateResult:
    """Make the updates of one step. All ranks call this together.

    Args:
        state: The weights and the optimizer, which change.
        objective: The formula of the loss.
        batch: The rows of this rank. An empty batch makes no update.
        train: The section of the configuration.
        skip_update: Called for an update with a loss or a gradient that is not finite, while the
            weights are still those before it.
    """
    parameters = state.policy.parameters()
    meter, norms, outcomes = Meter(), [], []
    for index, piece in enumerate(_shares(batch, train.updates_per_step)):
        state.optimizer.zero_grad()
        # The policy has BatchPlan's size, which divides an update. Train's is only the upper limit;
        # it serves a policy that was made without a size.
        images_per_pass = state.policy.images_per_pass or train.images_per_pass
        loss = compute_gradient(state.policy, objective, piece, images_per_pass, meter)
        if loss is None:
            continue
        norm = nn.utils.clip_grad_norm_(parameters, train.max_grad_norm).item()
        # Both numbers are of all ranks together, so all ranks apply the update or all skip it.
        is_finite = math.isfinite(norm) and bool(loss.isfinite())
        if is_finite:
            apply_update(state, objective, train)
        else:
            reason = f"the loss was {loss.item():g}, the gradient's norm {norm:g}"
            skip_update(SkippedUpdate(piece.trainable_rows(), index, reason))
        norms.append(norm)
        outcomes.append(is_finite)
    mean_norm = sum(norms) / max(1, len(norms))
    # The loss is NaN if nothing was trained on, because 0 would look like a perfect fit.
    metrics = {"loss": math.nan, **meter.values(), "grad_norm": mean_norm}
    return UpdateResult(metrics, outcomes, has_gradient=any(norms) or not len(batch))


def _shares(batch: Batch, updates: int) -> list[Batch]:
    return batch.pieces(len(batch) // updates) if len(batch) else []


def apply_update(state: TrainState, objective: Objective, train: Train) -> None:
    """Apply the gradients with AdamW at the scheduled rate, and let the copies follow."""
    # Schedules count applied updates, so a skipped one delays them and never jumps them.
    updates_before = state.updates
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(updates_before, train)
    state.optimizer.step()
    update_snapshots(state.policy, objective, updates_before, after="update")
    if train.ema.decay:
        state.policy.update_copy("ema", train.ema.decay_at(state.updates))


def learning_rate(updates: int, train: Train) -> float:
    """Return the rate of the update after `updates` updates: linear warm-up and cool-down."""
    remaining = train.steps * train.updates_per_step - updates
    rise = (updates + 1) / max(1, train.warmup)
    fall = remaining / (train.cooldown + 1)
    return train.learning_rate * min(1.0, rise, fall)


def update_snapshots(
    policy: Policy, objective: Objective, updates: int, after: Literal["step", "update"]
) -> None:
    """Let the objective's copies of the policy follow it, if they do after a step or an update.

    Args:
        policy: The policy and its copies.
        objective: It names the copies, their decay, and when they follow.
        updates: After a step, the updates that were scheduled up to its end. Skipped ones count, so
            that the decay depends on the step alone. After an update, those applied before it.
        after: What has just ended.
    """
    if objective.copies_follow_after != after:
        return
    for name, decay in objective.snapshots.items():
        policy.update_copy(name, decay(updates))
