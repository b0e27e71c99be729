"""Objectives that imitate given pictures, where the best velocity is known."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from flowalign.batch import Cond, Examples
from flowalign.errors import UserError
from flowalign.flow import add_noise, over_latent
from flowalign.objectives.draws import Draw, ForwardTimes
from flowalign.objectives.sft import SFT
from flowalign.objectives.soar import SOAR
from tests.objectives.toy import examples_of, minimiser, normal, random, VelocityPolicy

MEAN, STD = 1.5, 0.5


def even_case(t: float) -> tuple[Examples, Draw]:
    """Pictures MEAN ± STD with noise ±1, each with each: sums over them are expectations."""
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    return examples_of(MEAN + STD * signs[:, :1]), Draw(0, torch.full((4,), t), signs[:, 1:])


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_sft_ends_at_the_mean_of_the_data(t):
    """Among the velocities of N(m, STD²)."""
    examples, draw = even_case(t)
    still = torch.zeros(1)
    found = minimiser(
        lambda mean: SFT().loss(VelocityPolicy(normal, mean, still), examples, draw).total, still
    )
    assert found.item() == pytest.approx(MEAN, abs=1e-4)


def test_sft_s_loss_is_the_mean_square_of_what_is_left():
    examples, draw = even_case(0.4)
    zero = VelocityPolicy(lambda x, t, theta: 0 * x, torch.zeros(1), torch.zeros(1))
    loss = SFT().loss(zero, examples, draw)
    assert_close(loss.stats["error"].values, ((draw.noise - examples.x0) ** 2).flatten())
    assert loss.total.item() == pytest.approx(MEAN**2 + STD**2 + 1)


def soar_case(t: float = 0.6, count: int = 3) -> tuple[Examples, Draw]:
    return examples_of(random(count, 2, 4)), Draw(
        0, torch.full((count,), t), random(count, 2, 4, seed=1)
    )


def straight(examples: Examples, draw: Draw, off: float = 0.0) -> VelocityPolicy:
    """The velocity straight to the pictures, and a number."""
    return VelocityPolicy(
        lambda x, t, theta: draw.noise - examples.x0 + theta, torch.tensor([off]), torch.zeros(1)
    )


@pytest.mark.parametrize("off", [0.0, 0.4])
def test_a_correction_is_the_target_less_what_the_step_erred(off):
    """v_corr = (noise - x0) + (1 - α) (s - t) δ / s': plain flow matching where δ is 0."""
    examples, draw = soar_case()
    s, s_next = torch.tensor([0.5, 0.3, 0.0]), torch.tensor([0.8, 0.3, 0.2])
    x = add_noise(examples.x0, draw.t, draw.noise)[0] + over_latent(s - draw.t, examples.x0) * (
        draw.noise - examples.x0 + off
    )
    _, target = SOAR.correction(x, s, s_next, examples.x0, draw.noise)
    alpha = (s_next - s) / (1 - s)
    expected = draw.noise - examples.x0 + over_latent((1 - alpha) * (s - draw.t) * off / s_next, x)
    assert_close(target, expected, atol=1e-5, rtol=1e-5)


def test_a_corrected_velocity_lands_on_the_picture():
    examples, draw = soar_case()
    s, s_next = torch.tensor([0.5, 0.3, 0.0]), torch.tensor([0.8, 0.3, 0.2])
    xs, target = SOAR.correction(random(3, 2, 4, seed=2), s, s_next, examples.x0, draw.noise)
    assert_close(xs - over_latent(s_next, xs) * target, examples.x0, atol=1e-6, rtol=1e-5)


def test_soar_is_plain_flow_matching_where_the_step_does_not_err():
    """Both losses vanish at the straight velocity and grow as the square of an offset."""
    examples, draw = soar_case()
    loss = SOAR().loss(straight(examples, draw), examples, draw)
    assert loss.total.item() == pytest.approx(0, abs=1e-10)
    assert loss.stats["error/corrected"].values.max() < 1e-10


@pytest.mark.parametrize(("weight", "points"), [(1.0, 6), (0.5, 2), (0.0, 3)])
def test_soar_s_loss_is_a_weighted_mean_over_its_terms(weight, points):
    examples, draw = soar_case()
    loss = SOAR(weight=weight, points=points).loss(straight(examples, draw, 0.4), examples, draw)
    error, corrected = loss.stats["error"].values, loss.stats["error/corrected"].values
    assert_close(error, torch.full((3,), 0.16))
    assert_close(loss.total, ((error + weight * points * corrected) / (1 + weight * points)).mean())


def test_soar_s_corrections_are_what_the_identity_says():
    """δ too much in a step from t = 0.6 to s = 0.5: δ (1 + (1 - α) (t - s) / s') too much at s'."""
    examples, draw = soar_case()
    objective = SOAR(sampling_steps=10, points=1, guidance=1.0)
    loss = objective.loss(straight(examples, draw, 0.4), examples, draw)
    s_next = 0.5 + 0.5 * examples.uniform("point", 0)
    alpha = (s_next - 0.5) / 0.5
    assert_close(
        loss.stats["error/corrected"].values,
        (0.4 * (1 + (1 - alpha) * 0.1 / s_next)) ** 2,
        rtol=1e-4,
        atol=1e-6,
    )


def test_the_step_that_errs_carries_no_gradient():
    """θ is asked for once in x_t and once in each point; through x' it would be asked for again."""
    examples, draw = soar_case()
    theta = torch.tensor([0.4], requires_grad=True)
    policy = replace(straight(examples, draw), theta=theta)
    objective = SOAR(sampling_steps=10, points=1, guidance=1.0)
    (found,) = torch.autograd.grad(objective.loss(policy, examples, draw).total, theta)
    s_next = 0.5 + 0.5 * examples.uniform("point", 0)
    wrong = 0.4 * (1 + (1 - (s_next - 0.5) / 0.5) * 0.1 / s_next)
    assert_close(found, (2 * (0.4 + wrong.mean()) / 2)[None], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("shift", "t", "s"), [(1.0, 0.6, 0.35), (1.0, 0.2, 0.0), (3.0, 0.75, 0.5), (3.0, 1.0, 0.9)]
)
def test_one_step_later_is_on_the_shifted_schedule(shift, t, s):
    """A quarter of the unshifted schedule; t = 3 u / (1 + 2 u) takes ½ to 0.75 and ¼ to 0.5."""
    found = SOAR(sampling_steps=4, times=ForwardTimes(shift=shift)).next_time(torch.tensor([t]))
    assert found.item() == pytest.approx(s, abs=1e-6)


def test_points_differ_between_themselves_and_between_draws():
    seen: list[Tensor] = []

    def field(x: Tensor, t: Tensor, theta: Tensor) -> Tensor:
        seen.append(t.flatten())
        return 0 * x

    examples = examples_of(random(2, 4))
    objective = SOAR(points=2, times=ForwardTimes(count=2))
    for draw in objective.draws(examples):
        objective.loss(VelocityPolicy(field, torch.zeros(1), torch.zeros(1)), examples, draw)
    points = [seen[i] for i in (2, 3, 6, 7)]
    assert len({tuple(t.tolist()) for t in points}) == 4
    for (s,), point in zip([(objective.next_time(seen[0]),)] * 2, points[:2], strict=True):
        assert ((point >= s) & (point < 1)).all()


@pytest.mark.parametrize(
    "settings", [{"guidance": 0.5}, {"sampling_steps": 0}, {"points": 0}, {"weight": -1.0}]
)
def test_settings_of_soar_that_mean_nothing_are_refused(settings):
    with pytest.raises(UserError, match="must be"):
        SOAR(**settings)


def test_only_the_step_that_errs_is_guided():
    seen = []

    class Recording(VelocityPolicy):
        def velocity(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            seen.append(cond.guidance)
            return super().velocity(x, t, cond)

    examples, draw = soar_case()
    SOAR(points=2, guidance=4.5).loss(
        Recording(normal, torch.zeros(1), torch.zeros(1)), examples, draw
    )
    assert seen == [1.0, 4.5, 1.0, 1.0]
