"""Sampling rollouts: which forwards are made, and what they lead to."""

import pytest
import torch
from torch.testing import assert_close

from flowalign.dynamics import flow_sde, Window
from flowalign.policy import Policy, Sampler
from flowalign.rollouts.collect import collect
from tests.tiny import make_policy, stir, two_groups

STEPS, START = 5, 2
WINDOW = Window(size=2, range=(START, START + 2))


def late_window(**settings) -> Policy:
    """A policy whose stochastic steps begin at step START."""
    policy = make_policy(Sampler(steps=STEPS, dynamics=flow_sde, window=WINDOW, **settings))
    stir(policy)
    return policy.at("policy")


def rows_of_forwards(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that every later forward adds its number of rows to."""
    rows, velocity = [], policy.model.velocity

    def counted(x, t, cond):
        rows.append(len(x))
        return velocity(x, t, cond)

    monkeypatch.setattr(policy.model, "velocity", counted)
    return rows


@pytest.mark.parametrize("images_per_pass", [6, 3, 2])
def test_steps_before_the_window_are_taken_once_for_each_prompt(images_per_pass, monkeypatch):
    """Also where a pass cuts the images of a prompt."""
    policy = late_window(same_noise=True)
    rows = rows_of_forwards(policy, monkeypatch)
    collect(policy, two_groups(policy), images_per_pass)
    before = [2] * START
    after = [images_per_pass] * ((STEPS - START) * 6 // images_per_pass)
    assert rows == before + after


def test_images_with_noise_of_their_own_share_no_step(monkeypatch):
    policy = late_window()
    rows = rows_of_forwards(policy, monkeypatch)
    collect(policy, two_groups(policy), images_per_pass=3)
    assert rows == [3] * 2 * STEPS


@pytest.mark.parametrize("images_per_pass", [6, 2])
def test_shared_steps_lead_to_the_pictures_of_the_full_computation(images_per_pass):
    policy = late_window(same_noise=True)
    batch = two_groups(policy)
    rollout = collect(policy, batch, images_per_pass)
    full = policy.generate(batch, steps=rollout.steps)
    # Forwards of 2 rows and of 6 round differently, and in nothing else.
    assert_close(rollout.x0, full.x0, atol=1e-5, rtol=1e-5)
    assert_close(rollout.path, full.x, atol=1e-5, rtol=1e-5)
    assert_close(rollout.log_prob, full.log_prob, atol=1e-5, rtol=1e-5)
    # In passes of equal rows they agree bit for bit.
    first = policy.generate(batch[[0, 3]], steps=rollout.steps)
    assert torch.equal(rollout.path[[0, 3], 0], first.x[:, 0])
    assert torch.equal(rollout.path[0, 0], rollout.path[2, 0])
    assert not torch.equal(rollout.path[0, 1], rollout.path[2, 1])


def test_one_image_for_each_prompt_is_that_of_the_full_computation_bit_for_bit():
    policy = late_window(same_noise=True)
    batch = two_groups(policy, images=1)
    rollout = collect(policy, batch, images_per_pass=2)
    full = policy.generate(batch, steps=rollout.steps)
    assert torch.equal(rollout.path, full.x)
    assert torch.equal(rollout.x0, full.x0)


def test_every_ratio_is_one_after_shared_steps():
    policy = late_window(same_noise=True, guidance=3.0)
    rollout = collect(policy, two_groups(policy), images_per_pass=6)
    assert list(rollout.steps) == [START, START + 1]
    for k in rollout.steps:
        before, after, log_prob = rollout.transition(k)
        assert torch.equal(policy.step(before, k, rollout.cond).log_prob(after), log_prob)
