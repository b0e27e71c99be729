"""Adapters, snapshots, and the sampler that training re-evaluates."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from flowalign.config.load import load_config
from flowalign.dynamics import cps, dance_sde, ddim, flow_sde, Window
from flowalign.errors import UserError
from flowalign.models import load_model
from flowalign.objectives.flow_grpo import FlowGRPO
from flowalign.policy import Decay, Policy, Sampler
from flowalign.rollouts.collect import collect
from flowalign.training.gradient import compute_gradient, Meter
from tests.tiny import kept_storages, make_policy, sd3_config, stir, TEXTS, two_groups

STOCHASTIC = [flow_sde, dance_sde, cps, ddim]


def velocity(policy: Policy) -> torch.Tensor:
    x = torch.randn(2, *policy.model.latent_shape, generator=torch.Generator().manual_seed(0))
    return policy.velocity(x, torch.tensor([0.4, 0.9]), policy.encode(TEXTS))


@pytest.mark.parametrize("dynamics", STOCHASTIC)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_every_ratio_is_exactly_one_before_the_first_update(dynamics, guidance):
    policy = make_policy(Sampler(steps=4, dynamics=dynamics, guidance=guidance))
    stir(policy)
    rollout = collect(policy.at("policy"), two_groups(policy), images_per_pass=6)
    assert list(rollout.steps) == [0, 1, 2]
    for k in rollout.steps:
        before, after, log_prob = rollout.transition(k)
        assert torch.equal(policy.step(before, k, rollout.cond).log_prob(after), log_prob)


def test_ratios_stay_one_within_a_millionth_when_passes_are_smaller():
    policy = make_policy(Sampler(steps=4, dynamics=flow_sde))
    stir(policy)
    rollout = collect(policy.at("policy"), two_groups(policy), images_per_pass=6)
    for piece in rollout.pieces(2):
        for k in rollout.steps:
            before, after, log_prob = piece.transition(k)
            again = policy.step(before, k, piece.cond).log_prob(after)
            assert (again - log_prob).abs().max() <= 1e-6


def test_adapters_off_is_the_base_model_bit_for_bit():
    policy = make_policy()
    base = load_model(sd3_config())
    stir(policy)
    x = torch.randn(2, *base.latent_shape, generator=torch.Generator().manual_seed(0))
    bare = base.velocity(x, torch.tensor([0.4, 0.9]), base.encode(TEXTS))
    assert torch.equal(velocity(policy.at("reference")), bare)
    assert not torch.equal(velocity(policy), bare)


def test_a_new_adapter_changes_nothing():
    policy = make_policy()
    assert torch.equal(velocity(policy), velocity(policy.at("reference")))


def test_a_view_has_no_gradient_and_leaves_the_policy_active():
    policy = make_policy(snapshots=["old"])
    stir(policy)
    v = velocity(policy)
    for name in ("old", "reference", "policy"):
        assert not velocity(policy.at(name)).requires_grad
    assert torch.equal(velocity(policy), v)
    v.square().mean().backward()
    assert all(p.grad is not None for p in policy.parameters())


def test_a_view_that_fails_leaves_the_policy_active():
    policy = make_policy()
    stir(policy)
    v = velocity(policy)
    with pytest.raises(ValueError, match="unpack"):
        policy.at("reference").velocity(torch.zeros(1), torch.zeros(1), policy.encode(TEXTS))
    assert torch.equal(velocity(policy), v)


def test_only_the_policy_s_adapter_trains():
    policy = make_policy(snapshots=["old", "ema"])
    trained = {id(p) for p in policy.parameters()}
    assert {id(p) for p in policy.model.transformer.parameters() if p.requires_grad} == trained
    assert len(trained) == len(policy.parameters("old")) == len(policy.parameters("ema"))
    assert not trained & {id(p) for p in policy.parameters("old")}


def test_every_trained_matrix_that_reaches_the_output_receives_a_gradient():
    """SD3's last block drops its text stream, so the text queries there reach nothing."""
    policy = make_policy()
    stir(policy)
    velocity(policy).square().mean().backward()
    trained = {
        name: p for name, p in policy.model.transformer.named_parameters() if p.requires_grad
    }
    idle = {
        name.split(".lora_")[0]
        for name, p in trained.items()
        if p.grad is None or not p.grad.abs().sum() > 0
    }
    assert idle == {"transformer_blocks.4.attn.add_q_proj"}


def test_snapshots_start_as_the_policy_and_follow_it():
    policy = make_policy(snapshots=["old"])
    start = [p.clone() for p in policy.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(start, policy.parameters("old"), strict=True))
    stir(policy)
    policy.update_copy("old", 0.75)
    for before, now, old in zip(start, policy.parameters(), policy.parameters("old"), strict=True):
        assert_close(old, 0.75 * before + 0.25 * now)
    policy.update_copy("old", 0.0)
    assert torch.equal(velocity(policy.at("old")), velocity(policy))


def test_a_decay_is_a_function_of_the_updates():
    assert [Decay(slope=0.001, end=0.5)(n) for n in (0, 100, 1000)] == [0.0, 0.1, 0.5]
    late = Decay(start=75, slope=0.0075, end=0.999)
    assert [late(n) for n in (0, 74, 75, 1_000_000)] == [0.0, 0.0, 0.0, 0.999]
    assert [Decay(value=0.25, slope=0.005, end=0.999)(n) for n in (0, 100, 1000)] == [
        0.25,
        0.75,
        0.999,
    ]
    assert late(100) == pytest.approx(0.1875)
    assert [Decay(value=0.9, every=8)(n) for n in (7, 8, 9)] == [1.0, 0.9, 1.0]


def test_targets_that_match_no_layer_are_answered_with_those_there_are():
    config = sd3_config()
    config.lora.targets = ["attn.to_qq"]
    with pytest.raises(UserError, match=r"ends with 'attn.to_qq'.*attn.to_q\b|to_q"):
        Policy(load_model(config), Sampler())


def test_the_gradient_and_the_loss_are_the_same_in_passes_of_any_size():
    gradients, losses = [], []
    for images_per_pass in (6, 4, 2):
        policy = make_policy(Sampler(steps=4, dynamics=flow_sde))
        stir(policy)
        rollout = collect(policy.at("policy"), two_groups(policy), images_per_pass=6)
        rollout.advantage = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0])
        compute_gradient(
            policy, FlowGRPO(kl_weight=0.1), rollout, images_per_pass, meter := Meter()
        )
        losses.append(meter.values()["loss"])
        gradients.append(
            torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
        )
    for gradient, loss in zip(gradients[1:], losses[1:], strict=True):
        assert (gradients[0] - gradient).norm() <= 1e-5 * gradients[0].norm()
        assert loss == pytest.approx(losses[0], rel=1e-5)


def test_images_depend_on_their_keys_and_not_on_their_company():
    policy = make_policy(Sampler(steps=3, dynamics=flow_sde))
    batch = two_groups(policy)
    whole, part = (
        collect(policy.at("policy"), batch, 6),
        collect(policy.at("policy"), batch[2:4], 2),
    )
    assert_close(whole.path[2:4], part.path, atol=1e-5, rtol=1e-5)
    assert_close(whole.x0[2:4], part.x0, atol=1e-5, rtol=1e-5)
    assert (whole.path[0] - whole.path[1]).abs().max() > 0.1


def test_the_evaluation_samples_by_the_ode(tmp_path):
    config = load_config("configs/tiny/flow_grpo.yaml", ["evaluation.sampler.steps=20"])
    assert config.evaluation_sampler.steps == 20
    assert list(config.evaluation_sampler.stochastic_steps(0, 0)) == []
    assert config.sampler.steps == 8


def test_the_same_noise_within_a_group_leaves_only_the_stochastic_steps():
    policy = make_policy(Sampler(steps=3, dynamics=flow_sde, same_noise=True))
    path = collect(policy.at("policy"), two_groups(policy), images_per_pass=6).path
    assert torch.equal(path[0, 0], path[2, 0])
    assert not torch.equal(path[0, 0], path[3, 0])
    assert not torch.equal(path[0, 1], path[2, 1])


@pytest.mark.parametrize("window", [Window(), Window(size=1)])
def test_an_unrolled_path_is_the_one_that_is_sampled(window):
    policy = make_policy(Sampler(steps=4, dynamics=flow_sde, window=window))
    stir(policy)
    prompts = two_groups(policy)
    rollout = collect(policy.at("policy"), prompts, images_per_pass=6)
    x = policy.initial_noise(prompts)
    for k in range(4):
        before, (x, v) = x, policy.unroll_step(x, prompts, k)
        if k in rollout.steps:
            assert torch.equal(before, rollout.transition(k).before)
            assert torch.equal(x, rollout.transition(k).after)
    assert x.requires_grad
    assert v.requires_grad
    unrolled = policy.unroll(policy.initial_noise(prompts), prompts, range(4))
    assert torch.equal(unrolled, rollout.x0)


def test_only_the_window_is_stochastic():
    policy = make_policy(Sampler(steps=5, dynamics=flow_sde, window=Window(size=2, range=(1, 4))))
    rollout = collect(policy.at("policy"), two_groups(policy), images_per_pass=6)
    assert len(rollout.steps) == 2
    assert set(rollout.steps) <= {1, 2, 3}
    x = policy.initial_noise(rollout)
    for k in range(5):
        deterministic = policy.at("policy").step(x, k, rollout.cond, stochastic=False).mean
        x = rollout.transition(k).after if k in rollout.steps else deterministic
        assert torch.equal(x, deterministic) == (k not in rollout.steps)
    assert torch.equal(x, rollout.x0)


@pytest.mark.parametrize(("window", "kept"), [(Window(), 5), (Window(size=2, range=(1, 4)), 3)])
def test_only_latents_around_stochastic_steps_are_kept(window, kept):
    policy = make_policy(Sampler(steps=5, dynamics=flow_sde, window=window))
    rollout = collect(policy.at("policy"), two_groups(policy), images_per_pass=6)
    assert rollout.path.shape[:2] == (6, kept)
    assert rollout.log_prob.shape == (6, kept - 1)
    for tensor in (rollout.path, rollout.x0):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    ode = policy.sampling(Sampler(steps=5))
    assert collect(ode.at("policy"), two_groups(policy), 6).path.shape[:2] == (6, 0)


def test_float16_gradients_are_scaled_back():
    policy = make_policy(Sampler(steps=4, dynamics=flow_sde))
    half = make_policy(Sampler(steps=4, dynamics=flow_sde), dtype="float16")
    assert policy.loss_scale(4) == 1
    assert half.loss_scale(4) == 512 * 4
    gradients = []
    for one in (policy, half):
        stir(one)
        rollout = collect(one.at("policy"), two_groups(one), images_per_pass=6)
        rollout.advantage = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0])
        compute_gradient(one, FlowGRPO(), rollout, 6, Meter())
        gradients.append(
            torch.cat([p.grad.flatten() for p in one.parameters() if p.grad is not None])
        )
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


@pytest.mark.parametrize("null_gradient", [True, False])
def test_every_ratio_is_one_whether_or_not_the_empty_prompt_has_a_gradient(null_gradient):
    policy = make_policy(Sampler(steps=3, dynamics=flow_sde, guidance=3.0))
    stir(policy)
    batch = two_groups(policy)
    batch = replace(batch, cond=replace(batch.cond, null_gradient=null_gradient))
    rollout = collect(policy.at("policy"), batch, images_per_pass=6)
    for k in rollout.steps:
        before, after, log_prob = rollout.transition(k)
        assert torch.equal(policy.step(before, k, rollout.cond).log_prob(after), log_prob)


def test_without_its_gradient_the_empty_prompt_is_a_constant_and_half_is_kept():
    """∇ of v_null + w (v - v_null) with v_null detached, as in Flow-GRPO's released code."""
    policy = make_policy()
    stir(policy)
    x = torch.randn(2, *policy.model.latent_shape, generator=torch.Generator().manual_seed(0))
    t, cond = torch.tensor([0.4, 0.9]), policy.encode(TEXTS).guided(4.5)
    v_null = policy.model.forward(x, t, cond.null).detach()
    v = policy.model.forward(x, t, cond.inputs)
    detached = gradient_of(policy, v_null + 4.5 * (v - v_null))
    kept, gradients = {}, {}
    for null_gradient in (True, False):
        with kept_storages(policy.model.transformer.parameters()) as storages:
            v = policy.velocity(x, t, replace(cond, null_gradient=null_gradient))
        kept[null_gradient] = sum(storages.values())
        gradients[null_gradient] = gradient_of(policy, v)
    assert torch.equal(gradients[False], detached)
    assert 0.45 < kept[False] / kept[True] < 0.55
    cosine = torch.cosine_similarity(gradients[True], detached, dim=0)
    assert 0.1 < cosine < 0.95


def gradient_of(policy: Policy, v: torch.Tensor) -> torch.Tensor:
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(v.square().mean(), policy.parameters())]
    )
