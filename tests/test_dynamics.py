"""Sampler steps against closed forms: Gaussian data N(m, s²) has an affine velocity."""

import math
from collections import Counter
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.distributions import kl_divergence, Normal

from flowalign.dynamics import cps, dance_sde, ddim, flow_sde, Gaussian, is_stochastic, ode, Window
from flowalign.errors import UserError

MEAN, VARIANCE = 1.5, 0.25
STOCHASTIC = [flow_sde, dance_sde, cps, ddim]
MARGINAL_PRESERVING = [ode, flow_sde, dance_sde]


def shifted_times(steps: int, shift: float = 3.0) -> list[float]:
    base = [1 - k * (1 - 1 / steps) / (steps - 1) for k in range(steps)]
    return [shift * t / (1 + (shift - 1) * t) for t in base] + [0.0]


def velocity(x: torch.Tensor, t: float, variance: float = VARIANCE) -> torch.Tensor:
    """E[noise - x0 | x] for x0 ~ N(MEAN, variance)."""
    marginal = (1 - t) ** 2 * variance + t**2
    return (t - (1 - t) * variance) / marginal * (x - (1 - t) * MEAN) - MEAN


def score(x: torch.Tensor, t: float) -> torch.Tensor:
    return -(x - (1 - t) * MEAN) / ((1 - t) ** 2 * VARIANCE + t**2)


def marginals(dynamics, steps: int, variance: float = VARIANCE) -> list[tuple[float, float]]:
    """Mean and variance after every step, from N(0, 1): each step is x' = a x + b + std z."""
    times, found = shifted_times(steps), [(0.0, 1.0)]
    probe = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for t, s in pairwise(times):
        step = dynamics(probe, velocity(probe, t, variance), t, s)
        b, end = step.mean.flatten().tolist()
        mean, spread = found[-1]
        found.append(((end - b) * mean + b, (end - b) ** 2 * spread + step.std**2))
    return found


@pytest.mark.parametrize(
    ("dynamics", "variances"),
    [
        (ode, [0.1367, 0.2160, 0.2428, 0.2485]),
        (flow_sde, [0.1801, 0.2297, 0.2466, 0.2497]),
        (dance_sde, [0.1484, 0.2196, 0.2436, 0.2487]),
        (cps, [0.1073, 0.1534, 0.1725, 0.1787]),
        (ddim, [0.1090, 0.1859, 0.2325, 0.2461]),
    ],
)
def test_every_dynamics_ends_with_the_known_mean_and_variance(dynamics, variances):
    for steps, variance in zip([10, 40, 200, 1000], variances, strict=True):
        assert marginals(dynamics, steps)[-1] == (
            pytest.approx(MEAN, abs=1e-9),
            pytest.approx(variance, abs=1e-4),
        )


def test_flow_sde_with_an_ode_step_at_the_end_is_a_little_narrower():
    def last_step_ode(x, v, t, s):
        return (flow_sde if s else ode)(x, v, t, s)

    assert marginals(last_step_ode, 10)[-1] == (
        pytest.approx(MEAN),
        pytest.approx(0.1754, abs=1e-4),
    )


@pytest.mark.parametrize("dynamics", MARGINAL_PRESERVING)
def test_the_error_of_a_marginal_preserving_dynamics_falls_as_one_over_the_steps(dynamics):
    for steps in (10, 40, 200, 1000, 4000):
        assert marginals(dynamics, steps)[-1] == (
            pytest.approx(MEAN),
            pytest.approx(VARIANCE, abs=1.5 / steps),
        )


def test_cps_converges_to_another_variance():
    fine, finer = (marginals(cps, steps)[-1][1] for steps in (1000, 4000))
    assert finer == pytest.approx(fine, abs=2e-3)
    assert finer < 0.75 * VARIANCE


def test_ddim_s_error_falls_with_the_steps_too():
    for steps in (10, 40, 200, 1000, 4000):
        assert marginals(ddim, steps)[-1][1] == pytest.approx(VARIANCE, abs=5 / steps)


@pytest.mark.parametrize("dynamics", [cps, ddim])
def test_the_noise_is_that_of_the_schedule_when_the_data_is_one_point(dynamics):
    for t, (mean, variance) in zip(
        shifted_times(10), marginals(dynamics, 10, variance=0.0), strict=True
    ):
        assert (mean, variance) == (pytest.approx((1 - t) * MEAN), pytest.approx(t**2))


@pytest.mark.parametrize("dynamics", [flow_sde, dance_sde])
def test_sde_and_ode_end_in_the_same_distribution(dynamics):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, 1, generator=generator)
    ends, times = [], shifted_times(400)
    for step in (ode, dynamics):
        x = noise
        for t, s in pairwise(times):
            x = step(x, velocity(x, t), t, s).sample(torch.randn(x.shape, generator=generator))
        ends.append(x.flatten())
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    exact = Normal(MEAN, VARIANCE**0.5).icdf(levels)
    for end in ends:
        torch.testing.assert_close(end.quantile(levels), exact, atol=0.025, rtol=0)


def some_step(std: float = 0.3) -> tuple[Gaussian, torch.Tensor]:
    mean, x = torch.randn(2, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return Gaussian(mean, std), x


def test_log_prob_is_the_mean_over_elements_of_torchs():
    step, x = some_step()
    torch.testing.assert_close(
        step.log_prob(x), Normal(step.mean, step.std).log_prob(x).flatten(1).mean(1)
    )


def test_kl_is_the_mean_over_elements_of_torchs():
    step, other = some_step()
    expected = (
        kl_divergence(Normal(step.mean, step.std), Normal(other, step.std)).flatten(1).mean(1)
    )
    torch.testing.assert_close(step.kl(Gaussian(other, step.std)), expected)


def test_a_sample_is_the_mean_and_std_times_the_noise():
    step, noise = some_step(std=2.0)
    torch.testing.assert_close(step.sample(noise), step.mean + 2 * noise)


def test_a_deterministic_step_has_no_log_probability():
    step, x = some_step()
    with pytest.raises(ValueError, match="deterministic step has no log-probability"):
        ode(step.mean, x, 0.5, 0.4).log_prob(x)
    with pytest.raises(ValueError, match="deterministic step has no log-probability"):
        cps(step.mean, x, 0.1, 0.0).log_prob(x)


@pytest.mark.parametrize("t", [0.95, 0.5, 0.05])
def test_flow_sde_adds_half_the_squared_diffusion_times_the_score(t):
    x, eta, s = torch.linspace(-3, 3, 7, dtype=torch.float64).unsqueeze(1), 0.7, t - 0.04
    variance = eta**2 * t / (1 - t)
    step = flow_sde(x, velocity(x, t), t, s, eta)
    torch.testing.assert_close(
        step.mean, x + (velocity(x, t) - variance / 2 * score(x, t)) * (s - t)
    )
    assert step.std == pytest.approx(math.sqrt(variance * (t - s)))


@pytest.mark.parametrize("t", [1.0, 0.5, 0.05])
def test_dance_sde_adds_half_the_squared_diffusion_times_the_score(t):
    x, eta, s = torch.linspace(-3, 3, 7, dtype=torch.float64).unsqueeze(1), 0.3, t - 0.04
    step = dance_sde(x, velocity(x, t), t, s, eta)
    torch.testing.assert_close(step.mean, x + (velocity(x, t) - eta**2 / 2 * score(x, t)) * (s - t))
    assert step.std == pytest.approx(eta * math.sqrt(t - s))


@pytest.mark.parametrize("dynamics", STOCHASTIC)
@pytest.mark.parametrize(("t", "s"), [(1.0, 0.9), (0.6, 0.5), (0.1, 0.0)])
def test_without_noise_every_dynamics_is_the_ode(dynamics, t, s):
    x, v = some_step()[0].mean, some_step()[1]
    step = dynamics(x, v, t, s, eta=0.0)
    torch.testing.assert_close(step.mean, ode(x, v, t, s).mean)
    assert step.std == 0


def test_flow_sde_at_pure_noise_takes_the_denominator_of_the_next_time():
    x, v = some_step()[0].mean, some_step()[1]
    t, s, eta = 1.0, 0.96, 0.7
    variance = eta**2 / (1 - s)
    step = flow_sde(x, v, t, s, eta)
    torch.testing.assert_close(step.mean, x + (v + variance / 2 * x) * (s - t))
    assert step.std == pytest.approx(eta)


@pytest.mark.parametrize("dynamics", STOCHASTIC)
def test_the_first_and_the_last_step_are_finite(dynamics):
    x, v = some_step()[0].mean, some_step()[1]
    for t, s in [(1.0, 0.96), (0.009, 0.0)]:
        step = dynamics(x, v, t, s)
        assert step.mean.isfinite().all()
        assert math.isfinite(step.std)


@pytest.mark.parametrize(("t", "s"), [(1.0, 0.96), (0.6, 0.5), (0.3, 0.02)])
def test_ddim_with_eta_1_draws_from_the_forward_process_between_xt_and_x0(t, s):
    """x_s of x0 and noise, given x_t = a x_s + b z: the product of the two normal densities."""
    x, v = (value.double() for value in (some_step()[0].mean, some_step()[1]))
    a = (1 - t) / (1 - s)
    prior, seen = 1 / s**2, a**2 / (t**2 - a**2 * s**2)
    mean = (prior * (1 - s) * (x - t * v) + (seen * x / a if a else 0)) / (prior + seen)
    step = ddim(x, v, t, s)
    torch.testing.assert_close(step.mean, mean)
    assert step.std == pytest.approx((prior + seen) ** -0.5)


@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_ddim_s_diffusion_tends_to_that_of_flow_sde_with_eta_times_the_root_of_2(eta):
    x, t = torch.zeros(1, 1), 0.6
    steps = [ddim(x, x, t, t - 1e-6, eta), flow_sde(x, x, t, t - 1e-6, eta * math.sqrt(2))]
    assert steps[0].std == pytest.approx(steps[1].std, rel=1e-4)


def test_flow_sde_has_the_published_standard_deviations_on_the_schedule_of_sd3():
    times = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
    x = torch.zeros(1, 1)
    found = [flow_sde(x, x, t, s).std for t, s in pairwise(times)]
    assert found == pytest.approx(
        [0.70, 0.74, 0.54, 0.45, 0.39, 0.35, 0.32, 0.28, 0.225, 0.0063], rel=0.015
    )


def test_a_dynamics_without_noise_is_not_stochastic():
    assert not is_stochastic(ode)
    assert not is_stochastic(partial(cps, eta=0))
    assert all(is_stochastic(dynamics) for dynamics in STOCHASTIC)
    assert is_stochastic(partial(flow_sde, eta=0.7))


def test_without_a_window_every_step_but_the_last_is_stochastic():
    assert Window().steps(10, 0, 3) == range(9)


def test_a_range_alone_is_taken_whole():
    assert Window(range=(2, 5)).steps(10, 0, 3) == range(2, 5)


def test_the_last_step_is_never_in_a_window():
    assert Window(range=(2, 10)).steps(10, 0, 0) == range(2, 9)
    assert max(Window(size=3).steps(10, key, 0)[-1] for key in range(300)) == 8


def test_the_starts_of_a_window_are_evenly_distributed():
    windows = [Window(size=2, range=(1, 6)).steps(10, key, 0) for key in range(8000)]
    assert all(len(window) == 2 for window in windows)
    starts = Counter(window[0] for window in windows)
    assert sorted(starts) == [1, 2, 3, 4]
    assert list(starts.values()) == [pytest.approx(2000, abs=160)] * 4


def test_the_same_key_gives_the_same_window():
    assert len({Window(size=2).steps(20, 0, 7) for _ in range(3)}) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"range": (4, 2)}, r"range is \[4, 2\]"),
        ({"range": (-1, 2)}, r"range is \[-1, 2\]"),
        ({"size": 4, "range": (0, 3)}, r"size is 4, but range \[0, 3\] has 3 steps"),
        ({"size": -1}, "size is -1"),
    ],
)
def test_a_window_that_cannot_be_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Window(**settings)


@pytest.mark.parametrize(
    ("window", "count"), [(Window(), 1), (Window(size=4), 4), (Window(range=(6, 8)), 6)]
)
def test_a_window_that_does_not_fit_the_path_is_refused(window, count):
    with pytest.raises(
        UserError, match=f"sampler.steps is {count} and the last step is an ODE step"
    ):
        window.steps(count, 0, 0)


def test_a_progressive_window_goes_on_by_a_step_after_it_has_stayed_and_around():
    window = Window(size=2, range=(1, 5), moves="progressive", stay=10)
    starts = [window.steps(10, step, seed=3).start for step in (0, 9, 10, 19, 20, 29, 30)]
    assert starts == [1, 1, 2, 2, 3, 3, 1]
    assert window.steps(10, 0, seed=3) == window.steps(10, 0, seed=4) == range(1, 3)


def test_a_window_that_never_stays_is_refused():
    with pytest.raises(UserError, match="stay is 0"):
        Window(size=2, stay=0)
