"""Sampling a prior, and its file."""

from importlib import import_module

import pytest
import torch
from torch import nn

from harness.priors import small_prior
from harness.small_nets import numbers


@pytest.fixture
def it(pack):
    return import_module(f"{pack.__name__}.training.prior.prior")


@pytest.fixture
def process(pack):
    return import_module(f"{pack.__name__}.training.prior.process")


@pytest.fixture
def prior(pack):
    return small_prior(pack)


def texts(pack, count: int = 2, seed: int = 5):
    pairs = import_module(f"{pack.__name__}.training.prior.pairs")
    mask = torch.arange(77) <= torch.arange(count)[:, None] + 3
    return pairs.Texts(numbers(count, 32, seed=seed), numbers(count, 77, 32, seed=seed + 1), mask)


def listen(prior) -> list[tuple[int, float]]:
    """How many rows each call of the network has, and the level."""
    calls: list = []
    prior.network.register_forward_pre_hook(lambda _, given: calls.append((len(given[0]), float(given[1]))))
    return calls


def test_one_call_of_the_network_for_each_step(pack, it, prior):
    """Of twice the rows where there is guidance; never at level 0."""
    calls, told = listen(prior), []
    it.sampled(prior, texts(pack), None, [1, 2, 3], it.Sampling(steps=5, guidance=1.0), tell=told.append)
    assert [n for n, _ in calls] == [6] * 5 and min(t for _, t in calls) > 0 and calls[0][1] == 999
    assert told == [1, 2, 3, 4, 5] and it.steps_of(prior, it.Sampling(steps=5), 3) == 5
    calls.clear()
    it.sampled(prior, texts(pack), texts(pack, 1, 9), [1, 2, 3], it.Sampling(steps=5, guidance=2.0))
    assert [n for n, _ in calls] == [12] * 5
    calls.clear()
    part = it.Sampling(steps=10, guidance=2.0, guide_from=0.2, guide_to=0.7)
    it.sampled(prior, texts(pack), texts(pack, 1, 9), [1], part)
    assert [n for n, _ in calls] == [2, 2, 4, 4, 4, 4, 4, 2, 2, 2]


def test_guidance_leads_away_from_the_empty_text_alone(pack, it, process, prior):
    """One step written out: what is subtracted was said by the network of the negative text, with nothing of the prompt."""
    asked, negative = texts(pack), texts(pack, 1, 9)
    for guidance in (1.0, 3.0):
        made = it.sampled(prior, asked, negative, [4, 8], it.Sampling(steps=1, guidance=guidance))
        mean, std = prior.start.norm
        for n in range(2):
            for s, seed in enumerate((4, 8)):
                eps = torch.randn(24, generator=torch.Generator().manual_seed(seed + n * it.APART))
                top = process.schedule("cosine").level(999)
                start = process.Start(mean, std)
                shown = prior.start.norm.shown((mean + std * eps)[None], top, start)
                net = prior.network
                text = net.read(asked.states[n : n + 1], asked.pooled[n : n + 1], asked.mask[n : n + 1])
                cond = net(shown, 999.0, text)
                empty = net(shown, 999.0, net.read(*negative._replace(pooled=negative.states, states=negative.pooled)))
                expected = mean + std * (empty + guidance * (cond - empty))
                assert torch.allclose(made[n, s], expected[0], atol=1e-4)
    with pytest.raises(ValueError, match="there is none: give it, or set guidance to 1"):
        it.sampled(prior, asked, None, [4], it.Sampling(guidance=3.0))


def test_a_seed_makes_the_same_whatever_else_is_made(pack, it, prior):
    """Beside other seeds, beside other texts, and where more are asked for than go into one call; ancestral noise too."""
    asked, negative, many = texts(pack), texts(pack, 1, 9), list(range(100, 100 + it.AT_ONCE + 3))
    for sampler in ("dpm++ 2m", "ancestral"):
        how, told = it.Sampling(steps=4, sampler=sampler), []
        whole = it.sampled(prior, asked, negative, many, how, tell=told.append)
        assert (
            whole.shape == (2, len(many), 24) and told == list(range(1, 9)) and it.steps_of(prior, how, len(many)) == 8
        )
        for n, at in ((0, 0), (1, it.AT_ONCE - 1), (1, it.AT_ONCE + 2)):
            alone = it.sampled(prior, asked.rows([n]), negative, [many[at] + n * it.APART], how)
            assert torch.allclose(whole[n, at], alone[0, 0], atol=1e-4)
        assert torch.cdist(whole[0], whole[0]).fill_diagonal_(9).min() > 1e-2
        assert torch.equal(whole, it.sampled(prior, asked, negative, many, how))


def test_the_global_generator_is_not_touched(pack, it, prior):
    before = torch.get_rng_state()
    it.sampled(prior, texts(pack), None, [1], it.Sampling(sampler="ancestral", guidance=1.0))
    assert torch.equal(before, torch.get_rng_state())


def test_one_shot(pack, it):
    """One call on pure noise, no guidance, and what it says as it is."""
    network = import_module(f"{pack.__name__}.training.prior.network")
    prior = small_prior(pack, one_shot=True)
    prior.network = network.drawn(
        network.Shape(24, 32, 32, 32, 2, 2, 77, time=False), torch.Generator().manual_seed(0)
    ).requires_grad_(False)
    prior.network.proj_to_clip_embeddings.weight.copy_(numbers(24, 32))
    told, asked = [], texts(pack)
    made = it.sampled(prior, asked, None, [3, 4], it.Sampling(steps=20, guidance=4.0), tell=told.append)
    assert told == [1] and it.steps_of(prior, it.Sampling(steps=20), 2) == 1
    eps = torch.randn(24, generator=torch.Generator().manual_seed(4))
    prefix = prior.network.read(asked.states[:1], asked.pooled[:1], asked.mask[:1])
    mean, std = prior.start.norm
    assert torch.allclose(made[0, 1], mean + std * prior.network(eps[None], None, prefix)[0], atol=1e-5)
    with pytest.raises(ValueError, match="cannot vary a picture: disconnect the picture"):
        it.sampled(prior, asked, None, [3], image=numbers(1, 24))


class Ideal(nn.Module):
    """What the best network says where embeddings are one Gaussian: x0 of a noisy one, in its own units, is signal times what is shown."""

    def __init__(self, shape, schedule):
        super().__init__()
        self.shape, self.schedule, self.weight = shape, schedule, nn.Parameter(torch.zeros(1))

    def read(self, states, pooled, mask):
        return None

    def forward(self, noisy, time, prefix):
        return self.schedule.level(int(time)).signal * noisy


def test_a_variation_keeps_as_much_as_its_level(pack, it, process, prior):
    """Of one Gaussian the way down is exact: signal times the picture and noise times the draw, at whatever level it began."""
    prior.network = Ideal(prior.network.shape, process.schedule("cosine"))
    picture = prior.start.norm.mean + prior.start.norm.std * numbers(1, 24, seed=8)
    eps = torch.randn(24, generator=torch.Generator().manual_seed(6))
    kept = []
    for variation in (0.05, 0.3, 0.6, 1.0):
        how = it.Sampling(steps=40, guidance=1.0, variation=variation)
        made = prior.start.norm.whitened(it.sampled(prior, texts(pack, 1), None, [6], how, picture)[0, 0])
        at = process.schedule("cosine").level(round(999 * variation))
        kept.append(at.signal)
        assert torch.allclose(made, at.signal * prior.start.norm.whitened(picture[0]) + at.noise * eps, atol=0.06)
    assert kept[0] > 0.99 and kept[-1] < 0.01


def test_what_the_network_says_is_kept_within_the_clamp(pack, it, prior):
    prior.clamp = 0.25
    made = prior.start.norm.whitened(it.sampled(prior, texts(pack), None, [1, 2], it.Sampling(guidance=1.0)))
    assert made.abs().max() <= 0.2501 and (made.abs() > 0.2499).float().mean() > 0.2
    prior.clamp = 0.0
    free = prior.start.norm.whitened(it.sampled(prior, texts(pack), None, [1, 2], it.Sampling(guidance=1.0)))
    assert free.abs().max() > 0.3


# The file


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_file_brings_back_every_bit(pack, it, prior, tmp_path, dtype):
    prior.network.to(dtype)
    prior.text, prior.clamp, prior.schedule, prior.facts = "abcd", 5.0, "flow", {"steps": 7, "figures": {"norm": 1.5}}
    file = tmp_path / "mine.safetensors"
    file.write_bytes(it.to_bytes(prior))
    again = it.load(file)
    assert it.is_ours(file) and it.to_bytes(again) == it.to_bytes(prior)
    for name in ("schedule", "clamp", "one_shot", "text", "image", "space", "facts"):
        assert getattr(again, name) == getattr(prior, name), name
    assert {p.dtype for p in again.network.parameters()} == {dtype}
    one, other = (it.sampled(p, texts(pack), None, [3], it.Sampling(guidance=1.0)) for p in (prior, again))
    assert torch.equal(one, other)


@pytest.mark.parametrize(("change", "words"), [
    (lambda t, h: t.pop("net.proj_in.weight"), "mine is not whole: .* tensors fit. Save it again"),
    (lambda t, h: t.pop("norm.std"), "mine cannot be used. The start distribution .* lacks norm.std"),
    (lambda t, h: t["norm.std"].zero_(), "mine cannot be used. norm.std of a start distribution has 24 of 24 numbers that are not above 0"),
    (lambda t, h: t["norm.mean"].fill_(float("nan")), "mine cannot be used. norm.mean .* not finite"),
    (lambda t, h: h.pop("arch"), "mine is not whole: its header lacks arch"),
    (lambda t, h: h.update(schedule="sigmoid"), "schedule 'sigmoid', which is not known here"),
])  # fmt: skip
def test_a_file_that_is_not_whole(pack, it, prior, tmp_path, change, words):
    artefact = pack.training.artefact
    (tmp_path / "mine.safetensors").write_bytes(it.to_bytes(prior))
    tensors, header = artefact.read(tmp_path / "mine.safetensors")
    tensors = {k: v.clone() for k, v in tensors.items()}
    change(tensors, header)
    with pytest.raises(ValueError, match=words):
        it.of_file("mine", tensors, header)
