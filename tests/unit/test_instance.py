"""The instance probe: its groups, its loss and its figures against slow oracles, and what ships on objects it never met."""

import math
from itertools import combinations

import pytest
import torch


@pytest.fixture
def instance(pack):
    return pack.training.pocket.instance


def vectors(groups: int, seed: int, instance, closeness: float = 1.0) -> torch.Tensor:
    """Random unit vectors, those of an instance drawn together."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(groups * instance.INSTANCES, 6, generator=generator).repeat_interleave(instance.VIEWS, 0)
    noise = torch.randn(len(centres), 6, generator=generator)
    return torch.nn.functional.normalize(centres * closeness + noise, dim=1)


def test_only_the_instance_tells_the_objects_of_a_group_apart(instance):
    scenes = instance.sample_groups(6, 1)
    assert len(scenes) == 6 * instance.GROUP
    for number in range(6):
        group = scenes[torch.arange(number * instance.GROUP, (number + 1) * instance.GROUP)]
        for name in ("shape", "colour", "pattern"):
            assert len(getattr(group, name).unique()) == 1
        assert 0 not in group.pattern  # plain
        by_instance = group.instance.view(instance.INSTANCES, instance.VIEWS)
        assert (by_instance == by_instance[:, :1]).all() and len(by_instance[:, 0].unique()) == instance.INSTANCES
        assert len(group.setting.unique()) == len(group.yaw.unique()) == instance.GROUP
        media = len({tuple(f) for f in group.factors().tolist()})
        assert media == 1 if number % 2 == 0 else media > 10


def test_the_contrast_is_its_formula(instance):
    """Khosla et al. 2020, equation 2, term by term."""
    x, scale = vectors(1, 1, instance), 7.0
    terms = []
    for i in range(instance.GROUP):
        others = [j for j in range(instance.GROUP) if j != i]
        below = sum(math.exp(scale * float(x[i] @ x[j])) for j in others)
        for j in others:
            if j // instance.VIEWS == i // instance.VIEWS:
                terms.append(-math.log(math.exp(scale * float(x[i] @ x[j])) / below))
    assert instance.contrast(x, torch.tensor(scale)).item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def slow(x, instance):
    """Group, whether equal, and cosine of every pair within a group."""
    for g, group in enumerate(x.split(instance.GROUP)):
        for i, j in combinations(range(instance.GROUP), 2):
            yield g, i // instance.VIEWS == j // instance.VIEWS, float(group[i] @ group[j])


def test_the_figures_are_counted_pair_by_pair(instance):
    x, scenes, limit = vectors(8, 2, instance), instance.sample_groups(8, 3), 0.4
    found = instance.accuracy(x, scenes, limit)
    every = list(slow(x, instance))

    def right(groups) -> float:
        equal = [c >= limit for g, same, c in every if same and g in groups]
        different = [c < limit for g, same, c in every if not same and g in groups]
        return (sum(equal) / len(equal) + sum(different) / len(different)) / 2

    assert found["all"] == pytest.approx(right(range(8)))
    assert found["one medium"] == pytest.approx(right((0, 2, 4, 6)))
    pattern = int(scenes.pattern[0])
    name = ("plain", "striped", "spotted", "checkered", "blotched", "dipped")[pattern]
    same = [g for g in range(8) if int(scenes.pattern[g * instance.GROUP]) == pattern]
    assert found[name] == pytest.approx(right(same))
    equal, different = ([c for _, s, c in every if s == same] for same in (True, False))
    area = sum((e > d) + (e == d) / 2 for e in equal for d in different) / (len(equal) * len(different))
    assert found["area"] == pytest.approx(area, abs=1e-6)


def test_the_threshold_makes_both_errors_equal(instance):
    x = vectors(30, 4, instance)
    limit = instance.threshold(x)
    missed = [c < limit for _, same, c in slow(x, instance) if same]
    mistaken = [c >= limit for _, same, c in slow(x, instance) if not same]
    assert sum(missed) / len(missed) == pytest.approx(sum(mistaken) / len(mistaken), abs=0.01)
    assert 0.05 < sum(missed) / len(missed) < 0.45


def test_what_ships_knows_objects_that_it_never_met(pack, instance):
    """Ten fresh groups; what the card says of 100 groups, less what so few may miss by chance."""
    import json

    probe, limit = pack.nodes.pocket_models.load_instance_probe()
    scenes = instance.sample_groups(10, 987)
    images = torch.cat(
        [pack.training.pocket.painter.paint(scenes[torch.arange(i, i + 50)]).image for i in range(0, 200, 50)]
    )
    found = instance.accuracy(probe.see(images), scenes, limit)
    card = json.loads((pack.nodes.pocket_models.MODELS / "pocket-card.json").read_text())
    assert found["all"] > card["same object"]["real"]["all"] - 0.1
    assert card["same object"]["real"]["all"] > 0.8
