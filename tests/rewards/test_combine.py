"""Combinations of rewards, computed by hand, and the statistics they keep across a resume."""

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from flowalign.config.load import load_config
from flowalign.errors import RunError, UserError
from flowalign.files import read_tensors
from flowalign.reporting.trackers import read_metrics
from flowalign.rewards.combine import (
    Combine,
    Constrained,
    Gate,
    Minimum,
    Modulated,
    Normalised,
    Uncertainty,
    WeightedSum,
)
from flowalign.runs.checkpoint import checkpoints
from flowalign.training import trainer
from flowalign.training.setup import read_inputs
from tests.tiny import ROOT, SMALL, TINY

NONE = float("nan")
WEIGHTS = {"a": 2.0, "b": 0.5}
SCORES = {"a": torch.tensor([1.0, 2, NONE, NONE, 3]), "b": torch.tensor([10.0, NONE, 2, NONE, 4])}
"""Weighted: 2 and 5; 4 alone; 1 alone; none; 6 and 2."""


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("combine", "expected"),
    [
        (WeightedSum(), [7, 4, 1, NONE, 8]),
        (Minimum(), [2, 4, 1, NONE, 2]),
        (Uncertainty(caution=0.5), [3.5 - 0.5 * 2.25, 4, 1, NONE, 4 - 0.5 * 4]),
        (Uncertainty(caution=0), [3.5, 4, 1, NONE, 4]),
        (Gate(base={"a": 1.5}), [2, 4, 1, NONE, 8]),
        (Gate(base={"b": 4}), [7, 4, 1, NONE, 8]),
        (Gate(base={"b": 5}), [7, 4, 1, NONE, 2]),
    ],
    ids=repr,
)
def test_every_combination_by_hand(combine, expected):
    """A reward that an image lacks leaves it to the others."""
    assert_close(combine(SCORES, WEIGHTS), torch.tensor(expected), equal_nan=True)


def z_score(new: Tensor, all_so_far: Tensor) -> Tensor:
    scored = all_so_far[~all_so_far.isnan()]
    return (new - scored.mean()) / scored.std(correction=0)


def test_normalised_keeps_the_digits_of_scores_around_100():
    scores = {"a": torch.tensor([100.001, 99.999, 99.999])}
    combine = Normalised()
    combine.observe(scores)
    centred = scores["a"].double() - scores["a"].double().mean()
    expected = centred / (centred.square().mean().sqrt() + 1e-6)
    assert_close(combine(scores, {"a": 1.0}), expected.float(), rtol=1e-4, atol=0)


def test_normalised_is_the_sum_of_z_scores_over_all_scores_so_far():
    steps = [{"a": torch.randn(6), "b": 100 + 20 * torch.randn(6)} for _ in range(3)]
    steps[1]["a"][2], steps[1]["b"][:] = NONE, NONE
    combine = Normalised()
    for count, scores in enumerate(steps, 1):
        combine.observe(scores)
        z = {
            name: z_score(scores[name], torch.cat([step[name] for step in steps[:count]]))
            for name in scores
        }
        expected = 2 * z["a"] + 0.5 * z["b"] if count != 2 else 2 * z["a"]
        assert_close(combine(scores, WEIGHTS), expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_a_reward_without_deviation_is_normalised_to_0():
    combine = Normalised()
    combine.observe({"a": torch.full((4,), 3.0)})
    assert combine({"a": torch.full((4,), 3.0)}, {"a": 1.0}).tolist() == [0] * 4


def test_the_multiplier_after_two_steps_by_hand():
    combine = Constrained(at_least={"b": 0.5}, rate=0.1)
    combine.observe({"a": torch.ones(3), "b": torch.tensor([0.0, 0.2, NONE])})  # 0.1 · (0.5 - 0.1)
    combine.observe({"a": torch.ones(2), "b": torch.tensor([0.1, 0.3])})  # + 0.1 · (0.5 - 0.2)
    assert combine.metrics() == {"multiplier/b": pytest.approx(0.07)}
    scores = {"a": torch.tensor([1.0, 2, 3]), "b": torch.tensor([0.5, 1.5, NONE])}
    assert_close(combine(scores, WEIGHTS), torch.tensor([2.0, 4.07, 6]))


def test_a_multiplier_is_never_below_0():
    combine = Constrained(at_least={"b": 0.5}, rate=0.1)
    for mean, expected in ((0.0, 0.05), (9.0, 0.0), (9.0, 0.0), (0.4, 0.01), (NONE, 0.01)):
        combine.observe({"b": torch.full((2,), mean)})
        assert combine.metrics()["multiplier/b"] == pytest.approx(expected)
    assert combine({"a": torch.ones(1), "b": torch.ones(1)}, WEIGHTS).tolist() == pytest.approx(
        [2.005]
    )


def observed(combine: Constrained, mean: float, steps: int) -> float:
    """The multiplier of b after so many steps of one mean."""
    for _ in range(steps):
        combine.observe({"b": torch.full((2,), mean)})
    return combine.metrics()["multiplier/b"]


def test_a_multiplier_grows_to_its_bound_and_back_to_0():
    combine = Constrained(at_least={"b": 0.5}, rate=1.0, bound=2.0)
    assert observed(combine, 0.4, 1) == pytest.approx(2 * math.tanh(0.1 / 2))
    assert 1.99 < observed(combine, 0.4, 100) <= 2
    assert observed(combine, 0.9, 100) == 0


def test_a_ceiling_takes_the_weight_of_a_reward_and_then_pushes_it_down():
    combine = Constrained(at_most={"b": 0.5}, rate=0.1)
    scores = {"a": torch.tensor([1.0, 2]), "b": torch.tensor([0.5, 1.5])}
    assert observed(combine, 0.4, 5) == 0
    assert_close(combine(scores, WEIGHTS), torch.tensor([2.25, 4.75]))
    assert observed(combine, 1.5, 5) == pytest.approx(-0.5)
    assert_close(combine(scores, WEIGHTS), torch.tensor([2.25, 4.25]))
    assert observed(combine, 1.5, 5) == pytest.approx(-1.0)
    assert_close(combine(scores, WEIGHTS), torch.tensor([2.25, 3.75]))


def test_the_bound_of_a_ceiling_is_the_most_that_it_takes():
    combine = Constrained(at_most={"b": 0.5}, rate=10.0, bound=0.5)
    assert observed(combine, 9.0, 50) == pytest.approx(-0.5)
    scores = {"a": torch.tensor([1.0, 1]), "b": torch.tensor([0.5, 7])}
    assert_close(combine(scores, WEIGHTS), torch.tensor([2.25, 2.25]))


def test_floors_may_hold_all_rewards_and_a_ceiling_the_same_one():
    combine = Constrained(at_least={"a": 1.0, "b": 0.5}, at_most={"b": 0.6}, rate=1.0)
    combine.check({"a": 1.0, "b": 1.0})
    combine.observe({"a": torch.full((2,), 0.5), "b": torch.full((2,), 0.9)})
    assert combine.metrics() == {
        "multiplier/a": pytest.approx(0.5),
        "multiplier/b": pytest.approx(-0.3),
    }
    scores = {"a": torch.tensor([1.0, 2]), "b": torch.tensor([0.6, 1.6])}
    assert_close(combine(scores, {"a": 1.0, "b": 1.0}), torch.tensor([0.0, 0.5 - 0.3]))


@pytest.mark.parametrize(
    ("floor", "instruction", "quality", "expected"),
    [
        (0.4, 1.0, [0.25, 0.9], 0.55),
        (0.5, 1.0, [0.25, 0.9], 0.625),
        (0.4, 0.5, [1.0, 1.0], 0.5),
        (0.5, 0.5, [1.0, 1.0], 0.5),
        (0.5, 0.0, [1.0, 1.0], 0.0),
        (0.5, 0.8, [NONE, 0.5], 0.6),
        (0.5, 0.8, [NONE, NONE], 0.8),
        (0.5, NONE, [0.5, 0.6], 0.75),
        (0.5, NONE, [NONE, NONE], NONE),
    ],
)
def test_modulated_scales_the_base_by_the_worst_quality(floor, instruction, quality, expected):
    """The first values are FIRM's: its modes mix and legacy at instruction 1 and quality 1/4."""
    names = ("match", "look", "detail")
    scores = dict(zip(names, torch.tensor([instruction, *quality])[:, None], strict=True))
    combine, weights = Modulated(base="match", floor=floor), dict.fromkeys(names, 1.0)
    combine.check(weights)
    assert_close(combine(scores, weights), torch.tensor([expected]), equal_nan=True)


def test_modulated_passes_the_gradient_to_the_base_and_to_the_worst_quality():
    scores = {
        name: torch.tensor([value], requires_grad=True)
        for name, value in (("match", 0.8), ("look", 0.5), ("detail", 0.6))
    }
    Modulated(base="match")(scores, dict.fromkeys(scores, 1.0)).sum().backward()
    slopes = [0.0 if score.grad is None else score.grad.item() for score in scores.values()]
    assert slopes == pytest.approx([0.75, 0.4, 0.0])


def test_modulated_refuses_scores_outside_0_to_1():
    scores = {"match": torch.tensor([0.5]), "look": torch.tensor([1.5])}
    with pytest.raises(
        RunError, match=r"rewards\.look gave 1\.5, but combine modulated multiplies"
    ):
        Modulated(base="match")(scores, {"match": 1.0, "look": 1.0})


@pytest.mark.parametrize(
    "kind",
    [
        Normalised,
        lambda: Constrained(at_least={"b": 50}),
        lambda: Constrained(at_least={"b": 50}, at_most={"a": 0.1, "b": 60}, bound=3),
    ],
    ids=["normalised", "constrained", "ceilings"],
)
def test_a_restored_state_continues_bit_for_bit(kind, tmp_path):
    steps = [{"a": torch.rand(5), "b": 7 * torch.rand(5)} for _ in range(4)]
    whole, begun, resumed = kind(), kind(), kind()
    for scores in steps[:2]:
        whole.observe(scores)
        begun.observe(scores)
    save_file(begun.state(), tmp_path / "state.safetensors")
    resumed.load_state(load_file(tmp_path / "state.safetensors"))
    for scores in steps[2:]:
        for combine in (whole, resumed):
            combine.observe(scores)
        assert torch.equal(resumed(scores, WEIGHTS), whole(scores, WEIGHTS))
    assert whole.state().keys() == resumed.state().keys() != set()
    assert all(torch.equal(value, resumed.state()[name]) for name, value in whole.state().items())


def test_a_negative_bonus_counts_below_a_threshold_too():
    scores = {"good": torch.tensor([0.4, 0.4, 0.6, 0.6]), "bonus": torch.tensor([-3.0, 2, -3, 2])}
    assert_close(
        Gate(base={"good": 0.5})(scores, {"good": 1.0, "bonus": 1.0}),
        torch.tensor([-2.6, 0.4, -2.4, 2.6]),
    )


@pytest.mark.parametrize(
    "combine",
    [WeightedSum(), Minimum(), Uncertainty(), Gate(base={"a": 1}), Modulated(base="a")],
    ids=repr,
)
def test_the_others_keep_no_statistics(combine: Combine):
    combine.observe(SCORES)
    assert combine.state() == combine.metrics() == {}


TWO = "rewards={brightness: 1, jpeg_size: 1}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [TWO, "combine={name: gate}"],
            "combine.base is empty. Write thresholds by reward, for example {brightness: 0.5}",
        ),
        (
            [TWO, "combine={name: gate, base: {bright: 1}}"],
            "combine.base names 'bright', which is not a reward of this run. Choose from",
        ),
        (
            [
                "rewards={brightness: -1, jpeg_size: 1}",
                "combine={name: gate, base: {brightness: 1}}",
            ],
            "rewards.brightness has a weight below 0, but combine.base asks for more of it. Write",
        ),
        (
            [
                "rewards={brightness: 2, jpeg_size: 1}",
                "combine={name: constrained, at_least: {brightness: 1}}",
            ],
            "rewards.brightness has weight 2, which would have no effect: combine.at_least gives",
        ),
        (
            [TWO, "combine={name: gate, base: {brightness: 1, jpeg_size: 1}}"],
            "combine.base names all rewards. Leave out",
        ),
        ([TWO, "combine={name: constrained}"], "combine.at_least is empty"),
        (
            [TWO, "combine={name: constrained, at_least: {size: 1}}"],
            "combine.at_least names 'size', which is not a reward of this run. Choose from",
        ),
        (
            [TWO, "combine={name: constrained, at_most: {size: 1}}"],
            "combine.at_most names 'size', which is not a reward of this run. Choose from",
        ),
        (
            [TWO, "combine={name: constrained, at_least: {jpeg_size: 2}, at_most: {jpeg_size: 1}}"],
            "combine.at_least.jpeg_size is 2, but combine.at_most.jpeg_size is 1. Write a floor",
        ),
        (
            [TWO, "combine={name: constrained, at_least: {brightness: 1}, bound: 0}"],
            "combine.bound is 0; it must be greater",
        ),
        ([TWO, "combine={name: modulated}"], "combine.base is '', which is not a reward of"),
        (
            [TWO, "combine={name: modulated, base: brightness, floor: 1.5}"],
            "combine.floor is 1.5; it must be less than or equal to 1",
        ),
        (
            ["rewards={brightness: 1}", "combine={name: modulated, base: brightness}"],
            "brightness is the only reward. Add a reward",
        ),
        (
            ["rewards={brightness: 1, contrast: 2}", "combine={name: modulated, base: brightness}"],
            "rewards.contrast has weight 2, but modulated multiplies scores in [0, 1]. Leave",
        ),
        (
            [TWO, "combine={name: constrained, at_least: {brightness: 1}, rate: 0}"],
            "combine.rate is 0; it must be greater",
        ),
        (
            [TWO, "combine={name: uncertainty, caution: -1}"],
            "combine.caution is -1; it must be greater than or equal to 0",
        ),
        ([TWO, "combine={name: minimal}"], "Did you mean 'minimum'"),
        (
            [
                "rewards={brightness: 1, contrast: 1}",
                "combine={name: constrained, at_least: {brightness: 1}}",
                "ALIGN",
            ],
            "combine.name is constrained, which looks at whole steps, but the objective alignprop",
        ),
        (
            ["rewards={brightness: 1}", "combine={name: normalised}", "ALIGN"],
            "choose from weighted_sum, minimum, uncertainty, gate, modulated",
        ),
    ],
)
def test_rewards_that_cannot_be_combined_are_an_error(overrides, message):
    overrides = [override.replace("ALIGN", "objective={name: alignprop}") for override in overrides]
    with pytest.raises(UserError) as caught:
        load_config(TINY, [*SMALL, *overrides])
    assert message in str(caught.value)


@pytest.fixture
def reds(tmp_path) -> Path:
    folder = tmp_path / "reds"
    folder.mkdir()
    for level in (180, 200, 220):
        Image.new("RGB", (64, 64), (level, 25, 30)).save(folder / f"{level}.png")
    return folder


def learning(reds: Path, *overrides: str) -> list[str]:
    settings = f"{{weight: 1.0, pictures: {reds}, learning_rate: 1e-2}}"
    return [*SMALL, f"rewards={{brightness: 1.0, adversarial: {settings}}}", *overrides]


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(reds, tmp_path):
    """The run has a multiplier that grows and a reward that learns."""
    (tmp_path / "few.txt").write_text("a red circle")
    constrained = "combine={name: constrained, at_least: {brightness: 1}, rate: 1}"
    few = [
        f"evaluation.prompts={tmp_path / 'few.txt'}",
        "evaluation.rewards={brightness: 1}",
        "train.learning_rate=1e-2",
    ]
    for name, steps in (("whole", 3), ("parts", 2), ("parts", 3)):
        changes = [*few, constrained, f"train.steps={steps}", f"output={tmp_path / name}"]
        trainer.train(load_config(TINY, learning(reds, *changes)))
    whole, parts = (checkpoints(tmp_path / name)[-1] for name in ("whole", "parts"))
    for file in ("pytorch_lora_weights.safetensors", "rewards.safetensors"):
        one, other = read_tensors(whole / file), read_tensors(parts / file)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    learned, lines = read_tensors(parts / "rewards.safetensors"), read_metrics(tmp_path / "parts")
    name = "adversarial"
    assert learned[f"rewards/{name}/head.2.weight"].abs().max() > 0
    assert learned["combine/brightness"].item() == pytest.approx(
        sum(1 - line["reward/brightness"] for line in lines), rel=1e-5
    )
    assert [line["multiplier/brightness"] for line in lines][-1] == learned[
        "combine/brightness"
    ].item()
    assert all(f"{name}/loss" in line for line in lines)


def test_a_reward_that_learns_cannot_evaluate(reds):
    message = r"adversarial changes while it learns.* Name other rewards in evaluation\.rewards"
    with pytest.raises(UserError, match=message):
        read_inputs(load_config(TINY, learning(reds, "evaluation.rewards={}")))


def test_a_reward_that_learns_needs_whole_steps(reds):
    changes = ["objective={name: alignprop}", "evaluation.rewards={brightness: 1}"]
    config = load_config(TINY, learning(reds, *changes))
    message = "adversarial learns from whole steps, but the objective alignprop takes each image's"
    with pytest.raises(UserError, match=message):
        read_inputs(config)


GROUPS = """
from flowalign.rewards.base import traits

@traits(level="pairwise")
def prefers(first, second, prompts, metadata):
    return [0.5] * len(first)

@traits(level="group")
def spread(images, prompts, metadata):
    return images.flatten(1).std(1)
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("prefers", "prefers is pairwise: its mean .* is always ½"),
        ("spread", "evaluation.images_per_prompt is 1, but spread compares"),
    ],
)
def test_rewards_that_compare_images_cannot_evaluate_single_ones(name, message, tmp_path):
    (tmp_path / "mine.py").write_text(GROUPS)
    reward = f'{{"{tmp_path}/mine.py:{name}": 1.0}}'
    config = load_config(TINY, [*SMALL, f"rewards={reward}", f"evaluation.rewards={reward}"])
    with pytest.raises(UserError, match=message):
        read_inputs(config)
    changes = [f"rewards={reward}", "evaluation.rewards={brightness: 1.0}"]
    assert read_inputs(load_config(TINY, [*SMALL, *changes])).evaluation_rewards
