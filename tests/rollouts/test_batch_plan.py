"""The batch arithmetic of a step."""

from itertools import product

import pytest

from flowalign import distributed
from flowalign.config.load import load_config
from flowalign.errors import UserError
from flowalign.rollouts.batch_plan import BatchPlan, largest_divisor
from flowalign.training.setup import batch_plan, read_inputs
from tests.tiny import small_config

GROUP_REWARD = """
from flowalign import traits


@traits(level="group")
def first(images, prompts, metadata):
    return images.mean((1, 2, 3))
"""


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


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 6, 12])
def test_processes_share_the_images_of_every_update_also_where_they_cut_prompts(processes):
    shared = plan(updates_per_step=1, processes=processes)
    members = [shared.members(rank) for rank in range(processes)]
    assert {len(rows) for rows in members} == {12 // processes}
    assert [row for rows in members for row in rows] == list(product(range(4), range(3)))
    assert shared.cuts_groups == (processes not in (1, 2, 4))


def test_64_processes_share_48_prompts_of_24_images():
    shared = plan(prompts_per_step=48, images_per_prompt=24, updates_per_step=1, processes=64)
    assert shared.rows_per_update == 18
    assert shared.slots(1) == [0, 1]
    # With two updates as in the published files, each has 24 prompts.
    assert plan(prompts_per_step=48, images_per_prompt=24, processes=64).rows_per_update == 9


@pytest.mark.parametrize("name", ["flow_grpo", "nft", "awm", "alignprop"])
def test_an_objective_on_advantages_or_gradients_lets_two_processes_share_a_prompt(name):
    config = small_config(
        "outputs/none", f"objective={{name: {name}}}", "train.images_per_prompt=4"
    )
    shared = batch_plan(config, 4)
    assert (shared.cuts_groups, shared.rows_per_update) == (True, 2)


@pytest.mark.parametrize("name", ["crd", "dgpo", "rwr", "raft", "prdp", "d3po", "dpo", "kto"])
def test_prompts_stay_whole_where_an_objective_compares_their_images(name):
    config = small_config(
        "outputs/none", f"objective={{name: {name}}}", "train.images_per_prompt=4"
    )
    with pytest.raises(UserError, match=r"on 4 process.* share evenly"):
        batch_plan(config, 4)


def test_images_that_cannot_be_shared_are_answered_with_a_number_of_processes():
    with pytest.raises(UserError, match=r"has 12 images, which 5 processes.*Start 4 process"):
        plan(updates_per_step=1, processes=5)


def test_a_reward_of_groups_refuses_processes_that_cut_groups(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(GROUP_REWARD)
    rewards = f"rewards={{'{tmp_path}/mine.py:first': 1.0}}"
    config = small_config(tmp_path / "run", rewards, "train.images_per_prompt=4")
    monkeypatch.setattr(distributed, "count", lambda: 4)
    with pytest.raises(UserError, match=r"compares a prompt's images, but 4 processes"):
        read_inputs(config)


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


@pytest.mark.parametrize(
    ("pairs", "most", "size"),
    [(8, 16, 16), (8, 8, 8), (8, 7, 4), (6, 9, 6), (1, 8, 2), (1, 1, 2), (3, 4, 2), (8, 1000, 16)],
)
def test_passes_of_given_pairs_hold_whole_pairs(pairs, most, size):
    """Both images of a pair count, and a pass that allows less still holds one pair."""
    counts = {"images_per_prompt": 1, "updates_per_step": 1, "processes": 1}
    given = plan(prompts_per_step=pairs, max_images_per_pass=most, images_per_row=2, **counts)
    assert (given.images_per_update, given.images_per_step) == (2 * pairs, 2 * pairs)
    assert given.images_per_pass == size
    assert bool(given.note) == (size != most)
    if given.note:
        assert f"an update has {2 * pairs} images in pairs on each process" in given.note
        assert f"Passes have {size} images" in given.note


@pytest.mark.parametrize(
    ("name", "images_per_row", "images"), [("dpo", 2, 120), ("sft", 1, 60), ("dpo_online", 1, 120)]
)
def test_only_given_pairs_count_as_two_images(name, images_per_row, images):
    counts = batch_plan(load_config(f"configs/tiny/{name}.yaml"))
    assert (counts.images_per_row, counts.images_per_update) == (images_per_row, images)


def test_a_plan_that_fits_has_no_note():
    assert plan().note == ""


def test_the_largest_divisor_of_a_huge_number_is_found_at_once():
    assert largest_divisor(10**12, 7) == 5
    assert largest_divisor(10**12 + 39, 1000) == 1  # a prime


@pytest.mark.parametrize(
    ("changes", "nearest"),
    [
        ({"prompts_per_step": 6, "whole_groups": True}, "4 or 8"),
        ({"prompts_per_step": 3, "whole_groups": True}, ": 4."),
        ({"prompts_per_step": 5}, "4 or 6"),
    ],
)
def test_prompts_that_cannot_be_shared_are_answered_with_the_nearest_that_can(changes, nearest):
    with pytest.raises(UserError, match=f"train.prompts_per_step is .* share evenly.*{nearest}"):
        plan(**changes)


def test_a_run_prints_once_that_its_passes_are_smaller(tmp_path, capsys):
    inputs = read_inputs(small_config(tmp_path, "train.images_per_pass=4"))
    assert inputs.plan.images_per_pass == 3
    assert capsys.readouterr().out.count("Passes have 3 images instead") == 1
