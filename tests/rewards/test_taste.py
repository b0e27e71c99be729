"""The personal reward: its fit against known answers, and when it refuses to be a reward."""

import json
import math
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import flowalign
from flowalign.errors import UserError
from flowalign.rewards.accuracy import accuracy_of
from flowalign.rewards.features import BUNDLED_CLIP
from flowalign.rewards.taste import fit_head, held_out_margins, Taste, TasteFeatures, whiten


def simulated(pairs: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences of whitened features, and votes of a person whose margin has the deviation 2."""
    generator = torch.Generator().manual_seed(seed)
    taste = torch.randn(width, generator=generator).double()
    difference = torch.randn(pairs, width, generator=generator).double()
    margin = 2 * difference @ (taste / taste.norm())
    votes = torch.rand(pairs, generator=generator).double() < margin.sigmoid()
    return difference, votes.double()


def test_the_head_is_at_the_minimum_of_its_loss():
    difference, votes = simulated(60, 4)
    head = fit_head(difference, votes, deviation=2.0)
    ridge = difference.square().sum(1).mean() / 4
    gradient = difference.T @ ((difference @ head.weight).sigmoid() - votes) + ridge * head.weight
    assert gradient.abs().max() < 1e-9


def test_a_vote_that_is_doubled_and_separable_votes_leave_a_finite_head():
    difference, votes = torch.tensor([[1.0], [2.0]]).double(), torch.ones(2).double()
    once = fit_head(difference, votes, 2.0)
    twice = fit_head(difference.repeat(2, 1), votes.repeat(2), 2.0)
    assert 0 < once.weight < twice.weight < 100


def test_no_preference_is_no_direction():
    difference, _ = simulated(40, 3)
    assert fit_head(difference, torch.full((40,), 0.5).double(), 2.0).weight.abs().max() < 1e-12


def test_scores_do_not_depend_on_the_axes_of_the_features():
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).double()
    rotation = torch.linalg.qr(torch.randn(6, 6).double()).Q
    votes = simulated(25, 1)[1]
    scores = []
    for points in (features, features @ rotation):
        white = whiten(points, 3)(points)
        head = fit_head(white[:25] - white[25:], votes, 2.0)
        scores.append(white @ head.weight)
    assert_close(*scores)


def test_the_cosine_of_picture_and_prompt_is_a_direction_of_its_own():
    features = TasteFeatures(BUNDLED_CLIP, "rewards.taste.path")
    images = torch.rand(12, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    rows = features(images, ["a red circle", "two blue squares"] * 6).double()
    cosine = rows[:, rows.shape[1] // 2 :].sum(1)
    last = features.whiten(rows, 3)(rows)[:, 3]
    assert_close(last, (cosine - cosine.mean()) / cosine.std(correction=0))


@pytest.mark.parametrize(("votes", "published"), [(50, 0.74), (200, 0.77)])
def test_accuracy_on_new_pairs_is_that_of_the_simulated_table(votes, published):
    """Eight features, margins of deviation 2: 0.74 after 50 votes and 0.77 after 200."""
    shares = []
    for seed in range(40):
        difference, choices = simulated(votes + 2000, 8, seed)
        head = fit_head(difference[:votes], choices[:votes], 2.0)
        margins = (difference[votes:] @ head.weight) * (2 * choices[votes:] - 1)
        shares.append(accuracy_of(margins).share)
    assert np.mean(shares) == pytest.approx(published, abs=0.02)


def test_held_out_votes_of_a_coin_are_right_half_the_time():
    difference, _ = simulated(400, 8)
    votes = torch.tensor([Random(n).random() < 0.5 for n in range(400)]).double()
    folds = torch.arange(400) % 5
    low, high = accuracy_of(held_out_margins(difference, votes, folds, 2.0)).interval
    assert low < 0.5 < high


def test_pairs_of_a_question_count_as_one_in_an_interval():
    margins = torch.tensor([1.0, 1.0, -1.0, 1.0, math.nan])
    accuracy = accuracy_of(margins, ["a", "a", "a", "b", "c"])
    assert (accuracy.share, accuracy.questions) == (pytest.approx(5 / 6), 2)


def write_votes(folder: Path, prefers: str, count: int = 60) -> str:
    """Votes on plain pictures, red against blue; `prefers` red, or at random."""
    lines, random = [], Random(0)
    for color in ("red", "blue"):
        for shade in range(4):
            level = 150 + 30 * shade
            rgb = (level, 20, 20) if color == "red" else (20, 20, level)
            Image.new("RGB", (64, 64), rgb).save(folder / f"{color}{shade}.png")
    for number in range(count):
        files = [f"red{number % 4}.png", f"blue{number // 4 % 4}.png"]
        likes_red = prefers == "red" or random.random() < 0.5
        pictures = [{"file": file} for file in files]
        labels = [1, -1] if likes_red else [-1, 1]
        vote = {"prompt": f"picture {number}", "pictures": pictures, "labels": labels}
        lines.append(json.dumps(vote))
    (folder / "votes.jsonl").write_text("\n".join(lines))
    return str(folder / "votes.jsonl")


def test_a_taste_for_red_scores_red_pictures_higher_with_a_gradient(tmp_path):
    taste = Taste(votes=write_votes(tmp_path, "red"), dimensions=4)
    assert taste.accuracy.share > 0.95
    images = torch.full((2, 3, 64, 64), 0.1)
    images[0, 0] = images[1, 2] = 0.8
    images.requires_grad_()
    scores = taste(images, ["picture 7"] * 2, [{}, {}])
    assert scores[0] > scores[1] + 0.5
    scores.sum().backward()
    assert images.grad is not None
    assert images.grad.abs().max() > 0


def test_a_taste_that_may_be_chance_is_not_a_reward(tmp_path):
    with pytest.raises(UserError, match=r"which may be chance\. Answer more questions"):
        Taste(votes=write_votes(tmp_path, "any"), dimensions=4)
    with pytest.raises(UserError, match=r"has 10 questions .*Answer 25 or more"):
        Taste(votes=write_votes(tmp_path, "red", count=10))


def test_rewards_are_compared_with_votes(tmp_path, capsys):
    votes = write_votes(tmp_path, "red", count=40)
    (tmp_path / "red.py").write_text(
        "def redness(i, p, m): return (i[:, 0] - i[:, 2]).mean((1, 2))"
    )
    shares = flowalign.reward_accuracy([f"{tmp_path / 'red.py'}:redness", "saturation"], votes)
    assert [accuracy.questions for accuracy in shares.values()] == [40, 40]
    assert next(iter(shares.values())).share == 1
    assert "1.000 (95 % interval 0.912 to 1.000, 40 questions)" in capsys.readouterr().out
