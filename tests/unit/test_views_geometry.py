"""Cameras and pictures of meshes, against closed forms and loops over pixels."""

import math

import pytest
import torch

from harness.small_nets import numbers


@pytest.fixture(scope="module")
def views(pack):
    return pack.nodes.views


def info(position=(0.0, 0.0, 4.0), target=(0.0, 0.0, 0.0), fov=40.0, **more) -> dict:
    places = [dict(zip("xyz", p, strict=True)) for p in (position, target)]
    return {"position": places[0], "target": places[1], "zoom": 1.0, "cameraType": "perspective", "fov": fov, **more}


def camera(views, *args, **more):
    return views.geometry.read_camera(info(*args, **more))


def sphere(radius=1.0, rings=96):
    """(v, 3) and (f, 3); the poles lie on Y."""
    up = torch.linspace(0, math.pi, rings + 1, dtype=torch.float64)
    around = torch.arange(2 * rings, dtype=torch.float64) * math.pi / rings
    sin = up.sin()[:, None]
    points = torch.stack([sin * around.cos(), up.cos()[:, None].expand(-1, 2 * rings), sin * around.sin()], -1)
    i = torch.arange(rings)[:, None] * 2 * rings
    j = torch.arange(2 * rings)
    right = (j + 1) % (2 * rings)
    quads = [i + j, i + right, i + 2 * rings + j, i + 2 * rings + right]
    a, b, c, d = (q.flatten() for q in quads)
    return radius * points.flatten(0, 1), torch.cat([torch.stack([a, b, c], 1), torch.stack([b, d, c], 1)])


def cube(side=1.0):
    corners = torch.tensor([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=torch.float64)
    squares = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
    faces = [[s[0], s[k], s[k + 1]] for s in squares for k in (1, 2)]
    return corners * side / 2, torch.tensor(faces)


def mesh(vertices, faces, **more):
    from comfy_api.latest import Types

    return Types.MESH(vertices[None], faces[None], **more)


@pytest.mark.parametrize("window", [None, {"fullWidth": 200, "fullHeight": 100, "offsetX": 30, "offsetY": 7, "width": 90, "height": 60}])  # fmt: skip
def test_what_is_put_into_the_scene_is_seen_where_it_was(views, window):
    eye = camera(views, (1.0, 2.0, 3.0), (0.2, -0.1, 0.3), view=window)
    at, depth = numbers(50, 2).sigmoid(), numbers(50, seed=2).exp()
    points = views.geometry.unproject(eye, at, depth, 1.5)
    again, z = views.geometry.project(eye, points, 1.5)
    assert (again - at).abs().max() <= 1e-7 and (z - depth).abs().max() <= 1e-7
    distance = (points - eye.position).norm(dim=1)
    assert (views.geometry.along_axis(eye, at, distance, 1.5) - depth).abs().max() <= 1e-7


def test_a_camera_is_the_one_of_kornia(views):
    """Which has Y down and Z forward, pixels, and matrices."""
    from kornia.geometry.camera import PinholeCamera

    eye, (height, width) = camera(views, (1.0, 2.0, 3.0), (0.2, -0.1, 0.3)), (60, 80)
    flip = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)[:, None]
    outside = torch.eye(4, dtype=torch.float64)
    outside[:3, :3] = eye.axes * flip
    outside[:3, 3] = -outside[:3, :3] @ eye.position
    inside = torch.eye(4, dtype=torch.float64)
    inside[0, 0] = inside[1, 1] = height / 2 / math.tan(math.radians(20))
    inside[0, 2], inside[1, 2] = width / 2, height / 2
    sizes = [torch.tensor([float(n)]).double() for n in (height, width)]
    points = numbers(20, 3).double() * 0.5
    expected = PinholeCamera(inside[None], outside[None], *sizes).project(points[None])[0]
    at, _ = views.geometry.project(eye, points, width / height)
    assert (at * torch.tensor([width, height]) - expected).abs().max() <= 1e-6


def test_a_quaternion_says_what_the_target_says(views):
    """Core's own look-at makes the quaternion."""
    from comfy_extras.nodes_gaussian_splat import _lookat_camera_info

    for position in ([1.0, 2.0, 3.0], [-2.0, 0.4, -1.0], [0.0, 1.0, -3.0]):
        turned = views.geometry.read_camera(_lookat_camera_info(position, [0.1, 0.2, 0.0], 35, "cpu"))
        plain = camera(views, position, (0.1, 0.2, 0.0), fov=35)
        assert (turned.axes - plain.axes).abs().max() <= 1e-6
        assert (plain.axes @ plain.axes.T - torch.eye(3)).abs().max() <= 1e-12 and plain.axes.det() > 0


def test_zoom_is_a_longer_lens_and_straight_down_is_upright(views):
    assert camera(views, zoom=2.0).focal == pytest.approx(2 * camera(views).focal)
    down = camera(views, (0.0, 3.0, 0.0))
    assert down.axes[2].tolist() == [0, 1, 0] and down.axes.isfinite().all()


@pytest.mark.parametrize("wrong, words", [
    ({"cameraType": "orthographic"}, "take a perspective camera"), ({"fov": 0}, "field of view between 0 and 180"),
    ({"target": {"x": 0.0, "y": 0.0, "z": 4.0}}, "stands where it looks"),
    ({"position": {"x": math.nan, "y": 0.0, "z": 4.0}}, "not finite"),
])  # fmt: skip
def test_a_camera_that_is_none_is_refused(views, wrong, words):
    with pytest.raises(ValueError, match=words):
        views.geometry.read_camera({**info(), **wrong})


@pytest.mark.parametrize("aspect", [0.5, 1.0, 2.0])
def test_an_orbit_keeps_the_object_in_the_picture(views, aspect):
    centre = torch.tensor([0.5, 1.0, -2.0], dtype=torch.float64)
    for each in views.geometry.orbit([-120.0, 0.0, 45.0], 30.0, 35.0, aspect, centre, 1.5):
        points = centre + 1.5 * torch.nn.functional.normalize(numbers(2000, 3).double(), dim=1)
        at, depth = views.geometry.project(views.geometry.read_camera(each), points, aspect)
        assert at.min() > 0 and at.max() < 1 and at.std(0).max() > 0.2
        assert each["near"] <= depth.min() and depth.max() <= each["far"]


def slow(corners, depths, height, width):
    """Every pixel asks every triangle, on which side of each edge it lies, and solves for the plane through its corners."""
    face, z = torch.full((height, width), -1), torch.full((height, width), torch.inf, dtype=torch.float64)
    for row in range(height):
        for column in range(width):
            x, y = column + 0.5, row + 0.5
            for number, (corner, depth) in enumerate(zip(corners.tolist(), depths.tolist(), strict=True)):
                sides = []
                for k in range(3):
                    (px, py), (qx, qy) = corner[k], corner[(k + 1) % 3]
                    sides.append((qx - px) * (y - py) - (qy - py) * (x - px))
                if min(sides) < 0 < max(sides) or min(depth) <= 0:
                    continue
                plane = torch.tensor([[cx, cy, 1.0] for cx, cy in corner], dtype=torch.float64)
                inverse = torch.linalg.solve(plane, 1 / torch.tensor(depth, dtype=torch.float64))
                here = 1 / float(inverse @ torch.tensor([x, y, 1.0], dtype=torch.float64))
                if here < z[row, column]:
                    face[row, column], z[row, column] = number, here
    return face, z


@pytest.mark.parametrize("together", [1 << 21, 40])
def test_triangles_are_those_of_a_slow_loop(views, monkeypatch, together):
    """Some beyond the edges of the picture, one behind the camera, of both windings."""
    monkeypatch.setattr(views.raster, "FRAGMENTS", together)
    corners, depths = numbers(12, 3, 2).double() * 9 + 8, numbers(12, 3, seed=5).double().exp() + 0.5
    depths[4, 1] = -1.0
    face, z = slow(corners, depths, 14, 18)
    got = views.raster.nearest_face(corners, depths, 14, 18)
    assert got.equal(face) and (face >= 0).float().mean() > 0.3 and len(face.unique()) > 5
    row, column = (face >= 0).nonzero().unbind(1)
    seen = face[row, column]
    _, shares, depth = views.raster._within(corners[seen], depths[seen], torch.stack([column, row], 1) + 0.5)
    assert (depth - z[row, column]).abs().max() <= 1e-9 and (shares.sum(1) - 1).abs().max() <= 1e-12


def test_a_sphere_is_where_rays_meet_it(views):
    eye = camera(views, (1.0, 1.5, 3.0))
    solid = views.raster.Solid(*sphere())
    view = views.raster.render(solid, eye, 60, 80)
    at = views.geometry.centres(60, 80)
    ray = views.geometry.unproject(eye, at, torch.ones(60, 80), 80 / 60) - eye.position  # depth 1
    b, c = (ray * eye.position).sum(-1), eye.position.square().sum() - 1
    root = b.square() - ray.square().sum(-1) * c
    depth = (-b - root.clamp_min(0).sqrt()) / ray.square().sum(-1)
    assert (view.mask != (root > 0)).float().mean() < 0.01
    inner = view.mask & (root > 0.5)
    assert inner.sum() > 500 and (view.depth - depth)[inner].abs().max() < 3e-3
    assert (view.coordinates - eye.position - depth[..., None] * ray)[inner].abs().max() < 3e-3
    assert view.depth[~view.mask].eq(0).all() and view.picture[~view.mask].eq(0).all()
    across = view.picture[view.mask]
    assert across.max() <= 0.8 and across.min() >= 0.8 * 0.3 - 1e-6 and across.std() > 0.05


def test_a_cube_is_exact(views):
    """Its front is a square, and every point seen lies on its surface."""
    view = views.raster.render(views.raster.Solid(*cube()), camera(views, (0.0, 0.0, 2.5), fov=60.0), 100, 100)
    half = 0.5 / 2.0 / math.tan(math.radians(30)) * 50  # pixels from the middle
    expected = torch.zeros(100, 100, dtype=torch.bool)
    inside = (torch.arange(100) + 0.5 - 50).abs() < half
    expected[inside[:, None] & inside[None]] = True
    assert view.mask.equal(expected) and (view.depth[expected] - 2.0).abs().max() <= 1e-6
    turned = views.raster.render(views.raster.Solid(*cube()), camera(views, (2.0, 1.5, 2.5)), 64, 64)
    on = turned.coordinates[turned.mask]
    assert (on.abs().amax(1) - 0.5).abs().max() <= 1e-6 and (on == on.clamp(-0.5001, 0.5001)).all()
    assert len(turned.picture[turned.mask][:, 0].mul(8).round().unique()) >= 2, "its sides look alike"


def test_colours_are_those_of_the_point(views):
    """Of a slanted square: straight in the scene, not in the picture. Texture and vertex colours say the same."""
    vertices = torch.tensor([[-1.0, -1, 1], [1, -1, -1], [1, 1, -1], [-1, 1, 1]], dtype=torch.float64)
    faces, uvs = torch.tensor([[0, 1, 2], [0, 2, 3]]), torch.tensor([[0.0, 1], [1, 1], [1, 0], [0, 0]])
    colours = torch.cat([uvs, torch.full((4, 1), 0.25)], 1)
    eye = camera(views, (0.0, 0.0, 4.0))
    raster = views.raster
    plain = raster.render(raster.read_mesh(mesh(vertices, faces, vertex_colors=colours[None])), eye, 64, 64)
    across = plain.coordinates[plain.mask]
    expected = torch.stack([(across[:, 0] + 1) / 2, (1 - across[:, 1]) / 2, torch.full((len(across),), 0.25)], 1)
    assert (plain.picture[plain.mask] - expected).abs().max() <= 1e-6
    y, x = ((torch.arange(256) + 0.5) / 256).expand(256, 256).T, ((torch.arange(256) + 0.5) / 256).expand(256, 256)
    texture = torch.stack([x, y, torch.full_like(x, 0.25)], -1)
    painted = raster.render(raster.read_mesh(mesh(vertices, faces, uvs=uvs[None], texture=texture[None])), eye, 64, 64)
    assert (painted.picture - plain.picture).abs().max() <= 0.005
    assert painted.mask.equal(plain.mask) and plain.mask.sum() > 500


def test_a_mesh_that_was_filled_up_is_cut_to_its_counts(views):
    vertices, faces = cube()
    more = mesh(torch.cat([vertices, torch.full((5, 3), math.nan)]), torch.cat([faces, torch.zeros(3, 3).long()]),
                vertex_counts=torch.tensor([8]), face_counts=torch.tensor([12]))  # fmt: skip
    solid = views.raster.read_mesh(more)
    assert solid.vertices.equal(vertices) and solid.faces.equal(faces)


@pytest.mark.parametrize("broken, words", [
    ("faces", "has no faces, only points"), ("nan", "1 vertices of the MESH are no finite numbers"),
    ("index", "vertex that is not there .of 8."), ("two", "holds 2 objects"),
])  # fmt: skip
def test_a_mesh_that_cannot_be_seen_is_refused(views, broken, words):
    vertices, faces = cube()
    if broken == "nan":
        vertices[3, 1] = math.nan
    faces = {"faces": faces[:0], "index": faces + 1}.get(broken, faces)
    given = mesh(vertices, faces)
    if broken == "two":
        given.vertices, given.faces = given.vertices.repeat(2, 1, 1), given.faces.repeat(2, 1, 1)
    with pytest.raises(ValueError, match=words):
        views.raster.read_mesh(given)
