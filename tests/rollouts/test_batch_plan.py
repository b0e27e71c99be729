"""The batch arithmetic of a step."""

import pytest

from flowalign.errors import UserError
from flowalign.rollouts.batch_plan import BatchPlan, largest_divisor
from flowalign.training.setup import read_inputs
from tests.tiny import small_config


def plan(**changes: int) -> BatchPlan:
    """Four prompts of three images, in two updates on two processes."""
    counts = {
        "prompts_per_step": 4,
        "images_per_prompt": 3,
        "updates_per_step": 2,
        "max_images_per_pass": 3,
        "processes": 2,
    }
    return BatchPlan(**{**counts, **changes})


def test_a_step_is_shared_out_evenly():
    assert plan().images_per_step == 12
    assert plan().images_per_update == 3
    assert plan(updates_per_step=1).images_per_update == 6
    assert plan(processes=1).images_per_update == 6


def test_every_process_takes_an_equal_share_of_every_update():
    assert [plan().slots(rank) for rank in (0, 1)] == [[0, 2], [1, 3]]
    assert [plan(updates_per_step=1).slots(rank) for rank in (0, 1)] == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("most", "size"), [(1, 1), (2, 2), (3, 3), (4, 3), (5, 3), (6, 6), (7, 6), (1000, 6)]
)
def test_passes_are_lowered_to_a_divisor_with_a_note(most, size):
    lowered = plan(processes=1, max_images_per_pass=most)
    assert lowered.images_per_pass == size
    assert bool(lowered.note) == (size != most)
    if lowered.note:
        assert f"train.images_per_pass is {most}" in lowered.note
        assert f"Passes have {size} images" in lowered.note


def test_a_plan_that_fits_has_no_note():
    assert plan().note == ""


def test_the_largest_divisor_of_a_huge_number_is_found_at_once():
    assert largest_divisor(10**12, 7) == 5
    assert largest_divisor(10**12 + 39, 1000) == 1  # a prime


@pytest.mark.parametrize(
    ("changes", "nearest"),
    [({"prompts_per_step": 6}, "4 or 8"), ({"prompts_per_step": 3}, ": 4.")],
)
def test_prompts_that_cannot_be_shared_are_answered_with_the_nearest_that_can(changes, nearest):
    with pytest.raises(UserError, match=f"train.prompts_per_step is .* share evenly.*{nearest}"):
        plan(**changes)


def test_a_run_prints_once_that_its_passes_are_smaller(tmp_path, capsys):
    inputs = read_inputs(small_config(tmp_path, "train.images_per_pass=4"))
    assert inputs.plan.images_per_pass == 3
    assert capsys.readouterr().out.count("Passes have 3 images instead") == 1
