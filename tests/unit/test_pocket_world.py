"""Pocket's world: what it is made of, what is kept out of it, its exact ground truth and its language."""

import importlib
import math
import re
from dataclasses import fields

import pytest
import torch

N = 20_000


@pytest.fixture(scope="module")
def pocket(pack):
    class Parts:
        world, grammar, painter, pictures = (
            importlib.import_module(f"{pack.__name__}.training.pocket.{name}")
            for name in ("world", "grammar", "painter", "pictures")
        )

    return Parts


@pytest.fixture(scope="module")
def many(pocket):
    return pocket.world.sample_scenes(N, 77)


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Standard deviations above what chance gives."""
    expected = expected * counts.sum()
    used = expected > 0
    assert not counts[~used].any()
    freedom = int(used.sum()) - 1
    return (((counts - expected)[used] ** 2 / expected[used]).sum().item() - freedom) / math.sqrt(2 * freedom)


# What is drawn


def test_held_out_combinations_are_no_ones_name_and_cover_the_factors(pocket):
    held = pocket.world.HELD_OUT
    assert (
        len(set(held)) == 6
        and not set(held) & set(pocket.world.MEDIUMS.values())
        and len(set(pocket.world.MEDIUMS.values())) == 10
    )
    assert [len({c[axis] for c in held}) for axis in range(3)] == [6, 4, 3], "every factor level occurs among them"


def test_held_out_combinations_are_never_drawn(pocket, many):
    held = set(pocket.world.HELD_OUT)
    splits = [
        pocket.pictures.scenes_of(split, k)
        for split in ("train", "held out")
        for k in range(pocket.pictures.SPLITS[split])
    ]
    for scenes in (many, *splits):
        assert not held & {tuple(c) for c in scenes.factors().tolist()}


def test_everything_else_is_drawn(pocket, many):
    drawn = {tuple(c) for c in many.factors().tolist()}
    assert len(drawn) == 72 - 6 and set(pocket.world.MEDIUMS.values()) <= drawn


@pytest.mark.parametrize("name", ["shape", "colour", "pattern", "background", "stroke", "paper", "line"])
def test_every_value_of_an_attribute_is_equally_likely(pocket, many, name):
    size = len(pocket.world.ATTRIBUTES[name])
    counts = torch.bincount(getattr(many, name), minlength=size).double()
    assert len(counts) == size and abs(chi_square(counts, torch.full((size,), 1 / size))) < 5


@pytest.mark.parametrize("split", ["train", "judge"])
def test_attributes_do_not_tell_of_each_other(pocket, split):
    """Only the medium's own three factors go together, and not for the judge."""
    shards = [pocket.pictures.scenes_of(split, k) for k in range(pocket.pictures.SPLITS[split])]
    attributes = {name: torch.cat([getattr(s, name) for s in shards]) for name in pocket.world.ATTRIBUTES}
    numbers = {name: torch.cat([getattr(s, name) for s in shards]).double() for name in pocket.world.GEOMETRY}
    for i, (a, x) in enumerate(attributes.items()):
        for b, y in list(attributes.items())[:i]:
            if split == "train" and {a, b} <= set(pocket.world.FACTORS):
                continue
            sizes = len(pocket.world.ATTRIBUTES[a]), len(pocket.world.ATTRIBUTES[b])
            counts = torch.bincount(x * sizes[1] + y, minlength=sizes[0] * sizes[1]).double()
            assert abs(chi_square(counts, torch.full_like(counts, 1 / len(counts)))) < 6, (a, b)
    columns = torch.stack([*(x.double() for x in attributes.values()), *numbers.values()])
    beside = torch.corrcoef(columns).fill_diagonal_(0)
    if split == "train":
        beside[4:7, 4:7] = 0
    assert beside.abs().max() < 5 / columns.shape[1] ** 0.5


def test_named_mediums_are_about_half(pocket, many):
    named = set(pocket.world.MEDIUMS.values())
    share = sum(tuple(c) in named for c in many.factors().tolist()) / N
    assert 0.3 < share < 0.7


def test_the_judge_sees_all_72_combinations(pocket):
    for split in ("judge", "judge held out"):
        scenes = [pocket.pictures.scenes_of(split, k) for k in range(pocket.pictures.SPLITS[split])]
        counts = torch.zeros(6, 4, 3, dtype=torch.float64)
        for s in scenes:
            counts.index_put_(tuple(s.factors().T), torch.ones(len(s), dtype=torch.float64), accumulate=True)
        assert abs(chi_square(counts.flatten(), torch.full((72,), 1 / 72))) < 5


def test_splits_have_no_scene_in_common(pocket):
    shards = [pocket.pictures.scenes_of(split, k) for split, n in pocket.pictures.SPLITS.items() for k in range(n)]
    seen = [tuple(row) for s in shards for row in torch.stack([s.instance, s.setting], 1).tolist()]
    assert len(set(seen)) == len(seen) == 1000 * sum(pocket.pictures.SPLITS.values())


def test_the_seed_decides_and_the_global_generator_is_left_alone(pocket):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, again, other = (pocket.world.sample_scenes(50, seed) for seed in (9, 9, 10))
    assert before.equal(torch.get_rng_state())
    for f in fields(one):
        assert getattr(one, f.name).equal(getattr(again, f.name)) and not getattr(one, f.name).equal(
            getattr(other, f.name)
        )


def test_numbers_stay_in_their_range(pocket, many):
    for name, (low, high) in pocket.world.GEOMETRY.items():
        column = getattr(many, name)
        assert (
            low <= column.min() and column.max() <= high and abs(column.mean() - (low + high) / 2) < 0.02 * (high - low)
        )


def test_fixed_columns_are_fixed_and_the_rest_stays(pocket):
    free, fixed = pocket.world.sample_scenes(20, 4), pocket.world.sample_scenes(20, 4, shape=3, yaw=0.25)
    assert set(fixed.shape.tolist()) == {3} and set(fixed.yaw.tolist()) == {0.25}
    assert all(
        getattr(free, f.name).equal(getattr(fixed, f.name)) for f in fields(free) if f.name not in ("shape", "yaw")
    )
    with pytest.raises(ValueError, match="'size'"):
        pocket.world.sample_scenes(2, 1, size=3)


# What is painted


@pytest.fixture(scope="module")
def twelve(pocket):
    """Two scenes in each stroke, painted together."""
    strokes = torch.arange(12) % 6
    scenes = pocket.world.sample_scenes(12, 5, stroke=strokes, shape=torch.arange(12) % 8)
    return scenes, pocket.painter.paint(scenes)


def test_pictures_are_pictures(twelve):
    scenes, painting = twelve
    assert painting.image.shape == (12, 3, 128, 128) and painting.image.dtype == torch.float32
    for part in (painting.image, painting.mask):
        assert part.isfinite().all() and part.min() >= 0 and part.max() <= 1
    assert painting.depth.isfinite().all() and (painting.image.flatten(1).std(1) > 0.05).all()
    coverage = painting.mask.mean((1, 2))
    assert (coverage > 0.08).all() and (coverage < 0.5).all(), "the object is there and does not fill the picture"
    edges = torch.cat([painting.mask[:, 0], painting.mask[:, -1], painting.mask[:, :, 0], painting.mask[:, :, -1]], 1)
    assert (edges < 0.5).all(), "the object is cut off by the picture's edge"


def test_a_picture_does_not_depend_on_the_batch_it_was_painted_in(pocket, twelve):
    scenes, together = twelve
    order = torch.tensor([7, 3, 11])
    for rows in (order, *order.split(1)):
        again = pocket.painter.paint(scenes[rows])
        for f in fields(again):
            assert getattr(again, f.name).equal(getattr(together, f.name)[rows]), f.name


def rays(pocket, scenes, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eye (3,) and unit directions (3, 128, 128) in world coordinates: a pinhole that looks down by `pitch` from a
    distance of 4.6, 33 degrees wide, everything 5 pixels higher."""
    size, pitch = 128, scenes.pitch[i].double()
    axis = torch.arange(size, dtype=torch.float64) + 0.5 - size / 2
    up = -(axis + pocket.painter.RAISED)[:, None].expand(size, size) / (size / 2)
    right = axis[None].expand(size, size) / (size / 2)
    forward = torch.full_like(up, 1 / math.tan(math.radians(33 / 2)))
    c, s = pitch.cos(), pitch.sin()
    directions = torch.stack([right, up * c - forward * s, up * s + forward * c])
    return torch.stack([torch.zeros_like(c), 4.6 * s, -4.6 * c]), directions / directions.norm(dim=0)


def test_mask_depth_and_coordinates_of_a_sphere_are_those_of_a_sphere(pocket):
    scenes = pocket.world.sample_scenes(3, 6, shape=0)
    painting = pocket.painter.paint(scenes)
    for i in range(3):
        eye, ray = rays(pocket, scenes, i)
        radius = 0.88 * scenes.scale[i].double()
        centre = torch.tensor([scenes.offset[i].double(), radius + pocket.painter.GROUND_Y, 0.0], dtype=torch.float64)
        to = centre - eye
        along = (ray * to.view(3, 1, 1)).sum(0)
        apart = (to @ to - along**2).clamp_min(0).sqrt()  # of ray and centre
        pixel = (radius - apart) / to.norm() / pocket.painter.PIXEL  # inside the silhouette, pixels
        assert ((painting.mask[i] > 0.5) == (pixel > 0))[pixel.abs() > 1].all()
        inside = pixel > 3
        hit = along - (radius**2 - apart**2).clamp_min(0).sqrt()
        assert (painting.depth[i] - hit)[inside].abs().max() < 0.01
        surface = painting.coordinates[i].double()
        assert (surface.norm(dim=0) - 0.88)[inside].abs().max() < 0.01


def off_surface(pocket, scenes, painting) -> torch.Tensor:
    """(n, 128, 128) distance of the coordinates from the surface of the shape, object units."""
    shapes = importlib.import_module(pocket.painter.__name__.replace("painter", "shapes")).SHAPES
    by_shape = torch.stack(
        [shapes[name](*painting.coordinates.unbind(1)).abs() for name in pocket.world.ATTRIBUTES["shape"]]
    )
    return by_shape[scenes.shape, torch.arange(len(scenes))]


def test_coordinates_lie_on_the_surface_wherever_the_object_is(pocket):
    """Correspondences and 3-D points are read there: "meaningful where mask > 0.5"."""
    scenes = pocket.world.sample_scenes(8, 12, shape=torch.arange(8))
    painting = pocket.painter.paint(scenes)
    wrong = (off_surface(pocket, scenes, painting) > 0.05) & (painting.mask > 0.5)
    shares = (wrong.sum((1, 2)) / (painting.mask > 0.5).sum((1, 2))).tolist()
    assert max(shares) < 0.001, {
        name: round(x, 4) for name, x in zip(pocket.world.ATTRIBUTES["shape"], shares, strict=True)
    }


@pytest.mark.parametrize("shape", range(8))
def test_depth_coordinates_and_camera_meet_at_one_point(pocket, shape):
    """eye + depth * ray = where the object stands + its scale * its turn * coordinates; elsewhere the ground is met."""
    scenes = pocket.world.sample_scenes(2, 30 + shape, shape=shape)
    painting = pocket.painter.paint(scenes)
    foot = pocket.painter.FOOT[pocket.world.ATTRIBUTES["shape"][shape]]
    for i in range(2):
        eye, ray = rays(pocket, scenes, i)
        seen = eye.view(3, 1, 1) + painting.depth[i] * ray
        c, s, scale = scenes.yaw[i].double().cos(), scenes.yaw[i].double().sin(), scenes.scale[i].double()
        x, y, z = painting.coordinates[i].double() * scale
        stands = torch.stack(
            [c * x - s * z + scenes.offset[i], y + foot * scale + pocket.painter.GROUND_Y, s * x + c * z]
        )
        inside = (painting.mask[i] > 0.99) & (off_surface(pocket, scenes, painting)[i] < 0.01)
        assert inside.sum() > 500 and (seen - stands).norm(dim=0)[inside].max() < 0.01
        lowest = stands[1][inside].min()
        assert pocket.painter.GROUND_Y - 0.02 < lowest < pocket.painter.GROUND_Y + 0.25, "it stands on the ground"
        ground = (painting.mask[i] < 0.01) & (painting.depth[i] < 50)
        assert ground.any() and (seen[1][ground] - pocket.painter.GROUND_Y).abs().max() < 0.05


@pytest.mark.parametrize("pattern", ["striped", "spotted", "checkered", "blotched", "dipped"])
def test_an_instance_keeps_its_pattern_in_another_view(pocket, pattern):
    """The same surface point has the same colour seen from elsewhere, and another colour on most of another instance."""
    fixed = {"shape": 0, "colour": 0, "pattern": pocket.world.ATTRIBUTES["pattern"].index(pattern), "background": 0}
    flat = {
        "stroke": 1,
        "paper": 0,
        "line": 0,
        "scale": 1.0,
        "offset": 0.0,
        "light_azimuth": 0.0,
        "light_elevation": 0.9,
    }
    views = {"yaw": torch.tensor([-0.3, 0.3]), "pitch": torch.tensor([0.2, 0.4])}

    def agreement(instance: list[int]) -> float:
        scenes = pocket.world.sample_scenes(2, 1, **fixed, **flat, **views, instance=torch.tensor(instance))
        painting = pocket.painter.paint(scenes)
        points, colours = [], []
        for i in range(2):
            inside = painting.mask[i] > 0.99
            points.append(painting.coordinates[i][:, inside].T)
            rgb = painting.image[i][:, inside].T
            colours.append(rgb / rgb.norm(dim=1, keepdim=True))  # two tones of light fall out
        distance, nearest = torch.cdist(points[0], points[1]).min(1)
        seen = distance < 0.02
        assert seen.sum() > 200, "the two views have too little in common"
        return ((colours[0] - colours[1][nearest]).norm(dim=1)[seen] < 0.1).float().mean().item()

    pairs = [(a, b) for a in (11, 12, 13) for b in (11, 12, 13) if a < b]
    others = sum(agreement([a, b]) for a, b in pairs) / len(pairs)
    for instance in (11, 12, 13):
        same = agreement([instance, instance])
        assert 1 - same < (1 - others) / 4, (same, others)


def test_what_surrounds_the_object_belongs_to_the_setting(pocket):
    """The same instance in another setting: the same object, other hills and moon."""
    same = {
        "instance": 5,
        "shape": 1,
        "colour": 2,
        "background": 3,
        "stroke": 1,
        "paper": 0,
        "line": 0,
        **{k: low for k, (low, _) in pocket.world.GEOMETRY.items()},
    }
    painting = pocket.painter.paint(pocket.world.sample_scenes(2, 1, **same, pattern=1, setting=torch.tensor([1, 2])))
    a, b = painting.image
    inside = painting.mask[0] > 0.99
    assert a[:, inside].equal(b[:, inside]) and not a[:, painting.mask[0] < 0.01].equal(b[:, painting.mask[0] < 0.01])


def test_every_factor_of_the_medium_shows(pocket):
    for factor, n in {"stroke": 6, "paper": 4, "line": 3}.items():
        other = {f: 0 for f in pocket.world.FACTORS if f != factor}
        scene = pocket.world.sample_scenes(1, 8, shape=0, **other)[torch.zeros(n, dtype=torch.long)]
        setattr(scene, factor, torch.arange(n))
        pictures = pocket.painter.paint(scene).image
        for i in range(n):
            for k in range(i):
                assert (pictures[i] - pictures[k]).abs().mean() > 0.01, (factor, i, k)


# What is said


@pytest.fixture(scope="module")
def said(pocket, many):
    return pocket.grammar.captions(many, 100)


COLOURS = {"red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"}
SHAPES = {
    "sphere",
    "ball",
    "globe",
    "cube",
    "box",
    "cone",
    "cylinder",
    "drum",
    "ring",
    "donut",
    "diamond",
    "gem",
    "star",
    "heart",
}
PLACES = (
    "in a studio",
    "on a meadow",
    "on green grass",
    "in the desert",
    "on sand",
    "at night",
    "in the dark",
    "in the snow",
    "on snow",
    "at sea",
    "on the water",
)
FACTOR_WORDS = (
    "shading",
    "tones",
    "hatching",
    "halftone",
    "washes",
    "blocks",
    "full colour",
    "paper",
    "outline",
    "outlines",
)
NAMES = ("photo", "photograph", "poster", "comic", "cartoon", "engraving", "newsprint", "watercolor", "watercolour", "pixel art", "neon", "chalk",
         "chalk drawing", "pop art")  # fmt: skip


def has(caption: str, phrases) -> bool:
    return any(re.search(rf"\b{re.escape(p)}\b", caption) for p in phrases)


def without_places(caption: str) -> str:
    for place in PLACES:
        caption = caption.replace(place, "")
    return caption


def test_shares_of_what_is_left_out(said):
    """20 % say a generic word where the medium stands, 10 % the medium alone, 10 % omit the shape or the colour."""
    alone = [c for c in said if not has(c, SHAPES) and not has(c, ["object"])]
    bodies = [c for c in said if has(c, SHAPES) or has(c, ["object"])]
    generic = [c for c in bodies if has(c, ["picture"]) and not has(c, NAMES) and not has(c, FACTOR_WORDS)]
    omitted = [c for c in bodies if has(c, ["object"]) or not has(without_places(c), COLOURS)]
    assert abs(len(alone) / N - 0.10) < 0.02
    assert abs(len(generic) / N - 0.20) < 0.03
    assert abs(len(omitted) / N - 0.10) < 0.02
    for caption in alone:
        assert not has(without_places(caption), COLOURS) and not has(caption, PLACES)
        assert has(caption, NAMES) or has(caption, FACTOR_WORDS), f"{caption!r} says nothing"


def test_about_half_name_factors(said):
    assert 0.3 < sum(has(c, FACTOR_WORDS) for c in said) / N < 0.6


def test_captions_say_what_is_in_the_scene(pocket, many, said):
    """Whatever a caption says of shape, colour or medium is so."""
    world, grammar = pocket.world, pocket.grammar
    for i, caption in enumerate(said[:3000]):
        text = without_places(caption)
        shape = world.ATTRIBUTES["shape"][many.shape[i]]
        assert not has(text, SHAPES - set(grammar.SYNONYMS["shape"][shape])), caption
        assert not has(text, COLOURS - {world.ATTRIBUTES["colour"][many.colour[i]]}), caption
        named = [m for m, ways in grammar.MEDIUM_SYNONYMS.items() if has(text, ways)]
        assert all(world.MEDIUMS[m] == many.combination(i) for m in named), caption
        for factor, level in zip(world.FACTORS, many.combination(i), strict=True):
            for k, value in enumerate(world.ATTRIBUTES[factor]):
                assert k == level or not has(text, grammar.SYNONYMS[factor][value]), caption
        for place, ways in grammar.SYNONYMS["background"].items():
            assert place == world.ATTRIBUTES["background"][many.background[i]] or not has(caption, ways), caption


def test_every_word_is_in_the_vocabulary(pocket, said):
    known = pocket.grammar.vocabulary()
    spoken = {word for caption in said for word in re.findall(r"[a-z]+", caption)}
    assert spoken <= known and {"picture", "style", "in", "the", "of", "a"} <= known
    assert known - spoken == set(), "words that are never said are never learned"
    assert not [c for c in said if re.search(r"[^a-z, -]|  |^ | $|, ,|,$", c)], "stray blanks, commas or capitals"


def test_a_held_out_medium_has_no_name(pocket):
    for k, combination in enumerate(pocket.world.HELD_OUT):
        scenes = pocket.world.sample_scenes(300, 50 + k, **dict(zip(pocket.world.FACTORS, combination, strict=True)))
        assert not [c for c in pocket.grammar.captions(scenes, k) if has(c, NAMES)]


def test_another_seed_says_the_same_differently(pocket, many):
    few = many[torch.arange(200)]
    one, again, other = (pocket.grammar.captions(few, seed) for seed in (1, 1, 2))
    assert one == again and sum(a != b for a, b in zip(one, other, strict=True)) > 150


def test_content_says_nothing_of_the_medium(pocket, many):
    for i in range(500):
        caption = pocket.grammar.content(many, i)
        assert has(caption, SHAPES) and has(caption, COLOURS) and has(caption, PLACES)
        assert not has(caption, NAMES) and not has(caption, FACTOR_WORDS) and not has(caption, ["picture"])


def test_captions_become_the_tokens_that_comfyui_makes_of_them(pack, pocket, said):
    words = importlib.import_module(f"{pack.__name__}.nodes.pocket_training").Words()
    wrong = []
    for caption in said[:500]:
        (chunk,) = words.tokenizer.tokenize_with_weights(caption)
        tokens = [token for token, _ in chunk]
        rows = words.rows(caption)
        ours = [int(words.ids[row]) for row in rows]
        ours += [words.tokenizer.end_token] * (77 - len(ours))
        if ours != tokens:
            wrong.append(caption)
    assert not wrong
