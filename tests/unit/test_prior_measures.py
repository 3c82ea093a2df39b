"""Figures of a prior against slow oracles, and what each says of priors that are known to be good, blurred, or collapsed."""

import importlib
import math

import pytest
import scipy.linalg
import torch

from harness.small_nets import numbers


@pytest.fixture(scope="module")
def measures(pack):
    return importlib.import_module(f"{pack.__name__}.training.prior.measures")


TEXTS, MADE, REAL, WIDTH = 7, 4, 3, 5
made, real = numbers(TEXTS, MADE, WIDTH, seed=1).double() + 1, numbers(TEXTS, REAL, WIDTH, seed=2).double() * 1.5 + 1
population = numbers(60, WIDTH, seed=3).double() * torch.tensor([0.5, 1, 2, 3, 9]) + 1


def cos(a, b) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def white(x):
    return ((x - population.mean(0)) / population.std(0)).tolist()


def distance(x, y) -> float:
    """Energy distance of two lists of rows, each pair by itself; a row is not its own pair."""

    def within(z):
        return mean(math.dist(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j)

    return 2 * mean(math.dist(a, b) for a in x for b in y) - within(x) - within(y)


def test_cosines_are_of_every_pair_of_one_text(measures):
    known = mean(cos(a, b) for x, y in zip(made.tolist(), real.tolist(), strict=True) for a in x for b in y)
    centred = mean(cos(a, b) for x, y in zip(white(made), white(real), strict=True) for a in x for b in y)
    found = measures.figures(made, real, population)
    assert found["cosine"] == pytest.approx(known) and found["centred cosine"] == pytest.approx(centred)


def test_frechet_is_the_formula_per_coordinate(measures):
    x, y = (torch.tensor(white(z)).double().flatten(0, 1) for z in (made, real))
    a, b = x.T.cov(), y.T.cov()
    root = torch.from_numpy(scipy.linalg.sqrtm((a @ b).numpy()).real.copy())
    known = (x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace() - 2 * root.trace()
    assert measures.figures(made, real, population)["frechet"] == pytest.approx(known.item() / WIDTH, rel=1e-6)


def test_energy_is_the_mean_of_distances(measures):
    x, y = white(made), white(real)
    found = measures.figures(made, real, population)
    assert found["energy"] == pytest.approx(distance(sum(x, []), sum(y, [])), rel=1e-6)
    assert found["energy per text"] == pytest.approx(mean(distance(a, b) for a, b in zip(x, y, strict=True)), rel=1e-6)


def test_diversity_and_norm_are_ratios(measures):
    def variance(rows):
        return mean(sum((v - mean(c)) ** 2 for v in c) / (len(c) - 1) for c in zip(*rows, strict=True))

    found = measures.figures(made, real, population)
    known = mean(map(variance, white(made))) / mean(map(variance, white(real)))
    lengths = [mean(math.hypot(*row) for rows in z.tolist() for row in rows) for z in (made, real)]
    assert found["diversity"] == pytest.approx(known) and found["norm"] == pytest.approx(lengths[0] / lengths[1])


def test_rank_counts_the_texts_that_are_nearer(measures):
    texts = [[mean(c) for c in zip(*rows, strict=True)] for rows in white(real)]
    places = [
        1 + sum(cos(row, t) > cos(row, texts[i]) for t in texts) for i, rows in enumerate(white(made)) for row in rows
    ]
    assert measures.figures(made, real, population)["rank"] == pytest.approx(mean(places))


def test_rank_of_equals_is_their_middle(measures):
    """Four texts of one picture are all alike: (1 + 4) / 2."""
    same = numbers(1, 2, WIDTH, seed=4).double().expand(4, 2, WIDTH)
    assert measures.rank(same, same) == 2.5


def test_blocks_change_nothing(measures, monkeypatch):
    whole = measures.figures(made, real, population)
    monkeypatch.setattr(measures, "BLOCK", 3)
    monkeypatch.setattr(importlib.import_module(measures.__name__.replace("prior.measures", "distances")), "BLOCK", 3)
    assert measures.figures(made, real, population) == pytest.approx(whole, rel=1e-9)


def drawn(count: int, each: int, seed: int, left: float = 1.0) -> torch.Tensor:
    """A world in which a text says a mean and leaves a Gaussian of this deviation around it."""
    said = numbers(count, 1, 8, seed=1).double() + 2
    return said + left * torch.randn(count, each, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_true_draws_are_told_from_blurred_and_collapsed_ones(measures):
    there, everything = drawn(200, 8, 2), drawn(1000, 1, 3)[:, 0]
    priors = {
        "true": drawn(200, 8, 4),
        "timid": drawn(200, 8, 4, left=0.5),
        "wild": drawn(200, 8, 4, left=2.0),
        "collapsed": drawn(200, 8, 4, left=1e-3),
    }
    found = {name: measures.figures(x, there, everything) for name, x in priors.items()}
    assert max(found, key=lambda name: found[name]["cosine"]) == "collapsed"
    for best in ("frechet", "energy", "energy per text"):
        assert min(found, key=lambda name: found[name][best]) == "true"
    assert found["true"]["diversity"] == pytest.approx(1, abs=0.05)
    assert found["timid"]["diversity"] == pytest.approx(0.25, abs=0.02)
    assert found["wild"]["diversity"] == pytest.approx(4, abs=0.2)
    assert found["collapsed"]["diversity"] < 1e-5
    assert found["true"]["norm"] == pytest.approx(1, abs=0.02)
    assert abs(found["true"]["energy per text"]) < 0.03 and abs(found["true"]["energy"]) < 0.01
    assert found["true"]["centred cosine"] == pytest.approx(0.5, abs=0.03)  # half of the variance is what the text says
    assert found["collapsed"]["rank"] < found["true"]["rank"] < found["wild"]["rank"] < 200 / 2


def test_embeddings_of_other_texts_rank_by_chance(measures):
    there = drawn(400, 2, 2)
    rank = measures.figures(
        drawn(400, 4, 4)[torch.randperm(400, generator=torch.Generator().manual_seed(0))], there, there[:, 0]
    )["rank"]
    assert rank == pytest.approx(401 / 2, rel=0.15)


@pytest.mark.parametrize("left", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("each", [2, 8])
def test_diversity_needs_but_one_picture_of_a_text(measures, left, each):
    """True draws get 1, whatever their number; a collapsed prior gets 0."""
    there = drawn(4000, 1, 2, left)
    assert measures.diversity(drawn(4000, each, 4, left), there) == pytest.approx(1, abs=0.05)
    assert measures.diversity(drawn(4000, each, 4, 1e-3), there) < 1e-4


def test_one_picture_of_a_text_is_enough_for_all_but_its_own_energy(measures):
    found = measures.figures(made, real[:, 0], population)
    assert found == measures.figures(made, real[:, :1], population)
    assert set(measures.figures(made, real, population)) - set(found) == {"energy per text"}
    assert all(math.isfinite(value) for value in found.values())


def test_they_are_printed_together(measures):
    found = measures.figures(made, real, population)
    lines = measures.table({"ridge": found, "whitened": {**found, "frechet": 123.4}}).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["ridge", "whitened"]
    for name in ("cosine", "centred cosine", "frechet", "energy per text", "diversity", "norm", "rank"):
        assert name in lines[0]
    assert f"{found['cosine']:.3f}" in lines[1] and " 123 " in lines[2]


@pytest.mark.parametrize(
    "lacking", [("centred cosine",), ("frechet", "energy", "energy per text"), ("diversity",), ("norm",)]
)
def test_cosine_is_never_printed_alone(measures, lacking):
    found = measures.figures(made, real, population)
    left = {k: v for k, v in found.items() if k not in lacking}
    with pytest.raises(
        ValueError, match=f"figures of paper lack {' or '.join(lacking)}: a collapsed prior wins by cosine"
    ):
        measures.table({"ridge": found, "paper": left})
    one = {k: v for k, v in found.items() if k not in lacking[1:]}
    assert measures.table({"paper": one})


def test_shapes_that_do_not_fit(measures):
    with pytest.raises(
        ValueError, match=r"shape \(7, 4, 5\), real ones of \(6, 3, 5\) and a population of \(60, 5\) do not fit"
    ):
        measures.figures(made, real[:6], population)
    with pytest.raises(ValueError, match="do not fit"):
        measures.figures(made, real, population[:, :4])
    with pytest.raises(ValueError, match="Make 2 or more embeddings for each text"):
        measures.figures(made[:, :1], real, population)
    with pytest.raises(ValueError, match="All 60 embeddings of the population are the same"):
        measures.figures(made, real, torch.ones(60, WIDTH))
