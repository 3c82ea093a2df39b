"""Similarities of single pictures against their formulas written out, and cut-outs against what they must keep."""

import math

import pytest
import torch
import torchmetrics.functional


@pytest.fixture
def similarity(pack):
    return pack.training.similarity


def features(n: int, d: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


def cosine(a, b) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def test_style_is_the_cosine_with_the_references_mean(similarity):
    made, reference = features(3, 5, 1), features(4, 5, 2, 0.5)
    units = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in reference.tolist()]
    mean = [sum(column) / 4 for column in zip(*units, strict=True)]
    assert similarity.to_mean(made, reference).tolist() == pytest.approx([cosine(row, mean) for row in made.tolist()])


def test_csls_is_its_formula(similarity):
    made, reference, others = features(3, 5, 1), features(4, 5, 2, 0.5), features(7, 5, 3)
    units = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in reference.tolist()]
    mean = [sum(column) / 4 for column in zip(*units, strict=True)]

    def crowd(x):
        return sum(sorted((cosine(x, y) for y in others.tolist()), reverse=True)[:2]) / 2

    expected = [2 * cosine(x, mean) - crowd(x) - crowd(mean) for x in made.tolist()]
    assert similarity.csls(made, reference, others, k=2).tolist() == pytest.approx(expected, rel=1e-5)


def test_csls_sees_through_a_style_that_is_near_to_everything(similarity):
    """Two styles; the second lies in the middle of all pictures, so every picture is near to it by cosine."""
    own, hub = torch.tensor([[1.0, 0.2, 0.0, 0.0]]), torch.tensor([[0.6, 0.6, 0.4, 0.4]])
    others = torch.tensor([[0.5, 0.7, 0.4, 0.4], [0.7, 0.5, 0.4, 0.4], [0.6, 0.6, 0.3, 0.5]])
    made = torch.tensor([[0.95, 0.55, 0.25, 0.25]])
    assert similarity.to_mean(made, hub) > similarity.to_mean(made, own) - 0.02
    assert similarity.csls(made, own, others) > similarity.csls(made, hub, others) + 0.2


def test_the_clip_score_is_everyones(similarity):
    pictures, texts = features(6, 8, 1), features(6, 8, 2)
    theirs = torchmetrics.functional.pairwise_cosine_similarity(pictures.double(), texts.double()).diagonal()
    assert torch.allclose(similarity.clip_scores(pictures, texts), (100 * theirs).clamp_min(0))


def test_r_precision(similarity):
    texts = torch.eye(5)
    pictures = texts.clone()
    pictures[3] = texts[0]
    captions = ["a", "b", "c", "d", "e"]
    assert similarity.found(pictures, texts, captions).tolist() == [1, 1, 1, 0, 1]


def test_r_precision_never_takes_an_equal_caption_for_a_wrong_one(similarity):
    texts = torch.eye(3)[[0, 0, 1]]
    assert similarity.found(texts.clone(), texts, ["a", "a", "b"]).tolist() == [1, 1, 1]


def test_r_precision_is_the_whole_table_where_there_are_few(similarity):
    """Up to 100 captions all others are drawn: the table written out."""
    captions = [str(i % 50) for i in range(60)]
    texts = features(50, 8, 2)[[i % 50 for i in range(60)]]
    pictures = texts + features(60, 8, 1)
    expected = []
    for i in range(60):
        own = cosine(pictures[i].tolist(), texts[i].tolist())
        others = [cosine(pictures[i].tolist(), texts[j].tolist()) for j in range(60) if captions[j] != captions[i]]
        expected.append(float(own > max(others)))
    assert similarity.found(pictures, texts, captions).tolist() == expected and 10 < sum(expected) < 50


def test_r_precision_of_chance_is_one_in_a_hundred(similarity):
    pictures, texts = features(1500, 32, 1), features(1500, 32, 2)
    share = similarity.found(pictures, texts, [str(i) for i in range(1500)]).mean().item()
    assert 0.003 < share < 0.02


def test_a_cut_out_is_the_object_on_grey(similarity):
    image, mask = torch.rand(1, 40, 60, 3), torch.zeros(1, 40, 60)
    mask[0, 10:20, 30:50] = 1
    square = similarity.cut_out(image, mask)
    assert square.shape == (1, 24, 24, 3)
    assert torch.equal(square[0, 7:17, 2:22], image[0, 10:20, 30:50])
    outside = torch.ones(24, 24, dtype=torch.bool)
    outside[7:17, 2:22] = False
    assert (square[0][outside] == 0.5).all()


def test_what_lies_around_an_object_does_not_matter(similarity):
    mask = torch.zeros(1, 30, 30)
    mask[0, 5:15, 5:15] = 1
    first, second = torch.rand(1, 30, 30, 3), torch.rand(1, 30, 30, 3)
    second[0, 5:15, 5:15] = first[0, 5:15, 5:15]
    assert torch.equal(similarity.cut_out(first, mask), similarity.cut_out(second, mask))


@pytest.mark.parametrize(
    "mask, words", [(torch.zeros(1, 30, 30), "empty"), (torch.ones(1, 20, 30), "30 x 20 .* 30 x 30")]
)
def test_masks_that_cannot_be_used(similarity, mask, words):
    with pytest.raises(ValueError, match=words):
        similarity.cut_out(torch.rand(1, 30, 30, 3), mask)


def test_intervals_of_means(pack):
    interval = pack.training.intervals.mean_interval
    assert interval(torch.tensor([1.0, 1.0, 0.0, 1.0]), share=True)[0] == 0.75
    assert interval(torch.zeros(5), share=True)[2] > 0.4 and interval(torch.zeros(5)) == (0, 0, 0)
    generator = torch.Generator().manual_seed(0)
    for n in (100, 1000):
        mean, low, high = interval(torch.randn(n, generator=generator))
        assert low < mean < high and (high - low) == pytest.approx(2 * 1.96 / n**0.5, rel=0.25)
