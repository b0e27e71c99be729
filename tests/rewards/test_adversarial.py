"""A reward that learns: what it learns, and that nothing but an update changes it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from flowalign.errors import UserError
from flowalign.rewards.adapters import make_reward
from flowalign.rewards.adversarial import Adversarial
from flowalign.rewards.base import LearnedReward
from tests.rewards.test_features import random_dinov2

RED, GREEN, BLUE = (0.9, 0.1, 0.1), (0.1, 0.7, 0.2), (0.1, 0.2, 0.9)


def shades(colour: tuple[float, float, float], count: int = 4) -> Tensor:
    """Plain pictures, each a little brighter than the one before."""
    steps = torch.linspace(0.8, 1.1, count)[:, None] * torch.tensor(colour)
    return steps.clamp(0, 1)[:, :, None, None].expand(-1, 3, 32, 32)


@pytest.fixture
def reds(tmp_path) -> Path:
    folder = tmp_path / "reds"
    folder.mkdir()
    for level in range(180, 256, 15):
        Image.new("RGB", (48, 64), (level, 25, 30)).save(folder / f"{level}.png")
    return folder


def adversarial(reds: Path, **settings: Any) -> Adversarial:
    return Adversarial(pictures=str(reds), **{"learning_rate": 1e-3, **settings})


def score(reward: Adversarial, images: Tensor) -> Tensor:
    return reward(images, [""] * len(images), [{}] * len(images))


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_has_no_preference_before_it_has_learned(reds):
    reward = adversarial(reds)
    assert isinstance(reward, LearnedReward)
    assert score(reward, torch.cat([shades(RED), shades(BLUE)])).tolist() == [0] * 8


@pytest.mark.parametrize("backbone", ["bundled", "dinov2"])
def test_it_learns_to_separate_generated_images_from_references(reds, tmp_path, backbone):
    settings = {"path": random_dinov2(tmp_path / "dinov2")} if backbone == "dinov2" else {}
    reward = adversarial(reds, **settings)
    first = reward.update(shades(BLUE))
    for _ in range(15):
        last = reward.update(shades(BLUE))
    assert first == {"loss": pytest.approx(math.log(2)), "accuracy": 0.5}
    assert last["loss"] < 0.1
    assert last["accuracy"] == 1
    assert (score(reward, shades(RED, 3)) > 1).all()
    assert (score(reward, shades(BLUE, 3)) < -1).all()


def test_it_learns_from_new_images_and_keeps_past_ones(reds):
    reward = adversarial(reds)
    for colour in [BLUE] * 10 + [GREEN] * 20:
        reward.update(shades(colour))
    for color in (BLUE, GREEN):
        assert score(reward, shades(color)).max() < 0 < score(reward, shades(RED)).min()


def test_the_loss_is_half_of_references_a_quarter_of_new_and_a_quarter_of_past_pictures(reds):
    reward = adversarial(reds)
    reward.update(shades(BLUE, 3))
    reference = reward.logit(reward.references)
    past, new = score(reward, shades(BLUE, 3)), score(reward, shades(GREEN, 5))
    parts = [
        F.logsigmoid(reference).mean() / 2,
        F.logsigmoid(-new).mean() / 4,
        F.logsigmoid(-past).mean() / 4,
    ]
    assert reward.update(shades(GREEN, 5))["loss"] == pytest.approx(
        -sum(part.item() for part in parts), rel=1e-5
    )


def test_the_buffer_holds_the_newest_pictures(reds):
    reward = adversarial(reds, buffer=6)
    reward.update(shades(BLUE))
    reward.update(shades(GREEN))
    expected = torch.cat([reward.backbone(shades(BLUE))[2:], reward.backbone(shades(GREEN))])
    torch.testing.assert_close(reward.past, expected)


def test_a_saved_and_loaded_state_goes_on_bit_for_bit(reds, tmp_path):
    steps = [shades(colour) for colour in (BLUE, GREEN, BLUE, GREEN)]
    whole, begun = adversarial(reds), adversarial(reds)
    for images in steps:
        whole.update(images)
    for images in steps[:2]:
        begun.update(images)
    save_file(begun.state(), tmp_path / "state.safetensors")
    resumed = adversarial(reds)
    resumed.load_state(load_file(tmp_path / "state.safetensors"))
    for images in steps[2:]:
        resumed.update(images)
    assert equal(resumed.state(), whole.state())
    assert torch.equal(score(resumed, steps[0]), score(whole, steps[0]))


def test_a_state_from_before_the_first_update_starts_anew(reds, tmp_path):
    reward = adversarial(reds)
    save_file(reward.state(), tmp_path / "state.safetensors")
    reward.update(shades(BLUE))
    once = reward.state()
    reward.load_state(load_file(tmp_path / "state.safetensors"))
    assert score(reward, shades(BLUE)).tolist() == [0] * 4
    reward.update(shades(BLUE))
    assert equal(reward.state(), once)


def test_a_state_that_was_taken_is_not_changed_by_learning_on(reds):
    reward = adversarial(reds)
    reward.update(shades(BLUE))
    taken = reward.state()
    kept = {name: value.clone() for name, value in taken.items()}
    reward.update(shades(GREEN))
    assert equal(taken, kept)
    assert not equal(taken, reward.state())


def test_scoring_changes_nothing(reds):
    reward = adversarial(reds)
    reward.update(shades(BLUE))
    before, images = reward.state(), shades(GREEN).clone().requires_grad_()
    scores = score(reward, images)
    scores.sum().backward()
    assert equal(reward.state(), before)
    assert torch.equal(score(reward, images), scores)
    assert not any(parameter.requires_grad for parameter in reward.head.parameters())


def test_it_draws_nothing_from_the_runs_generator(reds):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    reward = adversarial(reds)
    reward.update(shades(BLUE))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_step_along_its_gradient_makes_a_picture_more_like_a_reference(reds):
    reward = adversarial(reds)
    for _ in range(10):
        reward.update(shades(BLUE))
    images = shades(BLUE).clone().requires_grad_()
    before = score(reward, images)
    (gradient,) = torch.autograd.grad(before.sum(), images)
    after = score(
        reward, images + 1e-3 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    )
    assert (after > before).all()


def test_it_scores_with_and_without_a_gradient_as_any_reward_does(reds):
    reward = make_reward("adversarial", adversarial(reds))
    images = shades(BLUE).clone().requires_grad_()
    assert reward(images, [""] * 4, [{}] * 4).shape == (4,)
    assert reward.with_gradient(images, [""] * 4, [{}] * 4).requires_grad


def test_it_learns_inside_a_gradient_free_block(reds):
    reward = adversarial(reds)
    with torch.no_grad():
        reward.update(shades(BLUE))
    assert score(reward, shades(BLUE)).max() < 0


def test_a_state_of_another_backbone_is_an_error(reds, tmp_path):
    other = adversarial(reds, path=random_dinov2(tmp_path / "dinov2"))
    with pytest.raises(UserError, match="the checkpoint was written with another backbone"):
        adversarial(reds).load_state(other.state())
    with pytest.raises(UserError, match="the checkpoint was written with another backbone"):
        adversarial(reds).load_state({})


@pytest.mark.parametrize(
    "settings", [{"learning_rate": 0}, {"descents": 0}, {"buffer": 0}, {"size": -1}]
)
def test_settings_that_cannot_work_are_an_error(reds, settings):
    with pytest.raises(UserError, match=rf"rewards\.adversarial\.{next(iter(settings))} is"):
        adversarial(reds, **settings)
