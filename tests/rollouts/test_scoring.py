"""Scores: images without one, rewards of groups, and when rewards are called."""

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from threading import current_thread, Event, main_thread
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from flowalign.advantages import ADVANTAGES, group_advantage, incomplete_rows, win_rate
from flowalign.batch import Cond, Keys, Rollout
from flowalign.config.load import load_config
from flowalign.errors import RunError, UserError
from flowalign.evaluation.results import EvaluationResult
from flowalign.evaluation.statistics import paired_difference
from flowalign.rewards.base import Reward, Traits
from flowalign.rewards.combine import WeightedSum
from flowalign.rollouts.ranking import rank
from flowalign.rollouts.ranking_settings import Ranking
from flowalign.rollouts.scoring import NotFinite, RolloutScorer
from flowalign.rollouts.sources import differentiable_prompts
from flowalign.training.reward_checks import check_rewards
from tests.rollouts.test_sources import context, flat
from tests.tiny import SMALL, TINY

NONE = math.nan
KINDS = [*ADVANTAGES.values(), partial(group_advantage, std="group")]


def grey(*groups: list[int]) -> Rollout:
    """A prompt a list, and a grey image a level, of which the latent is the level too."""
    levels = torch.tensor([level for group in groups for level in group])
    keys = [(0, 0, slot, image) for slot, group in enumerate(groups) for image in range(len(group))]
    prompts = [f"prompt {slot}" for _, _, slot, _ in keys]
    nothing = torch.zeros(len(levels), 1)
    cond = Cond({"prompt": nothing}, {"prompt": nothing})
    path, images = (
        levels[:, None, None].float(),
        levels[:, None, None, None].byte().expand(-1, 3, 2, 2),
    )
    return Rollout(
        prompts=prompts,
        metadata=[{}] * len(levels),
        keys=Keys.of_rows(keys),
        cond=cond,
        weight=torch.ones(len(levels)),
        x0=path[:, 0],
        path=path,
        log_prob=nothing,
        images=images,
        reward=nothing[:, 0],
        advantage=nothing[:, 0],
        steps=range(0),
    )


def level_of(images: Tensor) -> list[int]:
    return [round(255 * value) for value in images[:, 0, 0, 0].tolist()]


def by_level(**table: float) -> Any:
    """A score for every level: `_10=0.5`."""
    return lambda images, prompts, metadata: [table[f"_{level}"] for level in level_of(images)]


A = Reward("a", by_level(_1=0.0, _2=1.0, _3=0.5, _4=0.75, _5=NONE, _6=0.25, _7=0.5, _8=1.0))
B = Reward(
    "b", by_level(_1=4.0, _2=1.0, _3=3.0, _4=NONE, _5=9.0, _6=NONE, _7=NONE, _8=NONE), weight=0.25
)
C = Reward("c", by_level(_6=0.9, _7=1.0, _8=0.95))


def judge(
    *rewards: Reward, advantage: Any = group_advantage, images_per_pass: int = 2
) -> RolloutScorer:
    return RolloutScorer(
        list(rewards), WeightedSum(), advantage, images_per_pass, torch.device("cpu")
    )


# images without a score


@pytest.mark.parametrize("advantage", KINDS)
def test_images_that_lack_a_score_get_weight_0_and_change_nothing_for_their_group(advantage):
    """4 lacks b and 5 lacks a; that they have the other changes no mean and no deviation."""
    asked = judge(A, B, advantage=advantage)
    found, metrics = asked([grey([1, 4, 2, 5, 3], [6, 7, 8])])
    expected, _ = asked([grey([1, 2, 3], [6, 7, 8])])
    scored = [0, 2, 4, 5, 6, 7]
    assert_close(found.advantage[scored], expected.advantage)
    assert found.advantage[:5].abs().max() > 0
    assert torch.equal(found.reward[scored], expected.reward)
    assert found.reward[[1, 3]].isnan().all()
    assert found.advantage[[1, 3]].tolist() == [0, 0]
    assert found.weight.tolist() == [1, 0, 1, 0, 1, 1, 1, 1]
    assert len(found.trainable_rows()) == 6
    assert metrics["reward/not_scored"] == 0.25
    assert metrics["reward/b"] == pytest.approx((4 + 1 + 3 + 9) / 4)


@pytest.mark.parametrize("advantage", KINDS)
def test_a_prompt_that_lacks_a_reward_wholly_is_decided_by_the_others(advantage):
    found, _ = judge(A, B, C, advantage=advantage)([grey([6, 7, 8])])
    expected, _ = judge(A, C, advantage=advantage)([grey([6, 7, 8])])
    assert found.weight.tolist() == [1, 1, 1]
    assert torch.equal(found.reward, expected.reward)
    assert_close(found.advantage, expected.advantage)
    assert expected.advantage.abs().max() > 0


@pytest.mark.parametrize("advantage", [win_rate, partial(group_advantage, std="group")])
def test_prompts_with_and_without_a_reward_stand_side_by_side(advantage):
    found, _ = judge(A, B, advantage=advantage)([grey([6, 7, 8], [1, 2, 3])])
    for part, rewards, group in ((found[:3], (A,), [6, 7, 8]), (found[3:], (A, B), [1, 2, 3])):
        assert_close(
            part.advantage, judge(*rewards, advantage=advantage)([grey(group)])[0].advantage
        )


@pytest.mark.parametrize("advantage", KINDS)
def test_a_prompt_without_any_score_gets_weight_0(advantage):
    found, metrics = judge(
        Reward("a", by_level(_1=NONE, _2=NONE, _3=0.0, _4=1.0)), advantage=advantage
    )([grey([1, 2], [3, 4])])
    assert found.weight.tolist() == [0, 0, 1, 1]
    assert found.advantage.tolist()[:2] == [0, 0]
    assert metrics["reward/not_scored"] == 0.5


def test_a_step_of_which_nothing_is_scored_is_refused():
    with pytest.raises(NotFinite, match=r"no image was given a score by rewards\.a$"):
        judge(Reward("a", by_level(_1=NONE, _2=NONE)))([grey([1, 2])])


def test_an_image_lacks_what_another_of_its_prompt_has():
    group = torch.tensor([0, 0, 0, 1, 1])
    scores = {"a": torch.tensor([1, NONE, 2, NONE, NONE]), "b": torch.tensor([1, 2, 3, 4, NONE])}
    assert incomplete_rows(scores, group).tolist() == [False, True, False, False, True]


@pytest.mark.parametrize(
    "ranking",
    [Ranking(top=1), Ranking(top=2), Ranking(top=9), Ranking(top=2, weighted=True)],
    ids=repr,
)
@pytest.mark.parametrize("unscored", [[], [1], [1, 4], [1, 2, 4], [1, 2, 3, 4]], ids=repr)
def test_an_image_without_a_score_is_in_no_pair_that_counts(ranking, unscored):
    table = {f"_{level}": NONE if level in unscored else level / 10 for level in range(1, 9)}
    rollout, _ = judge(Reward("a", by_level(**table)))([grey([3, 1, 4, 2], [5, 8, 7, 6])])
    pairs = rank(rollout, ranking).trainable_rows()
    assert not {*pairs.x0[0].flatten().tolist(), *pairs.x0[1].flatten().tolist()} & set(unscored)
    assert (pairs.gap > 0).all()
    assert pairs.weight.isfinite().all()


@pytest.mark.parametrize("unscored", [[], [4], [1, 3], [2, 3, 4]], ids=repr)
def test_of_the_scored_the_best_is_paired_with_the_worst(unscored):
    table = {f"_{level}": NONE if level in unscored else level / 10 for level in range(1, 5)}
    rollout, _ = judge(Reward("a", by_level(**table)))([grey([3, 1, 4, 2])])
    pairs = rank(rollout, Ranking(top=1)).trainable_rows()
    scored = [level for level in range(1, 5) if level not in unscored]
    expected = ([scored[-1]], [scored[0]]) if len(scored) > 1 else ([], [])
    assert tuple(side.flatten().tolist() for side in pairs.x0) == expected


def test_the_paired_difference_leaves_out_pictures_without_a_score():
    prompt, nothing = torch.tensor([0, 0, 1, 1, 2, 3]), torch.zeros(0)
    before = EvaluationResult(
        prompt, {"r": torch.tensor([0.0, NONE, 0.0, 0.0, 0.0, 5.0])}, nothing, nothing
    )
    after = EvaluationResult(
        prompt, {"r": torch.tensor([1.0, 9.0, 0.0, 1.0, 0.0, NONE])}, nothing, nothing
    )
    kept = [0, 2, 3, 4]
    fewer = [
        EvaluationResult(prompt[kept], {"r": scores.rewards["r"][kept]}, nothing, nothing)
        for scores in (before, after)
    ]
    assert paired_difference(before, after) == paired_difference(*fewer)
    assert paired_difference(before, after)["r"][1] == pytest.approx((1 + 0.5 + 0) / 3)
    assert after.means["r"] == pytest.approx(11 / 5)


# when they are asked


def test_rewards_of_groups_see_all_images_of_a_prompt_though_passes_part_them():
    seen: dict[str, list[list[int]]] = {"pointwise": [], "group": []}

    def share(kind, images, prompts, metadata):
        assert kind == "pointwise" or len(set(prompts)) == 1
        seen[kind].append(level_of(images))
        return images.mean((1, 2, 3)) / images.mean((1, 2, 3)).sum()

    rewards = [Reward(kind, partial(share, kind), traits=Traits(kind)) for kind in seen]
    rollout, scores = judge(*rewards).score(iter(grey([1, 2, 5], [3, 3, 6]).pieces(2)))
    assert seen == {"pointwise": [[1, 2], [5, 3], [3, 6]], "group": [[1, 2, 5], [3, 3, 6]]}
    assert_close(scores["group"], torch.tensor([1 / 8, 2 / 8, 5 / 8, 3 / 12, 3 / 12, 6 / 12]))
    assert level_of(rollout.images.float() / 255) == [1, 2, 5, 3, 3, 6]


def test_a_pass_is_scored_while_the_next_is_made():
    asked, made, order = Event(), Event(), []

    def waits(images, prompts, metadata):
        assert current_thread() is not main_thread()
        order.append("asked about the first")
        asked.set()
        assert made.wait(60), "the second pass was not made meanwhile"
        return images.mean((1, 2, 3))

    def passes():
        first, second = grey([1, 2, 3, 4]).pieces(2)
        yield first
        assert asked.wait(60), "the first pass was not scored meanwhile"
        order.append("made the second")
        made.set()
        yield second

    _, scores = judge(Reward("waits", waits)).score(passes())
    assert order[:2] == ["asked about the first", "made the second"]
    assert_close(scores["waits"], torch.tensor([1.0, 2, 3, 4]) / 255)


@pytest.mark.parametrize("level", ["pointwise", "group"])
def test_a_reward_that_fails_in_the_middle_ends_the_scoring(level):
    def fails(images, prompts, metadata):
        if 5 in level_of(images):
            raise ConnectionError("the scorer is gone")
        return [0.0] * len(images)

    with pytest.raises(
        RunError, match=r"rewards\.fails raised ConnectionError: the scorer is gone"
    ):
        judge(Reward("fails", fails, traits=Traits(level)))(
            grey([1, 2, 3], [4, 5, 6], [7, 8, 9]).pieces(3)
        )


def test_nothing_more_is_made_or_asked_once_a_reward_has_failed():
    asked, made = [], []

    def fails(images, prompts, metadata):
        asked.append(level_of(images))
        raise ConnectionError("the scorer is gone")

    def passes() -> Iterator[Rollout]:
        for level in range(100_000):
            made.append(level)
            yield grey([1])
            time.sleep(1e-3)

    with pytest.raises(RunError, match="the scorer is gone"):
        judge(Reward("fails", fails)).score(passes())
    assert len(asked) <= len(made) < 100_000


def test_an_interruption_waits_for_no_reward():
    asked, workers, begun, over = [], [], Event(), Event()

    def waits(images, prompts, metadata):
        asked.append(level_of(images))
        workers.append(current_thread())
        begun.set()
        assert over.wait(60)
        return images.mean((1, 2, 3))

    def passes() -> Iterator[Rollout]:
        yield from grey([1, 2, 3, 4]).pieces(2)
        assert begun.wait(60)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge(Reward("waits", waits)).score(passes())
    over.set()
    workers[0].join()
    assert asked == [[1, 2]]


def test_rewards_of_groups_that_a_gradient_passes_through_are_asked_prompt_by_prompt():
    seen = []

    def share(images, prompts, metadata):
        seen.append(set(prompts))
        return images.mean((1, 2, 3)) / images.mean((1, 2, 3)).sum()

    scorer = judge(Reward("share", share, traits=Traits("group")))
    prompts, _ = differentiable_prompts(replace(context(), scorer=scorer), 0)
    images = torch.rand(6, 3, 2, 2, requires_grad=True)
    combined, by_name = prompts.reward(images, prompts.prompts, prompts.metadata)
    assert seen == [{prompts.prompts[0]}, {prompts.prompts[3]}]
    assert_close(combined.view(2, 3).sum(1), torch.ones(2))
    assert (
        torch.autograd.grad(by_name["share"][0], images)[0].flatten(1).abs().sum(1)[3:].tolist()
        == [0] * 3
    )


def test_passes_that_part_a_prompt_are_refused_where_a_gradient_is_taken_through_its_group():
    config = load_config(TINY, [*SMALL, "objective={name: alignprop}"])
    compares = Reward("compares", flat, traits=Traits("group"))
    plan = replace(context().plan, max_images_per_pass=2)
    with pytest.raises(
        UserError,
        match=r"Passes have 2 images, but rewards\.compares compares.*images_per_prompt, 3",
    ):
        check_rewards(config, plan, [compares])
    check_rewards(config, plan, [replace(compares, traits=Traits("pointwise"))])
    check_rewards(config, replace(plan, max_images_per_pass=3), [compares])
