"""What an update does besides its gradient: the moving average and the copies."""

import math

import pytest
import torch
from torch.testing import assert_close

from flowalign.config.sections import Ema, Train
from flowalign.objectives.crd import CRD
from flowalign.objectives.nft import NFT
from flowalign.rewards.combine import WeightedSum
from flowalign.rollouts.scoring import RolloutScorer
from flowalign.runs.checkpoint import TrainState
from flowalign.training.setup import make_optimizer
from flowalign.training.update import apply_update
from tests.tiny import make_policy


def share_of_the_start(ema: Ema, updates: list[int]) -> float:
    """How much of the first weights an average holds that follows after these updates."""
    return math.prod(ema.decay_at(n) for n in updates)


@pytest.mark.parametrize(("updates", "share"), [(1, 0.182), (2, 0.045), (5, 0.002), (10, 6e-5)])
def test_an_average_in_every_update_forgets_the_start_as_in_diffusion_nft(updates, share):
    found = share_of_the_start(Ema(decay=0.9), list(range(1, updates + 1)))
    assert found == pytest.approx(share, rel=0.06)


@pytest.mark.parametrize(
    ("last", "share"), [(7, 0.471), (15, 0.301), (39, 0.140), (79, 0.071), (159, 0.025)]
)
def test_an_average_in_every_eighth_update_forgets_the_start_as_in_flow_grpo(last, share):
    """At the updates at which the released code follows."""
    updates = list(range(7, last + 1, 8))
    assert share_of_the_start(Ema(decay=0.9), updates) == pytest.approx(share, abs=6e-4)


@pytest.mark.parametrize(("decay", "last"), [(0.9, 79), (0.99, 889)])
def test_the_warm_up_ends_at_the_decay(decay, last):
    ema = Ema(decay=decay)
    assert ema.decay_at(last) < decay
    assert [ema.decay_at(n) for n in (last + 1, 10 * last)] == [decay, decay]


def test_an_average_follows_at_multiples_of_every_and_counts_all_updates():
    ema = Ema(decay=0.9, every=8)
    assert [ema.decay_at(n) for n in (1, 7, 8, 9, 16)] == [1, 1, 9 / 18, 1, 17 / 26]
    assert [Ema(decay=0.9, warmup=False).decay_at(n) for n in (1, 100)] == [0.9, 0.9]


def test_after_one_update_two_elevenths_of_the_start_remain():
    policy = make_policy(snapshots=["old", "ema"])
    optimizer = make_optimizer(policy, Train(learning_rate=1e-2, weight_decay=0.0))
    start = [parameter.clone() for parameter in policy.parameters()]
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    scorer = RolloutScorer([], WeightedSum(), lambda table, group: group, 1, torch.device("cpu"))
    apply_update(TrainState(policy, optimizer, scorer), NFT(), Train(ema=Ema(decay=0.99)))
    rows = zip(start, policy.parameters(), policy.parameters("ema"), strict=True)
    for before, now, average in rows:
        assert not torch.equal(before, now)
        assert_close(average, before * 2 / 11 + now * 9 / 11)
    # NFT's copy follows at the end of a step, not of an update.
    assert all(torch.equal(a, b) for a, b in zip(start, policy.parameters("old"), strict=True))


def test_the_copies_of_crd_follow_as_its_table_says():
    """At the ends of steps 0, 1 and 49 of two updates each."""
    ends = [2 * (step + 1) for step in (0, 1, 49)]
    assert [CRD().old(n) for n in ends] == pytest.approx([0.26, 0.27, 0.75])
    assert [CRD().sampler(n) for n in ends] == pytest.approx([0, 0, 0.1875])
    assert CRD().sampler(76) == pytest.approx(0.0075)
