"""One half of the evaluation prompts chooses a step, and the other half measures it."""

import math

import pytest
import torch

from flowalign.evaluation.halves import split_prompts
from flowalign.evaluation.results import EvaluationResult
from flowalign.evaluation.statistics import paired_difference

TEXTS = [f"prompt {number}" for number in range(9)]


def result(prompts, **changes):
    scores = {"r": torch.arange(2.0 * prompts)}
    rows = torch.arange(prompts).repeat_interleave(2)
    nothing = torch.zeros(0)
    return EvaluationResult(rows, scores, nothing, nothing, **changes)


def test_every_prompt_is_in_one_half():
    halves = split_prompts(TEXTS)
    assert halves.choosing.sum() == 4
    assert torch.equal(halves.measuring, ~halves.choosing)


def test_the_halves_depend_on_the_texts_alone():
    halves, reversed_halves = split_prompts(TEXTS), split_prompts(TEXTS[::-1])
    assert torch.equal(reversed_halves.choosing.flip(0), halves.choosing)
    repeated = split_prompts([*TEXTS, *TEXTS]).choosing
    assert torch.equal(repeated, halves.choosing.repeat(2))


def test_a_single_prompt_chooses_and_measures():
    halves = split_prompts(["a", "a"])
    assert halves.choosing.all()
    assert halves.measuring.all()


def test_a_half_has_the_scores_of_its_prompts_alone():
    halves, whole = split_prompts(TEXTS), result(9)
    chosen, measured = halves.choose(whole), halves.measure(whole)
    rows = halves.choosing[whole.prompt]
    assert torch.equal(chosen.rewards["r"].isnan(), ~rows)
    assert torch.equal(measured.rewards["r"].isnan(), rows)
    assert chosen.means["r"] == pytest.approx(whole.rewards["r"][rows].mean().item())
    assert (chosen.scored_prompts, measured.scored_prompts, whole.scored_prompts) == (4, 5, 9)


def test_held_out_entries_are_split_by_their_number():
    halves = split_prompts(TEXTS)
    whole = result(9, held_out={"error": torch.tensor([1.0, 2.0, 3.0])})
    assert halves.choose(whole).means["error"] == 2
    assert halves.measure(whole).means["error"] == 2
    assert halves.measure(whole).held_out["error"].isnan().tolist() == [True, False, True]
    single = result(9, held_out={"error": torch.tensor([1.0])})
    assert halves.choose(single).means["error"] == halves.measure(single).means["error"] == 1


def test_a_difference_counts_what_both_evaluations_scored():
    halves = split_prompts(TEXTS)
    held_out = {"error": torch.tensor([1.0, 2.0, 3.0, 5.0])}
    before, after = result(9, held_out={"error": torch.zeros(4)}), result(9, held_out=held_out)
    after.rewards["r"] = after.rewards["r"] + 1
    difference = paired_difference(before, halves.measure(after))
    assert difference["r"] == (1, 1, 1)
    low, mean, high = difference["error"]
    assert mean == 3.5
    assert high - mean == pytest.approx(12.7062 * 1.5, rel=1e-4)
    assert mean - low == pytest.approx(high - mean)
    assert math.isfinite(low)
