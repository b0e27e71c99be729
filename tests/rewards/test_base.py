"""Errors of the wrapper around every reward, and the examples on the page about your own reward."""

import json
import math
import re
import shlex

import pytest
import torch

from flowalign.cli import main
from flowalign.errors import RunError, UserError
from flowalign.reporting.trackers import read_metrics
from flowalign.rewards.adapters import make_reward
from flowalign.rewards.base import Reward, Traits, traits
from flowalign.rewards.registry import load_rewards
from tests.tiny import ROOT, SMALL

LEVELS = [0.2, 0.4, 0.8]
IMAGES = torch.tensor(LEVELS)[:, None, None, None].expand(3, 3, 4, 4)
PROMPTS, METADATA = ["one", "two", "three"], [{}, {}, {}]


def scores(reward: Reward) -> list[float]:
    return reward(IMAGES, PROMPTS, METADATA).tolist()


def no_module(device):
    import no_such_module  # noqa: F401


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda a, b: [],
            "rewards.mine takes (a, b). Write one of (images, prompts, metadata), TRL's (prompts",
        ),
        (lambda *inputs: [], "rewards.mine takes (inputs). Write one of"),
        (lambda images: [], "rewards.mine takes (images). Write one of"),
        (
            lambda images, prompts, metadata, more: [],
            "rewards.mine takes (images, prompts, metadata, more). Write one of",
        ),
        (lambda completions: [], "rewards.mine takes (completions). Write one of"),
        (
            traits(level="pairwise")(lambda images, prompts, metadata: []),
            "takes (images, prompts, metadata). Write (first, second,",
        ),
        (lambda device, score_dict: [], "rewards.mine takes (device, score_dict). Write one of"),
        (lambda: 5, "rewards.mine returned a int when it was called. Write one of"),
        (lambda: 1 / 0, "rewards.mine cannot be made: ZeroDivisionError: division by zero"),
        (
            no_module,
            "rewards.mine cannot be made: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        (object(), "rewards.mine is not a function. Write one of"),
    ],
)
def test_an_unknown_form_is_an_error_that_lists_the_forms(function, message):
    with pytest.raises(UserError) as caught:
        make_reward("mine", function)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.zeros(3, 1), "returned shape (3, 1). Return 3 numbers, one per image: shape (3,)"),
        (torch.zeros(2), "returned shape (2,). Return 3"),
        (0.5, "returned shape (). Return 3"),
        ([0.5, 1.01, 0], "returned 1.01, outside its declared range [0, 1]"),
        ([0.5, -2, math.nan], "returned -2, outside its declared range [0, 1]"),
        (["good", "bad", "good"], "returned a list"),
        (None, "returned a NoneType"),
    ],
)
def test_a_result_that_is_not_scores_is_an_error_with_the_reward(result, message):
    with pytest.raises(RunError) as caught:
        scores(make_reward("mine", traits(range=(0, 1))(lambda images, prompts, metadata: result)))
    assert f"rewards.mine {message}" in str(caught.value)


def divides(images, prompts, metadata):
    return images.mean((1, 2, 3)) * (1 // len(metadata[3:]))


def test_an_exception_is_named_with_its_file_and_line():
    where = rf"{re.escape(__file__)}, line {divides.__code__.co_firstlineno + 1}\)"
    with pytest.raises(RunError, match=rf"rewards\.mine raised ZeroDivisionError: .* \({where}"):
        scores(make_reward("mine", divides))
    with pytest.raises(RunError, match=rf"rewards\.mine raised ZeroDivisionError: .* \({where}"):
        make_reward("mine", divides).with_gradient(
            IMAGES.clone().requires_grad_(), PROMPTS, METADATA
        )


def reads(images, prompts, metadata):
    return json.loads(prompts[0])


def test_an_exception_in_a_library_is_named_by_the_line_that_called_it():
    where = rf"{re.escape(__file__)}, line {reads.__code__.co_firstlineno + 1}\)"
    with pytest.raises(RunError, match=rf"rewards\.mine raised JSONDecodeError: .* \({where}"):
        scores(make_reward("mine", reads))


def levels_between(low: float, high: float) -> torch.Tensor:
    return torch.linspace(low, high, 3)[:, None, None, None].expand(3, 3, 4, 4).clone()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ((IMAGES * 255).byte(), "was given images of torch.uint8. Convert them"),
        (IMAGES * 255, "was given images with values from 51 to 204. Scale them to [0, 1]"),
        (levels_between(0, 1.02), "was given images with values from 0 to 1.02. Scale them"),
        (2 * IMAGES - 1, "was given images with values from -0.6 to 0.6. Scale them"),
    ],
    ids=["uint8", "float bytes", "above 1", "from -1 to 1"],
)
def test_images_outside_0_to_1_are_an_error_and_get_no_scores(images, message):
    reward = make_reward("mine", lambda images, prompts, metadata: images.float().mean((1, 2, 3)))
    with pytest.raises(RunError) as caught:
        reward(images, PROMPTS, METADATA)
    assert f"rewards.mine {message}" in str(caught.value)
    with pytest.raises(RunError) as caught:
        reward.with_gradient(images, PROMPTS, METADATA)
    assert f"rewards.mine {message}" in str(caught.value)


@pytest.mark.parametrize("rounding", [0, 0.004])
def test_images_that_rounding_moved_outside_0_to_1_are_scored(rounding):
    reward = make_reward("mine", lambda images, prompts, metadata: images.mean((1, 2, 3)))
    images = levels_between(-rounding, 1 + rounding)
    expected = pytest.approx([-rounding, 0.5, 1 + rounding])
    assert reward(images, PROMPTS, METADATA).tolist() == expected


def test_a_reward_that_writes_into_its_images_changes_only_a_copy():
    def writes(images, prompts, metadata):
        return images.sub_(0.5).mean((1, 2, 3))

    images = IMAGES.clone()
    reward = make_reward("mine", writes)
    expected = [level - 0.5 for level in LEVELS]
    assert reward(images, PROMPTS, METADATA).tolist() == pytest.approx(expected)
    reward.with_gradient(images.requires_grad_(), PROMPTS, METADATA)
    assert torch.equal(images, IMAGES)


BLOCKS = [
    block.split("```")[0]
    for block in (ROOT / "docs" / "your-own-reward.md").read_text().split("```python\n")[1:]
]
TASTE = """
from dataclasses import dataclass
from torch import nn, Tensor


def load(path):
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.AvgPool1d(3), nn.Flatten(0))


"""


def test_the_function_on_the_page_is_inspected_and_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    file = tmp_path / "my_rewards.py"
    file.write_text(BLOCKS[0])
    page = (ROOT / "docs" / "your-own-reward.md").read_text()
    test, train = (
        shlex.split(line.replace("my_rewards.py", str(file)))
        for line in page.splitlines()
        if line.startswith(("flowalign reward test", "python train.py"))
    )
    assert main(test[1:]) == 0
    assert "reaches 8 of 8 images" in capsys.readouterr().out
    (tmp_path / "few.txt").write_text("a red circle")
    small = [
        *SMALL,
        "train.steps=1",
        f"evaluation.prompts={tmp_path / 'few.txt'}",
        f"output={tmp_path / 'run'}",
    ]
    (evaluation,) = [part for part in page.split("`") if part.startswith("'evaluation.rewards")]
    assert (
        main(
            [
                "train",
                *train[2:-1],
                shlex.split(evaluation.replace("my_rewards.py", str(file)))[0],
                *small,
            ]
        )
        == 0
    )
    assert "reward/redness" in read_metrics(tmp_path / "run")[0]


def test_the_settings_on_the_page_reach_the_function(tmp_path):
    (tmp_path / "floored.py").write_text(BLOCKS[0])
    (reward,) = load_rewards({f"{tmp_path}/floored.py:redness": {"weight": 1.0, "floor": 0.5}})
    assert scores(reward) == [0.5] * 3


def test_the_class_on_the_page_scores(tmp_path):
    (tmp_path / "taste.py").write_text(TASTE + BLOCKS[1])
    (reward,) = load_rewards({f"{tmp_path}/taste.py:Taste": {"path": "elsewhere"}})
    assert scores(reward) == pytest.approx(LEVELS)


def test_the_traits_on_the_page_are_read(tmp_path):
    (tmp_path / "kinds.py").write_text(BLOCKS[2])
    names = ["legible", "variety", "prefers"]
    rewards = load_rewards({f"{tmp_path}/kinds.py:{name}": 1.0 for name in names})
    assert [reward.traits for reward in rewards] == [
        Traits("pointwise", "pil", (0, 1)),
        Traits("group"),
        Traits("pairwise"),
    ]
    assert len(BLOCKS) == 3
