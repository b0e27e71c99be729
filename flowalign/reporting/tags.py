"""Scores by the tags of prompts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flowalign.data.prompts import Prompt
from flowalign.evaluation.results import EvaluationResult
from flowalign.evaluation.statistics import Interval, paired_difference
from flowalign.reporting.record import Cell, difference_cell, Side, Table

TAG_FIELDS = ("tag", "category", "Category")
"""Fields of a prompt that say which kind it is; the first one counts."""


def tag_tables(
    sides: Sequence[Side], contrasts: Sequence[tuple[int, int]], prompts: Sequence[Prompt]
) -> list[Table]:
    """Return a table for each reward, with a row for each tag. Empty unless there are two tags.

    Args:
        sides: What is compared.
        contrasts: Which sides are subtracted: the position of one and of the other.
        prompts: The prompts, with tags among their metadata.
    """
    tags = [tag_of(prompt) for prompt in prompts]
    names = list(dict.fromkeys(tag for tag in tags if tag))
    if len(names) < 2 or not sides:
        return []
    rows = {name: _tag_sides(sides, torch.tensor([tag == name for tag in tags])) for name in names}
    counts = {name: str(tags.count(name)) for name in names}
    head = ["tag", "prompts", *(side.label for side in sides)]
    head += [f"{sides[end].label} \N{MINUS SIGN} {sides[start].label}" for end, start in contrasts]
    return [
        Table(
            reward,
            head,
            [_tag_row(name, counts[name], rows[name], contrasts, reward) for name in names],
        )
        for reward in sides[-1].result.rewards
    ]


def tag_of(prompt: Prompt) -> str:
    """Return the kind of a prompt, or nothing."""
    values = [prompt.metadata.get(name) for name in TAG_FIELDS]
    return next((str(value) for value in values if isinstance(value, str | int)), "")


def format_score(value: float) -> str:
    """Return a score, or a dash for NaN."""
    return f"{value:.3f}" if value == value else "-"


def _tag_sides(sides: Sequence[Side], prompts: Tensor) -> list[Side]:
    """Return the sides with the scores of some prompts alone. `prompts` is True for those."""
    return [Side(side.label, _only(side.result, prompts)) for side in sides]


def _only(result: EvaluationResult, prompts: Tensor) -> EvaluationResult:
    rows = prompts[result.prompt.clamp(max=len(prompts) - 1)]
    rewards = {name: values.where(rows, math.nan) for name, values in result.rewards.items()}
    return replace(result, rewards=rewards, held_out={})


def _tag_row(
    name: str, count: str, sides: list[Side], contrasts: Sequence[tuple[int, int]], reward: str
) -> list[Cell]:
    means = [Cell(format_score(side.result.means.get(reward, math.nan))) for side in sides]
    differences = [
        difference_cell(_difference(sides[start].result, sides[end].result, reward), reward)
        for end, start in contrasts
    ]
    return [Cell(name), Cell(count), *means, *differences]


def _difference(
    before: EvaluationResult, after: EvaluationResult, reward: str
) -> Mapping[str, Interval]:
    if reward not in before.rewards or reward not in after.rewards:
        return {}
    return paired_difference(
        replace(before, rewards={reward: before.rewards[reward]}),
        replace(after, rewards={reward: after.rewards[reward]}),
    )
