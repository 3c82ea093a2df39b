"""Inspect Dataset's findings: each on pictures that have the fault, and on pictures that only look like it."""

import pytest
import torch
from PIL import Image, ImageDraw


@pytest.fixture
def inspection(pack):
    return pack.training.inspection


def photo(seed: int, height: int = 96, width: int = 96) -> torch.Tensor:
    """(1, H, W, 3): broad forms and fine grain."""
    generator = torch.Generator().manual_seed(seed)
    broad = torch.nn.functional.interpolate(
        torch.rand(1, 3, 6, 6, generator=generator), (height, width), mode="bicubic"
    )
    return (broad + torch.randn(1, 3, height, width, generator=generator) * 0.02).clamp(0, 1).movedim(1, -1)


def drawing(seed: int, size: int = 96) -> torch.Tensor:
    """Lines on white paper."""
    generator = torch.Generator().manual_seed(seed)
    canvas = Image.new("RGB", (size, size), "white")
    points = (torch.rand(8, generator=generator) * (size - 40) + 20).tolist()
    ImageDraw.Draw(canvas).line(points, fill="black", width=4)
    return torch.tensor(list(canvas.getdata()), dtype=torch.float32).view(1, size, size, 3) / 255


def framed(image: torch.Tensor, top: int, left: int, colour: float = 0.0) -> torch.Tensor:
    out = image.clone()
    out[:, :top], out[:, image.shape[1] - top :] = colour, colour
    if left:
        out[:, :, :left], out[:, :, -left:] = colour, colour
    return out


def found(inspection, images, captions=(), size=64, style_words=()) -> dict:
    return {f.what: f for f in inspection.inspect(images, list(captions), size, list(style_words))}


def test_nothing_is_found_in_good_pictures(inspection):
    images = [photo(i) for i in range(12)]
    captions = [f"a {i} on a table" for i in range(12)]
    assert found(inspection, images, captions) == {}
    table = inspection.table(images, captions, [str(i) for i in range(12)], 64, [])
    assert table.splitlines() == [
        "12 pictures, 96 x 96 pixels, 12 square; trained on as squares of 64",
        "12 captions; every caption says 'table'",
        "Nothing to look at was found.",
    ]


def test_drawings_on_white_paper_have_no_border_and_no_watermark(inspection):
    assert found(inspection, [drawing(i) for i in range(12)]) == {}


def test_pocket_pictures_are_good_pictures(pack, inspection):
    scenes = pack.training.pocket.world.sample_scenes(40, 3)
    images = [i[None].movedim(1, -1) for i in pack.training.pocket.painter.paint(scenes).image]
    assert not found(inspection, images, size=128).keys() & {"a border", "too small for 128 pixels"}
    assert not any("watermark" in what for what in found(inspection, images, size=128))


def test_too_small_and_far_from_square(inspection):
    images = [photo(0), photo(1, 40, 50), photo(2, 64, 200)]
    got = found(inspection, images)
    assert got["too small for 64 pixels"].detail == {1: "enlarged 1.6 times"}
    assert got["far from square"].detail == {2: "68 % is cut off"}


@pytest.mark.parametrize("change, word", [
    (lambda x: x.clone(), "like picture 1"),
    (lambda x: x.flip(2), "the mirror image of picture 1"),
    (lambda x: (x * 0.9 + 0.05).clamp(0, 1), "like picture 1"),
    (lambda x: torch.nn.functional.interpolate(x.movedim(-1, 1), (50, 50), mode="area").movedim(1, -1), "like picture 1"),
    (lambda x: (x + torch.randn(x.shape, generator=torch.Generator().manual_seed(9)) * 0.03).clamp(0, 1), "like picture 1"),
])  # fmt: skip
def test_near_duplicates(inspection, change, word):
    images = [photo(0), photo(1), change(photo(0))]
    assert found(inspection, images, size=32)["near-duplicates"].detail == {2: word}


def test_a_picture_of_one_colour_is_like_its_double_only(inspection):
    images = [torch.full((1, 64, 64, 3), v) for v in (0.2, 0.5, 0.2)]
    assert found(inspection, images)["near-duplicates"].detail == {2: "like picture 1"}


@pytest.mark.parametrize("top, left, said", [
    (10, 0, "10 pixels above, 10 pixels below"),
    (6, 8, "6 pixels above, 6 pixels below, 8 pixels left, 8 pixels right"),
])  # fmt: skip
@pytest.mark.parametrize("colour", [0.0, 1.0, 0.5])
def test_borders(inspection, top, left, said, colour):
    images = [photo(0), framed(photo(1) * 0.3 + (0.7 if colour < 0.5 else 0.0), top, left, colour)]
    assert found(inspection, images)["a border"].detail == {1: said}


def test_a_watermark_at_the_same_place(inspection):
    images = [photo(i) for i in range(12)]
    for image in images[:-1]:
        image[:, 84:88, 60:90] = (image[:, 84:88, 60:90] + 0.35).clamp(0, 1)
    (what,) = found(inspection, images)
    assert what == "the same marks at the bottom right of nearly every picture: a watermark?"
    assert not found(inspection, images[:5]), "five pictures are too few to tell"


def test_captions(inspection):
    captions = ["a cat", "", "A  cat.", "a dog in watercolor, pop-art", "word " * 70, "nowatercolors here"]
    got = found(inspection, [photo(i) for i in range(6)], captions, style_words=["Watercolor", "pop-art"])
    assert got["without a caption"].rows == [1]
    assert got["with the caption of another picture"].rows == [0, 2]
    assert got["with a caption that names the style"].detail == {3: "Watercolor, pop-art"}
    assert got["with a caption of more than 60 words, whose end may not be read"].detail == {4: "70 words"}


def test_what_every_caption_says(inspection):
    assert inspection.in_every_caption(["a red cube", "the cube is blue", ""]) == ["cube"]
    assert inspection.in_every_caption(["one caption"]) == []


def test_the_table_names_files(inspection):
    images = [photo(0), photo(1, 40, 50), photo(0)]
    findings = inspection.inspect(images, ["a", "b", "c"], 64, [])
    assert inspection.table(images, ["a", "b", "c"], ["x.png", "y.jpg", "z.png"], 64, findings).splitlines() == [
        "3 pictures, 50 x 40 to 96 x 96 pixels, 2 square, 1 wide; trained on as squares of 64",
        "3 captions; no word is in every caption",
        "1 too small for 64 pixels:",
        "- y.jpg: enlarged 1.6 times",
        "1 near-duplicates:",
        "- z.png: like picture 1",
    ]


def test_a_common_tint_is_no_likeness(inspection):
    tint = torch.tensor([0.1, 0.3, 0.8])
    images = [(tint + (photo(i).mean(-1, keepdim=True) - 0.5) * 0.25).clamp(0, 1) for i in range(6)]
    assert "near-duplicates" not in found(inspection, images)


def test_pictures_of_one_colour_are_compared_with_all_others(inspection):
    images = [photo(1), torch.full((1, 8, 8, 3), 0.5), torch.full((1, 8, 8, 3), 0.2), torch.full((1, 9, 9, 3), 0.5)]
    assert found(inspection, images, size=8)["near-duplicates"].detail == {3: "like picture 2"}


def test_style_words_are_found_with_their_punctuation(inspection):
    named = found(inspection, [photo(i) for i in range(2)], ["by H.R. Giger", "a cat"], style_words=["H.R. Giger"])
    assert named["with a caption that names the style"].rows == [0]


def test_one_caption_is_not_said_to_share_a_word(inspection):
    assert "1 caption" in inspection.table([photo(1)], ["a red cube"], ["a"], 64, []).splitlines()
