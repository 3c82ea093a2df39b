"""Filter Set: which pictures of sets of one object are worth keeping."""

from __future__ import annotations

import json
import math
import os
import textwrap
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import folder_paths
import numpy
import torch
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker
from PIL import Image

from ..training import artefact, filtering, similarity
from ..training import folder as files
from ..training.features import Extractor, images_hash
from ..training.histogram import histogram, stacked
from ..training.run import config_hash
from ..training.sheet import framed, sheet
from .dataset import CATEGORY, roots
from .features import SUFFIXES, FeaturesType, read_weights
from .metrics import CONNECTED, measure
from .similarity import read_captions
from .training_job import fit_size

FOLDER = "aesthetics"  # of ComfyUI's models folder
NO_HEAD = "none"
SCORES = "scores.json"
SHOWN, MOST, LEAST = 128, 40, 4  # pixels of a picture on the sheet, sets on it, pictures' room in a row
KEPT = ("green", (40, 160, 70))
COLOURS = {
    filtering.OTHER: ("red", (210, 40, 40)), filtering.ALIKE: ("orange", (240, 150, 20)), filtering.PROMPT: ("blue", (50, 90, 210)),
    filtering.PLAIN: ("violet", (150, 60, 190)), filtering.EMPTY: ("black", (0, 0, 0)), filtering.ALONE: ("grey", (150, 150, 150)),
}  # fmt: skip
REMEDY = {
    filtering.OTHER: "lower `least`", filtering.ALIKE: "raise `most`", filtering.PROMPT: "lower `fidelity`",
    filtering.PLAIN: "lower `aesthetic`", filtering.EMPTY: "look at the masks", filtering.ALONE: "give sets of 2 pictures or more",
}  # fmt: skip


def heads() -> list[str]:
    return [NO_HEAD, *(n for n in folder_paths.get_filename_list(FOLDER) if Path(n).suffix in SUFFIXES)]


class FilterSet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        each = "1 for each picture, in order."
        return io.Schema(
            node_id="CounterpointFilterSet",
            display_name="Filter Set",
            category=CATEGORY,
            description="Keeps of sets of pictures those that show the same object and are no copies of each other, follow their prompts, and "
            "please an aesthetic head. Shows what was dropped and why; every score is written down, and nothing is deleted.",
            is_experimental=True,
            search_aliases=["quality filter", "syncd filter", "aesthetic score", "near duplicates", "dino filter"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The pictures of all sets, 2 or more for each set."),
                io.String.Input("captions", force_input=True, tooltip=f"What each picture was asked for: {each}"),
                io.Int.Input("sets", force_input=True, optional=True, tooltip=f"The number of its set, {each} Without it all pictures are of 1 set."),
                io.Mask.Input("masks", optional=True, tooltip=f"White (1) where the object is, {each} Pictures are cut out by them before they are compared."),
                FeaturesType.Input("identity", optional=True, tooltip="From Load Features: what objects are compared with. The bounds 0.7 and 0.98 are for DINOv2."),
                io.Float.Input("least", default=filtering.LEAST, min=-1.0, max=1.0, step=0.01,
                               tooltip="A picture needs another one of its set with at least this cosine: 0.7 as published for DINOv2, other features need another; -1 is off."),
                io.Float.Input("most", default=filtering.MOST, min=-1.0, max=1.0, step=0.01,
                               tooltip="And with at most this one, so that it is no copy: 0.98 as published for DINOv2; 1 is off."),
                FeaturesType.Input("clip_features", optional=True,
                                   tooltip="1 that reads as well as sees, for the prompts (CLIP, Pocket); CLIP ViT-L/14 for LAION's aesthetic head."),
                io.Float.Input("fidelity", default=0.0, min=0.0, max=100.0, step=0.5,
                               tooltip="Least CLIP score of a picture and its caption, 100 x cosine: 20 to 25 is usual; 0 is off. SynCD has no such filter."),
                io.Combo.Input("aesthetic_head", options=heads(), default=NO_HEAD,
                               tooltip="1 weights file in models/aesthetics: LAION's linear head on CLIP features (sa_0_4_vit_l_14_linear). Press R after adding it."),
                io.Float.Input("aesthetic", default=filtering.AESTHETIC, min=-100.0, max=100.0, step=0.1,
                               tooltip="Least aesthetic score: 6 as published for LAION's head, whose scores run from about 1 to 10."),
                io.String.Input("folder", optional=True, force_input=True,
                                tooltip="1 folder of the set, for scores.json; without it the scores go to output/counterpoint/filters."),
            ],
            outputs=[
                io.Image.Output(display_name="images", is_output_list=True, tooltip="The pictures that are kept."),
                io.String.Output(display_name="captions", is_output_list=True, tooltip="Their captions."),
                io.Int.Output(display_name="sets", is_output_list=True, tooltip="The numbers of their sets."),
                io.Mask.Output(display_name="masks", is_output_list=True, tooltip="Their masks; all white where there are none."),
                io.Image.Output(display_name="dropped", is_output_list=True, tooltip="The pictures that are dropped; nothing comes where all are kept."),
                io.String.Output(display_name="dropped_captions", is_output_list=True, tooltip="Their captions."),
                io.String.Output(display_name="reasons", is_output_list=True, tooltip="Why each of them is dropped."),
                io.Image.Output(display_name="histogram", tooltip="How often each score occurs, and where the bounds lie."),
                io.Image.Output(display_name="sheet", tooltip="A row for each set; the colour of a frame says what became of the picture."),
                io.String.Output(display_name="report", tooltip="1 line: how many are kept, and how many each bound drops."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, images, captions, sets=None, masks=None, identity=None, clip_features=None, folder=None, **bounds
    ) -> io.NodeOutput:
        of = Pictures.given(images, captions, sets, masks)
        asked = Asked.given((identity or [None])[0], (clip_features or [None])[0], {k: v[0] for k, v in bounds.items()})
        file = scores_file((folder or [""])[0], of, asked)
        scores = asked.measure(of)
        faults = filtering.judge(of.sets, scores, asked.bounds)
        artefact.write_whole(
            file, json.dumps(asked.told() | filtering.told(of.captions, of.sets, scores, faults)).encode()
        )
        kept, dropped = ([i for i, own in enumerate(faults) if bool(own) == out] for out in (False, True))
        if not kept:
            raise ValueError(nothing_kept(faults, shown(file)))
        report = f"{filtering.line(of.sets, faults)}; scores in {shown(file)}"
        contact = contact_sheet(of, faults, report)
        columns = (of.pictures, of.captions, of.sets, of.masks or [torch.ones(p.shape[:3]) for p in of.pictures])
        reasons = ["; ".join(fault.text for fault in own) for own in faults]
        return io.NodeOutput(
            *([column[i] for i in kept] for column in columns),
            *([column[i] for i in dropped] or [ExecutionBlocker(None)] for column in (*columns[:2], reasons)),
            as_picture(plots(scores, asked.bounds)), contact, report,
            ui={**ui.PreviewImage(contact, cls=cls).as_dict(), **ui.PreviewText(report).as_dict()},
        )  # fmt: skip


@dataclass(frozen=True)
class Pictures:
    """What is to be filtered."""

    pictures: list[torch.Tensor]  # (1, H, W, 3)
    captions: list[str]
    sets: list[int]
    masks: list[torch.Tensor]  # (1, H, W), or none at all

    @classmethod
    def given(cls, images, captions, sets, masks) -> Pictures:
        """Raises ValueError where numbers differ, or no set has two pictures."""
        pictures, own = ([single for batch in given or [] for single in batch.split(1)] for given in (images, masks))
        sets = sets or [1] * len(pictures)
        for name, column in (("captions", captions), ("sets", sets), *([("masks", own)] if masks else [])):
            if len(column) != len(pictures):
                raise ValueError(f"There are {len(column)} {name} for {len(pictures)} pictures: give 1 for each.")
        if all(len(rows) == 1 for rows in filtering.rows_of(sets).values()):
            raise ValueError(
                "Every set has 1 picture, and there is nothing to compare it with: connect the `sets` of Multi-Image Set or Load Image "
                "Sets, which number sets of 2 pictures or more."
            )
        return cls([p[..., :3] for p in pictures], captions, sets, own)

    def subjects(self) -> tuple[list[torch.Tensor], list[bool]]:
        """Pictures cut out by their masks, whole ones where a mask is all white, and which have a subject at all."""
        if not self.masks:
            return self.pictures, [True] * len(self.pictures)
        pairs = list(zip(self.pictures, self.masks, strict=True))
        has = [bool((mask > 0.5).any()) for _, mask in pairs]
        cut = [
            p if bool(m.eq(1).all()) else similarity.cut_out(p, m)
            for (p, m), own in zip(pairs, has, strict=True)
            if own
        ]
        return cut, has


@dataclass(frozen=True)
class Asked:
    """What pictures are judged by."""

    identity: Extractor | None
    clip: Extractor | None
    head: str
    bounds: filtering.Bounds

    @classmethod
    def given(cls, identity, clip, values: dict) -> Asked:
        """Raises ValueError for bounds that nothing can meet, or that need features which are not connected."""
        head = values["aesthetic_head"]
        least, most, fidelity = values["least"], values["most"], values["fidelity"]
        if least > most:
            raise ValueError(f"No pair lies between {least:g} and {most:g}: `least` has to be below `most`.")
        if clip is None and (fidelity > 0 or head != NO_HEAD):
            what = "prompts" if fidelity > 0 else "the aesthetic head"
            raise ValueError(
                f"There are no features for {what}: connect Load Features with CLIP to clip_features, or switch it off."
            )
        if identity is None and clip is None:
            raise ValueError(
                "There is nothing to judge by: connect Load Features to identity, to clip_features, or to both."
            )
        floor = values["aesthetic"] if head != NO_HEAD else filtering.Bounds().aesthetic
        return cls(identity, clip, head, filtering.Bounds(least, most, fidelity, floor))

    def measure(self, of: Pictures) -> filtering.Scores:
        cosines, fidelity, aesthetic = {}, None, None
        if self.clip is not None:  # first, as it may find that files or captions do not fit
            seen = measure(self.clip, "images", of.pictures, CONNECTED, False).values
            if self.head != NO_HEAD:
                weights = read_weights(Path(folder_paths.get_full_path_or_raise(FOLDER, self.head)), FOLDER)
                aesthetic = filtering.aesthetics(seen, filtering.linear_head(weights, self.head), self.head)
            if self.clip.texts is not None or self.bounds.fidelity > 0:
                _, texts = read_captions(self.clip, of.captions, len(of.captions))
                fidelity = similarity.clip_scores(seen, texts)
        if self.identity is not None:
            cosines = self._compared(of)
        return filtering.Scores(cosines, fidelity, aesthetic)

    def _compared(self, of: Pictures) -> dict[int, torch.Tensor]:
        cut, has = of.subjects()
        if not cut:
            raise ValueError("All masks are empty: they have to be white (above 0.5) where the object is.")
        seen = measure(self.identity, "images", cut, CONNECTED, False).values
        features = seen.new_zeros(len(has), seen.shape[1])
        features[torch.tensor(has)] = seen
        return filtering.pairs(features, of.sets, has)

    def told(self) -> dict:
        """What was asked, as JSON takes it; bounds that are infinitely wide are left out."""
        used = {"identity": self.identity, "clip_features": self.clip}
        return {
            "features": {
                k: {"name": each.name, "weights": each.identity} for k, each in used.items() if each is not None
            },
            "aesthetic_head": self.head,
            "bounds": {k: v for k, v in self.bounds._asdict().items() if math.isfinite(v)},
        }


def scores_file(folder: str, of: Pictures, asked: Asked) -> Path:
    """scores.json in a set's folder, as Multi-Image Set or Load Image Sets names it; without a folder a file that belongs to these
    pictures and what was asked. Raises FolderError."""
    if not folder.strip():
        kept = Path(folder_paths.get_output_directory()) / "counterpoint" / "filters"
        return kept / f"{images_hash([*of.pictures, *of.masks])}-{config_hash(asked.told())[:8]}.json"
    named = folder if Path(folder).parts[0] in roots() else f"output/{folder}"
    return files.resolve(named, roots()) / SCORES


def shown(file: Path) -> str:
    """A file below input or output, from there on."""
    real = {name: Path(os.path.realpath(root)) for name, root in roots().items()}
    file = Path(os.path.realpath(file))
    return next(
        f"{name}/{file.relative_to(root).as_posix()}" for name, root in real.items() if file.is_relative_to(root)
    )


def nothing_kept(faults: list[list[filtering.Fault]], where: str) -> str:
    (kind, count), *_ = filtering.counted(faults).most_common()
    return f"No picture is kept: {count} of {len(faults)} are dropped as {kind!r}, so {REMEDY[kind]} first; every score is in {where}."


def plots(scores: filtering.Scores, bounds: filtering.Bounds) -> Image.Image:
    """A histogram of each score that there is, with the bounds that are not off."""
    wide, panels = filtering.Bounds(), []
    active = {k: None if v == getattr(wide, k) else v for k, v in bounds._asdict().items()}
    cosines = filtering.pair_values(scores.cosines)
    if len(cosines):
        title = f"cosine of {len(cosines)} pairs of one set"
        panels.append(histogram(title, cosines, active["least"], active["most"]))
    for what, title in (("fidelity", "CLIP score of picture and caption"), ("aesthetic", "aesthetic score")):
        values = getattr(scores, what)
        if values is not None:
            panels.append(histogram(f"{title}, {len(values)} pictures", values, active[what]))
    return stacked(panels)


def contact_sheet(of: Pictures, faults: list[list[filtering.Fault]], report: str) -> torch.Tensor:
    """(1, H, W, 3): a row for each of the first sets, each picture in a frame whose colour says what became of it."""
    rows, labels = [], []
    groups = filtering.rows_of(of.sets)
    for number, own in list(groups.items())[:MOST]:
        comfy.model_management.throw_exception_if_processing_interrupted()
        looks = [COLOURS[faults[i][0].kind] if faults[i] else KEPT for i in own]
        squares = [fit_size(of.pictures[i], SHOWN)[0].movedim(-1, 0) for i in own]
        row = torch.stack([framed(square, colour) for square, (_, colour) in zip(squares, looks, strict=True)])
        rows.append(torch.cat([row, row.new_ones(max(0, LEAST - len(row)), *row.shape[1:])]))
        labels.append(f"set {number}: {sum(not faults[i] for i in own)} of {len(own)} kept")
    kinds = [kind for kind in COLOURS if any(own and own[0].kind == kind for own in faults)]
    legend = ", ".join([f"{KEPT[0]}: kept", *(f"{COLOURS[kind][0]}: {kind}" for kind in kinds)])
    more = f"the first {MOST} of {len(groups)} sets" if len(groups) > MOST else ""
    width = 16 * max(len(row) for row in rows)
    title = [part for text in (report, legend, more) for part in textwrap.wrap(text, width)]
    return as_picture(sheet(rows, labels, 0, "\n".join(title)))


def as_picture(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(numpy.asarray(image, dtype=numpy.float32) / 255)[None]


NODES = [FilterSet]
