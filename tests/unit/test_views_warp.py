"""Warping on a grid of tokens, against a loop over them."""

import itertools

import pytest
import torch

from harness.small_nets import numbers


@pytest.fixture(scope="module")
def views(pack):
    return pack.nodes.views


def matches(views, pairs, count, size):
    """`pairs` {(a, b): rows of x, y, x, y}."""
    points = {p: (torch.tensor(rows)[:, :2], torch.tensor(rows)[:, 2:]) for p, rows in pairs.items()}
    return views.correspondences.Correspondences(count, size, points)


def same(views, count, height, width):
    middle = views.geometry.centres(height, width).flatten(0, 1).float().tolist()
    pairs = {(a, b): [m + m for m in middle] for a in range(count) for b in range(count) if a != b}
    return matches(views, pairs, count, (height, width))


def scattered(views, count=3, height=12, width=18, share=0.7, seed=1):
    """Some pixels of each view, and where they are in another, by a shift of its own and a little at random."""
    generator, middle, pairs = (
        torch.Generator().manual_seed(seed),
        views.geometry.centres(height, width).flatten(0, 1),
        {},
    )
    for a in range(count):
        for b in range(count):
            there = middle + (torch.rand(2, generator=generator) - 0.5) * 0.3 + torch.randn(middle.shape, generator=generator) * 0.01  # fmt: skip
            seen = (torch.rand(len(middle), generator=generator) < share) & ((there > 0) & (there < 1)).all(1)
            if a != b:
                pairs[a, b] = torch.cat([middle, there], 1)[seen].float().tolist()
    return matches(views, pairs, count, (height, width))


def slow(views, of, x, strength, height, width, noise=False):
    """(n, tokens, d): every point of every pair of views by itself, then every token."""
    out, enough = x.double().clone(), views.warp.ENOUGH
    fine = [max(1, -(-side // measured)) for side, measured in zip((height, width), of.size, strict=True)]
    size = [n * m for n, m in zip(fine, of.size, strict=True)]
    for view in range(1, of.views):
        inside = [inside_tokens(of.points[view, source], fine, size, height, width) for source in range(view)]
        for token in range(height * width):
            for source in range(view):
                points = inside[source].get(divmod(token, width), [])
                if points and len(points) >= enough * size[0] * size[1] / (height * width):
                    _, qx, qy = min(points, key=lambda each: each[0])
                    origin = [min(max(int(q * side // 1), 0), side - 1) for q, side in ((qy, height), (qx, width))]
                    f1, f2 = out[source, origin[0] * width + origin[1]], out[view, token]
                    mixed = strength * f1 + (1 - strength) * f2
                    out[view, token] = mixed / ((strength**2 + (1 - strength) ** 2) ** 0.5 if noise else 1)
                    break
    return out


def inside_tokens(points, fine, size, height, width) -> dict[tuple[int, int], list[tuple]]:
    """By row and column of a token, for all that lies in it how far it is from the middle, and what the middle is in the other view."""
    found = {}
    for (px, py), (qx, qy) in zip(*(p.double().tolist() for p in points), strict=True):
        for i, j in itertools.product(range(fine[0]), range(fine[1])):
            x, y = px + (j - (fine[1] - 1) / 2) / size[1], py + (i - (fine[0] - 1) / 2) / size[0]
            row, column = int(y * height), int(x * width)
            middle = ((column + 0.5) / width, (row + 0.5) / height)
            far = ((x - middle[0]) * width) ** 2 + ((y - middle[1]) * height) ** 2
            found.setdefault((row, column), []).append((far, qx + middle[0] - px, qy + middle[1] - py))
    return found


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize("height, width", [(12, 18), (4, 6), (6, 6), (5, 7), (24, 36), (20, 30)])
def test_every_token_is_the_formulas(views, height, width, strength, noise):
    of, x = scattered(views), numbers(3, height * width, 5)
    plan = views.warp.steps(of, height, width)
    got = views.warp.warped(x, plan, strength, noise=noise)
    expected = slow(views, of, x, strength, height, width, noise)
    assert (got - expected).abs().max() <= 1e-6
    assert (got[1:] - x[1:]).abs().max() > 0.1


def test_the_first_view_and_what_is_hidden_stay_to_the_bit(views):
    of, x = scattered(views, share=0.4), numbers(3, 54, 5)
    plan = views.warp.steps(of, 6, 9)
    got, touched = views.warp.warped(x, plan, 0.7), torch.zeros(3, 54, dtype=torch.bool)
    for step in plan:
        assert not touched[step.view, step.tokens].any(), "twice"
        touched[step.view, step.tokens] = True
    assert 0 < touched.float().mean() < 0.7 and not touched[0].any()
    assert got[~touched].equal(x[~touched]) and (got[touched] - x[touched]).abs().amax(1).min() > 0


def test_where_nothing_moves_nothing_changes(views):
    """Views that show the same: equal features stay, and those of one view become the other's, token by token."""
    plan = views.warp.steps(same(views, 3, 8, 8), 8, 8)
    one = numbers(1, 64, 4)
    assert views.warp.warped(one.expand(3, -1, -1), plan, 1.0).equal(one.expand(3, -1, -1))
    x = numbers(3, 64, 4)
    assert views.warp.warped(x, plan, 1.0).equal(x[:1].expand(3, -1, -1))
    assert views.warp.warped(x, plan, 0.0) is x and views.warp.warped(x, [], 1.0) is x
    half = views.warp.warped(x, views.warp.steps(same(views, 2, 8, 8), 8, 8), 0.5)
    assert half[1].equal((x[0] + x[1]) / 2) and half[2].equal(x[2])


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.2])
def test_noise_keeps_its_variance(views, strength):
    """And without the correction it does not, where it is mixed."""
    plan = views.warp.steps(scattered(views, share=0.9), 64, 96)
    x = numbers(3, 16, 64, 96)
    got = views.warp.warped_maps(x, plan, strength, noise=True)
    assert (got[1:] - x[1:]).abs().mean() > 0.1
    assert ((got.std((1, 2, 3)) - 1).abs() <= 0.01).all()
    if strength < 1:
        assert views.warp.warped_maps(x, plan, strength)[2].std() < 0.95


def test_done_twice_is_done_once(views):
    """At full strength, and it is linear: on these the equality of latents with Euler rests."""
    plan = views.warp.steps(scattered(views, count=4), 12, 18)
    x, y = numbers(4, 8, 12, 18), numbers(4, 8, 12, 18, seed=2)
    once = views.warp.warped_maps(x, plan, 1.0)
    assert views.warp.warped_maps(once, plan, 1.0).equal(once)
    both = views.warp.warped_maps(2 * x - 3 * y, plan, 1.0)
    assert (both - 2 * once + 3 * views.warp.warped_maps(y, plan, 1.0)).abs().max() <= 1e-5


def test_tokens_may_lie_along_any_axis_and_in_half_precision(views):
    plan, x = views.warp.steps(scattered(views), 6, 9), numbers(3, 2, 54, 5)
    along = views.warp.warped(x, plan, 0.4, axis=2)
    apart = torch.stack([views.warp.warped(x[:, head], plan, 0.4) for head in range(2)], 1)
    assert along.equal(apart)
    half = views.warp.warped(x.bfloat16(), plan, 0.4, axis=2)
    assert half.dtype == torch.bfloat16 and (half - along).abs().max() < 0.05


def test_neighbours_that_leave_gaps_are_enough(views):
    """A quarter of a token's pixels."""
    middle = views.geometry.centres(16, 16).float()
    for every, expected in ((2, 16), (4, 0)):
        some = middle[::every, ::every].flatten(0, 1).tolist()
        of = matches(views, {(1, 0): [m + m for m in some]}, 2, (16, 16))
        plan = views.warp.steps(of, 4, 4)
        assert sum(len(step.tokens) for step in plan) == expected
