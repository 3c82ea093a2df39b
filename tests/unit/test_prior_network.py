"""The network of a prior against diffusers' PriorTransformer, and against a slow reading of the whole sequence at once."""

import math

import pytest
import torch

from harness.small_nets import numbers

KANDINSKY = {"embedding_dim": 12, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3}
LENGTHS = (1, 5, 77, 40)  # of the texts; the last rows of the batch


@pytest.fixture
def network(pack):
    from importlib import import_module

    return import_module(f"{pack.__name__}.training.prior.network")


def shaped(network, **changed):
    sizes = {"dim": 12, "text_dim": 12, "states_dim": 12, "width": 16, "layers": 3, "heads": 2, "text_length": 77}
    return network.Shape(**sizes | changed)


@torch.no_grad()
def lively(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights of a size that lets every part speak."""
    generator = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator) * (0.3 if weight.ndim > 1 else 0.5))
    return module.eval()


def texts(lengths=LENGTHS, width: int = 12, places: int = 77):
    """(states, pooled, mask)"""
    mask = torch.arange(places) < torch.tensor(lengths)[:, None]
    return numbers(len(lengths), places, width), numbers(len(lengths), width, seed=2), mask


@torch.no_grad()
def whole(net, noisy, time, states, pooled, mask):
    """The answer from one pass over the whole sequence, token by token and head by head, in float64."""
    weights, shape, answers = {k: v.double() for k, v in net.state_dict().items()}, net.shape, []

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name, x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    for row in range(len(noisy)):
        tokens = [] if states is None else list(linear("encoder_hidden_states_proj", states[row].double()))
        seen = [] if states is None else mask[row].tolist()
        tokens.append(linear("embedding_proj", pooled[row].double()))
        if shape.time:
            half = shape.width // 2
            angles = [float(time[row]) * 10000 ** (-i / half) for i in range(half)]
            waves = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles]).double()
            hidden = linear("time_embedding.linear_1", waves)
            tokens.append(linear("time_embedding.linear_2", hidden * torch.sigmoid(hidden)))
        tokens += [linear("proj_in", noisy[row].double()), weights["prd_embedding"][0, 0]]
        seen += [True] * (len(tokens) - len(seen))
        x = torch.stack(tokens) + weights["positional_embedding"][0]
        for i in range(shape.layers):
            name, normed = f"transformer_blocks.{i}", norm(f"transformer_blocks.{i}.norm1", x)
            q, k, v = (linear(f"{name}.attn1.to_{part}", normed) for part in "qkv")
            mixed = torch.zeros_like(x)
            for place in range(len(x)):
                shown = [j for j in range(place + 1) if seen[j]] or [place]
                for part in torch.arange(shape.width).chunk(shape.heads):
                    logits = k[shown][:, part] @ q[place, part] / len(part) ** 0.5
                    mixed[place, part] = logits.softmax(0) @ v[shown][:, part]
            x = x + linear(f"{name}.attn1.to_out.0", mixed)
            hidden = linear(f"{name}.ff.net.0.proj", norm(f"{name}.norm3", x))
            x = x + linear(f"{name}.ff.net.2", hidden * (1 + torch.erf(hidden / 2**0.5)) / 2)
        answers.append(linear("proj_to_clip_embeddings", norm("norm_out", x[-1])))
    return torch.stack(answers)


@pytest.mark.parametrize("what", ["with time", "one shot", "without states"])
def test_a_prefix_and_a_tail_are_the_whole_sequence(network, what):
    changed = {
        "with time": {"states_dim": 20, "text_dim": 20},
        "one shot": {"time": False, "text_dim": 20, "states_dim": 20},
        "without states": {"text_length": 0, "states_dim": 0, "text_dim": 20},
    }
    net = lively(network.PriorNetwork(shaped(network, **changed[what])))
    states, pooled, mask = texts((3, 9), 20)
    if what == "without states":
        states = mask = None
    noisy, time = numbers(2, 12, seed=3), None if what == "one shot" else torch.tensor([17.25, 999.0])
    with torch.no_grad():
        got = net(noisy, time, net.read(states, pooled, mask))
    want = whole(net, noisy, time, states, pooled, mask)
    assert want.std() > 0.1
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_it_is_the_network_of_diffusers(network):
    """Every key, and what it answers; their mask is a sum of -10000 and ours is none."""
    from diffusers import PriorTransformer

    theirs = lively(PriorTransformer(**KANDINSKY))
    net = network.empty(shaped(network))
    state = {k: v for k, v in theirs.state_dict().items() if k not in ("clip_mean", "clip_std")}
    net.load_state_dict(state, assign=True)  # strict
    states, pooled, mask = texts()
    noisy = numbers(4, 12, seed=3)
    with torch.no_grad():
        for time in (0, 500, 999):
            want = theirs(noisy, time, pooled, states, mask).predicted_image_embedding
            got = net(noisy, time, net.read(states, pooled, mask))
            assert want.std() > 0.1
            assert (got - want).abs().max() <= 1e-5 * want.abs().max()
        bare = theirs(noisy, 999, pooled, states).predicted_image_embedding  # without a mask theirs is not causal
        assert (bare - want).abs().max() > 0.01


def test_the_mask_hides_what_no_text_fills(network):
    net = lively(network.PriorNetwork(shaped(network)))
    states, pooled, mask = texts((4, 30))
    other = torch.where(mask[..., None], states, numbers(2, 77, 12, seed=9) * 100)
    noisy = numbers(2, 12, seed=3)
    with torch.no_grad():
        first, second = (net(noisy, 3.0, net.read(s, pooled, mask)) for s in (states, other))
        seen = net(noisy, 3.0, net.read(other, pooled))
        hidden = net(noisy, 3.0, net.read(states, pooled, torch.zeros_like(mask)))
    assert first.equal(second) and not torch.allclose(first, seen, atol=1e-2)
    assert hidden.isfinite().all()


def test_places_that_no_text_fills_are_not_computed(network):
    net = network.drawn(shaped(network), torch.Generator().manual_seed(0))
    assert net.read(*texts((4, 9))).keys[0].shape == (2, 2, 10, 8)


@pytest.mark.parametrize("time", [True, False])
def test_many_embeddings_share_one_reading(network, time):
    """As if each had its text read for itself; and no text is copied."""
    net = lively(network.PriorNetwork(shaped(network, time=time)))
    states, pooled, mask = texts((4, 9))
    noisy, times = numbers(10, 12, seed=3), torch.linspace(0, 999, 10) if time else None
    each = torch.arange(2).repeat_interleave(5)
    with torch.no_grad():
        prefix = net.read(states, pooled, mask)
        together = net(noisy, times, prefix)
        alone = net(noisy, times, net.read(states[each], pooled[each], mask[each]))
        expanded = net(noisy, times, prefix.rows(each))
    assert len(prefix.mask) == 2
    assert (together - alone).abs().max() <= 1e-5 * alone.abs().max()
    assert (together - expanded).abs().max() <= 1e-5 * alone.abs().max()
    with pytest.raises(ValueError, match="10 embeddings cannot be shared out to 3 texts"):
        net(noisy, times, prefix.rows([0, 1, 0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(network, dtype):
    net = network.drawn(network.shape_of(128, 128, 128, 77), torch.Generator().manual_seed(0))
    with torch.no_grad():
        net.proj_to_clip_embeddings.weight.normal_(generator=torch.Generator().manual_seed(1))
        states, pooled, mask = texts((4, 30), 128)
        noisy = numbers(2, 128, seed=3)
        want = net(noisy, 300.0, net.read(states, pooled, mask))
        net.to(dtype)
        got = net(noisy, 300.0, net.read(states, pooled, mask))
    assert got.dtype == torch.float32
    assert torch.cosine_similarity(got, want).min() >= 0.999


def test_the_gradient_is_that_of_the_whole(network):
    """Through the prefix and the tail, from the loss of several embeddings per text; by central differences in float64."""
    net = lively(network.PriorNetwork(shaped(network))).double()
    states, pooled, mask = texts((4, 9))
    noisy, times, aim = numbers(6, 12, seed=3).double(), torch.linspace(0, 999, 6), numbers(6, 12, seed=4).double()

    def loss():
        return (net(noisy, times, net.read(states, pooled, mask)) - aim).square().mean()

    loss().backward()
    for name, weight in net.named_parameters():
        assert weight.grad is not None, name
        direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        with torch.no_grad():
            weight += 1e-5 * direction
            above = loss()
            weight -= 2e-5 * direction
            slope = (above - loss()) / 2e-5
            weight += 1e-5 * direction
        assert math.isclose(slope, (weight.grad * direction).sum(), rel_tol=1e-4, abs_tol=1e-8), name


def test_drawn_networks(network):
    """The same from the same generator; the first answer is zero; tokens stay of one size through the layers; and the global
    generator is left alone."""
    before = torch.get_rng_state()
    one, two, other = (
        network.drawn(network.shape_of(128, 96, 64, 77), torch.Generator().manual_seed(s)) for s in (3, 3, 4)
    )
    assert before.equal(torch.get_rng_state())
    assert all(a.equal(b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not one.proj_in.weight.equal(other.proj_in.weight)
    states, pooled, mask = numbers(2, 77, 64), numbers(2, 96, seed=2), torch.ones(2, 77, dtype=torch.bool)
    sizes = []
    for block in one.transformer_blocks:
        block.register_forward_hook(lambda block, given, out: sizes.append(out[0].std().item()))
    with torch.no_grad():
        assert one(numbers(2, 128, seed=3), 10.0, one.read(states, pooled, mask)).equal(torch.zeros(2, 128))
    assert all(0.3 < size < 3 for size in sizes), sizes


def test_parameters(network):
    """Of the public priors, and of ours."""

    def millions(shape):
        return sum(p.numel() for p in network.empty(shape).parameters()) / 1e6

    public = {768: 1022.0, 1280: 1026.2}
    for dim, count in public.items():
        assert round(millions(network.Shape(dim, dim, dim, 2048, 20, 32, 77)), 1) == count
    assert round(millions(network.Shape(1280, 1280, 1280, 512, 10, 16, 77, False)) * 4) == 137  # ECLIPSE's file, in MB
    for dim, states in ((768, 768), (1024, 1024), (1280, 1280)):
        assert 38 <= millions(network.shape_of(dim, dim, states, 77)) <= 44
    assert 0.8 <= millions(network.shape_of(128, 128, 128, 77)) <= 1
    assert 4 <= millions(network.shape_of(128, 128, 128, 77, "medium")) <= 6


def test_what_does_not_fit_is_refused(network):
    net = network.empty(shaped(network))
    for states in (torch.zeros(1, 78, 12), torch.zeros(1, 77, 10), None):
        with pytest.raises(ValueError, match="reads texts of up to 77 states of 12 numbers"):
            network.drawn(net.shape, torch.Generator()).read(states, torch.zeros(1, 12))
    with pytest.raises(ValueError, match="3 heads"):
        shaped(network, heads=3)
    with pytest.raises(ValueError, match="both are 0"):
        shaped(network, text_length=0)
