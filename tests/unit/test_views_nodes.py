"""What the nodes of views make of their inputs, and lines for the eye."""

import pytest
import torch

from harness.small_nets import numbers


@pytest.fixture(scope="module")
def views(pack):
    return pack.nodes.views


@pytest.fixture(scope="module")
def sources(views):
    return views.sources


def camera(**more) -> dict:
    place = {"position": {"x": 0, "y": 0, "z": 4}, "target": {"x": 0, "y": 0, "z": 0}}
    return {**place, "zoom": 1, "cameraType": "perspective", "fov": 40, "near": 2.0, "far": 6.0, **more}


def test_batches_and_lists_are_one_set_of_views(sources):
    assert sources.one_size("depth", [torch.zeros(2, 4, 6, 3), torch.zeros(1, 4, 6, 3)]).shape == (3, 4, 6, 3)
    with pytest.raises(ValueError, match="View 2 of 'depth' is 6 x 5 and the first 6 x 4: make them one size"):
        sources.one_size("depth", [torch.zeros(1, 4, 6, 3), torch.zeros(1, 5, 6, 3)])
    with pytest.raises(ValueError, match="There is 1 view in 'images': give 2 or more"):
        sources.one_size("images", [torch.zeros(1, 4, 6, 3)])


def test_masks_may_have_sizes_of_their_own(sources):
    large, small = torch.zeros(1, 40, 60), torch.zeros(1, 8, 12)
    large[:, :20], small[:, :, 6:] = 1, 1
    inside = sources.read_masks([large, small], 2, 4, 6)
    assert inside[0].tolist() == [[True] * 6] * 2 + [[False] * 6] * 2 and inside[1].all(0).tolist() == [False] * 3 + [True] * 3  # fmt: skip
    assert sources.read_masks(None, 2, 4, 6).all()


def test_grey_is_a_distance_between_near_and_far(sources):
    grey = torch.tensor([[[1.0, 0.5], [0.25, 0.0]]])
    depth, (read,) = sources.distances(grey, [camera()], False)
    assert depth.tolist() == [[[2.0, 4.0], [5.0, 6.0]]]
    along, _ = sources.distances(grey, [camera()], True)
    at = sources.centres(2, 2)
    reach = (sources.read_camera(camera()).position - torch.tensor([0.0, 0.0, 4.0])).norm()
    assert reach == 0 and (along < depth).all()
    from_pixel = torch.stack([at[..., 0] * 2 - 1, 1 - at[..., 1] * 2], -1) / read.focal
    assert (along[0] * (1 + from_pixel.square().sum(-1)).sqrt() - depth[0]).abs().max() <= 1e-9


def test_depth_without_its_camera_is_refused(sources):
    with pytest.raises(ValueError, match="There are 3 pictures of depth and 2 cameras: give 1 camera for each"):
        sources.distances(torch.ones(3, 4, 4), [camera()] * 2, False)
    for blind in ({"near": None}, {"far": 1.0}):
        with pytest.raises(ValueError, match="Camera 2 does not say how near white is and how far black"):
            sources.distances(torch.ones(2, 4, 4), [camera(), camera(**blind)], False)


def test_patches_lie_where_the_picture_shows_them(sources, pack):
    """Of Pocket's eye, 8 x 8 of them: what changes in one corner of a picture changes that patch most."""
    vision, picture = pack.nodes.pocket_models.load_vision(), numbers(1, 128, 256, 3).sigmoid()
    other = picture.clone()
    other[:, 96:112, 32:64] = 1 - other[:, 96:112, 32:64]  # in a picture that is squeezed to half its width
    with torch.inference_mode():
        before, after = (sources.patches(vision, p) for p in (picture, other))
    assert before.shape == (1, 8, 8, 128)
    assert (after - before).norm(dim=-1).flatten().argmax() == 6 * 8 + 1
    strange = type("Eye", (), {"image_size": -1, "config": {}, "encode_image": lambda self, images, crop: {"last_hidden_state": torch.zeros(1, 256, 8)}})  # fmt: skip
    with pytest.raises(ValueError, match="has 256 tokens, which are no square of patches"):
        sources.patches(strange(), picture)


def test_angles_are_even_and_a_whole_turn_closes(views):
    assert views.node.angles(3, -30, 30) == [-30, 0, 30] and views.node.angles(4, 0, 360) == [0, 90, 180, 270]


def test_lines_lead_from_one_view_to_the_next(views):
    """On black pictures, straight lines from the points of one to those of the other, no more than asked for."""
    c = views.correspondences
    here = torch.stack([torch.full((40,), 0.25), (torch.arange(40) + 0.5) / 40], 1)
    there = here + torch.tensor([0.5, 0.0])
    for pair, of in (((0, 1), (here, there)), ((1, 0), (there, here))):
        matches = c.Correspondences(2, (40, 40), {pair: of})
        drawn = views.drawing.to_tensor(views.drawing.lines([torch.zeros(80, 100, 3)] * 2, matches, 5))
        assert drawn.shape == (1, 80, 208, 3)
        rows = (drawn[0, :, 60:90].amax((1, 2)) > 0.5).nonzero().flatten()
        assert 5 <= len(rows) <= 10 and rows[0] < 16 and rows[-1] > 64
        assert drawn[0, :, :20].eq(0).all() and drawn[0, :, 200:].eq(0).all(), "lines end where their points are"
        colours = drawn[0, rows, 70]
        assert len(colours.mul(255).round().unique(dim=0)) == 5
    assert views.drawing.evenly(3, 5).tolist() == [0, 1, 2] and views.drawing.evenly(100, 4).tolist() == [12, 37, 62, 87]  # fmt: skip


def test_pictures_of_other_views_are_not_drawn_on(views):
    draw, c = views.node.DrawCorrespondences, views.correspondences
    points = (torch.tensor([[0.5, 0.5]]),) * 2
    matches = c.Correspondences(2, (8, 8), {(0, 1): points})
    with pytest.raises(ValueError, match="There are 3 pictures and correspondences of 2 views"):
        draw.execute([torch.zeros(3, 8, 8, 3)], [matches], [5])
    with pytest.raises(ValueError, match="There are 2 correspondences: give 1, of all views together"):
        draw.execute([torch.zeros(2, 8, 8, 3)], [matches, matches], [5])
    with pytest.raises(ValueError, match="No point of one view was found in another: there is nothing to draw"):
        draw.execute([torch.zeros(2, 8, 8, 3)], [c.Correspondences(2, (8, 8), {})], [5])
