"""Start distributions: fitted against slow oracles, honest on texts they have not seen, exact in a file, and strict with bad input."""

import importlib
import math

import pytest
import scipy.cluster.vq
import torch

from harness import embeddings
from harness.small_nets import numbers

FITTED = ("none", "whitened", "clusters", "clusters as published", "ridge")


@pytest.fixture(scope="module")
def starts(pack):
    return importlib.import_module(f"{pack.__name__}.training.prior.starts")


@pytest.fixture(scope="module")
def artefact(pack):
    return pack.training.artefact


@pytest.fixture(scope="module")
def pairs():
    """Text and image of one width, so that a cosine between them means something."""
    text, image = embeddings.pairs(1500, seed=1)
    return torch.nn.functional.pad(text, (0, embeddings.WIDTH - embeddings.TEXT)), image


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_none_is_the_unit_gaussian_and_whitened_the_embeddings_own(starts, pairs):
    text, image = pairs
    none, whitened = (starts.fit(kind, text, image, scale=3.0).start(text) for kind in ("none", "whitened"))
    assert not none.mean.any() and (none.scale == 3).all() and none.mean.shape == (image.shape[1],)
    assert torch.allclose(whitened.mean, image.mean(0), atol=1e-6)
    assert torch.allclose(whitened.scale, 3 * image.std(0), rtol=1e-6)


@pytest.mark.parametrize("kind", FITTED)
def test_a_file_gives_it_back_bit_by_bit(starts, artefact, pairs, tmp_path, kind):
    text, image = pairs
    fitted = starts.fit(kind, text, image, clusters=12, scale=0.7)
    others = {"net.weight": torch.ones(2)}
    artefact.write(tmp_path / "prior.safetensors", {**others, **fitted.tensors}, {"format": "x", **fitted.metadata()})
    again = starts.StartDistribution.of_file(*artefact.read(tmp_path / "prior.safetensors"))
    for one, other in zip(fitted.start(text[:9]), again.start(text[:9]), strict=True):
        assert torch.equal(one, other)
    assert again.kind == kind and again.scale == 0.7 and set(again.tensors) == set(starts.KINDS[kind])
    assert (again.start(text[:9]).scale > 0).all()


@pytest.mark.parametrize("kind", FITTED)
def test_without_a_text_it_is_the_same_for_all(starts, pairs, kind):
    text, image = pairs
    fitted = starts.fit(kind, text, image, clusters=12)
    mean, scale = fitted.start(None)
    assert mean.shape == scale.shape == (image.shape[1],)
    if kind != "none":
        assert torch.allclose(mean, image.mean(0), atol=1e-5) and torch.allclose(scale, image.std(0), rtol=1e-5)


@pytest.mark.parametrize("kind", FITTED)
def test_the_same_pairs_and_seed_give_the_same(starts, pairs, kind):
    text, image = pairs
    before = torch.get_rng_state()
    one, other = (starts.fit(kind, text, image, clusters=12, generator=generator(3)) for _ in range(2))
    assert all(torch.equal(one.tensors[k], other.tensors[k]) for k in one.tensors)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("strength", [1e-3, 0.1, 10.0])
def test_ridge_is_least_squares_with_rows_for_the_penalty(starts, strength):
    text, image = numbers(30, 7, seed=1).double() + 2, numbers(30, 4, seed=2).double()
    weight, bias = starts._Sums.of(text, image).solver()(strength)
    penalty = math.sqrt(30 * strength) * torch.eye(7, 8).double()  # none for the bias
    rows = torch.cat([torch.cat([text, torch.ones(30, 1)], 1), penalty])
    known = torch.linalg.lstsq(rows, torch.cat([image, torch.zeros(7, 4).double()])).solution
    assert (torch.cat([weight, bias[None]]) - known).abs().max() < 1e-10


def test_ridge_without_limit_is_the_mean(starts):
    text, image = numbers(30, 7, seed=1).double(), numbers(30, 4, seed=2).double()
    weight, bias = starts._Sums.of(text, image).solver()(torch.inf)
    assert not weight.any() and torch.allclose(bias, image.mean(0))


def test_sums_without_a_part_are_those_of_the_rest(starts):
    text, image = numbers(30, 7, seed=1).double(), numbers(30, 4, seed=2).double()
    rest = starts._Sums.of(text, image).without(starts._Sums.of(text[:11], image[:11]))
    for one, other in zip(rest, starts._Sums.of(text[11:], image[11:]), strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_ridge_explains_what_captions_say(starts):
    """On pairs it has not seen; the best any map could do is known from many more of them."""
    text, image = embeddings.pairs(2000, seed=1)
    fresh = embeddings.pairs(2000, seed=2)
    many = starts.fit("ridge", *embeddings.pairs(20_000, seed=3))
    left = starts.unexplained(starts.fit("ridge", text, image), *fresh)
    assert left <= 0.66
    assert left <= 1.1 * starts.unexplained(many, *fresh)
    assert left < starts.unexplained(starts.fit("clusters", text, image, clusters=30), *fresh) < 1


@pytest.mark.parametrize("count", [3, 10, 40, 200])
def test_ridge_is_never_worse_than_the_mean(starts, count):
    """Of few pairs, and of texts that have nothing to do with the pictures."""
    fresh = embeddings.pairs(1000, seed=2)
    text, image = embeddings.pairs(count, seed=1)
    foreign = numbers(count, embeddings.TEXT, seed=5), image
    for mine, theirs in (((text, image), fresh), (foreign, (numbers(1000, embeddings.TEXT, seed=6), fresh[1]))):
        fitted, mean = starts.fit("ridge", *mine), starts.fit("whitened", *mine)
        assert starts.unexplained(fitted, *theirs) <= 1.02 * starts.unexplained(mean, *theirs)


def test_texts_that_say_nothing_are_not_listened_to(starts):
    """Where every strength does worse than none, the weights are 0 and not just small."""
    drawn = [(numbers(12, 48, seed=2 * i), numbers(12, 8, seed=2 * i + 1)) for i in range(20)]
    silent = [not starts.fit("ridge", *pair).tensors["start.linear.weight"].any() for pair in drawn]
    assert sum(silent) > 10


@pytest.mark.parametrize("count", [40, 500, 3000])
def test_the_deviation_is_what_is_left_on_texts_not_seen(starts, count):
    """Also where there are fewer pairs than the 48 numbers of a text, which could be learned by heart."""
    text, image = embeddings.pairs(count, seed=1)
    there, seen = embeddings.pairs(2000, seed=2)
    fitted = starts.fit("ridge", text, image)
    mean, scale = fitted.start(there)
    left = (seen - mean).square().mean(0).sqrt()
    assert (scale / left).square().mean().sqrt().item() == pytest.approx(1, abs=0.12)


def test_pictures_of_one_caption_do_not_judge_each_other(starts):
    """20 captions, 50 pictures of each: what is said of a 21st is judged by captions that were left out."""
    text, _ = embeddings.pairs(20, seed=1)
    own = numbers(20, 8, seed=2)
    image = own.repeat_interleave(50, 0) + 0.1 * numbers(1000, 8, seed=3)
    fitted = starts.fit("ridge", text.repeat_interleave(50, 0), image)
    assert fitted.start(text).scale.mean() > 0.5  # 0.1 if a caption could be known by its other pictures


def test_captions_that_are_all_the_same_leave_the_mean(starts):
    text, image = torch.full((50, 4), 0.1), numbers(50, 8, seed=1)
    fitted = starts.fit("ridge", text, image)
    mean, scale = fitted.start(text[:1])
    assert torch.allclose(mean[0], image.mean(0), atol=1e-5) and torch.allclose(scale, image.std(0), rtol=0.05)
    assert torch.allclose(fitted.start(text[:1] + 0.5).mean, mean, atol=1e-5)


def test_kmeans_is_the_other_librarys_from_the_same_seeds(starts):
    x = numbers(400, 6, seed=1).double()
    seeds = starts._seeds(x, 9, generator(), "rows", starts.nothing)
    theirs, index = scipy.cluster.vq.kmeans2(x.numpy(), seeds.numpy(), iter=starts.ROUNDS, minit="matrix")
    ours = starts.kmeans(x, 9, generator())
    assert torch.equal(ours[1], torch.from_numpy(index).long())
    assert torch.allclose(ours[0], torch.from_numpy(theirs), atol=1e-10)


def test_kmeans_finds_what_is_apart(starts):
    blobs = numbers(20, 5, seed=1).double() * 50
    x = (blobs[:, None] + numbers(20, 30, 5, seed=2).double()).flatten(0, 1)
    for seed in range(5):
        index = starts.kmeans(x, 20, generator(seed))[1].view(20, 30)
        assert (index == index[:, :1]).all() and len(index[:, 0].unique()) == 20


def test_seeds_are_drawn_by_the_square_of_their_distance(starts):
    """From 0, of two others at distances 1 and 3, the far one in 9 of 10."""
    x = torch.tensor([[0.0], [1.0], [3.0]]).double()
    drawn = [starts._seeds(x, 2, generator(seed), "rows", starts.nothing).flatten().tolist() for seed in range(3000)]
    seconds = [second for first, second in drawn if first == 0]
    assert seconds.count(3.0) / len(seconds) == pytest.approx(0.9, abs=4 * (0.09 / len(seconds)) ** 0.5)


def test_an_empty_cluster_takes_the_farthest_row(starts, monkeypatch):
    """Seeds that are all but one: the last stays without rows until it is given some."""
    x = torch.tensor([[100.0], [100.1], [100.2], [109.0]]).double()
    monkeypatch.setattr(starts, "_seeds", lambda *_: torch.tensor([[100.0], [105.0], [600.0]]).double())
    centroids, index = starts.kmeans(x, 3, generator())
    assert len(index.unique()) == 3 and torch.allclose(centroids[index[3]], x[3])


def test_a_text_begins_where_the_pictures_of_its_cluster_are(starts, pairs):
    text, image = pairs
    fitted = starts.fit("clusters", text, image, clusters=8)
    index = fitted.cluster(text)
    text_mean, text_std, centroids = (fitted.tensors[k] for k in ("text.mean", "text.std", "start.text_centroid"))
    for row in range(0, 200, 20):
        white = (text[row] - text_mean) / text_std
        assert index[row] == min(range(8), key=lambda c: math.dist(white.tolist(), centroids[c].tolist()))
    squares = torch.zeros(image.shape[1]).double()
    for c in range(8):
        own = image[index == c].double()
        squares += (own - own.mean(0)).square().sum(0)
        assert torch.allclose(fitted.tensors["start.mean"][c].double(), own.mean(0), atol=1e-4)
    common = (squares + 10 * image.double().var(0)) / (len(image) - 8 + 10)
    for c in range(8):
        own = image[index == c].double()
        variance = ((own - own.mean(0)).square().sum(0) + 10 * common) / (len(own) - 1 + 10)
        assert torch.allclose(fitted.tensors["start.std"][c].double(), variance.sqrt(), rtol=1e-4)


def test_as_published_a_text_takes_the_nearest_mean_by_cosine(starts, pairs):
    text, image = pairs
    fitted = starts.fit("clusters as published", text, image, clusters=8)
    means = fitted.tensors["start.mean"]
    for row, index in zip(text[:50], fitted.cluster(text[:50]), strict=True):
        cosines = [(row @ m / (row.norm() * m.norm())).item() for m in means]
        assert index == max(range(8), key=cosines.__getitem__)
    start = fitted.start(text[:50])
    assert torch.equal(start.mean, means[fitted.cluster(text[:50])])


def test_a_cluster_of_one_picture_has_a_deviation(starts):
    text, image = numbers(6, 3, seed=1), numbers(6, 4, seed=2)
    for clusters in (5, 6):
        scale = starts.fit("clusters", text, image, clusters=clusters).start(text).scale
        assert (scale > 0.05).all() and scale.isfinite().all()


def test_a_coordinate_that_never_varies_is_not_divided_by_0(starts):
    text, image = numbers(50, 6, seed=1), numbers(50, 8, seed=2)
    text[:, 2] = image[:, 3] = 4.0
    for kind in ("whitened", "clusters", "ridge"):
        fitted = starts.fit(kind, text, image, clusters=4)
        mean, scale = fitted.start(text)
        assert scale.isfinite().all() and (scale > 0).all() and mean.isfinite().all()
        assert torch.allclose(mean.expand(50, 8)[:, 3], torch.tensor(4.0), atol=1e-3)


@pytest.mark.parametrize("kind", FITTED)
def test_half_precision_texts_are_read_in_single(starts, pairs, kind):
    text, image = pairs
    start = starts.fit(kind, text, image, clusters=8).start(text[:4].half())
    assert start.mean.dtype == start.scale.dtype == torch.float32


PAIR = numbers(20, 6, seed=1), numbers(20, 6, seed=2)
BROKEN = PAIR[1].clone()
BROKEN[4, 2] = math.nan
BAD_PAIRS = {
    "no such kind": ("sphere", *PAIR, 'no start distribution "sphere": it is one of none, whitened, clusters, clusters as'),
    "one pair": ("whitened", PAIR[0][:1], PAIR[1][:1], "There are 1 pairs: a start distribution needs 2"),
    "other counts": ("ridge", PAIR[0][:9], PAIR[1], r"shape \(9, 6\) and image embeddings of \(20, 6\) are no pairs"),
    "more clusters than pairs": ("clusters", *PAIR, "20 different texts for 64 clusters: take 20 clusters at the most"),
    "few different texts": ("clusters", torch.eye(6)[:3].repeat(30, 1), numbers(90, 6), "3 different texts for 64 clusters"),
    "few different pictures": ("clusters as published", numbers(90, 6), torch.eye(6)[:3].repeat(30, 1), "3 different pictures"),
    "widths without a cosine": ("clusters as published", numbers(90, 5), numbers(90, 6), "5 numbers have no cosine with .* 6"),
    "one picture again and again": ("whitened", PAIR[0], torch.full((20, 6), 0.1), "All 20 image embeddings are the same"),
    "no number": ("ridge", PAIR[0], BROKEN, "image embedding of pair 5 has numbers that are not finite"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_PAIRS)
def test_pairs_of_which_nothing_can_be_learned(starts, what):
    kind, text, image, said = BAD_PAIRS[what]
    with pytest.raises(ValueError, match=said):
        starts.fit(kind, text, image)


BAD_TENSORS = {
    "missing": (lambda t: t.pop("start.linear.std"), '"ridge" lacks start.linear.std: fit it again'),
    "zeros": (lambda t: t["start.linear.std"].zero_(), "start.linear.std .* has 6 of 6 numbers that are not above 0"),
    "zeros of the norm": (lambda t: t["norm.std"][2:4].zero_(), "norm.std .* has 2 of 6 numbers that are not above 0"),
    "no number": (lambda t: t["start.linear.bias"].fill_(math.nan), "start.linear.bias .* not finite"),
    "another width": (lambda t: t.update({"start.linear.bias": torch.zeros(5)}), r"start.linear.bias .* shape \(5,\)"),
    "another rank": (lambda t: t.update({"norm.mean": torch.zeros(1, 6)}), r"norm.mean .* shape \(1, 6\)"),
}


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_a_file_that_is_not_whole(starts, what):
    change, said = BAD_TENSORS[what]
    fitted = starts.fit("ridge", *PAIR)
    tensors = {k: x.clone() for k, x in fitted.tensors.items()}
    change(tensors)
    with pytest.raises(ValueError, match=said):
        starts.StartDistribution.of_file(tensors, fitted.metadata())


def test_other_things_that_do_not_fit(starts):
    fitted = starts.fit("ridge", *PAIR)
    with pytest.raises(
        ValueError, match=r"shape \(3, 9\) does not fit .* \(n, 6\): use the text encoder it was fitted with"
    ):
        fitted.start(torch.zeros(3, 9))
    with pytest.raises(ValueError, match="scale of a start distribution is 0: it has to be above 0; 1 is recommended"):
        starts.fit("whitened", *PAIR, scale=0.0)


def test_a_long_fit_can_be_stopped(starts, pairs):
    class Stop(Exception):
        pass

    def stop():
        raise Stop

    for kind in ("clusters", "clusters as published", "ridge"):
        with pytest.raises(Stop):
            starts.fit(kind, *pairs, clusters=8, tell=stop)
