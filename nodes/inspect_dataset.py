"""Inspect Dataset: what a training will really see."""

from __future__ import annotations

import textwrap

import comfy.model_management
import numpy
import torch
from comfy_api.latest import io, ui

from ..training import inspection
from ..training.sheet import sheet
from .dataset import CATEGORY
from .training_job import fit_size

SHOWN = 128  # pixels of each picture on the sheet
LEAST = 4  # pictures in a row; fewer would leave no room for words
MOST = 200  # pictures on the sheet; more are inspected and not shown


class InspectDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointInspectDataset",
            display_name="Inspect Dataset",
            category=CATEGORY,
            description="Looks at pictures and captions before a training does: the squares it will really see, what is too small, cut off, "
            "framed, marked or there twice, and captions that are missing, repeated, or name the style.",
            search_aliases=["check dataset", "near duplicates", "watermark", "contact sheet", "dataset report"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The training pictures, 1 or more: from Load Dataset or Pocket Pictures."),
                io.String.Input("captions", force_input=True, optional=True, tooltip="1 caption for each picture."),
                io.String.Input("names", force_input=True, optional=True, tooltip="1 file name for each picture; without, they are numbered."),
                io.Int.Input("size", default=512, min=8, max=4096, step=8,
                             tooltip="Pixels of the square that will be trained on: 128 for Pocket, 512 for SD1.5, 1024 for SDXL."),
                io.String.Input("style_words", default="", tooltip="Words that captions should not say because the new word is to mean them, "
                                                                   "with commas: watercolor, ink. 0 or more."),
                io.Int.Input("columns", default=8, min=1, max=32, tooltip="Pictures in a row of the sheet, 8 by default."),
            ],
            outputs=[
                io.Image.Output(display_name="sheet", tooltip="The squares as they are trained on: first those to look at, then the others."),
                io.String.Output(display_name="table", tooltip="Sizes, and a line for everything that was found."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, images, size, style_words, columns, captions=None, names=None) -> io.NodeOutput:
        singles = [picture[..., :3] for batch in images for picture in batch.split(1)]
        for what, given in (("captions", captions), ("names", names)):
            if given and len(given) != len(singles):
                raise ValueError(f"There are {len(given)} {what} for {len(singles)} pictures: give 1 each, or none.")
        called = names or [f"picture {i + 1}" for i in range(len(singles))]
        unwanted = [w.strip() for w in style_words[0].split(",") if w.strip()]
        tell = comfy.model_management.throw_exception_if_processing_interrupted
        found = inspection.inspect(singles, captions or [], size[0], unwanted, tell)
        table = inspection.table(singles, captions or [], called, size[0], found)
        picture = contact_sheet(singles, size[0], columns[0], found, table)
        return io.NodeOutput(
            picture, table, ui={**ui.PreviewImage(picture, cls=cls).as_dict(), **ui.PreviewText(table).as_dict()}
        )


def contact_sheet(
    images: list[torch.Tensor], size: int, columns: int, found: list[inspection.Finding], table: str
) -> torch.Tensor:
    """(1, H, W, 3): the table's beginning, a row for each finding in some of the pictures, and the pictures without one."""
    some = [f for f in found if len(f.rows) < len(images)]
    suspects = {row for f in some for row in f.rows}
    rest = [i for i in range(len(images)) if i not in suspects]
    rows = [(f.what, f.rows) for f in some] + ([("without a fault of their own", rest)] if rest else [])
    headings = [line for line in table.splitlines() if not line.startswith("- ")]
    squares = {}
    for i in sorted({i for _, which in rows for i in which[:MOST]}):
        comfy.model_management.throw_exception_if_processing_interrupted()
        squares[i] = fit_size(fit_size(images[i], size), SHOWN).movedim(-1, 1)
    wide = max(LEAST, min(columns, max(len(which) for _, which in rows)))
    lines = [part for line in headings for part in textwrap.wrap(line, 16 * wide)]
    shown = [(f"{what}: {len(which)}", _row([squares[i] for i in which[:MOST]])) for what, which in rows]
    picture = sheet([s for _, s in shown], [label for label, _ in shown], columns, "\n".join(lines))
    return torch.from_numpy(numpy.asarray(picture, dtype=numpy.float32) / 255)[None]


def _row(squares: list[torch.Tensor]) -> torch.Tensor:
    """A row of the sheet, with empty places up to the width that its words need."""
    row = torch.cat(squares)
    return torch.cat([row, row.new_ones(max(0, LEAST - len(row)), *row.shape[1:])])


NODES = [InspectDataset]
