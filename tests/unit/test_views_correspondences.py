"""Which point of one view is which of another: against loops over pixels, and where the truth is known."""

import itertools

import pytest
import torch

from harness.small_nets import numbers


@pytest.fixture(scope="module")
def views(pack):
    return pack.nodes.views


class Pocket:
    """Three views of one object of Pocket's world, and what is known about them."""

    def __init__(self, pack, count=3, seed=3, **fixed):
        from counterpoint.nodes import pocket
        from counterpoint.nodes.views import geometry
        from counterpoint.training.pocket import painter

        scenes = pack.training.pocket.world.sample_scenes(count, seed, instance=5, **fixed)
        painted = painter.paint(scenes)
        self.masks = painted.mask > 0.5
        self.coordinates = pocket.right_handed(painted.coordinates.movedim(1, -1))
        self.cameras = [geometry.read_camera(each) for each in pocket.cameras(scenes)]
        distance = painted.depth / scenes.scale[:, None, None]
        self.middle = geometry.centres(128, 128)
        self.distance = distance.double()
        self.depth = torch.stack([geometry.along_axis(c, self.middle, d, 1.0) for c, d in zip(self.cameras, distance, strict=True)])  # fmt: skip


@pytest.fixture(scope="module", params=["cube", "star", "ring"])
def pocket(request, pack):
    shapes = pack.training.pocket.world.ATTRIBUTES["shape"]
    return Pocket(pack, shape=shapes.index(request.param))


def test_pockets_cameras_see_what_pocket_paints(views, pocket):
    for n, camera in enumerate(pocket.cameras):
        inside, points = pocket.masks[n], pocket.coordinates[n].double()
        at, depth = views.geometry.project(camera, points[inside], 1.0)
        assert (at - pocket.middle[inside]).abs().max() <= 1e-5
        assert (depth - pocket.depth[n][inside]).abs().max() <= 1e-4
        assert ((points[inside] - camera.position).norm(dim=1) - pocket.distance[n][inside]).abs().max() <= 1e-4


def surface(coordinates, at):
    """What is shown at points of a picture, and the most that it differs from the pixels around."""
    column, row = (at * 128).floor().long().unbind(1)
    here = coordinates[row, column]
    around = [coordinates[(row + y).clamp(0, 127), (column + x).clamp(0, 127)] for x, y in itertools.product((-1, 0, 1), repeat=2)]  # fmt: skip
    return here, torch.stack([(other - here).norm(dim=1) for other in around]).amax(0)


@pytest.mark.parametrize("source", ["depth", "coordinates"])
def test_matches_in_pockets_world_are_the_same_point(views, pocket, source):
    c = views.correspondences
    if source == "depth":
        matches = c.from_depth(pocket.depth, pocket.cameras, pocket.masks, 0.01)
    else:
        matches = c.from_coordinates(pocket.coordinates, pocket.masks, 0.01)
    assert matches.size == (128, 128) and set(matches.points) == set(itertools.permutations(range(3), 2))
    for (a, b), (here, there) in matches.points.items():
        assert len(here) > 0.3 * pocket.masks[a].sum(), "most of the object turns by less than a right angle"
        of_a, _ = surface(pocket.coordinates[a], here)
        of_b, unsure = surface(pocket.coordinates[b], there)
        gap = (of_a - of_b).norm(dim=1)
        assert gap.median() < 0.02 and (gap <= unsure + 0.04).float().mean() > 0.995
        truth, _ = views.geometry.project(pocket.cameras[b], of_a.double(), 1.0)
        assert (truth - there).abs().max() < (1e-4 if source == "depth" else 3 / 128)


def test_what_is_hidden_is_no_match(views, pocket):
    """A point of a that b cannot see, because something of the object is in front of it, is in no pair."""
    matches = views.correspondences.from_depth(pocket.depth, pocket.cameras, pocket.masks, 0.01)
    hidden = 0
    for (a, b), (here, _) in matches.points.items():
        inside = pocket.masks[a]
        at, z = views.geometry.project(pocket.cameras[b], pocket.coordinates[a][inside], 1.0)
        pixel, within = views.geometry.pixels(at, 128, 128)
        behind = within & (z - pocket.depth[b].flatten()[pixel] > 0.1) & pocket.masks[b].flatten()[pixel]
        matched = torch.zeros(128, 128, dtype=torch.bool)
        matched[(here[:, 1] * 128).long(), (here[:, 0] * 128).long()] = True
        assert not (matched[inside] & behind).any()
        hidden += int(behind.sum())
    assert hidden > 100


def boxes(views, height=15, width=20):
    """Depth and cameras of two boxes, one before the other, as the z-buffer sees them."""
    near = torch.tensor([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=torch.float64) * 0.4
    squares = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
    faces = torch.tensor([[s[0], s[k], s[k + 1]] for s in squares for k in (1, 2)])
    solid = views.raster.Solid(torch.cat([near, near * 1.5 + torch.tensor([0.3, 0.0, -1.5])]), torch.cat([faces, faces + 8]))  # fmt: skip
    low, high = solid.box()
    infos = views.geometry.orbit([-35.0, 0.0, 30.0], 15.0, 40.0, width / height, (low + high) / 2, float((high - low).norm() / 2))  # fmt: skip
    cameras = [views.geometry.read_camera(i) for i in infos]
    seen = [views.raster.render(solid, camera, height, width) for camera in cameras]
    return cameras, *(torch.stack([getattr(s, k) for s in seen]) for k in ("depth", "mask", "coordinates"))


def test_depth_and_cameras_are_a_loop_over_pixels(views):
    cameras, depth, masks, _ = boxes(views)
    (count, height, width), tolerance = depth.shape, 0.03
    masks[1, :, :8] = masks[2, 9:] = False  # what has depth there, and does not count
    g, scene = views.geometry, {}
    for n, row, column in masks.nonzero().tolist():
        at = torch.tensor([(column + 0.5) / width, (row + 0.5) / height], dtype=torch.float64)
        scene[n, row, column] = g.unproject(cameras[n], at, depth[n, row, column], width / height)
    every = torch.stack(list(scene.values()))
    slack = tolerance * float((every.amax(0) - every.amin(0)).max())

    def look(n, point):
        at, z = g.project(cameras[n], point, width / height)
        column, row = int(at[0] * width // 1), int(at[1] * height // 1)
        if (n, row, column) not in scene or abs(float(depth[n, row, column]) - float(z)) > slack:
            return None
        return at, (n, row, column)

    expected = {}
    for a, b in itertools.permutations(range(count), 2):
        expected[a, b] = []
        for (n, row, column), point in scene.items():
            met = look(b, point) if n == a else None
            if met and look(a, scene[met[1]]):
                expected[a, b].append([(column + 0.5) / width, (row + 0.5) / height, *met[0].tolist()])
    got = views.correspondences.from_depth(depth, cameras, masks, tolerance)
    for pair, rows in expected.items():
        assert len(rows) > 4 and (torch.cat(got.points[pair], 1) - torch.tensor(rows)).abs().max() <= 1e-6


@pytest.mark.parametrize("block, tolerance", [(1024, 0.05), (7, 0.5)])
def test_surface_coordinates_are_a_loop_over_pixels(views, monkeypatch, block, tolerance):
    """A large tolerance takes points that are not each other's nearest, but for the rule that they must be."""
    monkeypatch.setattr(views.correspondences, "BLOCK", block)
    _, _, masks, coordinates = boxes(views)
    got = views.correspondences.from_coordinates(coordinates, masks, tolerance)
    pixels = [m.nonzero().tolist() for m in masks]
    every = torch.cat([c[m] for c, m in zip(coordinates, masks, strict=True)])
    slack = tolerance * float((every.amax(0) - every.amin(0)).max())

    def nearest(a, at, b):
        return min(pixels[b], key=lambda p: float((coordinates[b][tuple(p)].double() - coordinates[a][tuple(at)].double()).norm()))  # fmt: skip

    for a, b in itertools.permutations(range(3), 2):
        rows = []
        for at in pixels[a]:
            other = nearest(a, at, b)
            gap = float((coordinates[b][tuple(other)] - coordinates[a][tuple(at)]).norm())
            if nearest(b, other, a) == at and gap <= slack:
                rows.append([(at[1] + 0.5) / 20, (at[0] + 0.5) / 15, (other[1] + 0.5) / 20, (other[0] + 0.5) / 15])
        rows = torch.tensor(sorted(rows))
        assert len(rows) > 5 and torch.tensor(sorted(torch.cat(got.points[a, b], 1).tolist())).equal(rows)


def test_features_that_agree_are_found_inside_the_masks(views):
    """Patches of one set, shuffled and blurred; half of the pictures is masked away. Then loop by loop."""
    words, order = numbers(24, 16), torch.randperm(24, generator=torch.Generator().manual_seed(4))
    features = torch.stack([words, words[order] + 0.3 * numbers(24, 16, seed=2)]).view(2, 4, 6, 16)
    masks = torch.ones(2, 4, 6, dtype=torch.bool)
    masks[0, :, 4:], masks[1, 0] = False, False
    unit = torch.nn.functional.normalize(features, dim=-1).flatten(1, 2)
    inside = [m.flatten().nonzero().flatten().tolist() for m in masks]

    def best(a, i, b):
        return max(inside[b], key=lambda j: float(unit[a, i] @ unit[b, j]))

    pairs = [(i, best(0, i, 1)) for i in inside[0] if best(1, best(0, i, 1), 0) == i]
    assert sum(int(order[j]) == i for i, j in pairs) >= 8
    for least in (0.95, None, -1.0):
        cosines = {p: float(unit[0, p[0]] @ unit[1, p[1]]) for p in pairs}
        limit = views.correspondences.otsu(torch.tensor(list(cosines.values())))[0] if least is None else least
        kept = [p for p in pairs if cosines[p] >= limit - 1e-6]
        got = views.correspondences.from_features(features, masks, least)
        places = [[((i % 6) + 0.5) / 6, (i // 6 + 0.5) / 4, (j % 6 + 0.5) / 6, (j // 6 + 0.5) / 4] for i, j in kept]
        assert 0 < len(kept) and (len(kept) < len(pairs)) == (least != -1) and torch.cat(got.points[0, 1], 1).sub(torch.tensor(places)).abs().max() <= 1e-6  # fmt: skip
        assert got.points[1, 0][0].equal(got.points[0, 1][1])


def test_maps_are_sampled_at_the_middle_of_each_pixel(views):
    c = views.correspondences
    assert c.at_most(512, 256, 128) == (128, 64) and c.at_most(60, 40, 128) == (60, 40)
    values = torch.arange(48.0).view(1, 6, 8)
    assert c.sampled(values, 6, 8).equal(values)
    assert c.sampled(values, 2, 4)[0].tolist() == [[9, 11, 13, 15], [33, 35, 37, 39]]


def test_masks_that_say_nothing_are_refused(views):
    c, masks = views.correspondences, torch.ones(3, 8, 8)
    assert c.checked_masks(None, 2, 4, 4).all() and c.checked_masks(masks, 3, 4, 4).shape == (3, 4, 4)
    with pytest.raises(ValueError, match="There are 3 masks for 2 views: give 1 mask for each"):
        c.checked_masks(masks, 2, 4, 4)
    masks[1] = 0
    with pytest.raises(ValueError, match="Mask 2 is empty: white is where the object is"):
        c.checked_masks(masks, 3, 4, 4)


def test_nothing_found_is_said(views):
    far = torch.stack([torch.zeros(4, 4, 3), torch.ones(4, 4, 3)])
    none = views.correspondences.from_coordinates(far, torch.ones(2, 4, 4, dtype=torch.bool), 0.01)
    with pytest.raises(ValueError, match="No point of one view was found in another: turn them less"):
        views.correspondences.found(none, "turn them less")
