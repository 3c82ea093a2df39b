"""Samplers of a prior: against the same ones without shift, against Euler's steps, and with a denoiser that is never wrong."""

import importlib
import itertools
import math

import pytest
import torch

from harness.priors import published_clusters
from harness.small_nets import numbers

SCHEDULES, DETERMINISTIC = ("linear", "cosine", "flow"), ("dpm++ 2m", "ddim")


@pytest.fixture(scope="module")
def prior(pack):
    """The modules of training/prior."""

    class Modules:
        process, samplers, starts = (
            importlib.import_module(f"{pack.__name__}.training.prior.{name}")
            for name in ("process", "samplers", "starts")
        )

    return Modules


def doubles(*shape: int, seed: int) -> torch.Tensor:
    return numbers(*shape, seed=seed).double()


def normals(rows: int, width: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(rows, width, generator=generator)


def last(steps):
    *_, z = steps
    return z


def any_network(z: torch.Tensor, t: int) -> torch.Tensor:
    """Says something of z that is neither linear nor the same at every level."""
    return 0.4 * z.tanh() + 0.1 * math.sin(0.01 * t)


def start_of(prior, rows: int = 3, width: int = 5):
    return prior.process.Start(doubles(rows, width, seed=1), doubles(width, seed=2).abs() + 0.2)


def unshifted(name, prior, grid, start, eps, sampler, fresh):
    """The textbook's sampler of y = (z - mu) / scale, with a predictor that is the network seen from there."""
    kept = [prior.process.schedule(name).level(t).signal ** 2 for t in grid] + [1.0]
    y, before, h_before = eps, None, None
    for i, t in enumerate(grid):
        now, then = kept[i], kept[i + 1]
        y0 = (any_network(start.mean + start.scale * y, t) - start.mean) / start.scale
        if then == 1:
            return start.mean + start.scale * y0
        if sampler == "ddim":
            noise = (y - math.sqrt(now) * y0) / math.sqrt(1 - now)
            y = math.sqrt(then) * y0 + math.sqrt(1 - then) * noise
        elif sampler == "ancestral":
            beta = 1 - now / then
            mean = math.sqrt(then) * beta / (1 - now) * y0 + math.sqrt(1 - beta) * (1 - then) / (1 - now) * y
            y = mean + math.sqrt((1 - then) / (1 - now) * beta) * next(fresh)
        else:
            h = 0.5 * math.log(then / (1 - then)) - 0.5 * math.log(now / (1 - now))
            d = y0 if before is None else (1 + h / (2 * h_before)) * y0 - h / (2 * h_before) * before
            y = math.sqrt((1 - then) / (1 - now)) * y - math.sqrt(then) * math.expm1(-h) * d
            before, h_before = y0, h


@pytest.mark.parametrize("name, sampler", itertools.product(("linear", "cosine"), (*DETERMINISTIC, "ancestral")))
def test_the_shift_is_a_change_of_variable(prior, name, sampler):
    start, grid = start_of(prior), prior.process.levels(8)
    draws = [doubles(3, 5, seed=10 + i) for i in range(9)]
    plain = unshifted(name, prior, grid, start, draws[0], sampler, iter(draws[1:]))
    ours = last(prior.samplers.sample(any_network, start, prior.process.schedule(name), grid, iter(draws), sampler))
    assert (ours - plain).abs().max() < 1e-8


def test_ddim_on_flow_is_eulers_step(prior):
    start, grid, eps = start_of(prior), prior.process.levels(7), doubles(3, 5, seed=10)
    z, taus = start.mean + start.scale * eps, [(t + 1) / 1000 for t in grid] + [0.0]
    for t, (tau, then) in zip(grid, itertools.pairwise(taus), strict=True):
        z = z + (then - tau) * (z - any_network(z, t)) / tau
    ours = last(prior.samplers.sample(any_network, start, prior.process.schedule("flow"), grid, iter([eps]), "ddim"))
    assert (ours - z).abs().max() < 1e-8


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_flow_is_ordinary_diffusion_at_matched_levels(prior, sampler):
    """With a / s the same, the states differ by a factor, sqrt((1 - tau)^2 + tau^2); its first level has a = 0."""
    flow, start, grid = prior.process.schedule("flow"), start_of(prior), prior.process.levels(6)
    size = (flow.signal**2 + flow.noise**2).sqrt()
    matched = prior.process.Schedule("matched", flow.signal / size, flow.noise / size, flow.signal / size)

    def seen_from_flow(z, t):
        return any_network(start.mean + (z - start.mean) / size[t].item(), t)

    eps = doubles(3, 5, seed=10)
    one = last(prior.samplers.sample(any_network, start, matched, grid, iter([eps]), sampler))
    other = last(prior.samplers.sample(seen_from_flow, start, flow, grid, iter([eps]), sampler))
    assert (one - other).abs().max() < 1e-8


@torch.inference_mode()
@pytest.mark.parametrize("steps", [2, 8, 25])
def test_whitened_and_ancestral_are_diffusers_unclip(prior, steps):
    """UnCLIPScheduler around a small PriorTransformer: its levels, its clamp, and the same noise. Its tables are made in double
    precision, as its own multiply the last answer by 0.9995: 1 - alpha-bar of level 0 has 3 digits in single precision."""
    from diffusers import PriorTransformer, UnCLIPScheduler

    torch.manual_seed(0)
    network = PriorTransformer(num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=12, num_embeddings=5, additional_embeddings=4).eval()  # fmt: skip
    pooled, states, mask = numbers(3, 12, seed=1), numbers(3, 5, 12, seed=2), torch.ones(3, 5)
    norm = prior.process.Norm(numbers(12, seed=3), numbers(12, seed=4).abs() + 0.2)

    def said(y, t):
        return 3 * network(y, timestep=t, proj_embedding=pooled, encoder_hidden_states=states, attention_mask=mask).predicted_image_embedding  # fmt: skip

    scheduler = UnCLIPScheduler(prediction_type="sample", variance_type="fixed_small_log", clip_sample_range=5.0)
    kept = prior.process.schedule("cosine").signal ** 2
    assert (scheduler.alphas_cumprod - kept).abs().max() < 1e-6
    scheduler.alphas = torch.cat([kept[:1], kept[1:] / kept[:-1]])
    scheduler.alphas_cumprod, scheduler.betas = kept, 1 - scheduler.alphas
    scheduler.set_timesteps(steps)
    grid, noise = scheduler.timesteps.tolist(), torch.Generator().manual_seed(7)
    theirs = torch.randn(3, 12, generator=noise)
    for t, then in zip(grid, [*grid[1:], None], strict=True):
        theirs = scheduler.step(said(theirs, t), t, theirs, generator=noise, prev_timestep=then).prev_sample

    start = prior.process.Start(*norm)
    ours = prior.samplers.sample(
        lambda z, t: norm.x0(said(norm.whitened(z), t).clamp(-5, 5)),
        start, prior.process.schedule("cosine"), grid, normals(3, 12, 7), "ancestral",
    )  # fmt: skip
    assert (last(ours) - norm.x0(theirs)).abs().max() < 1e-5 * norm.x0(theirs).abs().max()


def exact(prior, mean, covariance, start, table):
    """E[x0 | z] of x0 ~ N(mean, covariance) and a start with one mean for all rows: the network that is never wrong."""

    def predict(z, t):
        a, s, _ = table.level(t)
        seen = a**2 * covariance + s**2 * torch.diag(start.scale**2)
        gain = a * covariance @ torch.linalg.inv(seen)
        return mean + (z - a * mean - (1 - a) * start.mean) @ gain.T

    return predict


def toy(prior, width: int = 6):
    """A correlated Gaussian, and a start that is neither its mean nor its spread."""
    mix = doubles(width, width, seed=3) / width**0.5
    start = prior.process.Start(doubles(width, seed=4), doubles(width, seed=5).abs() + 0.5)
    return doubles(width, seed=6) * 2, mix @ mix.T + 0.1 * torch.eye(width).double(), start


@pytest.mark.parametrize("name", SCHEDULES)
def test_samplers_agree_where_the_denoiser_is_exact(prior, name):
    """DDIM at 512 steps and DPM-Solver++ at 64, from the same noise."""
    mean, covariance, start = toy(prior)
    table = prior.process.schedule(name)
    predict, eps = exact(prior, mean, covariance, start, table), doubles(200, 6, seed=7)
    ends = [
        last(prior.samplers.sample(predict, start, table, prior.process.levels(steps), iter([eps]), sampler))
        for sampler, steps in (("ddim", 512), ("dpm++ 2m", 64))
    ]
    assert (ends[0] - ends[1]).norm() / (ends[0] - mean).norm() < 0.01


@pytest.mark.parametrize("name, sampler", itertools.product(SCHEDULES, DETERMINISTIC))
def test_many_steps_follow_the_flow_of_probability(prior, name, sampler):
    """For independent coordinates it is known: z keeps its distance from the mean in standard deviations."""
    mean, covariance, start = toy(prior)
    covariance, table = torch.diag(covariance.diagonal()), prior.process.schedule(name)
    eps, top = doubles(200, 6, seed=7), table.level(999)
    spread = (top.signal**2 * covariance.diagonal() + top.noise**2 * start.scale**2).sqrt()
    z = start.mean + start.scale * eps
    known = mean + covariance.diagonal().sqrt() / spread * (z - top.signal * mean - (1 - top.signal) * start.mean)
    predict = exact(prior, mean, covariance, start, table)
    errors = [
        ((last(prior.samplers.sample(predict, start, table, prior.process.levels(n), iter([eps]), sampler)) - known).norm() / (known - mean).norm()).item()
        for n in (16, 500)
    ]  # fmt: skip
    assert errors[1] < 0.01 and errors[1] < errors[0] / 8


def test_after_the_end_of_flow_there_is_nothing_to_carry_on(prior):
    """Its last level is infinitely far away in log-SNR: two steps are DDIM's, exactly, and the third is not."""
    states = [
        list(prior.samplers.sample(any_network, start_of(prior), prior.process.schedule("flow"), prior.process.levels(6), iter([doubles(3, 5, seed=10)]), sampler))
        for sampler in DETERMINISTIC
    ]  # fmt: skip
    assert all(torch.equal(states[0][i], states[1][i]) for i in (0, 1)) and not torch.equal(states[0][2], states[1][2])


def test_carrying_on_is_nearer_at_few_steps(prior):
    mean, covariance, start = toy(prior)
    for name in SCHEDULES:
        table, eps = prior.process.schedule(name), doubles(200, 6, seed=7)
        predict = exact(prior, mean, covariance, start, table)

        def end(sampler, steps, predict=predict, table=table, eps=eps):
            return last(prior.samplers.sample(predict, start, table, prior.process.levels(steps), iter([eps]), sampler))

        truth = end("ddim", 999)
        assert (end("dpm++ 2m", 16) - truth).norm() < 0.6 * (end("ddim", 16) - truth).norm(), name


@pytest.mark.parametrize("name", SCHEDULES)
def test_ancestral_draws_have_the_datas_mean_and_covariance(prior, name):
    mean, covariance, start = toy(prior, 3)
    table, count = prior.process.schedule(name), 20_000
    noise = (x.double() for x in normals(count, 3, 0))
    predict = exact(prior, mean, covariance, start, table)
    made = last(prior.samplers.sample(predict, start, table, prior.process.levels(250), noise, "ancestral"))
    assert (made.mean(0) - mean).abs().max() < 0.05
    assert (made.T.cov() - covariance).abs().max() < 0.06 * covariance.diagonal().max()


def test_released_code_can_be_had_for_the_evidence(prior):
    """Its rule of variance and its levels, as a sampler of one's own: at the last step but one of 8 it adds 0.197 where the true
    posterior has 0.0001. And without noise at its start every seed gives the same."""
    grid, added = [0, 143, 285, 428, 571, 714, 856, 999][::-1], []

    def largest(now):
        mean, std = prior.process.posterior(now.z, now.x0, now.here, now.there, now.start)
        variance = prior.process.transition(now.here, now.there)[1]
        added.append((variance, ((std / now.start.scale) ** 2).max().item()))
        return mean + variance**0.5 * now.start.scale * next(now.noise)

    start = start_of(prior)
    silent = prior.process.Start(start.mean, torch.zeros_like(start.scale))
    ends = {}
    for seed, begin in itertools.product((1, 2), (start, silent)):
        noise = (x.double() for x in normals(3, 5, seed))
        steps = prior.samplers.sample(
            lambda z, t: 0.5 * z, begin, prior.process.schedule("linear"), grid, noise, largest
        )
        ends[seed, begin is silent] = last(steps)
    assert added[6] == pytest.approx((0.197, 0.0001), rel=0.02)
    assert not torch.equal(ends[1, False], ends[2, False]) and torch.equal(ends[1, True], ends[2, True])


@pytest.mark.parametrize("name, sampler", itertools.product(SCHEDULES, (*DETERMINISTIC, "ancestral")))
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_one_evaluation_for_each_step_none_at_0_and_the_last_is_the_answer(prior, name, sampler, steps):
    asked = []

    def predict(z, t):
        asked.append((t, any_network(z, t)))
        return asked[-1][1]

    noise = normals(3, 5, 0)
    states = list(
        prior.samplers.sample(
            predict, start_of(prior), prior.process.schedule(name), prior.process.levels(steps), noise, sampler
        )
    )
    assert len(states) == len(asked) == steps and asked[0][0] == 999 and min(t for t, _ in asked) > 0
    assert torch.equal(states[-1], asked[-1][1]) and all(z.isfinite().all() for z in states)


@pytest.mark.parametrize(
    "given, kept", [(torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_the_state_is_never_half_precision(prior, given, kept):
    seen = set()

    def half(z, t):
        seen.add(z.dtype)
        return any_network(z, t).half()

    start = prior.process.Start(*(x.to(given) for x in start_of(prior)))
    noise = normals(3, 5, 0)
    states = list(prior.samplers.sample(half, start, prior.process.schedule("flow"), prior.process.levels(4), noise))
    assert seen | {z.dtype for z in states} == {kept}


@pytest.mark.parametrize("sampler", [*DETERMINISTIC, "ancestral"])
def test_a_seed_is_a_draw_and_the_global_generator_is_left_alone(prior, sampler):
    before = torch.get_rng_state()

    def drawn(seed: int) -> torch.Tensor:
        noise = normals(3, 5, seed)
        return last(prior.samplers.sample(any_network, start_of(prior), prior.process.schedule("cosine"), prior.process.levels(8), noise, sampler))  # fmt: skip

    assert torch.equal(drawn(1), drawn(1))
    assert (drawn(1) - drawn(2)).abs().min() > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_a_variation_begins_at_a_noised_embedding(prior):
    """With a network that knows the picture it stays what it is; the start's draw is left for the noise."""
    table, start, image = prior.process.schedule("cosine"), start_of(prior), doubles(3, 5, seed=8)
    grid = prior.process.levels(4, top=300)
    z = prior.process.noised(image, doubles(3, 5, seed=9), table.level(grid[0]), start)
    states = list(prior.samplers.sample(lambda z, t: image, start, table, grid, iter([]), z=z))
    after = prior.process.noised(image, doubles(3, 5, seed=9), table.level(grid[1]), start)
    assert torch.equal(states[-1], image) and torch.allclose(states[0], after, atol=1e-12)


def test_the_cluster_of_the_text_serves_every_step(prior):
    """A network whose answers lie in another cluster does not change which mean the posterior leans on."""
    means = torch.tensor([[10.0, 0.0, 0.0], [0.0, 10.0, 0.0]])
    starts = published_clusters(prior.starts, means, torch.ones(2, 3))
    text = torch.tensor([[1.0, 0.2, 0.0]])
    start, table, grid = starts.start(text), prior.process.schedule("linear"), prior.process.levels(5)
    draws = [numbers(1, 3, seed=i) for i in range(5)]
    elsewhere = means[1:] + 0.5
    ours = list(prior.samplers.sample(lambda z, t: elsewhere, start, table, grid, iter(draws), "ancestral"))
    mu, z = means[0].double(), means[0].double() + draws[0].double()
    kept = [table.level(t).signal ** 2 for t in grid]
    for state, eps, (now, then) in zip(ours[:-1], draws[1:], itertools.pairwise(kept), strict=True):
        beta = 1 - now / then
        of_x0, of_z = math.sqrt(then) * beta / (1 - now), math.sqrt(1 - beta) * (1 - then) / (1 - now)
        z = of_x0 * elsewhere + of_z * z + (1 - of_x0 - of_z) * mu + math.sqrt(beta * (1 - then) / (1 - now)) * eps
        assert (state - z).abs().max() < 1e-4
    assert starts.cluster(elsewhere).item() == 1 and starts.cluster(text).item() == 0


def test_guidance_acts_on_every_coordinate(prior):
    cond, uncond = torch.ones(2, 1536), torch.zeros(2, 1536)
    assert torch.equal(prior.samplers.guided(cond, uncond, 3.0), torch.full((2, 1536), 3.0))
    assert prior.samplers.guided(cond, uncond, 1.0) is cond
    assert torch.equal(prior.samplers.guided(cond, uncond, 0.0), uncond)


def test_a_sampler_that_is_not_there(prior):
    steps = prior.samplers.sample(any_network, start_of(prior), prior.process.schedule("flow"), [999], iter([]), "heun")
    with pytest.raises(ValueError, match='no sampler "heun": it is one of dpm\\+\\+ 2m, ddim, ancestral'):
        next(steps)
