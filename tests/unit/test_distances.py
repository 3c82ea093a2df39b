"""Distances between sets against other people's implementations on the same features, and against formulas written out."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import scipy.linalg
import torch
import torch_fidelity.metric_fid
import torch_fidelity.metric_kid
import torch_fidelity.metric_prc
import torchmetrics.image.fid
import torchmetrics.image.kid


@pytest.fixture
def distances(pack):
    return pack.training.distances


@pytest.fixture
def comparison(pack):
    return pack.training.comparison


def cloud(n: int, d: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    """Correlated features with a mean far from 0, as networks give them."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(d)) / d**0.5
    return torch.randn(n, d, generator=generator) @ mix * scale + shift + 0.5


PAIRS = {
    "more pictures than numbers": (cloud(300, 40, 1), cloud(260, 40, 2, 0.2, 1.3)),
    "fewer pictures than numbers": (cloud(30, 200, 3), cloud(25, 200, 4, 0.1)),
    "nearly the same": (cloud(300, 16, 5), cloud(300, 16, 6)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_frechet_is_the_formula(distances, name):
    x, y = (z.double() for z in PAIRS[name])
    a, b = x.T.cov(), y.T.cov()
    root = torch.from_numpy(scipy.linalg.sqrtm((a @ b).numpy()).real.copy())
    expected = (x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace() - 2 * root.trace()
    tolerance = 1e-3 if name.startswith("fewer") else 1e-6  # the root of a singular product is the oracle's weak point
    assert distances.frechet(x.float(), y.float()) == pytest.approx(expected.item(), rel=tolerance, abs=1e-6)


@pytest.mark.parametrize("name", ["more pictures than numbers", "nearly the same"])
def test_frechet_agrees_with_two_libraries(distances, name):
    x, y = PAIRS[name]
    fid = torch_fidelity.metric_fid
    theirs = fid.fid_statistics_to_metric(fid.fid_features_to_statistics(x), fid.fid_features_to_statistics(y), False)
    assert distances.frechet(x, y) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    moments = [(z.double().mean(0), z.double().T.cov()) for z in (x, y)]
    other = torchmetrics.image.fid._compute_fid(*moments[0], *moments[1])
    assert distances.frechet(x, y) == pytest.approx(other.item(), rel=1e-4)


def test_frechet_through_the_small_matrix_and_the_large(distances):
    x, y = PAIRS["fewer pictures than numbers"]
    large = distances.frechet_of_moments(distances.moments(x), distances.moments(y))
    assert distances.frechet(x, y) == pytest.approx(large, rel=1e-6)


def test_moments_do_not_depend_on_blocks(distances, monkeypatch):
    x = cloud(100, 6, 1, shift=1000.0)
    monkeypatch.setattr(distances, "BLOCK", 7)
    made = distances.moments(x)
    assert torch.allclose(made.covariance, x.double().T.cov(), rtol=1e-12)
    assert torch.allclose(made.mean, x.double().mean(0), rtol=1e-14)


def test_kid_agrees_on_the_same_rows(distances):
    x, y = PAIRS["more pictures than numbers"]
    subsets = distances.draw_subsets(len(x), len(y), 100, 5, seed=1)
    for ours, (i, j) in zip(distances.kid(x, y, subsets), subsets, strict=True):
        a, b = x[i].double().numpy(), y[j].double().numpy()
        theirs = torch_fidelity.metric_kid.kernel_mmd(
            a, b, kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1
        )
        assert ours.item() == pytest.approx(theirs, rel=1e-9)
        other = torchmetrics.image.kid.poly_mmd(torch.from_numpy(a), torch.from_numpy(b))
        assert ours.item() == pytest.approx(other.item(), rel=1e-9)


def test_subsets_are_drawn_without_repetition(distances):
    for rows in (rows for pair in distances.draw_subsets(20, 30, 15, 4, seed=2) for rows in pair):
        assert len(set(rows.tolist())) == 15


def test_cmmd_is_its_formula(distances):
    x, y = PAIRS["more pictures than numbers"]
    x, y = x[:20], y[:30]

    def kernel(p, q):
        p, q = ([v / math.sqrt(sum(w * w for w in z)) for v in z] for z in (p.tolist(), q.tolist()))
        return math.exp(-sum((v - w) ** 2 for v, w in zip(p, q, strict=True)) / (2 * 10**2))

    def mean(p, q):
        return sum(kernel(a, b) for a in p.double() for b in q.double()) / (len(p) * len(q))

    value, error = distances.cmmd(x, y)
    assert value == pytest.approx(1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)), rel=1e-8)
    assert error > 0


def test_the_error_of_mmd_is_its_spread_over_fresh_sets(distances):
    """60 pairs of sets from the same two distributions: their spread, which the error is said from one pair to be."""
    pairs = [(cloud(80, 8, 100 + i), cloud(90, 8, 500 + i, 0.4)) for i in range(60)]
    said = [distances.mmd2(x.double(), y.double(), distances.cubic, True) for x, y in pairs]
    spread = torch.tensor([value for value, _ in said]).std().item()
    errors = torch.tensor([error for _, error in said])
    assert errors.mean().item() == pytest.approx(spread, rel=0.25)


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("name", PAIRS)
def test_precision_and_recall_agree(distances, name, k):
    made, real = PAIRS[name]
    theirs = torch_fidelity.metric_prc.calculate_precision_recall_full(made.double(), real.double(), k)
    ours = distances.overlap(made, real, k)
    assert (ours.precision.mean().item(), ours.recall.mean().item()) == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("name", PAIRS)
def test_density_and_coverage_are_their_formulas(distances, name):
    """Naeem et al. 2020, equations 3 and 4, pair by pair."""
    made, real, k = *PAIRS[name], 5
    made, real = made.double(), real.double()
    radius = [sorted(math.dist(a, b) for b in real.tolist())[k] for a in real.tolist()]
    inside = [[math.dist(a, b) <= r for b in made.tolist()] for a, r in zip(real.tolist(), radius, strict=True)]
    ours = distances.overlap(made, real, k)
    assert ours.density.mean().item() == pytest.approx(sum(map(sum, inside)) / (k * len(made)))
    assert ours.coverage.mean().item() == pytest.approx(sum(map(any, inside)) / len(real))


def test_blocks_change_nothing(distances, monkeypatch):
    x, y = PAIRS["more pictures than numbers"]

    def measured():
        balls = [rows.mean().item() for rows in distances.overlap(x, y, 5)]
        return [*balls, *distances.cmmd(x, y), *distances.mmd2(x.double(), y.double(), distances.cubic, True)]

    whole = measured()
    monkeypatch.setattr(distances, "BLOCK", 64)
    assert measured() == pytest.approx(whole, rel=1e-9)


def seen(pack, values: torch.Tensor, identity: str = "one"):
    return pack.training.features.Features(values, f"extractor {identity}", identity)


def test_the_same_set_twice(pack, comparison):
    x = seen(pack, PAIRS["nearly the same"][0])
    figures = {f.metric: f for f in comparison.compare(x, x)}
    assert figures["FID"].value == pytest.approx(0, abs=1e-9)
    assert figures["CMMD"].value == pytest.approx(0, abs=1e-9)
    assert figures["precision"].value == figures["recall"].value == figures["coverage"].value == 1


def test_a_set_as_good_as_the_reference_gets_about_its_floor(pack, comparison):
    made, real = seen(pack, cloud(300, 16, 5)), seen(pack, cloud(600, 16, 6))
    far = seen(pack, cloud(300, 16, 5, 0.5))
    good, bad = ({f.metric: f for f in comparison.compare(m, real)} for m in (made, far))
    for metric in ("FID", "CMMD"):
        assert good[metric].value < 3 * good[metric].floor < bad[metric].low
    assert bad["density"].high < good["density"].value and bad["coverage"].high < good["coverage"].value


def test_the_jackknife_is_the_spread_over_fresh_sets(distances, comparison):
    pairs = [(cloud(100, 6, 100 + i), cloud(100, 6, 500 + i, 0.5)) for i in range(60)]
    spread = torch.tensor([distances.frechet(x, y) for x, y in pairs]).std().item()
    said = torch.tensor([comparison.jackknife(distances.frechet, x, y) for x, y in pairs]).mean().item()
    assert said == pytest.approx(spread, rel=0.3)


@pytest.mark.parametrize("n, m", [(40, 400), (400, 60)])
def test_the_floor_is_of_sets_as_large_as_what_is_judged(pack, comparison, n, m):
    """From one and the same source no interval of a distance lies above its floor, whatever the sizes."""
    real, made = seen(pack, cloud(m, 16, 6)), seen(pack, cloud(n, 16, 5))
    figures = {f.metric: f for f in comparison.compare(made, real)}
    assert all(figures[k].low < figures[k].floor for k in ("FID", "CMMD"))
    own, rest = comparison.floor_sizes(n, m)
    assert (own, rest) == ((40, 360) if n < m else (30, 30))
    remarks = comparison.remarks(list(figures.values()), n, m)
    assert f"floor: {own} pictures of the reference against its other {rest}" in remarks[-1]
    assert ("too high" in remarks[-1]) == (n > m)


def test_the_order_of_the_pictures_changes_no_error(distances, comparison):
    """Ten kinds in turn: every tenth picture is of one kind."""
    kinds = torch.randn(10, 6, generator=torch.Generator().manual_seed(0)) * 5
    in_turn = [kinds.repeat(20, 1) + cloud(200, 6, seed) for seed in (1, 2)]
    in_rows = [z.view(20, 10, 6).transpose(0, 1).reshape(200, 6) for z in in_turn]
    errors = [
        comparison.jackknife(distances.frechet, *sets).item() for sets in (in_turn, in_rows, (in_turn[0], in_rows[1]))
    ]
    assert max(errors) < 3 * min(errors)


def test_intervals_hold_what_they_promise(pack, comparison):
    """95 % of them, with other pictures from the same two sources; 20 pairs of sets, so 15 of 20 at the least."""
    runs = [
        {
            f.metric: f
            for f in comparison.compare(seen(pack, cloud(80, 8, 100 + i, 0.2)), seen(pack, cloud(80, 8, 500 + i)))
        }
        for i in range(20)
    ]
    for metric in runs[0]:
        mean = sum(run[metric].value for run in runs) / len(runs)
        assert sum(run[metric].low <= mean <= run[metric].high for run in runs) >= 15, metric


def test_metrics_that_cannot_bear_so_few_pictures_say_so(pack, comparison):
    x, y = seen(pack, cloud(4, 8, 1)), seen(pack, cloud(5, 8, 2))
    figures = {f.metric: f for f in comparison.compare(x, y)}
    assert (
        figures["precision"].value is None
        and "needs 6 pictures on each side, and there are 4" in figures["precision"].note
    )
    assert figures["FID"].value is not None and "mostly noise below 17 pictures" in figures["FID"].note
    assert "needs 6" in comparison.table(list(figures.values()), 4, 5, "one")


def test_features_of_two_extractors_are_not_compared(pack, comparison):
    x, y = seen(pack, cloud(10, 8, 1)), seen(pack, cloud(10, 8, 2), "another")
    with pytest.raises(ValueError, match=r"extractor one .* extractor another .* same Load Features"):
        comparison.compare(x, y)
    with pytest.raises(ValueError, match="8 numbers each.* \\(6\\)"):
        comparison.compare(x, seen(pack, cloud(10, 6, 2)))


def test_large_sets_never_make_a_whole_table():
    """8000 x 8000 would take 512 MB."""
    script = """if True:
        import json, tempfile, torch
        from pathlib import Path
        from harness.boot import boot, load_pack, prepare
        from harness.timing import peak
        prepare(Path(tempfile.mkdtemp()))
        boot()
        features, comparison = load_pack().training.features, __import__("counterpoint.training.comparison").training.comparison
        few, many = ([features.Features(torch.randn(n, 8) + i, "a", "a") for i in range(2)] for n in (3_000, 8_000))
        comparison.compare(*few)  # the libraries of linear algebra take their own memory the first time
        print(json.dumps(peak(lambda: comparison.compare(*many))))
    """
    tests = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", script], cwd=tests, check=True, stdout=subprocess.PIPE)
    main, _ = json.loads(done.stdout.splitlines()[-1])
    assert main < 350e6, main
