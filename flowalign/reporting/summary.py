"""The summary of a run: what `summary.json` holds, and the table that is made of it."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

Interval = tuple[float, float, float]
"""Low end, mean and high end of a 95 % interval."""


class GuidedSummary(TypedDict):
    """The model without adapter at its best guidance, and what training adds to that."""

    guidance: float
    """The guidance that was chosen."""
    own_guidance: float
    """The guidance of `before` and `after`."""
    setting: str
    """The key of `sampler` that was varied: "guidance" or "embedded_guidance"."""
    chosen_by: str
    """The reward that chose it."""
    chosen_on: int
    """The number of prompts that it was chosen on, with other noise than that of `means`."""
    sweep: dict[str, float]
    """The mean of that reward at every guidance that was tried."""
    means: dict[str, float]
    """Mean of every reward at the chosen guidance."""
    difference: dict[str, Interval]
    """Low end, mean and high end of the 95 % interval of `after` minus `means`, paired."""


class BetterStep(TypedDict):
    """A step that is kept, and whose evaluation was clearly better than that of the last step."""

    step: int
    metric: str
    """The reward or held-out figure that chose the step."""
    change: Interval
    """Low end, mean and high end of the 95 % interval of its change since that step."""


class Summary(TypedDict):
    """The content of `summary.json`."""

    before: dict[str, float]
    """Mean of every reward and held-out figure without the adapter."""
    after: dict[str, float]
    """The same with the exported weights; empty for an interrupted run."""
    difference: dict[str, Interval]
    """Low end, mean and high end of the 95 % interval of `after` minus `before`, paired."""
    baseline_guided: GuidedSummary | None
    """The model without adapter at its best guidance; None if that is not evaluated."""
    prompts: int
    """Prompts that the intervals of rewards rest on; 0 without evaluation rewards."""
    held_out: int
    """Held-out entries that the intervals of the other figures rest on."""
    images: int
    """Images that were generated for training."""
    seconds: float
    """Seconds spent in training steps."""
    peak_memory_bytes: int
    """Most bytes in use: allocated on a GPU, resident on a CPU."""
    stopped: str
    """Why training ended: "finished", "interrupted" or the rule of train.stop."""
    weights: str
    """The exported weights: "policy" or "ema"."""
    step: int
    """The training step of the exported weights."""
    chosen_by: str
    """The metric that chose this step on one half of the evaluation prompts.

    `before`, `after` and `difference` are then of the other half. Empty for the last step.
    """
    better_step: BetterStep | None
    """A kept step that was clearly better than the exported last one, or None."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A model that trained weights are compared with: two columns of a table."""

    label: str
    """The head of the column."""
    means: Mapping[str, float]
    """Mean of every reward."""
    difference: Mapping[str, Interval]
    """Low end, mean and high end of the interval of the trained mean minus this one."""


def baselines(summary: Summary) -> list[Baseline]:
    """Return what a run is compared with: the base, and the guided base if it is another one."""
    base = Baseline(label="base", means=summary["before"], difference=summary["difference"])
    guided = summary["baseline_guided"]
    if guided is None or guided["guidance"] == guided["own_guidance"]:
        return [base]
    return [
        base,
        Baseline(label="guided", means=guided["means"], difference=guided["difference"]),
    ]


def guidance_note(guided: GuidedSummary) -> str:
    """Say which guidance the columns of a table stand for, and how that of the base was chosen."""
    best, own, setting = guided["guidance"], guided["own_guidance"], guided["setting"]
    setting = setting.replace("_", " ")
    scales = [f"{scale:g}" for scale in sorted(map(float, guided["sweep"]))]
    reason = (
        f"the best of {', '.join(scales)} by {guided['chosen_by']} on {guided['chosen_on']} "
        "prompts with other noise"
    )
    if best == own:
        note = f"Base and trained are sampled at {setting} {own:g}, for the base {reason}."
    else:
        note = (
            f"Guided is the base at {setting} {best:g}, {reason}. "
            f"Base and trained are sampled at {own:g}."
        )
    if best == max(map(float, guided["sweep"]), default=None):
        note += " No larger one was tried: add one to evaluation.guidance_sweep."
    return note


def result_notes(run: Path, summary: Summary) -> list[str]:
    """Return sentences on which step was exported, and whether an earlier one was better."""
    notes = []
    if summary["chosen_by"]:
        notes.append(_chosen_step_note(summary))
    if summary["better_step"]:
        notes.append(_better_step_note(run, summary["better_step"]))
    return notes


def _chosen_step_note(summary: Summary) -> str:
    chosen = f"Step {summary['step']} was chosen by {summary['chosen_by']}"
    if summary["chosen_by"].removeprefix("eval/") in summary["difference"]:
        half = "on one half of the evaluation prompts. The figures are those of the other half."
        return f"{chosen} {half}"
    # Metrics of training steps, and signs of over-optimisation, are not split into halves.
    return f"{chosen}. The figures are those of one half of the evaluation prompts."


def _better_step_note(run: Path, better: BetterStep) -> str:
    low, mean, high = better["change"]
    step, command = better["step"], f"flowalign export {shlex.quote(str(run))}"
    return (
        f"The last evaluation is clearly worse than the best one. Since step {step}, "
        f"{better['metric']} changed by {mean:+.3f} (95 % interval {low:+.3f} to {high:+.3f}, on "
        f"the prompts that did not choose the step). Export that step: {command} --step {step}"
    )
