"""What contrast removes from a gradient, against the formula written out in float64."""

import math

import numpy
import pytest
import torch

SIGNS = [(1, 1), (1, -1), (-1, 1), (-1, -1)]  # of g+ . n in each of two encoders


@pytest.fixture(scope="module")
def project_out(pack):
    return pack.training.gradients.project_out


def gradients(signs=(1, 1), scale: float = 1.0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Two encoders of other widths and lengths: g+ = sign * n + something across, as float32."""
    generator = torch.Generator().manual_seed(5)
    draws = [
        (torch.randn(3, width, generator=generator), torch.randn(3, width, generator=generator)) for width in (8, 20)
    ]
    negative = [n * (10.0 ** (-i)) for i, (n, _) in enumerate(draws)]
    positive = [scale * (0.6 * sign * n + 0.8 * r) for sign, (n, r) in zip(signs, draws, strict=True)]
    return positive, negative


def by_hand(positive, negative, strength, one_sided) -> list[numpy.ndarray]:
    """g+ - strength (g+.n / n.n) n, every encoder by itself."""
    out = []
    for g, n in (
        (g.double().numpy().ravel(), n.double().numpy().ravel()) for g, n in zip(positive, negative, strict=True)
    ):
        leave = one_sided and float(g @ n) < 0
        out.append(g if leave else g - strength * (g @ n) / (n @ n) * n)
    return out


def flat(tensors) -> numpy.ndarray:
    return numpy.concatenate([t.double().numpy().ravel() for t in tensors])


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("signs", SIGNS)
def test_projection_is_the_formula(project_out, signs, one_sided, strength, scale):
    positive, negative = gradients(signs, scale)
    kept = [t.clone() for t in positive + negative]
    out, said = project_out(positive, negative, strength, one_sided)
    right = by_hand(positive, negative, strength, one_sided)
    for u, want, g in zip(out, right, positive, strict=True):
        assert u.shape == g.shape and u.dtype == g.dtype
        numpy.testing.assert_allclose(u.numpy().ravel(), want, rtol=0, atol=1e-6 * scale)
    g, n, u = flat(positive), flat(negative), numpy.concatenate(right)
    assert said["cosine"] == pytest.approx(g @ n / math.sqrt((g @ g) * (n @ n)), abs=1e-6)
    assert said["removed"] == pytest.approx(numpy.linalg.norm(g - u) / numpy.linalg.norm(g), abs=1e-6)
    assert all(a.equal(b) for a, b in zip(kept, positive + negative, strict=True)), "the inputs were written to"


@pytest.mark.parametrize("signs", SIGNS)
@pytest.mark.parametrize("one_sided", [False, True])
def test_nothing_is_left_along_the_negative(project_out, signs, one_sided):
    out, _ = project_out(*gradients(signs), 1.0, one_sided)
    for u, n, sign, g in zip(out, gradients(signs)[1], signs, gradients(signs)[0], strict=True):
        if one_sided and sign < 0:
            assert u.equal(g), "it pointed the other way and is left as it was, bit for bit"
        else:
            u, n = u.double().ravel(), n.double().ravel()
            assert abs(u @ n) / (u.norm() * n.norm()) <= 1e-5


@pytest.mark.parametrize("scale", [1e-7, 1e7])
def test_figures_do_not_depend_on_the_scale(project_out, scale):
    positive, negative = gradients((1, -1))
    _, want = project_out(positive, negative, 1.0)
    _, said = project_out([scale * g for g in positive], [scale * n for n in negative], 1.0)
    assert said == pytest.approx(want, abs=1e-5)


def test_strength_nothing_changes_nothing(project_out):
    positive, negative = gradients()
    out, said = project_out(positive, negative, 0.0)
    assert all(u.equal(g) for u, g in zip(out, positive, strict=True)) and said["removed"] == 0


@pytest.mark.parametrize("length", [0.0, 1e-20])
def test_no_direction_removes_nothing(project_out, length):
    positive, negative = gradients()
    negative = [n * length for n in negative]
    out, said = project_out(positive, negative, 1.0)
    assert all(u.equal(g) for u, g in zip(out, positive, strict=True))
    assert said["removed"] == 0 and math.isfinite(said["cosine"])


def test_no_gradient_stays_none(project_out):
    positive, negative = gradients()
    out, said = project_out([0 * g for g in positive], negative, 1.0)
    assert not any(u.any() for u in out) and all(math.isfinite(v) for v in said.values())


def test_encoders_do_not_look_at_each_other(project_out):
    positive, negative = gradients((1, 1))
    negative[1] = torch.zeros_like(negative[1])
    both, _ = project_out(positive, negative, 1.0)
    alone, _ = project_out(positive[:1], negative[:1], 1.0)
    assert both[0].equal(alone[0]) and both[1].equal(positive[1])


def test_long_gradients_do_not_overflow(project_out):
    """Their squares are beyond float32, their projection is not."""
    positive, negative = gradients()
    negative = [n * 1e22 for n in negative]
    out, said = project_out(positive, negative, 1.0)
    for u, want in zip(out, by_hand(positive, negative, 1.0, False), strict=True):
        numpy.testing.assert_allclose(u.numpy().ravel(), want, rtol=0, atol=1e-6)
    assert all(math.isfinite(x) for x in said.values())
