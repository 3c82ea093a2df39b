"""Compare Grid: one labelled sheet from many pictures."""

from __future__ import annotations

import numpy
import torch
from comfy_api.latest import io, ui

from ..training.sheet import sheet

MOST = 12


class CompareGrid(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        rows = io.Autogrow.TemplatePrefix(
            io.Image.Input("row", tooltip="The pictures of 1 row: a batch or a list."), prefix="row", min=1, max=MOST
        )
        return io.Schema(
            node_id="CounterpointCompareGrid",
            display_name="Compare Grid",
            category="Counterpoint/metrics",
            description="Puts rows of pictures on one sheet with their labels, to look at and to share.",
            search_aliases=["contact sheet", "grid", "xy plot", "collage"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Autogrow.Input(
                    "rows", template=rows, tooltip=f"Up to {MOST} rows; a new socket appears when one is connected."
                ),
                io.String.Input("labels", default="", multiline=True, tooltip="1 line for each row, in order."),
                io.String.Input("title", default="", tooltip="1 line above everything."),
                io.Int.Input(
                    "columns",
                    default=8,
                    min=0,
                    max=64,
                    tooltip="Longer rows are broken after so many pictures, 8 by default; 0 never breaks.",
                ),
                io.Int.Input("most", default=0, min=0, max=1000, tooltip="Pictures shown of each row; 0 shows all."),
                io.Int.Input(
                    "scale",
                    default=1,
                    min=1,
                    max=8,
                    tooltip="Enlarges each picture without smoothing, 1 to 8 times: 2 suits Pocket's 128 pixels.",
                ),
            ],
            outputs=[io.Image.Output(display_name="sheet", tooltip="One picture with all rows.")],
        )

    @classmethod
    def execute(cls, rows, labels, title, columns, most, scale) -> io.NodeOutput:
        batches = [torch.cat([_same(b, given[0]) for b in given]) for given in rows.values() if given]
        if not batches:
            raise ValueError("Compare Grid has no pictures: connect at least 1 row.")
        lines = labels[0].splitlines() if labels[0] else []
        texts = [lines[i] if i < len(lines) else "" for i in range(len(batches))]
        picture = sheet([b[: most[0] or None].movedim(-1, 1) for b in batches], texts, columns[0], title[0], scale[0])
        out = torch.from_numpy(numpy.asarray(picture, dtype=numpy.float32) / 255)[None]
        return io.NodeOutput(out, ui=ui.PreviewImage(out, cls=cls))


def _same(images: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Pictures of one row in one size, RGB."""
    x = images[..., :3]
    if x.shape[1:3] == like.shape[1:3]:
        return x
    scaled = torch.nn.functional.interpolate(x.movedim(-1, 1), size=like.shape[1:3], mode="bilinear", antialias=True)
    return scaled.movedim(1, -1)


NODES = [CompareGrid]
