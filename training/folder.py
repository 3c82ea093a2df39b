"""A folder of pictures with captions and masks: found, sorted, fingerprinted, and read one file at a time."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
import torch
from PIL import Image, ImageColor, ImageFile, ImageOps, UnidentifiedImageError, features

FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    **({"AVIF": (".avif",)} if "avif" in features.modules and features.check_module("avif") else {}),
}
PICTURE = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)
OTHER_PICTURE = frozenset(
    ".arw .avif .cr2 .dng .exr .hdr .heic .heif .ico .jp2 .jxl .nef .psd .svg .tga".split()
)  # pictures to people and not to us: named when they are left out
CAPTION = ".txt"
MASK = ".mask.png"
MAX_PIXELS = 178_956_970  # where Pillow, too, stops; as IMAGE that is 2 GB
LISTED_DEPTH = 4  # folders below input/ and output/ that are offered
SETTLED = 2_000_000_000  # nanoseconds after which a folder's time of change can be trusted, even on FAT
BLACK = (0.0, 0.0, 0.0)

Colour = tuple[float, float, float]


class FolderError(ValueError):
    """A folder that cannot be used; the message is one sentence for the user."""


class Unreadable(ValueError):
    """One file that cannot be used; the message says why, to be put after the file's name."""


@dataclass(frozen=True)
class Entry:
    """One picture and what lies beside it."""

    name: str  # inside the folder, with forward slashes
    picture: Path
    caption: Path | None
    mask: Path | None


@dataclass(frozen=True)
class Listing:
    """What a folder holds: pictures in natural order, and a line for each file that is left out."""

    entries: list[Entry]
    left_out: list[str]


@dataclass(frozen=True)
class How:
    """How every picture of a folder is read."""

    size: int = 0  # side of a square in pixels; 0 keeps sizes
    background: Colour = (1.0, 1.0, 1.0)  # behind transparency
    alpha_as_mask: bool = False
    caption_when_missing: str = ""


@dataclass(frozen=True)
class Example:
    """One picture as ComfyUI's nodes take it, on the CPU."""

    name: str
    image: torch.Tensor  # (1, H, W, 3), float32 in 0..1
    mask: torch.Tensor  # (1, H, W), float32 in 0..1; 1 keeps
    caption: str
    captioned: bool  # by a file of its own
    masked: bool  # by a file of its own, or by its transparency
    notes: list[str]  # what was not as it should be, and was borne


# Folders


def resolve(text: str, roots: Mapping[str, Path]) -> Path:
    """The real path of the folder that `text` means.

    `roots` are the folders that may be read, by name: `input/cats` is `cats` inside `input`; a path that begins with
    no root's name is looked up in the first root; an absolute path must lie inside a root.
    Raises FolderError where it leads out of the roots or is no folder.
    """
    named = PurePath(text.strip())
    if not named.parts:
        raise FolderError("No folder is chosen: pick one from the list.")
    first = next(iter(roots.values()))
    place = roots[named.parts[0]].joinpath(*named.parts[1:]) if named.parts[0] in roots else first / named
    place = Path(os.path.abspath(place))
    if not is_inside(place, roots.values()):
        raise FolderError(
            f"The folder {text!r} lies outside ComfyUI's {' and '.join(roots)} folders, and only those are read: "
            f"copy its pictures into a folder inside {first}, press R, and choose that one."
        )
    if not os.path.isdir(place):
        raise FolderError(
            f"There is no folder {text!r}: put the pictures into a folder inside {first}, press R, and choose that one."
        )
    return Path(os.path.realpath(place))


def is_inside(place: Path, roots: Collection[Path]) -> bool:
    """Whether a path lies inside one of the roots, both as it is written and after every link in it is followed.

    What is written is looked at first, so that a path to another computer is refused without asking that computer.
    """
    real_roots = {os.path.realpath(root) for root in roots}
    written = Path(os.path.abspath(place))
    if not any(written.is_relative_to(root) for root in real_roots.union(map(os.path.abspath, roots))):
        return False
    try:
        real = Path(os.path.realpath(written))
    except ValueError:  # a null byte
        return False
    return any(real.is_relative_to(root) for root in real_roots)


_children: dict[str, tuple[int, list[str]]] = {}  # folder -> when it last changed, and the folders in it


def subfolders(folder: Path, depth: int = LISTED_DEPTH) -> list[str]:
    """Names of the folders below, with forward slashes, in natural order; hidden and linked ones are left out.

    Quick enough to be asked for all the time: a folder is read again only when it has changed.
    """
    names = []
    for child in _child_folders(str(folder)):
        names.append(child)
        if depth > 1:
            names += [f"{child}/{name}" for name in subfolders(folder / child, depth - 1)]
    return names


def _child_folders(folder: str) -> list[str]:
    try:
        changed = os.stat(folder).st_mtime_ns
        if folder in _children and _children[folder][0] == changed:
            return _children[folder][1]
        with os.scandir(folder) as found:
            names = [each.name for each in found if each.is_dir(follow_symlinks=False) and not _hidden(each.name)]
    except OSError:  # gone, or not ours to read: nothing to choose from
        return []
    names.sort(key=natural)
    if time.time_ns() - changed > SETTLED:
        _children[folder] = changed, names
    return names


def natural(name: str) -> tuple:
    """Sort key: 2 before 10, capitals beside small letters, `a.png` before `a1.png`, folder by folder."""
    parts = [piece for part in name.casefold().split("/") for piece in os.path.splitext(part)]
    return [[int(s) if i % 2 else s for i, s in enumerate(re.split(r"(\d+)", part))] for part in parts], name


def _hidden(name: str) -> bool:
    return name.startswith(".")


# Files


def find(text: str, recursive: bool, roots: Mapping[str, Path]) -> Listing:
    """The pictures of the folder that `text` means (see `resolve`), at least one. Raises FolderError."""
    folder = resolve(text, roots)
    listing = list_pictures(folder, recursive, roots.values())
    if not listing.entries:
        deeper = 0 if recursive else len(list_pictures(folder, True, roots.values()).entries)
        raise FolderError(_no_pictures(text, listing, deeper))
    return listing


def check(text: str, roots: Mapping[str, Path]) -> None:
    """Raises FolderError where no setting finds a picture; sub-folders are looked into only when they must be."""
    if not list_pictures(resolve(text, roots), False, roots.values()).entries:
        find(text, True, roots)


def _no_pictures(text: str, listing: Listing, deeper: int) -> str:
    if deeper:
        return f"There is no picture in {text!r} itself but {deeper} in its sub-folders: turn `recursive` on."
    what = f"There is no picture in {text!r}"
    what += f" that can be read ({_some(listing.left_out)})" if listing.left_out else ""
    return f"{what}: put {', '.join(FORMATS)} files in it, or choose another folder."


def list_pictures(folder: Path, recursive: bool, roots: Collection[Path]) -> Listing:
    """The pictures of a folder with their captions (same stem, .txt) and masks (same stem, .mask.png).

    Files are looked at by name only; links are taken where they end inside the roots. Nothing here raises.
    """
    folder = Path(os.path.realpath(folder))
    left_out: list[str] = []
    pictures: dict[str, str] = {}  # name -> stem
    captions: dict[str, Path] = {}
    masks: dict[str, Path] = {}
    for name in sorted(_file_names(folder, recursive, left_out), key=natural):
        stem, suffix = os.path.splitext(name)
        suffix = MASK if name.lower().endswith(MASK) else suffix.lower()
        if suffix in OTHER_PICTURE - PICTURE:
            left_out.append(f"{_shown(name)}: {suffix} files are not read; save it as PNG or JPEG")
        elif suffix not in PICTURE and suffix not in (CAPTION, MASK):
            continue
        elif not _usable(folder / name, roots):
            left_out.append(f"{_shown(name)}: a link that leads out of ComfyUI's folders or to nothing; copy the file")
        elif suffix in PICTURE:
            pictures[name] = stem
        else:
            (captions if suffix == CAPTION else masks)[name[: -len(suffix)]] = folder / name
    alone = masks.keys() - pictures.values()
    left_out += [f"{_shown(stem)}{MASK}: a mask without a picture of that name" for stem in sorted(alone, key=natural)]
    entries = [
        Entry(_shown(name), folder / name, captions.get(stem), masks.get(stem)) for name, stem in pictures.items()
    ]
    return Listing(entries, left_out)


def _file_names(folder: Path, recursive: bool, left_out: list[str]) -> Iterator[str]:
    """Files of a real folder, hidden ones not; linked folders (they can go round in circles) are left out by name."""

    def closed(error: OSError) -> None:
        left_out.append(f"{_shown(error.filename)}: cannot be opened ({error.strerror})")

    for place, folders, files in os.walk(folder, onerror=closed):
        inside = PurePath(place).relative_to(folder)
        yield from ((inside / name).as_posix() for name in files if not _hidden(name))
        visible = [name for name in folders if recursive and not _hidden(name)]
        folders[:] = [name for name in visible if os.path.realpath(full := os.path.join(place, name)) == full]
        linked = sorted(set(visible) - set(folders))
        left_out += [f"{_shown((inside / name).as_posix())}: a linked folder; copy what is in it" for name in linked]


def _usable(file: Path, roots: Collection[Path]) -> bool:
    return file.is_file() and (not file.is_symlink() or is_inside(file, roots))


def _shown(name: str) -> str:
    """A file name that can be sent and saved, also where the disk holds bytes that are no text."""
    return os.fsencode(name).decode("utf-8", "replace")


def fingerprint(entries: Iterable[Entry]) -> str:
    """Changes when a picture, caption or mask comes, goes, or is written to: a hash of names, sizes and times."""
    digest = hashlib.sha256()
    for entry in entries:
        for file in filter(None, (entry.picture, entry.caption, entry.mask)):
            facts = file.stat()
            digest.update(f"{entry.name}|{_shown(file.name)}|{facts.st_size}|{facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()


# Pixels


def colour(text: str) -> Colour:
    """Red, green and blue in 0..1 of `#ffffff` or `white`. Raises FolderError."""
    try:
        red, green, blue = ImageColor.getrgb(text.strip())[:3]
    except ValueError:
        raise FolderError(f"{text!r} is no colour: write one like '#ffffff' or 'white'.") from None
    return red / 255, green / 255, blue / 255


def read_picture(file: Path, background: Colour) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(H, W, 3) in 0..1, upright, over the background colour; and alpha (H, W) in 0..1 of a file that has one.

    The first frame of an animated file. Raises Unreadable.
    """
    try:
        with _strict_pillow(), Image.open(file, formats=list(FORMATS)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            ImageOps.exif_transpose(picture, in_place=True)
            colours, alpha = _values(picture)
    except Unreadable:
        raise
    except Exception as error:  # each decoder has its own ways to fail
        raise Unreadable(_reason(error)) from error
    if alpha is not None:
        colours = colours * alpha[..., None] + np.float32(background) * (1 - alpha[..., None])
    return torch.from_numpy(colours), None if alpha is None else torch.from_numpy(alpha)


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Pillow as it is by default: other packs tell it, for the whole process, to fill what is cut off with grey."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS // 10**6} million pixels; save it smaller"
    if isinstance(error, UnidentifiedImageError):
        return f"damaged, cut off, or none of {', '.join(FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be opened ({error.strerror})"
    if isinstance(error, MemoryError):
        return "needs more memory than there is; save it smaller"
    return f"damaged or cut off ({error})"


def _values(picture: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """Colours (H, W, 3) and alpha (H, W) of a loaded picture, float32 in 0..1."""
    if picture.mode == "F":
        return _grey(picture, 1), None
    if picture.mode.startswith("I"):  # 16 bits, which Pillow also keeps in 32
        return _grey(picture, 65535), None
    see_through = picture.has_transparency_data
    values = np.array(picture.convert("RGBA" if see_through else "RGB"), dtype=np.float32)
    values /= 255
    return (values[..., :3], values[..., 3].copy()) if see_through else (values, None)


def _grey(picture: Image.Image, top: int) -> np.ndarray:
    """(H, W, 3) in 0..1 of one channel that runs from 0 to `top`; Pillow's own conversion would clip it at 255."""
    values = np.array(picture, dtype=np.float32) / top
    low, high = values.min(), values.max()
    if not (-1e-5 <= low and high <= 1 + 1e-5):  # rounding; NaN is refused, too
        raise Unreadable(
            f"its values run from {low * top:g} to {high * top:g} instead of 0 to {top}; save it with 8 or 16 bits"
        )
    return np.repeat(values.clip(0, 1)[..., None], 3, axis=-1)


def _scale(planes: torch.Tensor, height: int, width: int, mode: str) -> torch.Tensor:
    """(B, C, H, W) in 0..1 to another size."""
    if planes.shape[-2:] == (height, width):
        return planes
    return torch.nn.functional.interpolate(planes, (height, width), mode=mode, antialias=True).clamp(0, 1)


def _square(planes: torch.Tensor, size: int, mode: str) -> torch.Tensor:
    """The middle square of (B, C, H, W), `size` pixels wide; size 0 leaves all as it is."""
    if size == 0:
        return planes
    height, width = planes.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return _scale(planes[..., top : top + side, left : left + side], size, size, mode)


# Examples


def load(entry: Entry, how: How) -> Example:
    """Picture, caption and mask of an entry. Raises Unreadable where there is no picture to be had."""
    notes: list[str] = []
    colours, alpha = read_picture(entry.picture, how.background)
    own_mask = _read_mask(entry, colours.shape[:2], notes)
    if own_mask is None and how.alpha_as_mask:
        own_mask = alpha
    mask = torch.ones(colours.shape[:2]) if own_mask is None else own_mask
    caption = _read_caption(entry, notes)
    return Example(
        name=entry.name,
        image=_square(colours.movedim(-1, 0)[None], how.size, "bicubic").movedim(1, -1).contiguous(),
        mask=_square(mask[None, None], how.size, "bilinear")[0].contiguous(),
        caption=caption or how.caption_when_missing,
        captioned=bool(caption),
        masked=own_mask is not None,
        notes=notes,
    )


def _read_mask(entry: Entry, shape: Sequence[int], notes: list[str]) -> torch.Tensor | None:
    """(H, W) in 0..1 from the mask file, white = 1 and what is transparent = 0, in the picture's shape."""
    if entry.mask is None:
        return None
    name = _shown(entry.mask.name)
    try:
        mask = read_picture(entry.mask, BLACK)[0].mean(-1)
    except Unreadable as error:
        notes.append(f"{name}: {error}; {entry.name} is used without it")
        return None
    if mask.shape != shape:
        sizes = " and ".join(f"{w} x {h}" for h, w in (mask.shape, shape))
        notes.append(f"{name}: mask and picture differ in size ({sizes}), so the mask is stretched")
    return _scale(mask[None, None], *shape, "bilinear")[0, 0]


def _read_caption(entry: Entry, notes: list[str]) -> str:
    """The text beside a picture, '' where there is none."""
    if entry.caption is None:
        return ""
    name = _shown(entry.caption.name)
    try:
        text, encoding = decode(entry.caption.read_bytes())
    except OSError as error:
        notes.append(f"{name}: {_reason(error)}, so the caption counts as missing")
        return ""
    if encoding != "UTF-8":
        notes.append(f"{name}: not UTF-8, read as {encoding}; if letters look wrong, save it as UTF-8")
    if not text:
        notes.append(f"{name}: empty, so the caption counts as missing")
    return text


def decode(data: bytes) -> tuple[str, str]:
    """The text of a file without white space around it, and the encoding it was read in."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace").strip(), "UTF-16"
    try:
        return data.decode("utf-8-sig").strip(), "UTF-8"
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace").strip(), "Windows-1252"


def report(text: str, found: int, examples: Sequence[Example], skipped: Sequence[str]) -> str:
    """What became of a folder, for a person: how many pictures of how many, and each file that needs a look.

    Raises FolderError where no picture is left.
    """
    if not examples:
        raise FolderError(
            f"None of the pictures in {text!r} could be read ({_some(skipped)}): "
            "replace them, or choose another folder."
        )
    sizes = sorted({(e.image.shape[2], e.image.shape[1]) for e in examples}, key=lambda size: (size[0] * size[1], size))
    span = " to ".join(f"{w} x {h}" for w, h in dict.fromkeys((sizes[0], sizes[-1])))
    gigabytes = sum(e.image.nbytes + e.mask.nbytes for e in examples) / 1e9
    captioned, masked = sum(e.captioned for e in examples), sum(e.masked for e in examples)
    named = f", {len(skipped)} skipped" if skipped else ""
    lines = [
        f"{len(examples)} of {found} pictures from {text}{named}: {span} pixels, {gigabytes:.2f} GB in memory",
        f"{captioned} with a caption, {masked} with a mask",
    ]
    for title, problems in (("Skipped", skipped), ("Look at", [note for e in examples for note in e.notes])):
        lines += [f"{title}:", *(f"- {problem}" for problem in problems)] if problems else []
    return "\n".join(lines)


def _some(problems: Sequence[str], most: int = 3) -> str:
    rest = len(problems) - most
    return "; ".join(problems[:most]) + (f"; and {rest} more" if rest > 0 else "")
