"""Views of one object in whole prompts: of a mesh, and of Pocket's world."""

import itertools

import pytest
import torch

from harness.training import node

COUNT = 3


def box():
    """A box of three sides, its corners coloured by where they are."""
    from comfy_api.latest import Types

    corners = torch.tensor([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) * torch.tensor(
        [1.0, 0.6, 0.4]
    )
    squares = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
    faces = torch.tensor([[s[0], s[k], s[k + 1]] for s in squares for k in (1, 2)])
    return Types.MESH(corners[None], faces[None], vertex_colors=corners[None].sign() * 0.4 + 0.5)


def painting(*modes: str) -> dict:
    """1 models, 2 text, 3 latents, 4 what the model itself makes of them; by mode a warped model and what it makes, with the warp on to
    the end; beside the correspondences in 9."""
    made = {
        "1": node("CounterpointLoadPocketModels"),
        "2": node("CLIPTextEncode", clip=["1", 1], text="a red cube on a meadow"),
        "3": node("EmptyLatentImage", width=128, height=128, batch_size=COUNT),
        "4": sampler(["1", 0]),
        "shown 4": node("PreviewAny", source=["4", 0]),
    }
    for mode in modes:
        warp = node("CounterpointFeatureWarp", model=["1", 0], correspondences=["9", 0], mode=mode, end=1.0)
        made |= {f"warp {mode}": warp, mode: sampler([f"warp {mode}", 0])}
        made[f"shown {mode}"] = node("PreviewAny", source=[mode, 0])
    return made


def sampler(model: list) -> dict:
    return node("KSampler", model=model, positive=["2", 0], negative=["2", 0], latent_image=["3", 0], seed=1, steps=4, cfg=2.0,
                sampler_name="euler", scheduler="normal", denoise=1.0)  # fmt: skip


def pocket(**more) -> dict:
    """8 three views of one object, 9 its correspondences."""
    inputs = {"coordinates": ["8", 5], "masks": ["8", 2], "size": 64, **more}
    return {
        "8": node("CounterpointPocketPictures", count=COUNT, shape="cube", same_object=7, seed=4),
        "9": node("CounterpointCorrespondencesFromCoordinates", **inputs),
        "10": node("CounterpointDrawCorrespondences", images=["8", 0], correspondences=["9", 0]),
    }


def test_a_mesh_is_seen_from_its_sides(graph, given):
    prompt = {
        "1": given("MESH", [box()]),
        "2": node("CounterpointViewsOfAMesh", mesh=["1", 0], width=160, height=128, views=COUNT),
        "3": node("CounterpointCorrespondencesFromDepth", depth=["2", 1], cameras=["2", 4], masks=["2", 2], size=128),
        "4": node("CounterpointCorrespondencesFromCoordinates", coordinates=["2", 3], masks=["2", 2]),
        "5": node("CounterpointDrawCorrespondences", images=["2", 0], correspondences=["2", 5]),
        "6": node("CounterpointDrawCorrespondences", images=["2", 1], correspondences=["3", 0]),
        "7": node("CounterpointDrawCorrespondences", images=["2", 3], correspondences=["4", 0]),
    }
    run = graph(prompt)
    images, depth, masks, coordinates = (run.value("2", n) for n in range(4))
    assert images.shape == depth.shape == coordinates.shape == (COUNT, 128, 160, 3) and masks.shape == (COUNT, 128, 160)
    assert len(run.outputs["2"][4]) == COUNT
    inside = masks > 0
    assert ((0.05 < masks.mean((1, 2))) & (masks.mean((1, 2)) < 0.6)).all() and images[~inside].eq(0).all()
    assert depth[inside].min() > 0 and depth[inside].max() <= 1 and depth[~inside].eq(0).all()
    assert (coordinates[inside] - 0.5).abs().amax(1).max() <= 0.5 + 1e-6
    own, again, nearest = run.value("2", 5), run.value("3"), run.value("4")
    for pair in itertools.permutations(range(COUNT), 2):
        assert len(own.points[pair][0]) > 300 and own.size == (102, 128)
        assert abs(len(again.points[pair][0]) - len(own.points[pair][0])) <= 0.02 * len(own.points[pair][0])
        for matches in (own, again, nearest):
            here, there = (shown(images[view], points) for view, points in zip(pair, matches.points[pair], strict=True))
            assert (here - there).abs().mean() < 0.02, "one point, one colour"
    assert run.value("5").shape == (1, 128, 3 * 160 + 2 * 8, 3)
    assert graph(prompt).executed == []


def shown(picture: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    height, width = picture.shape[:2]
    return picture[(at[:, 1] * height).long().clamp(max=height - 1), (at[:, 0] * width).long().clamp(max=width - 1)]


def test_pockets_views_agree_by_colour_and_by_depth(graph):
    """The same matches, whether from what the painter says of the surface or from depth and cameras."""
    prompt = {
        **pocket(tolerance=0.02),
        "11": node("CounterpointCorrespondencesFromDepth", depth=["8", 3], cameras=["8", 4], masks=["8", 2], size=64, measured="along each ray"),
        "12": node("CounterpointDrawCorrespondences", images=["8", 5], correspondences=["11", 0]),
    }  # fmt: skip
    run = graph(prompt)
    surface, depth = run.value("9"), run.value("11")
    coordinates = torch.cat(run.outputs["8"][5])
    assert coordinates.shape == (COUNT, 128, 128, 3) and coordinates.min() == 0 and coordinates.max() < 1
    for pair in itertools.permutations(range(COUNT), 2):
        assert len(surface.points[pair][0]) > 300 and len(depth.points[pair][0]) > 300
        for matches in (surface, depth):
            here, there = (
                shown(coordinates[view], points) for view, points in zip(pair, matches.points[pair], strict=True)
            )
            assert (here - there).norm(dim=1).median() < 0.015
    assert run.value("10").shape == run.value("12").shape == (1, 128, 3 * 128 + 2 * 8, 3)


def test_what_is_seen_of_pictures_matches_too(graph):
    run = graph({
        **pocket(),
        "1": node("CounterpointLoadPocketModels"),
        "11": node("CounterpointCorrespondencesFromFeatures", images=["8", 0], clip_vision=["1", 3], masks=["8", 2]),
        "12": node("CounterpointDrawCorrespondences", images=["8", 0], correspondences=["11", 0]),
    })  # fmt: skip
    matches = run.value("11")
    assert matches.size == (8, 8) and len(matches) >= 4
    assert matches.points[0, 1][0].equal(matches.points[1, 0][1])


def test_views_that_are_painted_agree(graph):
    """In the latents that correspond."""
    run = graph({**pocket(), **painting("features", "latents")})
    plain, features, latents = (run.value(each)["samples"] for each in ("4", "features", "latents"))
    matches = run.value("9")

    def apart(latents: torch.Tensor) -> float:
        gaps = []
        for (a, b), points in matches.points.items():
            here, there = (shown(latents[n].movedim(0, -1), p) for n, p in zip((a, b), points, strict=True))
            gaps.append((here - there).square().mean())
        return float(torch.stack(gaps).mean())

    assert latents[0].equal(plain[0]) and not features.equal(plain)
    assert apart(features) < 0.95 * apart(plain) and apart(latents) < 0.4 * apart(plain)


def test_a_batch_of_another_number_is_one_sentence(graph):
    prompt = {**pocket(), **painting("features")}
    prompt["3"]["inputs"]["batch_size"] = 2
    del prompt["4"], prompt["shown 4"]
    run = graph(prompt, check=False)
    assert len(run.errors) == 1 and "knows 3 views, and 2 pictures are painted together" in run.errors[0]


@pytest.mark.parametrize("broken, words", [("faces", "has no faces"), ("nan", "1 vertices of the MESH are no finite numbers")])  # fmt: skip
def test_a_mesh_without_a_surface_is_one_sentence(graph, given, broken, words):
    mesh = box()
    if broken == "faces":
        mesh.faces = mesh.faces[:, :0]
    else:
        mesh.vertices[0, 3, 1] = float("nan")
    prompt = {"1": given("MESH", [mesh]), "2": node("CounterpointViewsOfAMesh", mesh=["1", 0]), "3": node("PreviewImage", images=["2", 0])}  # fmt: skip
    run = graph(prompt, check=False)
    assert len(run.errors) == 1 and words in run.errors[0]
