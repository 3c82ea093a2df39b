"""The process of a prior against textbook formulas, generic Gaussian conditioning, and simulation."""

import importlib
import itertools
import math

import pytest
import torch

from harness.small_nets import numbers

NAMES = ("linear", "cosine", "flow")


@pytest.fixture(scope="module")
def process(pack):
    return importlib.import_module(f"{pack.__name__}.training.prior.process")


def textbook_betas(name: str) -> list[float]:
    if name == "linear":
        return [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]

    def kept(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(0.999, 1 - kept((i + 1) / 1000) / kept(i / 1000)) for i in range(1000)]


def start_of(process, width: int = 5, rows: int | None = None):
    """mu, and k sigma with k = 5."""
    shape = (width,) if rows is None else (rows, width)
    return process.Start(numbers(*shape, seed=1).double(), 5 * (numbers(width, seed=2).double().abs() + 0.2))


@pytest.mark.parametrize("name", NAMES)
def test_thousand_steps_are_the_closed_form(process, name):
    table, start = process.schedule(name), start_of(process)
    x0 = mean = numbers(5, seed=3).double()
    variance, before = torch.zeros(5, dtype=torch.float64), process.DATA
    for t in range(1000):
        level = table.level(t)
        r, b2 = process.transition(level, before)
        mean, variance = r * mean + (1 - r) * start.mean, r**2 * variance + b2 * start.scale**2
        closed = process.noised(x0, torch.zeros(5, dtype=torch.float64), level, start)
        assert (mean - closed).abs().max() < 1e-10
        assert (variance - (level.noise * start.scale) ** 2).abs().max() < 1e-10
        before = level


@pytest.mark.parametrize("name, last", [("linear", 4.036e-5), ("cosine", 2.4e-9)])
def test_a_step_is_the_textbooks(process, name, last):
    table, kept = process.schedule(name), 1.0
    for t, beta in enumerate(textbook_betas(name)):
        kept *= 1 - beta
        level, before = table.level(t), table.level(t - 1) if t else process.DATA
        assert level[:2] == pytest.approx((math.sqrt(kept), math.sqrt(1 - kept)), rel=1e-9)
        assert process.transition(level, before) == pytest.approx((math.sqrt(1 - beta), beta), rel=1e-9)
    assert kept == pytest.approx(last, rel=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_steps_that_are_simulated_end_at_the_start_distribution(process, name):
    table, start, count = process.schedule(name), start_of(process, 3), 8_000
    generator, before = torch.Generator().manual_seed(0), process.DATA
    z = numbers(3, seed=3).double().expand(count, 3)
    for t in range(1000):
        r, b2 = process.transition(table.level(t), before)
        eps = torch.randn(count, 3, generator=generator, dtype=torch.float64)
        z, before = r * z + (1 - r) * start.mean + b2**0.5 * start.scale * eps, table.level(t)
    leak = before.signal * (numbers(3, seed=3).double() - start.mean)
    assert ((z.mean(0) - start.mean - leak) / start.scale).abs().max() < 5 / count**0.5
    assert (z.std(0) / start.scale - 1).abs().max() < 5 / (2 * count) ** 0.5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("t, back", [(1, 0), (2, 1), (10, 9), (143, 20), (500, 499), (999, 998), (999, 300)])
def test_the_posterior_is_generic_conditioning(process, name, t, back):
    """Of the joint Gaussian of z' and z, coordinate by coordinate, given x0."""
    table, start = process.schedule(name), start_of(process)
    here, there = table.level(t), table.level(back)
    x0, z = numbers(5, seed=3).double(), numbers(5, seed=4).double()
    mean, std = process.posterior(z, x0, here, there, start)
    for i in range(5):
        mu, k = start.mean[i].item(), start.scale[i].item()
        first = there.signal * x0[i].item() + (1 - there.signal) * mu
        r = here.signal / there.signal
        shared = r * there.noise**2
        joint = torch.tensor([[there.noise**2, shared], [shared, here.noise**2]], dtype=torch.float64) * k**2
        gain = joint[0, 1] / joint[1, 1]
        second = here.signal * x0[i].item() + (1 - here.signal) * mu
        assert mean[i].item() == pytest.approx((first + gain * (z[i] - second)).item(), rel=1e-9, abs=1e-9)
        assert std[i].item() ** 2 == pytest.approx((joint[0, 0] - gain * joint[0, 1]).item(), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_without_shift_the_posterior_is_the_textbooks(process, name):
    """Ho et al. 2020, equation 7, from the betas."""
    table, plain = process.schedule(name), process.Start(torch.zeros(4).double(), torch.ones(4).double())
    betas, kept = textbook_betas(name), [1.0]
    for beta in betas:
        kept.append(kept[-1] * (1 - beta))
    x0, z = numbers(4, seed=1).double(), numbers(4, seed=2).double()
    for t in (1, 2, 50, 500, 999):
        now, before = kept[t + 1], kept[t]
        mean = math.sqrt(before) * betas[t] / (1 - now) * x0 + math.sqrt(1 - betas[t]) * (1 - before) / (1 - now) * z
        ours, std = process.posterior(z, x0, table.level(t), table.level(t - 1), plain)
        assert (ours - mean).abs().max() < 1e-10
        assert (std**2 - (1 - before) / (1 - now) * betas[t]).abs().max() < 1e-12


def test_the_posterior_of_the_data_is_the_data(process):
    x0, z = numbers(2, 5, seed=3).double(), numbers(2, 5, seed=4).double()
    mean, std = process.posterior(z, x0, process.schedule("flow").level(999), process.DATA, start_of(process))
    assert torch.allclose(mean, x0, atol=1e-14) and not std.any()


@pytest.mark.parametrize("name, steps", itertools.product(NAMES, (1, 2, 7, 100, 999)))
def test_respaced_steps_compose(process, name, steps):
    """The step between two levels of a respaced grid is all the single steps between them, one after the other."""
    table = process.schedule(name)
    grid = process.levels(steps)
    for top, bottom in itertools.pairwise(grid[:6]):
        r, b2 = 1.0, 0.0
        for t in range(bottom + 1, top + 1):
            step, noise = process.transition(table.level(t), table.level(t - 1))
            r, b2 = step * r, step**2 * b2 + noise
        assert process.transition(table.level(top), table.level(bottom)) == pytest.approx((r, b2), abs=1e-10)


def test_levels_fall_evenly_from_the_top_and_never_reach_0(process):
    for steps in range(1, 1000):
        grid = process.levels(steps)
        assert grid[0] == 999 and len(grid) == steps and grid[-1] >= 1
        gaps = {a - b for a, b in itertools.pairwise([*grid, 0])}
        assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1
    assert process.levels(1) == [999]
    assert process.levels(8) == [999, 874, 749, 624, 500, 375, 250, 125]
    assert process.levels(3, top=30) == [30, 20, 10]


@pytest.mark.parametrize("steps, top", [(0, 999), (-1, 999), (1000, 999), (31, 30), (5, 1000)])
def test_impossible_steps_are_named(process, steps, top):
    with pytest.raises(ValueError, match=f"{steps} steps do not go from level {top} to 0: take 1 to"):
        process.levels(steps, top)


@pytest.mark.parametrize("name, t", itertools.product(NAMES, (0, 1, 500, 998)))
def test_what_the_network_says_can_be_said_otherwise(process, name, t):
    """eps, x0 and velocity, with sigma far from 1."""
    level, start = process.schedule(name).level(t), start_of(process, rows=3)
    x0, eps = numbers(3, 5, seed=3).double(), numbers(3, 5, seed=4).double()
    z = process.noised(x0, eps, level, start)
    velocity = process.velocity_of_x0(z, x0, level, start)
    for back in (process.x0_of_eps(z, eps, level, start), process.x0_of_velocity(z, velocity, level, start)):
        assert (back - x0).abs().max() < 1e-5
    assert (process.eps_of_x0(z, x0, level, start) - eps).abs().max() < 1e-5


@pytest.mark.parametrize("name, t", itertools.product(NAMES, (3, 500, 999)))
def test_velocity_is_how_fast_z_moves(process, name, t):
    """Against a difference in the schedule's own time: the angle, or tau."""
    level, start, step = process.schedule(name).level(t), start_of(process), 1e-5
    x0, eps = numbers(5, seed=3).double(), numbers(5, seed=4).double()

    def at(moved: float) -> torch.Tensor:
        if name == "flow":
            tau = level.noise + moved
            return process.noised(x0, eps, process.Level(1 - tau, tau, 1.0), start)
        angle = math.atan2(level.noise, level.signal) + moved
        return process.noised(x0, eps, process.Level(math.cos(angle), math.sin(angle), math.cos(angle)), start)

    z = process.noised(x0, eps, level, start)
    slope = (at(step) - at(-step)) / (2 * step)
    assert (process.velocity_of_x0(z, x0, level, start) - slope).abs().max() < 1e-7


def test_at_the_end_of_flow_velocity_still_tells_x0(process):
    level, start = process.schedule("flow").level(999), start_of(process)
    assert level.signal == 0 and level.noise == 1
    x0, eps = numbers(5, seed=3).double(), numbers(5, seed=4).double()
    z = process.noised(x0, eps, level, start)
    assert torch.equal(z, start.mean + start.scale * eps)
    assert (
        process.x0_of_velocity(z, process.velocity_of_x0(z, x0, level, start), level, start) - x0
    ).abs().max() < 1e-12


def test_the_papers_weight_is_one_minus_alpha_bar(process):
    for name in ("linear", "cosine"):
        kept = 1.0
        for t, beta in enumerate(textbook_betas(name)):
            kept *= 1 - beta
            assert process.WEIGHTS["P2"](process.schedule(name).level(t)) == pytest.approx(1 - kept, rel=1e-9)
    tau = process.schedule("flow").level(249)
    assert process.WEIGHTS["P2"](tau) == pytest.approx(1 / (1 + (0.75 / 0.25) ** 2))


def test_the_uniform_weight_is_1_for_each_row(process):
    rows = process.schedule("cosine").rows(torch.tensor([0, 999]), torch.zeros(1))
    assert torch.equal(process.WEIGHTS["uniform"](rows), torch.ones(2, 1))


@pytest.mark.parametrize("name", NAMES)
def test_rows_have_levels_of_their_own(process, name):
    table, start = process.schedule(name), start_of(process, rows=4)
    t, x0, eps = torch.tensor([0, 7, 500, 999]), numbers(4, 5, seed=3).double(), numbers(4, 5, seed=4).double()
    together = process.noised(x0, eps, table.rows(t, x0), start)
    for i, row in enumerate(together):
        own = process.Start(start.mean[i], start.scale)
        assert torch.allclose(row, process.noised(x0[i], eps[i], table.level(int(t[i])), own), rtol=1e-14)
    assert table.rows(t, x0.float()).noise.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_the_network_is_shown_mean_0_and_variance_1(process, name):
    count, generator = 40_000, torch.Generator().manual_seed(0)
    norm = process.Norm(numbers(3, seed=1).double() * 4, torch.tensor([0.1, 1.0, 7.0]).double())
    start = process.Start(numbers(3, seed=2).double() * 9, torch.tensor([3.0, 0.2, 1.0]).double())
    x0, eps = (torch.randn(count, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    x0 = norm.x0(x0)
    for t in (0, 300, 700, 999):
        level = process.schedule(name).level(t)
        shown = norm.shown(process.noised(x0, eps, level, start), level, start)
        assert shown.mean(0).abs().max() < 5 / count**0.5
        assert (shown.std(0) - 1).abs().max() < 5 / (2 * count) ** 0.5


def test_what_is_shown_tells_nothing_of_the_starts_mean(process):
    """So what is asked without the text is not told by the text's start either."""
    x0, eps = numbers(4, 5, seed=3).double(), numbers(4, 5, seed=4).double()
    norm, here = process.Norm(numbers(5, seed=5).double(), torch.full((5,), 2.0).double()), start_of(process, rows=4)
    there, level = process.Start(here.mean + 3, here.scale), process.schedule("cosine").level(400)
    shown = [norm.shown(process.noised(x0, eps, level, start), level, start) for start in (here, there)]
    assert (shown[0] - shown[1]).abs().max() < 1e-12


def test_whitening_goes_there_and_back(process):
    norm, x0 = process.Norm(numbers(5, seed=1), numbers(5, seed=2).abs() + 0.1), numbers(3, 5, seed=3)
    assert torch.allclose(norm.x0(norm.whitened(x0)), x0, atol=1e-6)


def test_a_schedule_that_is_not_there(process):
    with pytest.raises(ValueError, match='no schedule "sigmoid": it is one of linear, cosine, flow'):
        process.schedule("sigmoid")


def test_a_start_is_repeated_row_by_row(process):
    start = start_of(process, rows=2).repeated(3)
    assert torch.equal(start.mean[0], start.mean[2]) and not torch.equal(start.mean[2], start.mean[3])
    assert start.scale.shape == (5,)
