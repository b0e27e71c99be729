"""Checks of the loss before the first update, when policy, copies and reference are equal."""

import math
from collections.abc import Iterator

from flowalign.batch import Batch
from flowalign.diagnostics.check.probes import whole_pass_size
from flowalign.models.compiled import uncompiled
from flowalign.objectives.base import Loss, Objective
from flowalign.objectives.terms import VelocityKL
from flowalign.policy import Policy
from flowalign.rewards.inspection import Finding
from flowalign.training.gradient import split

MAX_NOISE = 0.1
"""Error of a log-ratio above which something other than rounding must be wrong."""
COMPILED_SHARE = 0.1
"""Share of the clip range that compiled blocks may add to a log-ratio."""


def losses(
    policy: Policy, objective: Objective, batch: Batch, images_per_pass: int
) -> Iterator[tuple[int, Loss]]:
    """Yield the loss of every pass and draw, with the number of the draw."""
    for each in split(policy, objective, batch, images_per_pass):
        yield each.number, objective.loss(policy, each.batch, each.draw)


def check_initial_loss(
    policy: Policy, objective: Objective, batch: Batch, moved: bool = False
) -> Iterator[Finding]:
    """Check that ratios are 1 and KL is 0 before the first update, where the loss has them.

    `moved` is true if the policy begins elsewhere than the reference.
    """
    compiled = policy.model.config.compile
    whole, sampled = whole_pass_size(policy, batch), policy.images_per_pass
    # The images were made in large passes. Training may use small ones, which round differently.
    sizes = {whole, batch.images_per_row}
    if compiled and sampled:
        # In passes as large as those of the images, only the graphs can differ.
        sizes.add(sampled)
    errors, graph_errors, kls = dict[int, float](), [0.0], list[float]()
    for images_per_pass in sizes:
        for number, loss in losses(policy, objective, batch, images_per_pass):
            if "ratio/max_log_error" in loss.stats:
                error = loss.stats["ratio/max_log_error"].values.max().item()
                errors[number] = max(errors.get(number, 0.0), error)
                graph_errors += [error] * (images_per_pass == sampled)
            if "kl" in loss.stats and not compiled:
                kls.append(largest_kl(loss))
            # Free what the backward pass would need before the next loss is made.
            del loss
    if compiled:
        # The graph of the reference has no adapters, so it rounds differently.
        with uncompiled():
            each = losses(policy, objective, batch, whole)
            kls += [largest_kl(loss) for _, loss in each if "kl" in loss.stats]
    clip = objective.log_ratio_clip
    if errors:
        dtype = str(policy.model.dtype).removeprefix("torch.")
        yield ratio_finding(list(errors.values()), clip, dtype)
    if errors and compiled:
        yield compiled_finding(max(graph_errors), clip)
    if kls:
        yield kl_finding(max(kls), velocity_penalties(objective), moved)


def largest_kl(loss: Loss) -> float:
    """Return the largest KL of a pass, in absolute value."""
    return loss.stats["kl"].values.detach().abs().max().item()


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


def compiled_finding(error: float, log_ratio_clip: float) -> Finding:
    """Compare what compiled graphs add to log-ratios with the range that is not clipped.

    The images come from graphs without a gradient, and the loss from graphs with one.
    """
    text = f"graphs with and without a gradient differ by {error:.1g} in log-ratios"
    if error <= COMPILED_SHARE * log_ratio_clip:
        return Finding("compile", text)
    text += f", a large part of the clip range {log_ratio_clip:g}. Set model.compile to false."
    return Finding("compile", text, wrong=True)


def kl_finding(kl: float, penalties: list[VelocityKL], moved: bool) -> Finding:
    """Check that the KL is 0, unless the reference has a guidance or weights of its own."""
    text = f"{kl:.2g} before the first update"
    if moved:
        return Finding("kl", f"{text}; the reference is the model without model.adapter")
    guidances = [p.guidance for p in penalties if p.guidance is not None]
    if guidances:
        return Finding("kl", f"{text}; the reference has guidance {guidances[0]:g}")
    return Finding("kl", f"{text}; it should be 0" if kl > 0 else text, wrong=kl > 0)


def velocity_penalties(objective: Objective) -> list[VelocityKL]:
    """Return the settings of the objective that penalise the distance to the reference."""
    settings = vars(objective).values()
    return [value for value in settings if isinstance(value, VelocityKL) and value.weight]
