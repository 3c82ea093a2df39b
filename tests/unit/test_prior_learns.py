"""A prior is taught a world in which it is known how much of a picture its caption says."""

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from harness.small_nets import numbers

DIM, SAID, KINDS = 16, 8, 20  # numbers of an embedding, of what a caption says, and kinds of captions
OURS, PUBLISHED = ("whitened", "cosine", "uniform"), ("none", "linear", "P2")
RECIPE = {"steps": 500, "batch": 64, "draws": 8, "learning_rate": 0.008, "empty": 0.0, "average": 0.99}


def world(count: int, each: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts (count, DIM), and of each some embeddings (count, each, DIM), about as large as CLIP's: a mean, what is said, what of the
    same is left unsaid, and details."""
    kinds = numbers(KINDS, SAID, seed=1)[torch.arange(count) % KINDS]
    said = kinds + 0.6 * numbers(count, SAID, seed=seed)
    shown = said[:, None] + 0.5 * numbers(count, each, SAID, seed=seed + 1)
    details = numbers(count, each, DIM, seed=seed + 2) @ numbers(DIM, DIM, seed=2) / DIM**0.5
    pictures = numbers(DIM, seed=3) + shown @ numbers(SAID, DIM, seed=4) / SAID**0.5 + 0.7 * details
    return said @ numbers(SAID, DIM, seed=5) / SAID**0.5, 0.25 * pictures


@pytest.fixture(scope="module")
def figures(pack):
    """What is told of 8 steps of DPM-Solver++ on captions that were not learned from; by recipe, and of true pictures."""
    names = ("pairs", "trainer", "network", "starts", "prior", "measures")
    it = SimpleNamespace(**{name: import_module(f"{pack.__name__}.training.prior.{name}") for name in names})

    def texts(pooled: torch.Tensor):
        return it.pairs.Texts(pooled, torch.zeros(len(pooled), 1, 1), torch.ones(len(pooled), 1, dtype=torch.bool))

    (text, image), (asked, true) = world(6000, 1, seed=10), world(300, 16, seed=20)
    image = image[:, 0]
    words = dict(zip(("pooled", "states", "mask"), texts(text), strict=True))
    pairs = it.pairs.Pairs([{"image": image, **words}], texts(torch.zeros(1, DIM)), "", "")
    shape = it.network.Shape(DIM, DIM, 0, width=64, layers=2, heads=2, text_length=0)

    def made(kind: str, schedule: str, weight: str) -> torch.Tensor:
        network = it.network.drawn(shape, torch.Generator().manual_seed(0))
        settings = it.trainer.Settings(schedule, weight, **RECIPE)
        trainer = it.trainer.PriorTrainer(pairs, network, it.starts.fit(kind, text, image), settings)
        for i in range(settings.steps):
            trainer.step(i)
        return it.prior.sampled(trainer.finished(), texts(asked), None, list(range(8)), it.prior.Sampling(guidance=1.0))

    drawn = {"ours": made(*OURS), "published": made(*PUBLISHED), "true": true[:, 8:]}
    return {name: it.measures.figures(x, true[:, :8], image) for name, x in drawn.items()}


def test_it_is_calibrated(figures):
    ours, true = figures["ours"], figures["true"]
    assert ours["frechet"] <= 0.03 and 0.75 <= ours["diversity"] <= 1.15
    assert abs(ours["centred cosine"] - true["centred cosine"]) <= 0.05


def test_pure_noise_the_linear_schedule_and_its_weight_are_far_worse_and_have_the_better_cosine(figures):
    ours, published, true = figures["ours"], figures["published"], figures["true"]
    assert published["frechet"] >= 5 * ours["frechet"] and published["diversity"] < 0.1
    assert published["cosine"] > ours["cosine"] > true["cosine"]
