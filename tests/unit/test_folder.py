"""Pictures, captions and masks of a folder, from real files made on the spot."""

import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

WHITE, RED, GREEN, BLUE = (1.0, 1.0, 1.0), (255, 0, 0), (0, 255, 0), (0, 0, 255)
FORMATS = {"png": {}, "jpg": {"quality": 95}, "webp": {"lossless": True}, "bmp": {}, "gif": {}, "tif": {}, "avif": {}}
LOSSY = {"jpg", "avif"}
links = pytest.mark.skipif(os.name == "nt", reason="links need special rights on Windows")


@pytest.fixture
def files(pack):
    return pack.training.folder


@pytest.fixture
def roots(tmp_path: Path) -> dict[str, Path]:
    """ComfyUI's two folders, and `outside` beside them."""
    for name in ("input", "output", "outside"):
        (tmp_path / name).mkdir()
    return {name: tmp_path / name for name in ("input", "output")}


def paint(file: Path, colour=RED, size: tuple[int, int] = (6, 4), mode: str = "RGB", **options) -> Path:
    """A file of one colour."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(file, **options)
    return file


def gradient(height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth picture, which lossy formats keep almost as it is: (H, W, 3) uint8."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], -1).astype(np.uint8)


def names(listing) -> list[str]:
    return [entry.name for entry in listing.entries]


# Pixels


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read(files, tmp_path: Path, kind: str):
    if kind == "avif" and "AVIF" not in files.FORMATS:
        pytest.skip("this Pillow reads no AVIF")
    Image.fromarray(gradient()).save(file := tmp_path / f"a.{kind}", **FORMATS[kind])
    colours, alpha = files.read_picture(file, WHITE)
    assert colours.shape == (48, 64, 3) and colours.dtype == torch.float32 and alpha is None
    off = (colours - torch.from_numpy(gradient()) / 255).abs()
    assert off.max() < 0.1 if kind in LOSSY | {"gif"} else off.max() == 0
    assert off.mean() < 0.03


@pytest.mark.parametrize(
    ("mode", "colour", "kind", "expected"),
    [
        ("1", 1, "png", (1, 1, 1)),
        ("L", 100, "png", (100 / 255,) * 3),
        ("RGB", (10, 20, 30), "png", (10 / 255, 20 / 255, 30 / 255)),
        ("CMYK", (255, 0, 0, 0), "tif", (0, 1, 1)),
        ("CMYK", (0, 0, 0, 255), "jpg", (0, 0, 0)),
        ("I;16", 30000, "png", (30000 / 65535,) * 3),
        ("I;16B", 30000, "tif", (30000 / 65535,) * 3),
        ("I", 30000, "tif", (30000 / 65535,) * 3),
        ("F", 0.25, "tif", (0.25,) * 3),
        ("LA", (100, 51), "png", (0.2 * 100 / 255, 0.8 + 0.2 * 100 / 255, 0.2 * 100 / 255)),
        ("RGBA", (255, 0, 0, 51), "png", (0.2, 0.8, 0)),
        ("RGBA", (255, 0, 0, 0), "webp", (0, 1, 0)),
    ],
)
def test_every_mode_keeps_its_values_over_green(files, tmp_path, mode, colour, kind, expected):
    file = tmp_path / f"a.{kind}"
    if mode == "I;16B":
        Image.frombytes(mode, (6, 4), struct.pack(">H", colour) * 24).save(file)
    else:
        paint(file, colour, mode=mode, **({"lossless": True, "exact": True} if kind == "webp" else {}))
    colours, alpha = files.read_picture(file, (0.0, 1.0, 0.0))
    assert colours.shape == (4, 6, 3) and colours.dtype == torch.float32
    torch.testing.assert_close(colours[2, 3], torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=0)
    assert (alpha is not None) == ("A" in mode)


@pytest.mark.parametrize("kind", ["png", "gif"])
def test_a_palette_with_a_transparent_colour(files, tmp_path, kind):
    picture = Image.new("P", (2, 1))
    picture.putpalette([*RED, *BLUE])
    picture.putpixel((1, 0), 1)
    picture.save(file := tmp_path / f"a.{kind}", transparency=1)
    colours, alpha = files.read_picture(file, (0.0, 1.0, 0.0))
    assert colours.tolist() == [[[1, 0, 0], [0, 1, 0]]] and alpha.tolist() == [[1, 0]]
    picture.convert("RGB").save(file := tmp_path / "b.png", transparency=BLUE)  # without a palette
    assert torch.equal(files.read_picture(file, (0.0, 1.0, 0.0))[0], colours)


STORED = {  # EXIF orientation -> how an upright picture lies in the file
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("kind", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_photos_are_turned_upright(files, tmp_path, orientation, kind):
    exif = Image.Exif()
    exif[274] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](gradient())))
    stored.save(file := tmp_path / f"a.{kind}", exif=exif, **FORMATS[kind])
    assert torch.equal(files.read_picture(file, WHITE)[0], torch.from_numpy(gradient()) / 255)


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tif"])
def test_the_first_frame_of_an_animation(files, tmp_path, kind):
    frames = [Image.new("RGB", (6, 4), colour) for colour in (RED, BLUE)]
    frames[0].save(file := tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], **FORMATS[kind])
    with Image.open(file) as picture:
        assert picture.n_frames == 2
    assert files.read_picture(file, WHITE)[0][0, 0].tolist() == [1, 0, 0]


@pytest.mark.parametrize("filled", [False, True], ids=["pillow as it is", "pillow told to fill what is missing"])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_is_cut_off_is_refused(files, tmp_path, monkeypatch, kind, filled):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", filled)
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file := tmp_path / f"a.{kind}")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(files.Unreadable, match="cut off"):
        files.read_picture(file, WHITE)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is filled


@pytest.mark.parametrize(
    "content", [b"", b"my cat", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"]
)
def test_what_is_no_picture_is_refused(files, tmp_path, content):
    (file := tmp_path / "a.png").write_bytes(content)
    with pytest.raises(files.Unreadable, match="none of PNG, JPEG"):
        files.read_picture(file, WHITE)


def test_a_file_that_may_not_be_opened_is_refused(files, tmp_path):
    with pytest.raises(files.Unreadable, match=r"cannot be opened \(No such file"):
        files.read_picture(tmp_path / "gone.png", WHITE)


@pytest.mark.parametrize("unlimited", [False, True])
def test_a_decompression_bomb_is_refused(files, tmp_path, monkeypatch, unlimited):
    if unlimited:  # as some packs set it, for the whole process
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    data = bytearray(paint(file := tmp_path / "a.png").read_bytes())
    data[16:24] = struct.pack(">II", 30000, 30000)  # width and height, then what vouches for them
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    file.write_bytes(data)
    with pytest.raises(files.Unreadable, match="more than 178 million pixels"):
        files.read_picture(file, WHITE)


@pytest.mark.parametrize(("mode", "value"), [("F", 255.0), ("F", -1.0), ("F", float("nan")), ("I", 70000), ("I", -5)])
def test_numbers_of_unknown_scale_are_refused(files, tmp_path, mode, value):
    with pytest.raises(files.Unreadable, match=f"its values run from {value:g} to {value:g} instead of 0 to"):
        files.read_picture(paint(tmp_path / "a.tif", value, mode=mode), WHITE)


@pytest.mark.parametrize(
    ("text", "expected"), [("#ff0080", (1, 0, 128 / 255)), (" white ", WHITE), ("#ffffff80", WHITE)]
)
def test_colours(files, text, expected):
    assert files.colour(text) == expected
    with pytest.raises(files.FolderError, match="'reddish' is no colour: write one like '#ffffff'"):
        files.colour("reddish")


# Folders


def test_2_before_10(files):
    right = ["1.png", "2.png", "10.png", "a 9/b.png", "A 10/a.png", "b.png", "B2.png", "b010.png", "b10.png", "b11.png"]
    assert sorted(reversed(right), key=files.natural) == right


@pytest.mark.parametrize(
    "text", ["input/cats", "cats", " input/cats/ ", "input/./cats", "input/cats/../cats", "{input}/cats"]
)
def test_folders_that_are_read(files, roots, text):
    (roots["input"] / "cats").mkdir()
    assert files.resolve(text.format(**roots), roots) == Path(os.path.realpath(roots["input"] / "cats"))


def test_a_run_folder_under_output_is_read(files, roots):
    (roots["output"] / "run-1" / "previews").mkdir(parents=True)
    assert files.resolve("output/run-1/previews", roots).parts[-3:] == ("output", "run-1", "previews")


OUTSIDE = """.. ../outside input/../outside output/../../.. / {input}/../outside {input}-2
input/to-outside input/to-outside/inner input/a\0b""".split()


@pytest.mark.parametrize("text", OUTSIDE)
@links
def test_folders_outside_are_refused(files, roots, tmp_path, text):
    (tmp_path / "outside" / "inner").mkdir()
    (tmp_path / "input-2").mkdir()
    (roots["input"] / "to-outside").symlink_to(tmp_path / "outside", target_is_directory=True)
    with pytest.raises(files.FolderError, match="lies outside ComfyUI's input and output folders.*copy its pictures"):
        files.resolve(text.format(**roots), roots)


def test_a_path_outside_is_not_even_looked_at(files, roots, monkeypatch):
    """On Windows a look at another computer's folder would send that computer the user's name."""
    asked, realpath = [], os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda path: asked.append(str(path)) or realpath(path))
    with pytest.raises(files.FolderError, match="lies outside"):
        files.resolve("/other-computer/share", roots)
    assert asked and not any("other-computer" in path for path in asked)


@links
def test_a_root_may_be_a_link_itself(files, roots, tmp_path):
    (tmp_path / "outside" / "cats").mkdir()
    (link := tmp_path / "linked").symlink_to(tmp_path / "outside", target_is_directory=True)
    linked = {"input": link}
    expected = Path(os.path.realpath(tmp_path / "outside" / "cats"))
    assert files.resolve("cats", linked) == files.resolve(str(link / "cats"), linked) == expected
    assert files.resolve(str(expected), linked) == expected


@pytest.mark.parametrize("text", ["nowhere", "input/a.png", "input/" + 300 * "x", ""])
def test_what_is_no_folder_is_refused(files, roots, text):
    paint(roots["input"] / "a.png")
    sentence = (
        "There is no folder .*: put the pictures into a folder inside .*press R" if text else "No folder is chosen"
    )
    with pytest.raises(files.FolderError, match=sentence):
        files.resolve(text, roots)


@links
def test_the_folders_on_offer(files, roots, tmp_path):
    root = roots["input"]
    for name in ("set 10/b", "set 2", "set 10/a", ".hidden/x", "1/2/3/4/5"):
        (root / name).mkdir(parents=True)
    (root / "link").symlink_to(tmp_path / "outside", target_is_directory=True)
    paint(root / "a.png")
    assert files.subfolders(root) == ["1", "1/2", "1/2/3", "1/2/3/4", "set 2", "set 10", "set 10/a", "set 10/b"]
    changed = (root / "set 2").stat().st_mtime_ns
    (root / "set 2" / "new").mkdir()
    os.utime(root / "set 2", ns=(changed, changed))  # as where the disk's clock is coarse
    assert "set 2/new" in files.subfolders(root)
    assert files.subfolders(root / "gone") == []


def test_a_folder_that_did_not_change_is_not_read_again(files, roots, monkeypatch):
    root = roots["input"]
    for folder in (root / "a" / "b", root / "a", root):
        folder.mkdir(exist_ok=True, parents=True)
    for folder in (root / "a" / "b", root / "a", root):
        os.utime(folder, (1_000_000_000, 1_000_000_000))
    read, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: read.append(folder) or scandir(folder))
    assert files.subfolders(root) == files.subfolders(root) == ["a", "a/b"] and len(read) == 3
    (root / "a" / "c").mkdir()
    assert files.subfolders(root) == ["a", "a/b", "a/c"]
    assert read[3:] == [str(root / "a"), str(root / "a" / "c")]


def test_pictures_are_listed_with_what_belongs_to_them(files, roots):
    root = roots["input"]
    for name in ("10.png", "2.JPG", "10.mask.png", "sub/1.webp", ".hidden.png", ".thumbs/1.png", "alone.mask.png"):
        paint(root / name)
    for name in ("2.TXT", "10.txt", "notes.txt", "manifest.json", "sub/1.txt", "photo.HEIC"):
        (root / name).write_text("a caption")
    flat = files.list_pictures(root, False, roots.values())
    assert names(flat) == ["2.JPG", "10.png"]
    assert [(e.caption and e.caption.name, e.mask and e.mask.name) for e in flat.entries] == [
        ("2.TXT", None),
        ("10.txt", "10.mask.png"),
    ]
    assert flat.left_out == [
        "photo.HEIC: .heic files are not read; save it as PNG or JPEG",
        "alone.mask.png: a mask without a picture of that name",
    ]
    deep = files.list_pictures(root, True, roots.values())
    assert names(deep) == ["2.JPG", "10.png", "sub/1.webp"]
    assert deep.entries[2].caption.read_text() == "a caption"


@links
def test_links_are_followed_only_where_they_stay_inside(files, roots, tmp_path):
    folder, outside = roots["input"] / "cats", tmp_path / "outside"
    paint(folder / "1.png"), paint(roots["output"] / "2.png"), paint(outside / "3.png")
    (outside / "3.txt").write_text("a secret")
    (folder / "2.png").symlink_to(roots["output"] / "2.png")
    (folder / "3.png").symlink_to(outside / "3.png")
    (folder / "1.txt").symlink_to(outside / "3.txt")
    (folder / "4.png").symlink_to(outside / "gone.png")
    (folder / "5").symlink_to(roots["output"], target_is_directory=True)
    found = files.list_pictures(folder, True, roots.values())
    assert names(found) == ["1.png", "2.png"] and found.entries[0].caption is None
    assert [line.split(":")[0] for line in sorted(found.left_out)] == ["1.txt", "3.png", "4.png", "5"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps names that are no text")
def test_names_that_are_no_text_can_be_sent(files, roots):
    Image.new("RGB", (6, 4)).save(os.fsencode(roots["input"]) + b"/\xff.png", format="PNG")
    (entry,) = files.list_pictures(roots["input"], False, roots.values()).entries
    assert files.load(entry, files.How()).name == "\ufffd.png" and files.fingerprint([entry])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such files on this system")
def test_what_is_no_ordinary_file_is_left_out(files, roots):
    os.mkfifo(roots["input"] / "1.png")
    (roots["input"] / "2.png").mkdir()
    listing = files.list_pictures(roots["input"], False, roots.values())
    assert not listing.entries and [line.split(":")[0] for line in listing.left_out] == ["1.png"]


def test_where_there_is_no_picture(files, roots):
    root = roots["input"]
    with pytest.raises(files.FolderError, match="^There is no picture in 'input': put PNG, JPEG.* or choose another"):
        files.find("input", True, roots)
    (root / "a.heic").touch()
    with pytest.raises(files.FolderError, match=r"no picture in 'input' that can be read \(a.heic: .*save it as PNG"):
        files.check("input", roots)
    paint(root / "deep" / "er" / "1.png")
    files.check("input", roots)
    with pytest.raises(
        files.FolderError, match="no picture in 'input' itself but 1 in its sub-folders: turn `recursive`"
    ):
        files.find("input", False, roots)
    assert names(files.find("input", True, roots)) == ["deep/er/1.png"]


def test_the_fingerprint_knows_what_changed(files, roots):
    folder = roots["input"]
    paint(folder / "1.png")
    (folder / "1.txt").write_text("a cat")

    def now() -> str:
        return files.fingerprint(files.list_pictures(folder, False, roots.values()).entries)

    def written(name: str) -> str:
        facts = (folder / name).stat()
        os.utime(folder / name, ns=(facts.st_atime_ns, facts.st_mtime_ns + 10**9))
        return now()

    seen = [now()]
    assert now() == seen[0]
    seen.append(written("1.png"))
    seen.append(written("1.txt"))
    paint(folder / "1.mask.png")
    seen.append(now())
    seen.append(written("1.mask.png"))
    paint(folder / "2.png")
    seen.append(now())
    (folder / "1.txt").unlink()
    seen.append(now())
    (folder / "2.png").rename(folder / "3.png")
    seen.append(now())
    assert len(set(seen)) == len(seen)
    (folder / "manifest.json").write_text("{}")
    (folder / "other.txt").write_text("no picture's caption")
    assert now() == seen[-1]


# Captions, masks, sizes


def one(files, folder: Path, **how):
    """The only picture of a folder, loaded."""
    (entry,) = files.list_pictures(folder, False, [folder]).entries
    return files.load(entry, files.How(**how))


@pytest.mark.parametrize(
    ("data", "text", "note"),
    [
        ("a café \n".encode(), "a café", None),
        ("a café".encode("utf-8-sig"), "a café", None),
        ("a café".encode("utf-16"), "a café", "UTF-16"),
        ("a café".encode("cp1252"), "a café", "Windows-1252"),
        (b"\x81", "\ufffd", "Windows-1252"),
        (b" \n", "a picture", "1.txt: empty"),
        (None, "a picture", None),
    ],
)
def test_captions_in_any_encoding(files, tmp_path, data, text, note):
    paint(tmp_path / "1.png")
    if data is not None:
        (tmp_path / "1.txt").write_bytes(data)
    example = one(files, tmp_path, caption_when_missing="a picture")
    assert example.caption == text and example.captioned == (text != "a picture")
    assert note in example.notes[0] if note else not example.notes


@pytest.mark.parametrize(("alpha_as_mask", "value"), [(False, 1.0), (True, 0.2)])
def test_the_mask_where_there_is_no_mask_file(files, tmp_path, alpha_as_mask, value):
    paint(tmp_path / "1.png", (255, 0, 0, 51), mode="RGBA")
    example = one(files, tmp_path, alpha_as_mask=alpha_as_mask)
    assert example.image.shape == (1, 4, 6, 3) and example.masked is alpha_as_mask
    torch.testing.assert_close(example.mask, torch.full((1, 4, 6), value))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "1"])
def test_white_keeps(files, tmp_path, mode):
    paint(tmp_path / "1.jpg")
    half = np.zeros((4, 6), dtype=np.uint8)
    half[:, :2] = 255
    Image.fromarray(half).convert(mode).save(tmp_path / "1.mask.png")
    example = one(files, tmp_path, alpha_as_mask=True)
    assert torch.equal(example.mask[0], torch.from_numpy(half) / 255) and example.masked and not example.notes


def test_what_is_transparent_in_a_mask_does_not_count(files, tmp_path):
    paint(tmp_path / "1.png", (255, 0, 0, 255), mode="RGBA")
    paint(tmp_path / "1.mask.png", (255, 255, 255, 0), mode="RGBA")
    assert not one(files, tmp_path, alpha_as_mask=True).mask.any()


def test_a_mask_of_another_size_is_stretched_and_named(files, tmp_path):
    paint(tmp_path / "1.png", size=(12, 8))
    half = np.zeros((4, 6), dtype=np.uint8)
    half[:, :3] = 255
    Image.fromarray(half).save(tmp_path / "1.mask.png")
    example = one(files, tmp_path)
    assert example.mask.shape == (1, 8, 12) and example.mask[0, :, :4].eq(1).all() and not example.mask[0, :, 8:].any()
    assert "1.mask.png: mask and picture differ in size (6 x 4 and 12 x 8)" in example.notes[0]


def test_a_broken_mask_is_named_and_left_out(files, tmp_path):
    paint(tmp_path / "1.png")
    (tmp_path / "1.mask.png").write_bytes(b"no picture")
    example = one(files, tmp_path)
    assert example.mask.eq(1).all() and not example.masked and "1.png is used without it" in example.notes[0]


@pytest.mark.parametrize("size", [4, 2, 8])
@pytest.mark.parametrize(("width", "height"), [(12, 4), (4, 12)])
def test_the_middle_square_is_cut_out(files, tmp_path, width, height, size):
    """Blue in the middle, red on both sides; the mask the same."""
    colours = np.zeros((height, width, 3), dtype=np.uint8)
    colours[..., 0] = 255
    middle = (slice(None), slice(4, 8)) if width > height else (slice(4, 8), slice(None))
    colours[middle] = BLUE
    Image.fromarray(colours).save(tmp_path / "1.png")
    Image.fromarray(colours[..., 2]).save(tmp_path / "1.mask.png")
    example = one(files, tmp_path, size=size)
    blue = torch.tensor([0.0, 0.0, 1.0]).expand(1, size, size, 3)
    torch.testing.assert_close(example.image, blue, atol=1e-6, rtol=0)
    torch.testing.assert_close(example.mask, torch.ones(1, size, size), atol=1e-6, rtol=0)
    assert example.image.is_contiguous() and example.mask.is_contiguous()


def test_scaling_stays_in_range_and_averages(files, tmp_path):
    checks = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checks).save(tmp_path / "1.png")
    small = one(files, tmp_path, size=8).image
    torch.testing.assert_close(small, torch.full_like(small, 0.5), atol=0.02, rtol=0)
    edges = np.zeros((8, 8), dtype=np.uint8)
    edges[:, 4:] = 255
    Image.fromarray(edges).save(tmp_path / "1.png")
    large = one(files, tmp_path, size=64).image
    assert large.min() == 0 and large.max() == 1  # bicubic alone would overshoot


# The report


def test_the_report_says_what_became_of_every_file(files, roots):
    root = roots["input"]
    paint(root / "1.png", size=(6, 4)), paint(root / "2.png", size=(4, 3)), paint(root / "2.mask.png", size=(4, 3))
    (root / "1.txt").write_bytes("café".encode("cp1252"))
    entries = files.list_pictures(root, False, roots.values()).entries
    examples = [files.load(entry, files.How()) for entry in entries]
    lines = files.report("input", 3, examples, ["3.png: damaged"]).splitlines()
    assert lines[0] == "2 of 3 pictures from input, 1 skipped: 4 x 3 to 6 x 4 pixels, 0.00 GB in memory"
    assert lines[1:4] == ["1 with a caption, 1 with a mask", "Skipped:", "- 3.png: damaged"]
    assert lines[4] == "Look at:" and lines[5].startswith("- 1.txt: not UTF-8") and len(lines) == 6
    assert files.report("input", 1, examples[:1], []).count("6 x 4") == 1
    bad = [f"{i}.png: damaged" for i in range(5)]
    with pytest.raises(
        files.FolderError, match=r"None of the pictures in 'x' .*\(0.png: .*; and 2 more\): replace them"
    ):
        files.report("x", 5, [], bad)
