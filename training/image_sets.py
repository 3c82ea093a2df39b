"""Sets of pictures of one object each: what is asked for, and how they lie in folders, ours and those of SynCD.

SynCD (Kumari et al. 2025) makes sets of 3: consecutive groups of scenes, every group for every description of an object. Its
metadata is a list of records, one for each set, with `filenames` and `prompts` (the scenes alone) in the same order; masks
are JPEGs in a folder `masks` beside the pictures.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from .folder import MASK, Entry, Example, FolderError, How, is_inside, load

IN_ORDER, SHUFFLED = "in order", "shuffled for each object"
MANIFEST, METADATA = "manifest.json", "*metadata*.json"
OBJECT, SCENE = "{object}", "{scene}"


# What is asked for


@dataclass(frozen=True)
class ImageSet:
    """One object in several scenes, to be painted together."""

    object: str
    scenes: tuple[str, ...]
    seed: int  # of its first picture; the next ones count up

    @property
    def subject(self) -> str:
        """The words for the object, without an article."""
        return re.sub(r"^(an?|the)\s+", "", self.object, flags=re.IGNORECASE)

    def prompts(self, template: str) -> list[str]:
        """The template with object and scene in it; braces in these are words like others."""
        parts = re.split(f"({re.escape(OBJECT)}|{re.escape(SCENE)})", template)
        return ["".join({OBJECT: self.object, SCENE: scene}.get(part, part) for part in parts) for scene in self.scenes]


def template_fault(template: str) -> str:
    """What is wrong with a template, '' if nothing is."""
    missing = [word for word in (OBJECT, SCENE) if word not in template]
    return f"The template needs {' and '.join(missing)}, as in '{OBJECT}, {SCENE}'." if missing else ""


def deal(
    objects: Sequence[str], scenes: Sequence[str], per_set: int, order: str, seed: int, most: int = 0
) -> list[ImageSet]:
    """Every object in groups of `per_set` scenes: in all groups, or in the first `most` of them.

    The last group is filled up with the first scenes, so that none is left out. What a set is does not depend on the other
    objects: its seed and its order come from `seed`, its object and its scenes. Raises ValueError for too little to deal.
    """
    if per_set < 2:
        raise ValueError(
            "A set has 2 pictures or more: set per_set to 2 at least, or use Generate Set for single pictures."
        )
    if not objects:
        raise ValueError("There are no objects: connect a list, or type one description per line.")
    if len(scenes) < per_set:
        raise ValueError(
            f"{len(scenes)} scenes are too few for sets of {per_set} pictures: give more scenes, or lower per_set."
        )
    sets, copies = [], Counter()
    for name in objects:
        own, copy = list(scenes), copies[name]
        copies[name] += 1
        if order == SHUFFLED:
            random.Random(_number(seed, name, copy)).shuffle(own)
        groups = [tuple(own[(i + k) % len(own)] for k in range(per_set)) for i in range(0, len(own), per_set)]
        sets += [ImageSet(name, group, _number(seed, name, copy, *group)) for group in groups[: most or None]]
    return sets


def _number(*facts: str | int) -> int:
    """A number below 2^48 that stands for these facts on every machine."""
    return int.from_bytes(hashlib.sha256(json.dumps(facts).encode()).digest()[:6], "big")


def metadata(sets: Sequence[ImageSet], names: Sequence[Sequence[str]]) -> list[dict]:
    """SynCD's records of sets without a 3D model, whose pictures have these file names."""
    return [
        {"filenames": list(own), "prompts": list(each.scenes), "objaverse_id": "", "category": "deformable"}
        for each, own in zip(sets, names, strict=True)
    ]


# What lies in a folder


@dataclass(frozen=True)
class Member:
    """One picture of a set on disk."""

    set: int  # counted from 1, in the order of the folder's list
    entry: Entry
    caption: str

    def load(self, how: How) -> Example:
        """Raises Unreadable. A JPEG's mask is white or black, half-way between them: it is never quite black itself."""
        example = load(self.entry, replace(how, caption_when_missing=self.caption))
        if self.entry.mask is None or self.entry.mask.suffix.lower() == ".png":
            return example
        return replace(example, mask=(example.mask > 0.5).float(), notes=[])


def listed(
    folder: Path, roots: Collection[Path], first: int = 1, limit: int = 0
) -> tuple[list[Member], int, list[str]]:
    """Pictures of at most `limit` sets (0: all) from set number `first` on, how many sets the folder's list names, and a line
    for each picture that is not there. Files are not opened. Raises FolderError where there is no list, or none that can be read.
    """
    records, skipped, members = _records(folder), [], []
    for number, record in list(enumerate(records, 1))[first - 1 : first - 1 + limit if limit else None]:
        for name, caption in zip(record["filenames"], record["prompts"], strict=True):
            file = _find(folder, name, roots)
            if file is None:
                skipped.append(f"{name}: set {number} names it, and it is not in the folder")
            else:
                entry = Entry(file.relative_to(folder).as_posix(), file, None, _mask_of(file, roots))
                members.append(Member(number, entry, caption))
    return members, len(records), skipped


def lists_of(folder: Path) -> list[Path]:
    """The files in a folder that say which pictures belong together: our manifest, or else SynCD's metadata."""
    own = folder / MANIFEST
    return [own] if own.is_file() else sorted(f for f in folder.glob(METADATA) if f.is_file())


def _records(folder: Path) -> list[dict]:
    """SynCD's records of every list in a folder, each set once: the same metadata may lie there with scores and without."""
    files = lists_of(folder)
    if not files:
        raise FolderError(
            f"There is no manifest.json and no metadata.json in {folder.name!r}: choose a folder of Multi-Image Set or of SynCD, or "
            "use Load Dataset."
        )
    found = {}
    for file in files:
        for record in _read(file):
            found.setdefault(tuple(record["filenames"]), record)
    return list(found.values())


def _read(file: Path) -> list[dict]:
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FolderError(
            f"{file.name} in {file.parent.name!r} cannot be read ({error}): fetch or paint the set again."
        ) from None
    records = _by_set(said) if isinstance(said, dict) else said
    if not isinstance(records, list) or not records or not all(map(_sound, records)):
        raise FolderError(
            f"{file.name} in {file.parent.name!r} is no list of sets with as many prompts as filenames each: choose a folder of "
            "Multi-Image Set or of SynCD."
        )
    return records


def _by_set(manifest: dict) -> list[dict]:
    """Our manifest as records; without sets in it there are none."""
    records: dict[int, dict] = {}
    for picture in manifest.get("pictures", []):
        if "set" in picture:
            record = records.setdefault(picture["set"], {"filenames": [], "prompts": []})
            record["filenames"].append(picture["file"])
            record["prompts"].append(picture["prompt"])
    return [records[number] for number in sorted(records)]


def _sound(record: object) -> bool:
    if not isinstance(record, dict):
        return False
    columns = record.get("filenames"), record.get("prompts")
    texts = all(isinstance(column, list) and all(isinstance(x, str) for x in column) for column in columns)
    return texts and len(columns[0]) == len(columns[1])


def _find(folder: Path, name: str, roots: Collection[Path]) -> Path | None:
    """The file of a name that may begin with folders of another machine: the longest end of it that is in the folder."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    places = (folder.joinpath(*parts[start:]) for start in range(len(parts)))
    return next((p for p in places if is_inside(p, [folder]) and p.is_file() and is_inside(p, roots)), None)


def _mask_of(file: Path, roots: Collection[Path]) -> Path | None:
    places = [
        file.with_name(file.stem + MASK),
        *(file.parent / "masks" / (file.stem + end) for end in (".jpg", ".png")),
    ]
    return next((p for p in places if p.is_file() and is_inside(p, roots)), None)
