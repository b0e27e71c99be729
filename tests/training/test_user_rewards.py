"""Rewards of the user: how they train, and what is answered when they fail."""

import sys

import pytest
import torch

from flowalign.cli import main
from flowalign.errors import RunError, UserError
from flowalign.reporting.trackers import read_metrics
from flowalign.rewards.registry import load_rewards
from flowalign.runs.adapter import ADAPTER_FILE
from flowalign.runs.checkpoint import checkpoints
from flowalign.training import trainer
from tests.tiny import SMALL, small_config, TINY

USER_REWARDS = """
import os
import random
import sys

import numpy as np
import torch

calls = 0


def library_fails(images, prompts, metadata):
    from torch.nn import functional
    return functional.interpolate(images, scale_factor="two")


def wrong_shape(images, prompts, metadata):
    return images.mean((2, 3))


def raises(images, prompts, metadata):
    return 1 / 0


def fails_later(images, prompts, metadata):
    global calls
    calls += 1
    if calls > 12:
        raise ConnectionError("the scorer is gone")
    return images.mean((1, 2, 3))


def exits_later(images, prompts, metadata):
    global calls
    calls += 1
    if calls > 12:
        sys.exit(0)
    return images.mean((1, 2, 3))


def careless_redness(images, prompts, metadata):
    scores = redness(images, prompts, metadata)
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    os.chdir("/")
    images.zero_()
    prompts.clear()
    return scores


def exits_at_once(images, prompts, metadata):
    sys.exit(0)


def not_finite(images, prompts, metadata):
    return [float("inf")] * len(images)


def redness(images, prompts, metadata):
    red, green, blue = images.unbind(1)
    return (red - (green + blue) / 2).mean((1, 2))
"""


@pytest.fixture
def user_rewards(tmp_path):
    (tmp_path / "my_rewards.py").write_text(USER_REWARDS)
    return tmp_path / "my_rewards.py"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrong_shape", r"returned shape \(4, 3\).*Return 4 numbers"),
        ("raises", "ZeroDivisionError.*line 22"),
        ("library_fails", r"my_rewards\.py, line 14"),
        ("not_finite", r"returned inf\. Return finite numbers"),
    ],
)
def test_a_reward_that_is_wrong_is_refused_before_training(name, message, user_rewards, tmp_path):
    with pytest.raises(UserError, match=message):
        trainer.train(small_config(tmp_path / "run", f'rewards={{"{user_rewards}:{name}": 1.0}}'))


def test_a_reward_that_fails_while_running_leaves_the_steps_done(user_rewards, tmp_path):
    overrides = [
        f'rewards={{"{user_rewards}:fails_later": 1.0}}',
        "train.steps=20",
        "evaluation.rewards={brightness: 1.0}",
    ]
    with pytest.raises(
        RunError, match=r"fails_later raised ConnectionError: the scorer is gone[\s\S]*step-00000"
    ):
        trainer.train(small_config(tmp_path / "run", *overrides))
    assert checkpoints(tmp_path / "run")


def test_what_a_reward_does_to_its_process_changes_no_bit_of_the_adapter(user_rewards, tmp_path):
    adapters = []
    for name in ("redness", "careless_redness"):
        rewards = f'{{"{user_rewards}:{name}": 1.0, brightness: 0.5}}'
        overrides = [f"rewards={rewards}", "evaluation.rewards={brightness: 1.0}"]
        trainer.train(small_config(tmp_path / name, *overrides))
        adapters.append(tmp_path / name / "adapter" / ADAPTER_FILE)
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_a_reward_file_that_was_edited_is_loaded_as_it_is_now(tmp_path):
    file, scores = tmp_path / "edited_reward.py", []
    for value in (1.0, 2.0):
        file.write_text(f"def f(images, prompts, metadata):\n    return [{value}] * len(images)\n")
        (reward,) = load_rewards({f"{file}:f": 1.0})
        scores += reward(torch.ones(1, 3, 4, 4), [""], [{}]).tolist()
    assert scores == [1.0, 2.0]


def test_a_users_file_imports_its_neighbours(tmp_path):
    (tmp_path / "weights_of_mine.py").write_text("RED = 0.25")
    (tmp_path / "neighbourly.py").write_text(
        "import weights_of_mine\n"
        "def red(images, prompts, metadata):\n"
        "    return images[:, 0, 0, 0] * weights_of_mine.RED\n"
    )
    (reward,) = load_rewards({f"{tmp_path}/neighbourly.py:red": 1.0})
    assert reward(torch.ones(2, 3, 4, 4), ["", ""], [{}, {}]).tolist() == [0.25, 0.25]


def test_a_module_in_the_working_directory_is_found_by_an_installed_script(tmp_path, monkeypatch):
    (tmp_path / "house").mkdir()
    (tmp_path / "house" / "taste.py").write_text(
        "def red(images, prompts, metadata):\n    return images[:, 0, 0, 0]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sys.path", [folder for folder in sys.path if folder not in ("", str(tmp_path))]
    )
    (reward,) = load_rewards({"house.taste:red": 1.0})
    assert reward(torch.ones(2, 3, 4, 4), ["", ""], [{}, {}]).tolist() == [1, 1]


def test_one_reward_twice_is_logged_by_the_names_it_was_given(user_rewards, tmp_path):
    first, second = (
        f'{{reward: "{user_rewards}:redness"}}',
        f'{{reward: "{user_rewards}:redness", weight: -0.5}}',
    )
    overrides = [
        f"rewards={{first: {first}, second: {second}}}",
        "evaluation.rewards={}",
        "train.steps=1",
    ]
    summary = trainer.train(small_config(tmp_path / "run", *overrides))
    (line,) = read_metrics(tmp_path / "run")
    assert (
        line["reward/first"]
        == line["reward/second"]
        == pytest.approx(2 * line["reward/combined"], abs=1e-6)
    )
    assert set(summary["after"]) == {"first", "second"}


def test_a_users_reward_trains_and_is_logged_by_name(user_rewards, tmp_path):
    overrides = [
        f'rewards={{"{user_rewards}:redness": 1.0, "brightness": 0.5}}',
        "evaluation.rewards={}",
        "train.steps=1",
    ]
    summary = trainer.train(small_config(tmp_path / "run", *overrides))
    (line,) = read_metrics(tmp_path / "run")
    assert line["reward/combined"] == pytest.approx(
        line["reward/redness"] + 0.5 * line["reward/brightness"], abs=1e-6
    )
    assert set(summary["after"]) == {"redness", "brightness"}


def test_a_reward_that_exits_is_not_a_success(user_rewards, capsys):
    assert main(["reward", "test", f"{user_rewards}:exits_at_once"]) == 1
    assert "rewards.exits_at_once raised SystemExit: 0" in capsys.readouterr().err


def test_a_reward_that_exits_in_mid_run_ends_with_status_1(user_rewards, tmp_path, capsys):
    overrides = [
        f'rewards={{"{user_rewards}:exits_later": 1.0}}',
        "train.steps=20",
        "evaluation.rewards={brightness: 1.0}",
    ]
    assert main(["train", str(TINY), *SMALL, f"output={tmp_path}/run", *overrides]) == 1
    error = capsys.readouterr().err
    assert "rewards.exits_later raised SystemExit: 0" in error
    assert "resumes from there" in error
