"""Which pictures are kept: SynCD's rule against a slow loop, and made by hand."""

import importlib
import math

import pytest
import torch

from harness.small_nets import numbers


@pytest.fixture
def filtering(pack):
    return importlib.import_module(f"{pack.__name__}.training.filtering")


def slowly(sets, features, fidelity, aesthetic, bounds) -> list[bool]:
    """The rule picture by picture, from the features themselves."""
    count = len(sets)

    def cosine(i, j) -> float:
        a, b = features[i].tolist(), features[j].tolist()
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))

    def survives(i) -> bool:
        partners = [j for j in range(count) if j != i and sets[j] == sets[i]]
        paired = any(bounds.least <= cosine(i, j) <= bounds.most for j in partners)
        return paired and aesthetic[i] >= bounds.aesthetic and fidelity[i] >= bounds.fidelity

    alive = [survives(i) for i in range(count)]
    return [alive[i] and sum(alive[j] for j in range(count) if sets[j] == sets[i]) >= 2 for i in range(count)]


@pytest.mark.parametrize("seed", range(8))
def test_the_rule_is_the_slow_loop(filtering, seed):
    generator = torch.Generator().manual_seed(seed)
    sets = torch.randint(0, 25, (90,), generator=generator).tolist()  # sets of any size, in any order
    features = numbers(25, 4, seed=seed)[sets] + 0.45 * numbers(90, 4, seed=seed + 100)
    aesthetic, fidelity = 6 + numbers(90, seed=seed + 200), 25 + 4 * numbers(90, seed=seed + 300)
    bounds = filtering.Bounds(0.7, 0.98, 23.0, 5.5)
    scores = filtering.Scores(filtering.pairs(features, sets, [True] * 90), fidelity, aesthetic)
    faults = filtering.judge(sets, scores, bounds)
    want = slowly(sets, features, fidelity.tolist(), aesthetic.tolist(), bounds)
    assert [not own for own in faults] == want
    assert 5 < sum(want) < 85, "the draw does not try the rule"


def judged(filtering, cosines: list[list[float]], bounds, sets=None, **scores) -> list[list[str]]:
    """Kinds of faults of one set whose cosines are given."""
    sets = sets or [1] * len(cosines)
    table = torch.tensor(cosines, dtype=torch.float64)
    faults = filtering.judge(sets, filtering.Scores({1: table}, **scores), bounds)
    return [[fault.kind for fault in own] for own in faults]


def test_one_pair_in_between_is_enough(filtering):
    bounds = filtering.Bounds(0.7, 0.98)
    assert judged(filtering, [[1, 0.8, 0.1], [0.8, 1, 0.99], [0.1, 0.99, 1]], bounds) == [[], [], [filtering.ALIKE]]
    assert judged(filtering, [[1, 0.99, 0.8], [0.99, 1, 0.75], [0.8, 0.75, 1]], bounds) == [[], [], []], (
        "as published: copies stay where each makes a pair with a third picture"
    )


def test_the_bounds_belong_to_what_lies_between(filtering):
    exact = [[1, 0.5], [0.5, 1]]
    assert judged(filtering, exact, filtering.Bounds(0.5, 0.5)) == [[], []]
    assert judged(filtering, exact, filtering.Bounds(0.5 + 1e-9, 1)) == [[filtering.OTHER]] * 2
    assert judged(filtering, exact, filtering.Bounds(-1, 0.5 - 1e-9)) == [[filtering.ALIKE]] * 2


def test_each_bound_can_be_off(filtering):
    """The same pictures: with everything off all are kept, even copies and opposites."""
    table, off = [[1, 1.0, -1.0], [1.0, 1, -1.0], [-1.0, -1.0, 1]], filtering.Bounds()
    scores = {"fidelity": torch.tensor([0.0, 90, 0]), "aesthetic": torch.tensor([-50.0, 9, 9])}
    assert judged(filtering, table, off, **scores) == [[], [], []]
    assert judged(filtering, table, off._replace(least=0.7), **scores) == [[], [], [filtering.OTHER]]
    assert judged(filtering, table, off._replace(most=0.98), **scores) == [[], [], []]
    assert judged(filtering, table, off._replace(fidelity=20), **scores) == [
        [filtering.PROMPT],
        [filtering.ALONE],
        [filtering.PROMPT],
    ]
    assert judged(filtering, table, off._replace(aesthetic=6), **scores) == [[filtering.PLAIN], [], []]


def test_a_picture_may_have_several_faults_and_all_are_said(filtering):
    bounds = filtering.Bounds(0.7, 0.98, 20, 6)
    scores = {"fidelity": torch.tensor([10.0, 30]), "aesthetic": torch.tensor([1.0, 7])}
    table = torch.tensor([[1, 0.2], [0.2, 1]])
    first, second = filtering.judge([4, 4], filtering.Scores({4: table}, **scores), bounds)
    assert [f.kind for f in first] == [filtering.PLAIN, filtering.PROMPT, filtering.OTHER]
    assert [f.text for f in second] == ["another object: 0.2 at best, under 0.7"]
    assert filtering.counted([first, second]) == {filtering.OTHER: 2, filtering.PLAIN: 1, filtering.PROMPT: 1}


def test_a_picture_without_a_subject_is_compared_with_nothing(filtering):
    features, sets = numbers(1, 3).expand(4, 3) + 0.1 * numbers(4, 3, seed=2), [1, 1, 1, 2]
    tables = filtering.pairs(features, sets, [True, False, True, True])
    assert tables[1].isnan().sum() == 5 and tables[1][0, 2] > 0.7
    kinds = [[f.kind for f in own] for own in filtering.judge(sets, filtering.Scores(tables), filtering.Bounds(0.7, 1))]
    assert kinds == [[], [filtering.EMPTY], [], [filtering.ALONE]]
    assert filtering.pair_values(tables).tolist() == [tables[1][0, 2].item()]


def test_an_aesthetic_head_is_a_line_through_unit_features(filtering):
    features, weight, bias = 7 * numbers(5, 8), numbers(1, 8, seed=2), torch.tensor([3.0])
    head = filtering.linear_head({"weight": weight, "bias": bias}, "a.pth")
    got = filtering.aesthetics(features, head, "a.pth")
    for row, score in zip(features.tolist(), got.tolist(), strict=True):
        length = math.sqrt(sum(x * x for x in row))
        assert score == pytest.approx(
            3 + sum(x / length * w for x, w in zip(row, weight[0].tolist(), strict=True)), abs=1e-5
        )
    with pytest.raises(ValueError, match=r"a\.pth is for features of 8 numbers, and these have 6"):
        filtering.aesthetics(features[:, :6], head, "a.pth")


@pytest.mark.parametrize(
    "state",
    [{}, {"weight": torch.ones(1, 4)}, {"weight": torch.ones(2, 4), "bias": torch.ones(2)},
     {"layers.0.weight": torch.ones(1, 4), "layers.0.bias": torch.ones(1)}],
)  # fmt: skip
def test_other_heads_are_refused(filtering, state):
    with pytest.raises(ValueError, match="no linear aesthetic head"):
        filtering.linear_head(state, "a.pth")


def test_every_score_is_told(filtering):
    import json

    sets, features = [3, 3, 9], numbers(3, 4)
    scores = filtering.Scores(filtering.pairs(features, sets, [True, True, False]), torch.tensor([1.0, 2, 3]))
    faults = filtering.judge(sets, scores, filtering.Bounds(-1, 1))
    told = json.loads(json.dumps(filtering.told(["a", "b", "c"], sets, scores, faults), allow_nan=False))["sets"]
    assert [each["set"] for each in told] == [3, 9] and told[1]["cosines"] == [[None]]
    assert told[0]["cosines"][0][1] == pytest.approx(
        torch.cosine_similarity(features[0], features[1], 0).item(), abs=1e-5
    )
    assert told[0]["pictures"][1] == {"picture": 2, "caption": "b", "kept": True, "reasons": [], "fidelity": 2.0}
    assert told[1]["pictures"][0]["reasons"] == [fault.text for fault in faults[2]] != []


def test_the_line_counts_pictures_sets_and_faults(filtering):
    kinds = [[], [], [filtering.Fault(filtering.OTHER, "x")], [filtering.Fault(filtering.ALONE, "y")]]
    assert (
        filtering.line([1, 1, 1, 2], kinds)
        == "2 of 4 pictures kept, 1 of 2 sets; dropped: 1 another object, 1 alone in its set"
    )


def test_bars_of_a_histogram_count_their_values(pack):
    histogram = importlib.import_module(f"{pack.__name__}.training.histogram")
    values = torch.rand(500, generator=torch.Generator().manual_seed(1))
    got = histogram.counts(values, 0.0, 1.0).tolist()
    assert got == [
        sum(k <= v * histogram.BINS < k + 1 for v in values.double().tolist()) for k in range(histogram.BINS)
    ]
    picture = histogram.histogram("cosines", values, 0.25, 0.75)
    colours = {colour: count for count, colour in picture.getcolors(10**6)}
    assert colours[histogram.INSIDE] == pytest.approx(colours[histogram.OUTSIDE], rel=0.25), "half of it lies between"
    assert histogram.OUTSIDE not in {c for _, c in histogram.histogram("x", values, None, None).getcolors(10**6)}


def test_a_frame_covers_the_edge_alone(pack):
    picture = numbers(3, 20, 30).sigmoid()
    got = pack.training.sheet.framed(picture, (255, 0, 51), 4)
    assert torch.equal(got[:, 4:-4, 4:-4], picture[:, 4:-4, 4:-4])
    edge = torch.ones(20, 30, dtype=torch.bool)
    edge[4:-4, 4:-4] = False
    assert torch.allclose(got[:, edge], torch.tensor([1.0, 0.0, 0.2])[:, None])
