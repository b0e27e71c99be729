"""Reward maps: names, weights, settings, and the files that settings name."""

from pathlib import Path

import pytest

from flowalign.errors import UserError
from flowalign.rewards.registry import checked_rewards, locate_rewards, reward_entry, RewardEntry


@pytest.mark.parametrize(
    ("key", "value", "entry"),
    [
        ("ocr", 2, RewardEntry(name="ocr", spec="ocr", weight=2.0, settings={})),
        (
            "a.py:red",
            {"weight": 0.5, "floor": 1},
            RewardEntry(name="red", spec="a.py:red", weight=0.5, settings={"floor": 1}),
        ),
        (
            "sharp",
            {"reward": "ocr", "strict": True},
            RewardEntry(name="sharp", spec="ocr", weight=1.0, settings={"strict": True}),
        ),
        (
            "slow",
            {"reward": "ocr", "time_limit": 60},
            RewardEntry(name="slow", spec="ocr", weight=1.0, time_limit=60, settings={}),
        ),
        (
            "http://host:80",
            1,
            RewardEntry(name="host:80", spec="http://host:80", weight=1.0, settings={}),
        ),
    ],
)
def test_an_entry_has_a_name_a_spec_a_weight_and_settings(key, value, entry):
    assert reward_entry(key, value) == entry


@pytest.mark.parametrize("weight", [True, "high", None, float("nan"), float("inf"), [1]], ids=repr)
def test_a_weight_that_is_not_a_finite_number_is_an_error(weight):
    with pytest.raises(UserError, match=r"^rewards\.ocr is .* Write a weight"):
        checked_rewards({"ocr": {"weight": weight}}, "rewards")


@pytest.mark.parametrize("limit", [True, "long", 0, -1, float("inf")], ids=repr)
def test_a_time_limit_that_is_not_above_0_is_an_error(limit):
    with pytest.raises(UserError, match=r"^rewards\.ocr\.time_limit is .* Write the seconds"):
        checked_rewards({"ocr": {"time_limit": limit}}, "rewards")


def test_a_host_without_a_port_is_an_address_and_not_the_module_http():
    assert checked_rewards({"http://host": 1.0}, "rewards")


def test_two_rewards_of_one_name_are_an_error_that_shows_how_to_rename_the_second():
    with pytest.raises(UserError, match=r"called 'red'.*\{my_name: \{reward: 'b\.py:red'\}\}"):
        checked_rewards({"a.py:red": 1, "b.py:red": 1}, "rewards")


def test_files_in_settings_and_lists_are_found_next_to_the_configuration(tmp_path: Path):
    for name in ("a.png", "b.png", "mine.py"):
        (tmp_path / name).write_text("")
    rewards = {"mine.py:red": {"weight": 1.0, "pictures": ["a.png", "b.png", "word", "none.png"]}}
    located = locate_rewards(rewards, [tmp_path])
    pictures = [f"{tmp_path}/a.png", f"{tmp_path}/b.png", "word", "none.png"]
    assert located == {f"{tmp_path}/mine.py:red": {"weight": 1.0, "pictures": pictures}}
