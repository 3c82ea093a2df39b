"""Pairs on disk, and the training of a prior against its formulas written out row by row."""

import math
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from harness.small_nets import numbers

WORDS = 6  # places of a caption


@pytest.fixture
def it(pack):
    """What this is about, by the names of its modules."""
    names = ("pairs", "trainer", "network", "starts", "process", "prior")
    return SimpleNamespace(
        **{name: import_module(f"{pack.__name__}.training.prior.{name}") for name in names},
        features=pack.training.features, artefact=pack.training.artefact, loop=pack.training.loop,
    )  # fmt: skip


def number_of(caption: str) -> int:
    return int(caption or -1)


def encoders(it, text: str = "aa", image: str = "bb", seen: list | None = None):
    """Captions are numbers, and so are the embeddings that are made of them."""

    def read(captions: list[str]):
        n = torch.tensor([[float(number_of(c))] for c in captions])
        places = torch.arange(WORDS)
        mask = places <= (n.abs() % (WORDS - 1))
        return it.pairs.Texts(
            (n / 10).sin() * torch.ones(1, 4), n[:, :, None] / 100 + places[:, None] * torch.ones(5), mask
        )

    def see(images: torch.Tensor) -> torch.Tensor:
        if seen is not None:
            seen.extend(images[:, 0, 0, 0].mul(100).round().int().tolist())
        return images.flatten(1)[:, :3] * torch.tensor([1.0, 2.0, 3.0])

    return it.pairs.Encoders(text, read, it.features.Extractor("numbers", image, see))


def picture(n: int) -> torch.Tensor:
    return torch.full((1, 2, 2, 3), n / 100)


def part(numbers: list[int], key: str = "", read: list | None = None):
    def give():
        if read is not None:
            read.append(key)
        yield from ((picture(n), str(n)) for n in numbers)

    return key or str(numbers), give


# Pairs


def test_pairs_keep_their_order_across_files(it, tmp_path):
    told = []
    pairs = it.pairs.measured([part([3, 1, 4]), part([15]), part([9, 2])], encoders(it), tmp_path, told.append)
    numbers = [3, 1, 4, 15, 9, 2]
    assert len(pairs) == 6 and pairs.words == (WORDS, 5) and pairs.space == "numbers, 3 numbers"
    assert torch.allclose(pairs.images[:, 0], torch.tensor(numbers) / 100) and told == sorted(told) and told[-1] == 6
    expected = encoders(it).read([str(n) for n in numbers])
    for rows in ([0], [5, 0, 3, 3], [4, 2, 1, 0, 3, 5]):
        got = pairs.texts(rows)
        for name in ("pooled", "states", "mask"):
            assert torch.allclose(getattr(got, name).float(), getattr(expected, name)[rows].float(), atol=1e-2), name
        assert got.states.dtype == got.pooled.dtype == torch.float32
    assert torch.equal(pairs.nothing.pooled, encoders(it).read([""]).pooled)


def test_what_is_kept_is_not_read_again(it, tmp_path):
    read: list[str] = []
    parts = [part([1, 2], "a", read), part([3], "b", read)]
    first = it.pairs.measured(parts, encoders(it), tmp_path)
    again = it.pairs.measured(parts, encoders(it), tmp_path)
    assert read == ["a", "b"] and torch.equal(first.images, again.images)
    it.pairs.measured([*parts, part([4], "c", read)], encoders(it), tmp_path)
    it.pairs.measured(parts, encoders(it, text="cc"), tmp_path)
    it.pairs.measured(parts, encoders(it, image="dd"), tmp_path)
    assert read == ["a", "b", "c", "a", "b", "a", "b"], "and of other encoders everything is"


def test_a_measuring_that_broke_off_goes_on(it, tmp_path):
    read: list[str] = []

    def breaks():
        yield picture(3), "3"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        it.pairs.measured([part([1, 2], "a", read), ("b", breaks)], encoders(it), tmp_path)
    pairs = it.pairs.measured([part([1, 2], "a", read), part([3], "b", read)], encoders(it), tmp_path)
    assert read == ["a", "b"] and len(pairs) == 3


def test_parts_that_give_nothing_are_left_out(it, tmp_path):
    pairs = it.pairs.measured([part([]), part([1, 2]), part([], "x"), part([7])], encoders(it), tmp_path)
    assert len(pairs) == 3 and torch.allclose(pairs.texts([2]).pooled, encoders(it).read(["7"]).pooled)
    with pytest.raises(ValueError, match="None of the pictures could be read"):
        it.pairs.measured([part([]), part([], "x")], encoders(it), tmp_path)


def test_numbers_that_are_not_finite(it, tmp_path):
    whole = encoders(it)

    def read(captions):
        pooled, states, mask = whole.read(captions)
        return it.pairs.Texts(pooled / (pooled != pooled[0, 0]), states, mask)

    with pytest.raises(ValueError, match="gives numbers that are not finite for a caption"):
        it.pairs.measured([part([1])], it.pairs.Encoders("aa", read, whole.images), tmp_path)
    assert not list(tmp_path.iterdir())


# Training


@pytest.fixture
def pairs(it):
    """60 captions of 4 numbers; their pictures' 6 numbers follow from them in part."""
    pooled, states = numbers(60, 4), numbers(60, WORDS, 5, seed=2)
    image = pooled @ numbers(4, 6, seed=3) + 0.5 * numbers(60, 6, seed=4) + 1
    mask = torch.arange(WORDS) <= torch.arange(60)[:, None] % WORDS
    shards = [
        {"pooled": pooled[a:b], "states": states[a:b], "mask": mask[a:b], "image": image[a:b]}
        for a, b in ((0, 37), (37, 60))
    ]
    nothing = it.pairs.Texts(numbers(1, 4, seed=5), numbers(1, WORDS, 5, seed=6), torch.arange(WORDS)[None] < 2)
    return it.pairs.Pairs(shards, nothing, "aa", "bb", "small CLIP")


def trainer(it, pairs, kind: str = "whitened", scale: float = 1.0, look_every: int = 0, drawn: int = 0, **settings):
    settings = it.trainer.Settings(**{"batch": 5, "draws": 3, "steps": 20, **settings})
    network = it.network.drawn(it.network.Shape(6, 4, 5, 16, 2, 2, WORDS), torch.Generator().manual_seed(drawn))
    with torch.no_grad():
        network.proj_to_clip_embeddings.weight.copy_(0.3 * numbers(6, 16, seed=7))
    start = it.starts.fit(kind, pairs.pooled, pairs.images, 3, scale=scale)
    return it.trainer.PriorTrainer(pairs, network, start, settings, look_every=look_every)


def level(schedule: str, t: int) -> tuple[float, float]:
    """Signal and noise, from the papers."""
    if schedule == "linear":
        kept = math.prod(1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(t + 1))
    else:
        f = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(t + 2)]
        kept = math.prod(1 - min(0.999, 1 - f[i + 1] / f[i]) for i in range(t + 1))
    return math.sqrt(kept), math.sqrt(1 - kept)


@pytest.mark.parametrize(("kind", "scale", "schedule", "weight"), [
    ("whitened", 1.0, "cosine", "uniform"), ("clusters", 5.0, "linear", "P2"), ("ridge", 2.0, "cosine", "P2"),
])  # fmt: skip
def test_the_loss_written_out(it, pairs, kind, scale, schedule, weight):
    """Row by row and draw by draw in float64, the network asked for one noisy embedding at a time."""
    made = trainer(it, pairs, kind, scale, schedule=schedule, weight=weight, empty=0.4)
    batch, draws = 5, 3
    got = made.loss(torch.Generator().manual_seed(11)).item()
    generator = torch.Generator().manual_seed(11)
    rows = [made.rows[i] for i in torch.randint(len(made.rows), (batch,), generator=generator).tolist()]
    empty = torch.rand(batch, generator=generator) < 0.4
    spread = torch.randperm(15, generator=generator) + torch.rand(15, generator=generator)
    eps = torch.randn(15, 6, generator=generator).double()
    assert empty.any() and not empty.all()
    mean, std = pairs.images.double().mean(0), pairs.images.double().std(0)
    total = 0.0
    for i in range(15):
        row, t = rows[i // draws], int(spread[i] / 15 * 1000)
        begins, x0 = made.prior.start.start(pairs.pooled[[row]]), pairs.images[row].double()
        mu, k = (x[0].double() if x.ndim == 2 else x.double() for x in begins)
        a, s = level(schedule, t)
        z = a * x0 + (1 - a) * mu + s * k * eps[i]
        shown = (z - (a * mean + (1 - a) * mu)) / torch.sqrt(a**2 * std**2 + s**2 * k**2)
        texts = pairs.nothing if empty[i // draws] else pairs.texts([row])
        said = made.network(shown[None].float(), float(t), made.network.read(texts.states, texts.pooled, texts.mask))[0]
        share = 1.0 if weight == "uniform" else s**2  # 1 - alpha-bar
        total += (share * (said.double() - (x0 - mean) / std).square()).mean().item() / 15
    assert got == pytest.approx(total, rel=1e-4)


def test_every_level_is_drawn_evenly(it, pairs):
    """One draw in each of as many equal parts as there are draws: no step looks at little noise alone."""
    made, told = trainer(it, pairs, batch=10, draws=10), []
    made.network.register_forward_pre_hook(lambda _, given: told.append(given[1]))
    made.loss(torch.Generator().manual_seed(0))
    assert sorted(int(t) // 10 for t in told[0].tolist()) == list(range(100))


def test_captions_are_left_empty_whole(it, pairs):
    made = trainer(it, pairs, empty=0.5)
    texts = pairs.texts(list(range(40)))
    left = made.left_empty(texts, torch.Generator().manual_seed(0))
    gone = (left.pooled == pairs.nothing.pooled).all(1)
    assert 10 < gone.sum() < 30
    for i in range(40):
        source = pairs.nothing.rows([0]) if gone[i] else texts.rows([i])
        assert all(torch.equal(a[i], b[0]) for a, b in zip(left, source, strict=True))
    made.settings.empty = 0.0
    assert all(torch.equal(a, b) for a, b in zip(made.left_empty(texts, torch.Generator()), texts, strict=True))


def states(made) -> dict[str, torch.Tensor]:
    now = {f"now.{k}": v.detach().clone() for k, v in made.network.named_parameters()}
    return now | {f"average.{k}": v.clone() for k, v in made.average.items()}


def test_a_resumed_training_is_the_uninterrupted_one(it, pairs, tmp_path):
    """Through a checkpoint's file, into a network that was drawn otherwise."""
    whole, cut = trainer(it, pairs), trainer(it, pairs)
    for i in range(6):
        whole.step(i)
    for i in range(3):
        cut.step(i)
    it.artefact.write_tree(tmp_path / "state.safetensors", cut.state_dict())
    again = trainer(it, pairs, drawn=5)
    again.load_state_dict(it.artefact.read_tree(tmp_path / "state.safetensors"))
    for i in range(3, 6):
        again.step(i)
    a, b = states(whole), states(again)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_what_is_kept_is_the_average(it, pairs):
    made = trainer(it, pairs, average=0.3)
    average = {k: v.detach().double() for k, v in made.network.named_parameters()}
    for i in range(4):
        made.step(i)
        keep = min(0.3, (1 + i) / (10 + i))
        average = {k: keep * average[k] + (1 - keep) * v.detach().double() for k, v in made.network.named_parameters()}
    before = states(made)
    done = made.finished()
    for name, weight in done.network.named_parameters():
        assert torch.allclose(weight.double(), average[name], atol=1e-6) and not weight.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in states(made).items()), "the training's own stays"
    assert (done.text, done.image, done.space) == ("aa", "bb", "small CLIP")
    with made.averaged() as prior:
        assert torch.equal(prior.network.proj_in.weight, made.average["proj_in.weight"])
    assert all(torch.equal(v, before[k]) for k, v in states(made).items())


def test_it_learns(it, pairs):
    """Enough for the captions it has not seen, and the looks are told together."""
    made = trainer(it, pairs, steps=150, batch=16, learning_rate=3e-3, average=0.9, look_every=150)
    said = [made.step(i) for i in range(150)]
    losses = [each["loss"] for each in said]
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
    told = said[-1]
    assert {"cosine", "centred cosine", "frechet", "energy", "diversity", "norm", "rank"} <= told.keys()
    assert told["centred cosine"] > 0.4 and told["rank"] < 3 and 0.5 < told["norm"] < 1.5
    assert "frechet" not in said[-2]


def test_what_is_held_out_is_never_learned_from(it, pairs):
    """Whatever the seed: what a start distribution was fitted to is what it learns from."""
    rows, held = it.trainer.apart(60)
    assert len(held) == 6 and sorted(rows + held) == list(range(60))
    assert it.trainer.apart(39)[1] == [] and len(it.trainer.apart(10_000)[1]) == 256
    made, asked = trainer(it, pairs, seed=5), set()
    assert (made.rows, made.held) == (rows, held)
    texts = pairs.texts
    pairs.texts = lambda rows: asked.update(rows) or texts(rows)
    for i in range(30):
        made.step(i)
    assert len(asked) > 40 and asked <= set(made.rows) and not asked & set(made.held)


def test_a_loss_that_is_no_number_changes_nothing(it, pairs):
    made = trainer(it, pairs)
    made.step(0)
    before = states(made)
    pairs.images[made.rows] = float("inf")
    with pytest.raises(it.loop.Diverged, match="not a number at step 2"):
        made.step(1)
    assert all(torch.equal(v, before[k]) for k, v in states(made).items())


def test_fewer_pairs_than_a_batch(it, pairs):
    with pytest.raises(ValueError, match="54 pairs to learn from and a step takes 55: choose a batch of at most 54"):
        trainer(it, pairs, batch=55)


def test_a_start_of_another_width(it, pairs):
    made = trainer(it, pairs)
    start = it.starts.fit("whitened", pairs.pooled, pairs.images[:, :5])
    with pytest.raises(
        ValueError, match="is for embeddings of 5 numbers and these pairs have 6: fit it to the same pairs"
    ):
        it.trainer.PriorTrainer(pairs, made.network, start, made.settings)
