"""Rewards through the sampler: gradients against closed forms and finite differences; memory."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.models.normalization import RMSNorm
from torch import nn, Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextModelWithProjection

from flowalign.advantages import group_advantage
from flowalign.batch import DifferentiableReward, Keys, Metadata, Prompts
from flowalign.data.prompts import Prompt
from flowalign.dynamics import ddim, flow_sde, ode
from flowalign.errors import RunError, UserError
from flowalign.models.config import Lora
from flowalign.models.sd3 import SD3, SD3Config
from flowalign.objectives.alignprop import AlignProp
from flowalign.objectives.base import Objective
from flowalign.objectives.draft_lv import DRaFTLV
from flowalign.objectives.refl import ReFL
from flowalign.objectives.terms import VelocityKL
from flowalign.policy import Policy, Sampler
from flowalign.rewards.base import Reward
from flowalign.rewards.combine import WeightedSum
from flowalign.rewards.pixel_statistics import brightness, jpeg_size
from flowalign.rollouts.batch_plan import BatchPlan
from flowalign.rollouts.ranking_settings import Ranking
from flowalign.rollouts.scoring import RolloutScorer
from flowalign.rollouts.sources import differentiable_prompts, SourceContext
from flowalign.rollouts.voted import VotedPictures
from flowalign.training.gradient import compute_gradient, Meter
from tests.objectives.toy import DoublePolicy, labels, number_policy, NumberModel
from tests.tiny import make_policy, random_clip, ROOT, sd3_config, stir, TEXTS, two_groups

STEPS, THETA = 8, 0.3
H = -1 / STEPS


def of_pictures(function: Callable[[Tensor], Tensor]) -> DifferentiableReward:
    """A reward that asks for nothing but the pictures."""

    def reward(
        images: Tensor, prompts: list[str], metadata: list[Metadata]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        scores = function(images)
        return scores, {"function": scores}

    return reward


# a number: v = θ x and the reward is what the sampler ends at


def numbers(count: int = 3) -> Prompts:
    return Prompts(**labels(count), reward=of_pictures(lambda images: images.flatten()))


def slope(objective: Objective, policy: Policy, prompts: Prompts) -> float:
    """Of the mean reward with regard to θ."""
    compute_gradient(policy, objective, prompts, len(prompts), Meter())
    return -policy.parameters()[1].grad.item()


def start(policy: Policy, prompts: Prompts) -> float:
    """Of 1 at the start, gradients are multiples of this."""
    return policy.initial_noise(prompts).mean().item()


def powers(count: int) -> float:
    return (1 + H * THETA) ** count


@pytest.mark.parametrize(("depth", "steps"), [(8, 8), (20, 8), (3, 3), (1, 1)])
def test_the_gradient_through_the_last_steps_is_the_analytic_one(depth, steps):
    """∂x_N/∂θ through n steps = n h x_N / (1 + h θ)."""
    policy, prompts = number_policy(THETA, STEPS), numbers()
    expected = start(policy, prompts) * powers(8) * steps * H / (1 + H * THETA)
    assert slope(AlignProp(depth=depth), policy, prompts) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("depth", "published"), [(8, -1.3009305), (3, -0.4878489)])
def test_the_analytic_gradients_are_the_published_figures(depth, published):
    assert 1.7 * powers(8) * depth * H / (1 + H * THETA) == pytest.approx(published, abs=1e-7)


def test_refl_s_gradient_is_that_of_the_one_step_prediction():
    """-t_5 x_5; -0.5266037 for a start at 1.7."""
    policy, prompts = number_policy(THETA, STEPS), numbers()
    assert -0.375 * 1.7 * powers(5) == pytest.approx(-0.5266037, abs=1e-7)
    found = slope(ReFL(low=5 / 8, high=5 / 8), policy, prompts)
    assert found == pytest.approx(-0.375 * start(policy, prompts) * powers(5), rel=1e-9)


@pytest.mark.parametrize(("enough", "share"), [(math.inf, 1.0), (-100.0, 0.0)])
def test_an_image_that_is_good_enough_gives_no_gradient(enough, share):
    found = slope(ReFL(enough=enough), number_policy(THETA, STEPS), numbers())
    assert (found != 0) == bool(share)


@pytest.mark.parametrize(("step", "t"), [(-1, 1 / 8), (-3, 3 / 8)])
def test_draft_lv_s_gradient_is_the_mean_over_fresh_noise(step, t):
    """-t x_t with x_t = (1 - t) x_N + t noise."""
    policy, prompts = number_policy(THETA, STEPS), numbers()
    noise = [prompts.noise("copy", copy, (1, 1, 1)).mean().item() for copy in range(4)]
    expected = [-t * ((1 - t) * start(policy, prompts) * powers(8) + t * z) for z in noise]
    assert slope(DRaFTLV(copies=4, step=step), policy, prompts) == pytest.approx(
        sum(expected) / 4, rel=1e-6
    )


def test_a_whole_run_of_steps_has_the_gradient_of_finite_differences():
    prompts, h = numbers(), 1e-5
    ends = [slope_free_reward(THETA + sign * h, prompts) for sign in (1, -1)]
    assert slope(AlignProp(depth=STEPS), number_policy(THETA, STEPS), prompts) == pytest.approx(
        (ends[0] - ends[1]) / (2 * h), rel=1e-8
    )


def slope_free_reward(theta: float, prompts: Prompts) -> float:
    policy = number_policy(theta, STEPS)
    return (
        policy.at("policy")
        .unroll(policy.initial_noise(prompts), prompts, range(STEPS))
        .mean()
        .item()
    )


# the first step with gradient


def of_step(step: int, count: int = 4) -> Prompts:
    prompts = numbers(count)
    return replace(prompts, keys=Keys.training(0, step, [(i, 0) for i in range(count)]))


DRAWS = [
    AlignProp().first_step,
    AlignProp(distribution="uniform", start=0.0).first_step,
    ReFL().late_step,
]


@pytest.mark.parametrize("draw", DRAWS)
def test_every_pass_draws_its_own_first_step_with_gradient(draw):
    """By the released code, each micro-batch draws; one draw for all would be one step."""
    passes = of_step(7, 40).pieces(4)
    assert len({draw(20, one) for one in passes}) >= 3
    assert [draw(20, one) for one in passes] == [draw(20, one) for one in passes]
    assert len({draw(20, of_step(step)) for step in range(50)}) > 3
    other_seed = replace(of_step(7, 40), keys=Keys.training(1, 7, [(i, 0) for i in range(40)]))
    assert [draw(20, one) for one in other_seed.pieces(4)] != [draw(20, one) for one in passes]


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("processes", [2, 4])
def test_a_draw_does_not_depend_on_the_number_of_processes(draw, processes):
    def drawn(count: int) -> dict[int, int]:
        """The draw of each pass, by its first prompt."""
        plan = BatchPlan(
            prompts_per_step=32,
            images_per_prompt=1,
            updates_per_step=2,
            max_images_per_pass=4,
            processes=count,
        )
        draws = {}
        for rank in range(count):
            slots = plan.slots(rank)
            keys = Keys.training(0, 7, [(slot, 0) for slot in slots])
            for one in replace(numbers(len(slots)), keys=keys).pieces(plan.images_per_pass):
                draws[int(one.group[0])] = draw(20, one)
        return draws

    assert len(drawn(1)) == 8
    assert drawn(processes) == drawn(1)


def law(steps: int = 50, **settings: Any) -> list[float]:
    """The probability of each step to be the first with gradient."""
    weights = AlignProp(**settings).start_weights(steps)
    return [weight / sum(weights) for weight in weights]


def mean_depth(probabilities: list[float]) -> float:
    """The mean number of steps with gradient."""
    return sum((len(probabilities) - k) * p for k, p in enumerate(probabilities))


def test_the_gaussian_start_has_the_released_code_s_law():
    """int(N(42, 5)) of 50 steps, drawn again until 1 ≤ b < 50."""
    found = law(start=0.84, spread=0.1)
    assert mean_depth(found) == pytest.approx(9.09, abs=0.005)
    assert sum(found[:36]) == pytest.approx(0.12, abs=0.005)
    assert sum(found[:26]) == pytest.approx(7e-4, abs=5e-5)
    generator, draws = torch.Generator().manual_seed(0), []
    while len(draws) < 20_000:
        start = int(42 + 5 * torch.randn(1, generator=generator).item())
        draws += [start] if 1 <= start < 50 else []
    seen = [draws.count(k) / len(draws) for k in range(50)]
    assert max(abs(a - b) for a, b in zip(found, seen, strict=True)) < 0.01


@pytest.mark.parametrize(("steps", "depth"), [(50, 9.09), (20, 3.94), (8, 1.89)])
def test_the_share_of_steps_with_gradient_grows_as_steps_get_fewer(steps, depth):
    """The fraction of a draw is cut off, which is half a step however few there are."""
    assert mean_depth(law(steps)) == pytest.approx(depth, abs=0.005)


def test_the_uniform_start_has_the_released_code_s_law():
    """U{0..49}, drawn again if 0; and U{30..49}, as it was for some hours."""
    found, late = (law(distribution="uniform", start=start) for start in (0.0, 0.6))
    assert found == [0.0, *[1 / 49] * 49]
    assert mean_depth(found) == pytest.approx(25)
    assert late == [*[0.0] * 30, *[1 / 20] * 20]
    assert mean_depth(late) == pytest.approx(10.5)


def test_the_fixed_start_is_one_step():
    found = AlignProp(distribution="fixed", start=0.98)
    assert {found.first_step(50, one) for one in of_step(7).pieces(1)} == {49}
    assert AlignProp(distribution="fixed", start=0.0).first_step(50, of_step(7)) == 0


def test_starts_are_drawn_by_their_law():
    objective = AlignProp(start=0.84, spread=0.1)
    drawn = [objective.first_step(50, of_step(step, 1)) for step in range(3000)]
    assert 50 - sum(drawn) / len(drawn) == pytest.approx(9.09, abs=0.3)
    assert (min(drawn) >= 1, max(drawn)) == (True, 49)


def test_the_mean_over_all_starts_is_the_published_figure():
    """-0.65047 with deviation 0.420 over starts 0 to 8, the last of which has no gradient."""
    prompts = numbers()
    starts = [AlignProp(distribution="fixed", start=b / 8) for b in range(8)]
    slopes = [slope(one, number_policy(THETA, STEPS), prompts) for one in starts]
    scaled = torch.tensor([*slopes, 0.0]) * 1.7 / start(number_policy(THETA, STEPS), prompts)
    assert scaled.mean().item() == pytest.approx(-0.65047, abs=1e-5)
    assert scaled.std(correction=0).item() == pytest.approx(0.420, abs=5e-4)


@pytest.mark.parametrize("distribution", ["gaussian", "uniform", "fixed"])
def test_a_single_step_carries_the_gradient(distribution):
    assert AlignProp(distribution=distribution).first_step(1, of_step(7)) == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"distribution": "fixed", "start": 1.0},
        {"distribution": "uniform", "start": 1.0},
        {"start": 0.0, "spread": 1e-4},
    ],
)
def test_a_start_that_no_step_has_is_refused(settings):
    with pytest.raises(UserError, match=r"draws none of the sampler's 50 steps\. Write"):
        AlignProp(**settings).check(Sampler(steps=50))
    AlignProp().check(Sampler(steps=50))


# the anchor, and steps with noise


class ShiftModel(NumberModel):
    """v = θ, whatever x is."""

    def forward(self, x: Tensor, t: Tensor, inputs: Any) -> Tensor:
        return super().forward(torch.ones_like(x), t, inputs)


@pytest.mark.parametrize(("depth", "published"), [(8, -1.625), (3, -0.609375)])
def test_the_anchor_ends_where_the_closed_form_says(depth, published):
    """With reward c x_K and anchor λ θ² on M of K steps, θ* = -c M / (2 λ K)."""
    objective = AlignProp(depth=depth, kl=VelocityKL(weight=0.4))
    prompts = Prompts(**labels(3), reward=of_pictures(lambda images: 1.3 * images.flatten()))
    slopes = {}
    for theta in (published, published + 0.5):
        policy = number_policy(theta, STEPS, ShiftModel())
        slopes[theta] = slope(objective, policy, prompts)
    assert slopes[published] == pytest.approx(0, abs=1e-12)
    assert slopes[published + 0.5] == pytest.approx(-2 * 0.4 * 0.5, rel=1e-9)


def test_the_anchor_is_logged_and_is_0_at_the_start():
    policy = make_policy(Sampler(steps=3))
    objective = AlignProp(depth=2, kl=VelocityKL(weight=0.5))
    assert objective.loss(policy, bright_prompts(policy), None).stats["kl"].values.tolist() == [
        0,
        0,
    ]
    stir(policy)
    loss = objective.loss(policy, bright_prompts(policy), None)
    reward, kl = (loss.stats[name].values.mean() for name in ("reward/combined", "kl"))
    assert kl > 0
    assert_close(loss.total, 0.5 * kl - reward)


@pytest.mark.parametrize("dynamics", [flow_sde, ddim])
def test_the_gradient_through_steps_with_noise_is_that_of_finite_differences(dynamics):
    def policy_at(theta: float) -> Policy:
        policy = number_policy(theta, STEPS)
        policy.sampler.dynamics = dynamics
        return policy

    def end(theta: float) -> float:
        policy = policy_at(theta)
        x = policy.unroll(policy.initial_noise(prompts), prompts, range(STEPS))
        return x.mean().item()

    prompts, h = numbers(), 1e-5
    found = slope(AlignProp(depth=STEPS), policy_at(THETA), prompts)
    assert found == pytest.approx((end(THETA + h) - end(THETA - h)) / (2 * h), rel=1e-6)
    without_noise = slope(AlignProp(depth=STEPS), number_policy(THETA, STEPS), prompts)
    assert abs(found - without_noise) > 1e-3


@pytest.mark.parametrize("objective", [AlignProp(depth=1), ReFL(), DRaFTLV()])
def test_images_are_made_by_the_sampler_s_own_steps(objective):
    policy, totals = make_policy(Sampler(steps=3)), set()
    for dynamics in (ode, ddim):
        policy.sampler.dynamics = dynamics
        totals.add(objective.loss(policy, bright_prompts(policy), None).total.item())
    assert len(totals) == 2


@pytest.mark.parametrize(
    ("steps", "low", "high", "expected"),
    # Shares are rounded down: with 40 steps the released range, with 10 a little more.
    [
        (40, 0.75, 0.975, range(30, 40)),
        (10, 0.75, 0.975, range(7, 10)),
        (4, 0.75, 0.975, range(3, 4)),
        (1, 1, 1, range(1)),
    ],
)
def test_refl_s_step_is_drawn_evenly_late(steps, low, high, expected):
    assert {
        ReFL(low=low, high=high).late_step(steps, of_step(step, 1)) for step in range(300)
    } == set(expected)


# the tiny SD3


def double_policy(config: SD3Config, steps: int = 3) -> Policy:
    """A perturbed model in float64. torch's norm replaces diffusers', which is float32 inside."""
    torch.manual_seed(0)
    policy = DoublePolicy(SD3(config), Sampler(steps=steps, guidance=2.0))
    transformer = policy.model.transformer
    for name, norm in [
        (name, module)
        for name, module in transformer.named_modules()
        if isinstance(module, RMSNorm)
    ]:
        own = nn.RMSNorm(norm.dim, norm.eps).requires_grad_(False)
        own.weight.copy_(norm.weight)
        transformer.set_submodule(name, own)
    stir(policy)
    for module in (transformer, policy.model.vae):
        module.double()
    return policy


def contrast(images: Tensor) -> Tensor:
    """A smooth reward that sees every pixel differently."""
    weight = torch.linspace(-1, 1, images[0].numel(), dtype=images.dtype).view_as(images[0])
    return (images * weight + images**2).mean((1, 2, 3))


def sd3_without_norm(folder: Path) -> SD3Config:
    """SD3's classes with random weights, without the norm of queries and keys, which is float32."""
    torch.manual_seed(0)
    tokenizer, clip = random_clip()
    encoders = [CLIPTextModelWithProjection(clip).eval() for _ in range(2)]
    sizes = {"sample_size": 8, "in_channels": 8, "out_channels": 8, "pos_embed_max_size": 8}
    widths = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": 32,
        "caption_projection_dim": 32,
    }
    transformer = SD3Transformer2DModel(
        num_layers=2, pooled_projection_dim=32, qk_norm=None, **sizes, **widths
    )
    vae = AutoencoderKL.from_pretrained(ROOT / "assets" / "tiny-sd3" / "vae")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = (
        transformer,
        scheduler,
        vae,
        encoders[0],
        tokenizer,
        encoders[1],
        tokenizer,
        None,
        None,
    )
    StableDiffusion3Pipeline(*parts).save_pretrained(folder)
    return SD3Config(
        path=str(folder), height=64, width=64, max_sequence_length=0, lora=Lora(rank=2, alpha=6)
    )


def gradient_error(policy: Policy, h: float) -> float:
    """The largest error of a gradient's entries by finite differences, over the largest entry."""
    prompts, objective = (
        replace(two_groups(policy, 1), reward=of_pictures(contrast)),
        AlignProp(depth=policy.sampler.steps),
    )
    compute_gradient(policy, objective, prompts, 2, Meter())
    found, finite = [], []
    for parameter in policy.parameters()[:: len(policy.parameters()) // 5]:
        place = parameter.grad.abs().argmax()
        ends = {
            step: moved_loss(policy, objective, prompts, (parameter, place, step * h))
            for step in (-2, -1, 1, 2)
        }
        found.append(parameter.grad.view(-1)[place].item())
        finite.append((8 * (ends[1] - ends[-1]) - (ends[2] - ends[-2])) / (12 * h))
    assert min(map(abs, found[:-1])) > 1e-7
    return max(abs(a - b) for a, b in zip(found, finite, strict=True)) / max(map(abs, found))


@torch.no_grad()
def moved_loss(
    policy: Policy, objective: AlignProp, prompts: Prompts, move: tuple[Tensor, Tensor, float]
) -> float:
    """With one entry of a matrix moved by so much."""
    parameter, place, by = move
    before = parameter.view(-1)[place].clone()
    parameter.view(-1)[place] += by
    total = objective.loss(policy, prompts, None).total.item()
    parameter.view(-1)[place] = before
    return total


def test_the_tiny_sd3_s_gradient_is_that_of_finite_differences():
    assert gradient_error(double_policy(sd3_config()), h=3e-4) <= 1e-7


def test_a_random_sd3_s_gradient_is_that_of_finite_differences(tmp_path):
    assert gradient_error(double_policy(sd3_without_norm(tmp_path)), h=1e-3) <= 1e-7


def bright_prompts(policy: Policy, images: int = 1) -> Prompts:
    return replace(
        two_groups(policy, images), reward=of_pictures(lambda pictures: pictures.mean((1, 2, 3)))
    )


def lora_gradient(policy: Policy, objective: Objective, images_per_pass: int = 2) -> Tensor:
    for parameter in policy.parameters():
        parameter.grad = None
    compute_gradient(policy, objective, bright_prompts(policy), images_per_pass, Meter())
    return torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])


def test_recomputing_steps_changes_no_gradient():
    """Against plain Euler steps and decoding."""
    policy = make_policy(Sampler(steps=3, guidance=2.0))
    stir(policy)
    prompts = bright_prompts(policy)
    x = policy.initial_noise(prompts)
    for k in range(3):
        t, s = policy.times[k], policy.times[k + 1]
        x = x + (s - t) * policy.velocity(x, torch.full((2,), t), prompts.cond)
    plain = torch.autograd.grad(-policy.decode(x).mean(), policy.parameters(), allow_unused=True)
    plain = [
        torch.zeros_like(p) if g is None else g
        for p, g in zip(policy.parameters(), plain, strict=True)
    ]
    assert_close(
        lora_gradient(policy, AlignProp(depth=3)),
        torch.cat([g.flatten() for g in plain]),
        rtol=1e-4,
        atol=1e-8,
    )


def test_a_depth_of_all_steps_or_more_is_the_full_gradient():
    policy = make_policy(Sampler(steps=3))
    stir(policy)
    full = lora_gradient(policy, AlignProp(depth=3))
    assert torch.equal(lora_gradient(policy, AlignProp(depth=7)), full)
    assert (lora_gradient(policy, AlignProp(depth=1)) - full).norm() > 0.01 * full.norm()


def test_the_gradient_is_the_same_in_one_pass_and_in_many():
    policy = make_policy(Sampler(steps=3))
    stir(policy)
    one, many = (lora_gradient(policy, AlignProp(depth=2), size) for size in (2, 1))
    assert (one - many).norm() <= 1e-5 * one.norm()


@pytest.mark.parametrize("objective", [AlignProp(), ReFL(), DRaFTLV()])
def test_only_the_policy_s_matrices_receive_a_gradient(objective):
    policy = make_policy(Sampler(steps=3), snapshots=["ema"])
    stir(policy)
    compute_gradient(policy, objective, bright_prompts(policy), 2, Meter())
    trained = {id(parameter) for parameter in policy.parameters()}
    everything = [*policy.model.transformer.parameters(), *policy.model.vae.parameters()]
    assert {id(parameter) for parameter in everything if parameter.grad is not None} == trained
    assert sum(parameter.grad.abs().sum() for parameter in policy.parameters()) > 0


def test_rewards_are_logged_by_name():
    policy = make_policy(Sampler(steps=2))
    loss = AlignProp().loss(policy, bright_prompts(policy), None)
    assert set(loss.stats) == {"reward/function", "reward/combined"}
    assert loss.total.item() == pytest.approx(-loss.stats["reward/combined"].values.mean().item())


# memory


class Alive(TorchDispatchMode):
    """The most bytes of tensors made inside that were alive at once, the model's weights aside."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        weights = [*policy.model.transformer.parameters(), *policy.model.vae.parameters()]
        self.weights = {StorageWeakRef(weight.untyped_storage()) for weight in weights}
        self.sizes: dict[StorageWeakRef, int] = {}
        self.most = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for storage in [t.untyped_storage() for t in tree_leaves(result) if isinstance(t, Tensor)]:
            if (key := StorageWeakRef(storage)) not in self.weights:
                self.sizes[key] = storage.nbytes()
        if sum(self.sizes.values()) > self.most:
            self.sizes = {key: size for key, size in self.sizes.items() if not key.expired()}
            self.most = max(self.most, sum(self.sizes.values()))
        return result


def through_decoded_steps(steps: int) -> tuple[int, int]:
    """The bytes that a loss keeps for its backward pass, and the peak over both passes."""
    policy = make_policy(Sampler(steps=steps))
    prompts, kept = bright_prompts(policy), {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with Alive(policy) as alive:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = AlignProp(depth=steps).loss(policy, prompts, None)
        loss.total.backward()
    return sum(kept.values()), alive.most


def through_plain_steps(steps: int) -> int:
    """The most bytes alive where nothing is recomputed."""
    policy = make_policy(Sampler(steps=steps))
    prompts = two_groups(policy, 1)
    with Alive(policy) as alive:
        x = policy.initial_noise(prompts)
        for k in range(steps):
            x = policy.step(x, k, prompts.cond, stochastic=False).mean
        x.sum().backward()
    return alive.most


@pytest.mark.slow
def test_memory_does_not_grow_with_the_steps():
    """A step keeps its input alone; where nothing is recomputed, all that it computed."""
    (kept, most), (kept_of_ten, most_of_ten) = through_decoded_steps(2), through_decoded_steps(10)
    assert kept_of_ten - kept == 8 * 2 * 4 * math.prod((8, 8, 8))
    assert most_of_ten <= 1.1 * most
    assert through_plain_steps(4) > 1.7 * through_plain_steps(2)


# where the rewards come from


def test_a_reward_with_gradient_passes_it():
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    scores = Reward("brightness", brightness).with_gradient(images, ["", ""], [{}, {}])
    assert_close(torch.autograd.grad(scores.sum(), images)[0], torch.full_like(images, 1 / 192))


def test_a_reward_without_gradient_is_refused_by_name():
    images, reward = torch.rand(2, 3, 8, 8, requires_grad=True), Reward("jpeg_size", jpeg_size)
    with pytest.raises(RunError, match=r"rewards\.jpeg_size carries no gradient"):
        reward.with_gradient(images, ["", ""], [{}, {}])


def context(policy: Policy, rewards: list[Reward]) -> SourceContext:
    counts = BatchPlan(
        prompts_per_step=2, images_per_prompt=3, updates_per_step=1, max_images_per_pass=6
    )
    judge = RolloutScorer(rewards, WeightedSum(), group_advantage, 6, torch.device("cpu"))
    return SourceContext(
        policy=policy,
        scorer=judge,
        prompts=[Prompt(text) for text in TEXTS],
        examples=[],
        plan=counts,
        seed=0,
        sampling_weights="policy",
        steps=100,
        keeps_paths=True,
        null_gradient=True,
        ranking=Ranking(),
        voted=VotedPictures(policy, lambda _: policy.sampler, keeps_paths=True),
    )


def test_prompts_come_with_a_reward_that_is_differentiable_and_named():
    def redness(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        return images[:, 0].mean((1, 2))

    rewards = [Reward("brightness", brightness, 2.0), Reward("redness", redness, -1.0)]
    source = partial(differentiable_prompts, context(make_policy(), rewards))
    prompts, metrics = source(0)
    assert metrics == {}
    assert sorted(set(prompts.prompts)) == sorted(TEXTS)
    assert prompts.group.tolist() == [0, 0, 0, 1, 1, 1]
    images = torch.rand(6, 3, 8, 8, requires_grad=True)
    combined, scores = prompts[2:4].reward(images, prompts.prompts, prompts.metadata)
    assert_close(combined, 2 * images.mean((1, 2, 3)) - images[:, 0].mean((1, 2)))
    assert set(scores) == {"brightness", "redness"}
    assert combined.requires_grad
    assert torch.equal(source(0)[0].keys.table(), prompts.keys.table())
    assert not torch.equal(source(1)[0].keys.table(), prompts.keys.table())


def test_prompts_without_a_reward_say_so():
    policy = make_policy(Sampler(steps=2))
    with pytest.raises(RuntimeError, match="has no reward with a gradient"):
        AlignProp().loss(policy, two_groups(policy, 1), None)


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        (AlignProp, {"depth": -1}),
        (AlignProp, {"start": 1.5}),
        (AlignProp, {"spread": 0.0}),
        (AlignProp, {"distribution": "normal"}),
        (AlignProp, {"depth": 0.5}),
        (ReFL, {"low": 0.9, "high": 0.8}),
        (ReFL, {"high": 1.1}),
        (DRaFTLV, {"copies": 0}),
        (DRaFTLV, {"step": 0}),
    ],
)
def test_a_setting_that_means_nothing_is_refused(objective, settings):
    with pytest.raises(UserError, match=r"Write|must be|choose from"):
        objective(**settings)


def test_draft_lv_s_step_must_be_one_of_the_sampler_s():
    """Counted from the end further than there are steps, the time would be another one."""
    DRaFTLV(step=-2).check(Sampler(steps=2))
    with pytest.raises(UserError, match="step is -3, but"):
        DRaFTLV(step=-3).check(Sampler(steps=2))
