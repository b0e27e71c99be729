"""The arithmetic of a run: images and pairs, updates and passes, in words."""

import math

from flowalign.batch import Examples, Pairs
from flowalign.rewards.inspection import Finding
from flowalign.training.setup import Inputs

ROWS = {Pairs: "pairs", Examples: "pictures"}
"""Names of the rows of a batch. Rows of other batches are images."""


def describe_step(inputs: Inputs) -> Finding:
    """Describe what a step is made of, and how it is split into updates and passes."""
    plan, kind = inputs.plan, inputs.config.objective.learns_from
    prompts, noun = plan.prompts_per_step, ROWS.get(kind, "images")
    ranked = kind is Pairs and not inputs.examples
    if inputs.examples:
        total = f"{prompts} {noun}"
    else:
        images = f"{plan.images_per_prompt} images = {plan.images_per_step} images"
        total = f"{prompts} prompts × {images}"
    # Images with equal rewards make no pair.
    most = "at most " if ranked else ""
    if ranked:
        total += f", ranked into {most}{prompts * rows_per_prompt(inputs)} pairs"
    rows = plan.rows_per_update * rows_per_prompt(inputs) // plan.images_per_prompt
    passes = math.ceil(rows / max(1, plan.images_per_pass // kind.images_per_row))
    split = f"{plan.updates_per_step} update(s) of {most}{rows} {noun}"
    where = f"on each of {plan.processes} process(es), in {most}{passes} pass(es)"
    return Finding("step", f"{total}; {split} {where}")


def rows_per_prompt(inputs: Inputs) -> int:
    """Return how many rows of a batch one prompt, or one given example, makes at most."""
    if inputs.examples:
        return 1
    if inputs.config.objective.learns_from is Pairs:
        return inputs.config.data.ranking.most_pairs(inputs.plan.images_per_prompt)
    return inputs.plan.images_per_prompt


def describe_run(inputs: Inputs) -> Finding:
    """Describe how much the whole run trains on, and how often it uses each prompt or example."""
    plan, steps = inputs.plan, inputs.config.train.steps
    if inputs.examples:
        noun = ROWS[inputs.config.objective.learns_from]
        total, unit = f"{plan.prompts_per_step * steps:,} {noun}", noun.removesuffix("s")
    else:
        total, unit = f"{plan.images_per_step * steps:,} images", "prompt"
    times = plan.prompts_per_step * steps / len(inputs.examples or inputs.prompts)
    return Finding("run", f"{steps} steps, {total}; each {unit} is used {times:.3g} times")
