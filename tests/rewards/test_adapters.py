"""Forms of reward functions: each known form gives the scores that its author meant."""

import asyncio
import math
from dataclasses import dataclass
from threading import Lock, Thread
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from flowalign.errors import RunError, UserError
from flowalign.rewards.adapters import make_reward
from flowalign.rewards.base import Reward, Traits, traits
from flowalign.settings.types import configure

LEVELS = torch.tensor([0.2, 0.4, 0.8])  # 51, 102 and 204 of 255
IMAGES = LEVELS[:, None, None, None].expand(3, 3, 4, 4)
PROMPTS = ["one", "two", "three"]
METADATA = [{"level": level, "note": "x"} for level in LEVELS.tolist()]


def reward_from(function: Any, **settings: Any) -> Reward:
    """A reward as from a YAML file, which binds every argument that has a default."""
    return make_reward("mine", configure(function, settings, "rewards.mine"))


def scores(reward: Reward, count: int = 3) -> list[float]:
    return reward(IMAGES[:count], PROMPTS[:count], METADATA[:count]).tolist()


# Each of these functions returns the brightness of an image.


def native(images, prompts, metadata):
    assert (len(images), prompts, metadata) == (3, PROMPTS, METADATA)
    return images.mean((1, 2, 3))


def other_names(pictures, texts, entries):
    return native(pictures, texts, entries)


def optional_inputs(images, prompts=None, metadata=None):
    return native(images, prompts, metadata)


def a_list(images, prompts, metadata):
    return native(images, prompts, metadata).tolist()


def a_tuple(images, prompts, metadata):
    return tuple(native(images, prompts, metadata))


def an_array(images, prompts, metadata):
    return native(images, prompts, metadata).numpy()


@traits(images="pil")
def of_pictures(pictures, prompts, metadata):
    return [picture.getpixel((0, 0))[0] / 255 for picture in pictures]


class Instance:
    def __init__(self, scale: float = 1.0):
        self.scale = scale

    def __call__(self, images, prompts, metadata):
        return self.scale * native(images, prompts, metadata)


def factory():
    return native


def factory_of_device(device):
    torch.empty(1, device=device)
    return native


def factory_of_optional_device(device="cpu"):
    return factory_of_device(device)


def list_and_extras(images, prompts, metadata):
    return a_list(images, prompts, metadata), {"strict": 1}


def factory_of_extras():
    return lambda images, prompts, metadata: (native(images, prompts, metadata), {})


FROM_TRAINER = {"completion_ids", "trainer_state", "log_extra", "log_metric"}


def trl(prompts, completions, **columns):
    assert prompts == PROMPTS
    assert set(columns) | FROM_TRAINER == {"level", "note"} | FROM_TRAINER
    assert (columns["level"], columns["note"]) == (LEVELS.tolist(), ["x"] * 3)
    return of_pictures(completions, prompts, [])


def trl_named(prompts, completions, level):
    assert all(isinstance(picture, Image.Image) for picture in completions)
    return level


async def trl_async(prompts, completions, **columns):
    return trl(prompts, completions, **columns)


def trl_with_a_column_and_more(completions, level, **columns):
    assert set(columns) == {"note"} | FROM_TRAINER
    return trl_named(PROMPTS, completions, level)


def trl_with_ids(prompts, completions, completion_ids, **columns):
    assert completion_ids == [None] * 3
    return trl(prompts, completions, **columns)


def positional(images, prompts, metadata, /):
    return native(images, prompts, metadata)


def positional_in_another_order(prompts, images, /, metadata):
    return native(images, prompts, metadata)


def positional_with_a_default(images, prompts, metadata, scale=1.0, /):
    return scale * native(images, prompts, metadata)


def positional_with_other_names(pictures, texts, entries, /):
    return native(pictures, texts, entries)


def trl_positional(prompts, completions, /, **columns):
    return trl(prompts, completions, **columns)


def in_another_order(prompts, metadata, images):
    return native(images, prompts, metadata)


def by_keyword(images, *, prompts, metadata):
    return native(images, prompts, metadata)


def without_metadata(images, prompts):
    return native(images, prompts, METADATA)


def with_columns(prompts, images, **columns):
    return native(images, prompts, METADATA) * (columns["note"] == ["x"] * 3)


@traits(images="pil")
def with_columns_of_pictures(images, prompts, **columns):
    return of_pictures(images, prompts, [])


def a_mean_of_several(images, prompts, metadata):
    return {"bright": 3, "avg": native(images, prompts, metadata)}, {}


class Module(nn.Module):
    def forward(self, images, prompts, metadata):
        return native(images, prompts, metadata)


@traits(level="group")
def group(images, prompts, metadata):
    return native(images, prompts, metadata)


FORMS = [
    *(
        native,
        other_names,
        optional_inputs,
        a_list,
        a_tuple,
        an_array,
        of_pictures,
        Instance,
        Module,
    ),
    *(factory, factory_of_device, factory_of_optional_device, list_and_extras, factory_of_extras),
    *(trl, trl_named, trl_async, trl_with_a_column_and_more, trl_with_ids, group),
    *(
        in_another_order,
        by_keyword,
        without_metadata,
        with_columns,
        with_columns_of_pictures,
        a_mean_of_several,
    ),
    *(positional, positional_in_another_order, positional_with_a_default),
    *(positional_with_other_names, trl_positional),
]


@pytest.mark.parametrize("function", FORMS, ids=lambda function: function.__name__)
def test_every_form_gives_its_scores(function):
    assert scores(reward_from(function)) == pytest.approx(LEVELS.tolist())


def scaled(images, prompts, metadata, scale: float = 1.0):
    return scale * native(images, prompts, metadata)


def scaled_factory(device, scale: float = 1.0):
    return lambda images, prompts, metadata: scaled(images, prompts, metadata, scale)


def scaled_trl(prompts, completions, level, scale: float = 1.0):
    return [scale * value for value in level]


@pytest.mark.parametrize(
    "function",
    [scaled, Instance, scaled_factory, scaled_trl],
    ids=lambda function: function.__name__,
)
def test_arguments_with_a_default_are_settings(function):
    assert scores(reward_from(function, scale=2.0)) == pytest.approx((2 * LEVELS).tolist())


class Configured:
    def __init__(self, scale, client=Lock()):  # noqa: B008
        self.scale, self.client = scale, client

    def __call__(self, images, prompts, metadata):
        return self.scale * native(images, prompts, metadata)


def test_the_arguments_of_a_class_are_its_settings():
    assert scores(reward_from(Configured, scale=2.0)) == pytest.approx((2 * LEVELS).tolist())
    with pytest.raises(
        UserError,
        match=r"rewards\.mine\.scale is missing; write it as rewards\.mine: {scale: \.\.\.}",
    ):
        reward_from(Configured)


@dataclass
class Scaled:
    scale: float = 1.0

    def __call__(self, images, prompts, metadata):
        return self.scale * native(images, prompts, metadata)


@pytest.mark.parametrize("function", [Instance(2.0), Scaled(2.0)], ids=["plain", "dataclass"])
def test_an_instance_is_a_reward(function):
    assert scores(reward_from(function)) == pytest.approx((2 * LEVELS).tolist())


def test_a_reward_that_changes_its_metadata_changes_only_a_copy():
    def emptied(images, prompts, metadata):
        return [entry.pop("level") for entry in metadata]

    assert (
        scores(reward_from(emptied))
        == scores(reward_from(emptied))
        == pytest.approx(LEVELS.tolist())
    )


def test_an_input_in_the_place_of_another_is_an_error():
    with pytest.raises(UserError, match=r"takes \(prompts, pictures, metadata\)\. Write one of"):
        reward_from(lambda prompts, pictures, metadata: [0.0] * len(prompts))


def test_a_mapping_without_a_mean_is_an_error():
    with pytest.raises(RunError, match=r"a mapping of strict, loose\. Return one number per image"):
        scores(
            reward_from(lambda images, prompts, metadata: {"strict": [1, 1, 1], "loose": [1, 1, 1]})
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": "grup"}, "level is 'grup'"),
        ({"images": "PIL"}, "images is 'PIL'"),
        ({"range": (1, 0)}, "range is \\(1, 0\\)"),
        ({"level": native}, "level is <function native"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unknown_traits_are_an_error(arguments, message):
    with pytest.raises(UserError, match=f"traits: {message}"):
        traits(**arguments)


def test_another_attribute_of_that_name_is_ignored():
    class Named(Instance):
        traits = "bright"

    assert scores(reward_from(Named)) == pytest.approx(LEVELS.tolist())


def test_an_asynchronous_reward_keeps_its_event_loop_across_calls_and_threads():
    loops = []

    async def gathered(prompts, completions, **columns):
        loops.append(asyncio.get_running_loop())
        return await asyncio.gather(*(asyncio.sleep(0, level) for level in columns["level"]))

    reward = reward_from(gathered)
    thread = Thread(target=scores, args=(reward,))
    thread.start()
    thread.join()
    assert scores(reward) == pytest.approx(LEVELS.tolist())
    assert loops == [loops[0]] * 2
    assert not loops[0].is_closed()


@pytest.mark.parametrize("result", [[0.5, None], (0.5, None), (0.5, float("nan"))], ids=repr)
def test_none_and_nan_are_not_scored(result):
    first, second = scores(reward_from(lambda prompts, completions, **columns: result), 2)
    assert first == 0.5
    assert math.isnan(second)


@pytest.mark.parametrize(
    "result", [(1, 0), tuple(np.float32([1, 0])), tuple(torch.tensor([1, 0]))], ids=repr
)
def test_two_scores_are_not_scores_and_extras(result):
    assert scores(reward_from(lambda images, prompts, metadata: result), 2) == [1, 0]


def test_traits_of_a_factory_hold_for_its_result():
    def factory():
        return lambda pictures, prompts, metadata: [
            picture.getpixel((0, 0))[0] / 255 for picture in pictures
        ]

    reward = reward_from(traits(images="pil", range=(0, 1))(factory))
    assert reward.traits == Traits("pointwise", "pil", (0, 1))
    assert scores(reward) == pytest.approx(LEVELS.tolist())


BETTER = [[0.5, 0.9, 0.6], [0.3, 0.5, 0.5], [0.2, 0.1, 0.5]]
"""Probabilities that the first image is better, from a judge with a preference for the first."""


def by_table(first, second, prompts, metadata):
    places = (
        [LEVELS.tolist().index(level) for level in side[:, 0, 0, 0].tolist()]
        for side in (first, second)
    )
    return [BETTER[i][j] for i, j in zip(*places, strict=True)]


def test_win_rates_by_hand():
    pairs, sizes = [], []

    @traits(level="pairwise", range=(0, 1))
    def prefers(first, second, prompts, metadata):
        pairs.extend(
            zip(prompts, first[:, 0, 0, 0].tolist(), second[:, 0, 0, 0].tolist(), strict=True)
        )
        sizes.append(len(first))
        return by_table(first, second, prompts, metadata)

    reward = reward_from(prefers)
    assert reward.of_groups
    # (0.9 + 0.6 + 0.7 + 0.8) / 4, (0.3 + 0.5 + 0.1 + 0.9) / 4, (0.2 + 0.1 + 0.4 + 0.5) / 4
    assert scores(reward) == pytest.approx([0.75, 0.45, 0.3])
    assert sizes == [2, 2, 2]
    levels = LEVELS.tolist()
    assert sorted(pairs) == sorted(
        (p, a, b) for p, a in zip(PROMPTS, levels, strict=True) for b in levels if a != b
    )


@pytest.mark.parametrize("bias", [0.0, 0.1, -0.2])
def test_a_preference_for_the_first_or_the_second_cancels(bias):
    @traits(level="pairwise", images="pil")
    def prefers(first, second, prompts, metadata):
        pairs = zip(first, second, strict=True)
        return [
            0.5 + bias + (a.getpixel((0, 0))[0] - b.getpixel((0, 0))[0]) / 510 for a, b in pairs
        ]

    # against the others, 0.5 + half the difference in level
    assert scores(reward_from(prefers)) == pytest.approx([0.3, 0.45, 0.75])


def test_a_single_image_neither_wins_nor_loses():
    assert scores(reward_from(traits(level="pairwise")(by_table)), 1) == [0.5]


def test_images_of_an_undecided_pair_are_not_scored():
    @traits(level="pairwise")
    def prefers(first, second, prompts, metadata):
        return [None if "three" in prompt else 0.5 for prompt in prompts]

    assert all(math.isnan(score) for score in scores(reward_from(prefers)))


@pytest.mark.parametrize("result", [[0.5] * 3, [2.0] * 2, [-1.0] * 2], ids=repr)
def test_a_pairwise_reward_must_return_a_probability_per_pair(result):
    with pytest.raises(
        RunError,
        match=r"rewards\.mine raised ValueError: .* for 2 pairs\. Return 2 probabilities",
    ):
        scores(
            reward_from(traits(level="pairwise")(lambda first, second, prompts, metadata: result))
        )
