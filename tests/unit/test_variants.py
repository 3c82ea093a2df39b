"""The rules that are only measured, never shipped: each against its closed form or what it promises, on small gradients."""

import importlib

import pytest
import torch

from harness.small_nets import numbers

SHAPE = (2, 3, 3)


class Text:
    """A vector and a caption add up to what is said; differentiable."""

    def encode(self, captions, vectors):
        words = torch.stack([numbers(5, seed=sum(c.encode())) for c in captions])
        said = torch.stack([v["word"].sum(0) for v in vectors])
        return self.conditioning(torch.tanh(said + words)[:, None], None)


class Model:
    """Noise from the noisy picture and a push by the text."""

    push = numbers(5, 18, seed=2)

    def sigmas(self, n, generator):
        return 0.2 + 4 * torch.rand(n, generator=generator)

    def snr(self, sigma):
        return sigma**-2

    def error(self, latents, noise, sigma, cond):
        self.seen = latents, noise, sigma
        s = sigma.view(-1, 1, 1, 1)
        return (
            torch.sin((latents + s * noise) / (1 + s * s).sqrt() + (cond.states[:, 0] @ self.push).view(-1, *SHAPE))
            - noise
        )


@pytest.fixture
def variants(pack):
    Text.conditioning = pack.training.protocols.Conditioning
    return importlib.import_module("evidence.variants")


@pytest.fixture
def make(pack, variants):
    def make(kind, method: str = "paper", vectors: int = 2, settings: dict | None = None, **more):
        settings = {"method": method, "steps": 30, "batch": 3, "learning_rate": 0.05, **(settings or {})}
        pictures, negatives = numbers(6, *SHAPE, seed=3), numbers(6, *SHAPE, seed=4)
        ways, start = [[f"picture {i} {{token}}"] for i in range(6)], {"word": 0.3 * numbers(vectors, 5, seed=5)}
        settings = pack.training.textual_inversion.Settings(**settings)
        return kind(Model(), Text(), pictures, ways, start, settings, negatives, **more)

    return make


def dot(a, b) -> float:
    return sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)).item()


def mix(*terms) -> list[torch.Tensor]:
    """Sum of number times gradient."""
    return [sum(k * g.double() for k, g in zip(terms[::2], gs, strict=True)) for gs in zip(*terms[1::2], strict=True)]


def near(got, want) -> bool:
    size = dot(want, want) ** 0.5
    return dot(mix(1, got, -1, want), mix(1, got, -1, want)) ** 0.5 <= 1e-6 * size


@pytest.mark.parametrize("seed", range(5))
def test_shipped_updates_equal_their_closed_forms(variants, seed):
    """nsync specification, table of section 1.6, with a = |g+|^2, b = g+ . g-, c = |g-|^2, D = |g+ + g-|^2."""
    g, n, anchor = ([numbers(2, 5, seed=10 * seed + k), numbers(1, 7, seed=10 * seed + k + 5)] for k in (1, 2, 3))
    a, b, c = dot(g, g), dot(g, n), dot(n, n)
    d = a + 2 * b + c
    alpha = (a + b) / d
    want = {
        "v4.1": mix((b + c) / d, g, -(a + b) / d, n),
        "v4.2": mix(2 - alpha, g, -alpha, n),
        "v5.0": mix(1, g, 1 / 2, n),
        "v5.1": mix(1, g, 2 / 3, n, 1 / 3, anchor),
    }
    assert set(want) == set(variants.SHIPPED)
    for version, update in want.items():
        assert near(variants.shipped(version, g, n, anchor), update), version
    assert dot(want["v4.1"], g) == pytest.approx(-dot(want["v4.1"], n)), "it climbs the one as it descends the other"


def test_shipped_updates_are_what_accumulating_backward_passes_gives(variants):
    """The published code reads `.grad` after each of three backward passes and never empties it between them."""
    leaf = numbers(4, seed=1).requires_grad_()
    apart, read = [], []
    for k in (2, 3, 4):
        loss = (leaf @ numbers(4, 3, seed=k)).sin().sum()
        apart.append(list(torch.autograd.grad(loss, [leaf], retain_graph=True)))
        loss.backward()
        read.append(leaf.grad.double().clone())
    g, n, a = read
    assert near(variants.shipped("v4.2", *apart[:2]), [2 * g - (g @ n) / (n @ n) * n])
    assert near(variants.shipped("v5.1", *apart), [(g + a + n) / 3])


@pytest.mark.parametrize("version", ["v4.1", "v4.2", "v5.0", "v5.1"])
def test_a_training_step_makes_the_shipped_update(variants, make, version):
    """v5.1's anchor beside: other pictures, under another noise."""
    trainer = make(variants.Shipped, version=version)
    g, n = [numbers(2, 5, seed=1)], [numbers(2, 5, seed=2)]
    anchors = []
    draw_anchor = trainer._anchor

    def noted():
        anchors.append(draw_anchor())
        return anchors[-1]

    trainer._anchor = noted
    update, said = trainer.combine(g, n)
    assert len(anchors) == (version == "v5.1")
    assert near(update, variants.shipped(version, g, n, *anchors))
    assert said["cosine"] == pytest.approx(dot(g, n) / (dot(g, g) * dot(n, n)) ** 0.5)
    before = trainer.vectors["word"].detach().clone()
    trainer.step(0)
    assert not before.equal(trainer.vectors["word"])


def test_a_mean_of_negatives_at_the_current_point(variants, make):
    trainer, g = make(variants.Averaged), [numbers(2, 5, seed=9)]
    ns = [[numbers(2, 5, seed=k)] for k in (1, 2, 3)]
    update = [trainer.combine(g, n)[0] for n in ns][-1]
    mean = mix(0.81, ns[0], 0.9, ns[1], 1, ns[2])
    assert near(update, mix(1, g, -dot(g, mean) / dot(mean, mean), mean))
    assert all(group["word"].equal(trainer.vectors["word"]) for group in trainer._groups(1)), (
        "both at the current point"
    )


def test_noise_apart_from_its_picture(variants, make):
    trainer = make(variants.Apart)
    for i in range(3):
        trainer.step(i)
        _, noise, sigma = trainer.denoiser.seen
        assert not noise[:3].equal(noise[3:]) and not sigma[:3].equal(sigma[3:])
        assert abs(noise[3:].std() - 1) < 0.5


def test_a_constant_rate_is_torchs_adam(variants, make):
    trainer, again = make(variants.Constant, method="plain"), make(variants.TextualInversion, method="plain")
    leaf = again.vectors["word"]
    adam = torch.optim.Adam([leaf], lr=0.05)
    for i in range(12):
        generator = torch.Generator().manual_seed(i)
        batch = variants.draw(again.latents, again.denoiser, 3, generator)
        (leaf.grad,) = again._gradients(batch, again._pick_captions(batch.rows, generator))[1]
        adam.step()
        trainer.step(i)
    assert torch.allclose(trainer.vectors["word"], leaf, atol=1e-6)


def test_a_projected_step_never_goes_where_the_negatives_point(variants, make):
    """Adam's own step does: that is why the step is projected and not the gradient."""
    trainer, plain = (
        make(kind, method="reference point") for kind in (variants.StepProjected, variants.TextualInversion)
    )
    along = {}
    for name, each in {"projected": trainer, "gradient": plain}.items():
        for i in range(30):
            before = each.vectors["word"].detach().clone()
            each.step(i)
            moved = each.vectors["word"].detach() - before
            reference = each.reference[0] if name == "projected" else each.average["word"]
            along.setdefault(name, []).append((-(moved * reference).sum() / moved.norm() / reference.norm()).item())
    assert max(along["projected"]) < 1e-4 and max(along["gradient"]) > 1e-2


def test_a_step_is_projected_on_one_side(variants, make):
    trainer, before, n = (
        make(variants.StepProjected, method="reference point"),
        numbers(2, 5, seed=1),
        numbers(2, 5, seed=2),
    )
    trainer.reference, aside = [n], numbers(2, 5, seed=3)
    aside -= (aside * n).sum() / (n * n).sum() * n
    away, towards = before + aside + n, before + aside - n
    assert torch.allclose(trainer._project(before, away, 0), away, atol=1e-6)
    assert torch.allclose(trainer._project(before, towards, 0), before + aside, atol=1e-6)


@pytest.mark.parametrize("keep_norm", [False, True])
def test_a_projected_step_with_the_norm_kept(variants, make, keep_norm):
    trainer = make(variants.StepProjected, method="reference point", settings={"keep_norm": keep_norm})
    for i in range(30):
        said = trainer.step(i)
    assert (abs(said["norm"] - 1) < 1e-5) == keep_norm


@pytest.mark.parametrize("rank", [1, 4])
def test_a_confined_word_never_moves_along_the_negatives(variants, make, rank):
    trainer = make(variants.Confined, method="reference point", rank=rank)
    for i in range(30):
        trainer.step(i)
    moved = (trainer.vectors["word"].detach() - trainer.start["word"]).flatten()
    (rows,) = trainer.directions
    assert rows.shape == (rank, 10) and torch.allclose(rows @ rows.T, torch.eye(rank), atol=1e-5)
    assert moved.norm() > 0.02 and (rows @ moved).abs().max() < 1e-5


def test_confinement_is_to_the_largest_directions(variants, make):
    """Against the eigenvectors of the sum of outer products of the same gradients, in float64."""
    trainer = make(variants.Confined, method="reference point", rank=2, gradients=20)
    again = make(variants.TextualInversion, method="reference point")
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack(
        [variants.Confined._negatives_at_start(again, generator)[0].flatten() for _ in range(20)]
    ).double()
    largest = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -2:]
    assert torch.linalg.svdvals(trainer.directions[0].double() @ largest) == pytest.approx([1, 1], abs=1e-5)


def test_a_bootstrapped_word_sees_more_pictures_half_way(variants, make):
    asked = []

    def paint(vectors):
        asked.append(vectors["word"])
        return numbers(4, *SHAPE, seed=7), [["painted {token}"]] * 4

    trainer, plain = (
        make(variants.Bootstrapped, method="plain", paint=paint),
        make(variants.TextualInversion, method="plain"),
    )
    for i in range(15):
        trainer.step(i), plain.step(i)
    assert not asked and trainer.vectors["word"].equal(plain.vectors["word"])
    trainer.step(15)
    assert asked[0].equal(plain.vectors["word"]) and len(trainer.latents) == len(trainer.captions) == 10
    for i in range(16, 30):
        trainer.step(i)
    assert len(asked) == 1
