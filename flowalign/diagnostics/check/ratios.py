"""Checks of the loss before the first update, when policy, copies and reference are equal."""

import math
from collections.abc import Iterator

from flowalign.batch import Batch
from flowalign.diagnostics.check.probes import whole_pass_size
from flowalign.objectives.base import Loss, Objective
from flowalign.objectives.terms import VelocityKL
from flowalign.policy import Policy
from flowalign.rewards.inspection import Finding
from flowalign.training.gradient import split

MAX_NOISE = 0.1
"""Error of a log-ratio above which something other than rounding must be wrong."""


def losses(
    policy: Policy, objective: Objective, batch: Batch, images_per_pass: int
) -> Iterator[tuple[int, Loss]]:
    """Yield the loss of every pass and draw, with the number of the draw."""
    for each in split(policy, objective, batch, images_per_pass):
        yield each.number, objective.loss(policy, each.batch, each.draw)


def check_initial_loss(policy: Policy, objective: Objective, batch: Batch) -> Iterator[Finding]:
    """Check that ratios are 1 and KL is 0 before the first update, where the loss has them."""
    errors, kls = dict[int, float](), list[float]()
    # The images were made in large passes. Training may use small ones, which round differently.
    for images_per_pass in {whole_pass_size(policy, batch), batch.images_per_row}:
        for number, loss in losses(policy, objective, batch, images_per_pass):
            if "ratio/max_log_error" in loss.stats:
                error = loss.stats["ratio/max_log_error"].values.max().item()
                errors[number] = max(errors.get(number, 0.0), error)
            if "kl" in loss.stats:
                kls.append(loss.stats["kl"].values.detach().abs().max().item())
            # Free what the backward pass would need before the next loss is made.
            del loss
    if errors:
        dtype = str(policy.model.dtype).removeprefix("torch.")
        yield ratio_finding(list(errors.values()), objective.log_ratio_clip, dtype)
    if kls:
        yield kl_finding(max(kls), velocity_penalties(objective))


def ratio_finding(errors: list[float], log_ratio_clip: float, dtype: str) -> Finding:
    """Compare the errors of log-ratios, by step, with the range in which they are not clipped."""
    numbers = ", ".join(f"{error:.1g}" for error in errors)
    text = f"log-ratios before the first update, step by step, in {dtype}: {numbers}"
    if math.isfinite(log_ratio_clip):
        text += f"; clipped beyond {log_ratio_clip:g}"
    noise = max(errors)
    if noise < log_ratio_clip:
        return Finding("ratio", text, wrong=noise > MAX_NOISE)
    advice = f"Set objective.clip_range to {10 * noise:.0e}"
    if dtype != "float32":
        advice += " or model.dtype to float32"
    return Finding("ratio", f"{text}, which is below their noise. {advice}.", wrong=True)


def kl_finding(kl: float, penalties: list[VelocityKL]) -> Finding:
    """Check that the KL is 0, unless the reference has a guidance of its own."""
    text = f"{kl:.2g} before the first update"
    guidances = [p.guidance for p in penalties if p.guidance is not None]
    if guidances:
        return Finding("kl", f"{text}; the reference has guidance {guidances[0]:g}")
    return Finding("kl", f"{text}; it should be 0" if kl > 0 else text, wrong=kl > 0)


def velocity_penalties(objective: Objective) -> list[VelocityKL]:
    """Return the settings of the objective that penalise the distance to the reference."""
    settings = vars(objective).values()
    return [value for value in settings if isinstance(value, VelocityKL) and value.weight]
