"""The painted sets: what varies in them varies independently."""

from itertools import combinations

import pytest
import torch


@pytest.fixture
def pictures(pack):
    from counterpoint.training.pocket import pictures

    return pictures


@pytest.mark.parametrize("split", ["train", "judge", "judge held out"])
def test_no_attribute_tells_another(pictures, split):
    """Otherwise a network could read one off the other. Largest normalised chi-square over all pairs, 1000 scenes."""
    attributes = pictures.ATTRIBUTES
    scenes = pictures.scenes_of(split, 0)
    free = ("shape", "colour", "pattern", "background")
    pairs = [(a, b) for a, b in combinations(attributes, 2) if split != "train" or a in free]
    for a, b in pairs:
        counts = torch.zeros(len(attributes[a]), len(attributes[b]), dtype=torch.float64)
        for x, y in zip(getattr(scenes, a).tolist(), getattr(scenes, b).tolist(), strict=True):
            counts[x, y] += 1
        expected = counts.sum(1, keepdim=True) * counts.sum(0, keepdim=True) / counts.sum()
        degrees = (counts.shape[0] - 1) * (counts.shape[1] - 1)
        chi_square = ((counts - expected) ** 2 / expected).sum().item()
        assert chi_square < degrees + 5 * (2 * degrees) ** 0.5, (
            f"{a} tells {b}: chi-square {chi_square:.0f} with {degrees} degrees"
        )


def test_the_judge_meets_every_combination(pictures):
    scenes = pictures.scenes_of("judge", 0)
    assert len({tuple(c) for c in scenes.factors().tolist()}) == 72


def test_painting_is_repeatable_and_resumes(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "SHARD", 4)
    monkeypatch.setattr(pictures, "SPLITS", {"train": 2, "judge": 1})
    assert list(pictures.paint_all(tmp_path, 0, 1)) == ["train 0", "train 1", "judge 0"]
    first, scenes = pictures.load(tmp_path, "train")
    assert first.shape == (8, 3, 128, 128) and len(scenes) == 8
    pictures.shard_file(tmp_path, "train", 1).unlink()
    assert list(pictures.paint_all(tmp_path, 0, 1)) == ["train 1"]
    assert torch.equal(pictures.load(tmp_path, "train")[0], first)
    pictures.shard_file(tmp_path, "train", 0).unlink()
    assert torch.equal(pictures.load(tmp_path, "train")[0], first), "a stage by itself paints what it learns from"
