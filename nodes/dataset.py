"""Pictures that lie on disk: Load Dataset."""

from __future__ import annotations

import logging
from pathlib import Path

import comfy.model_management
import folder_paths
from comfy_api.latest import io, ui

from ..training import folder as files
from .progress import Reporter

CATEGORY = "Counterpoint/dataset"
log = logging.getLogger("counterpoint")


def roots() -> dict[str, Path]:
    """The folders that Load Dataset may read, by the name a choice begins with."""
    return {"input": Path(folder_paths.get_input_directory()), "output": Path(folder_paths.get_output_directory())}


def choices() -> list[str]:
    """Every folder below input/ and output/ but those of what is kept, and at the end these two themselves."""
    found = [f"{root}/{name}" for root, place in roots().items() for name in files.subfolders(place)]
    kept = tuple(f"output/counterpoint/{what}" for what in ("features", "captions", "filters", "pairs"))
    return [f for f in found if not f.startswith(kept)] + list(roots())


def read_all(entries: list[files.Entry], how: files.How, reporter: Reporter) -> tuple[list[files.Example], list[str]]:
    """Examples, and a line for each picture that cannot be read. Raises ComfyUI's interruption between two pictures."""
    examples, skipped = [], []
    for number, entry in enumerate(entries, 1):
        comfy.model_management.throw_exception_if_processing_interrupted()
        try:
            examples.append(files.load(entry, how))
        except files.Unreadable as error:
            skipped.append(f"{entry.name}: {error}")
        reporter.bar.update_absolute(number)
    return examples, skipped


class LoadDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointLoadDataset",
            display_name="Load Dataset",
            category=CATEGORY,
            description="Loads the pictures of a folder with their captions and masks, in order. A file that cannot be "
            "read is skipped and named, and a picture or caption that you add or change is noticed at the next run.",
            search_aliases=["load folder", "load images", "load captions", "image folder", "import dataset"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=choices(),
                    tooltip="A folder inside ComfyUI's input or output folder. Press R to see one you have just made.",
                ),
                io.Boolean.Input(
                    "recursive", default=False, tooltip="Also take the pictures in sub-folders, at any depth."
                ),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=8192,
                    step=8,
                    tooltip="0 keeps every picture as it is. Any other number, such as 512, cuts out the middle square "
                    "and scales it to so many pixels: wise for photos (24 megapixels take 0.4 GB of memory each).",
                ),
                io.Int.Input(
                    "limit",
                    default=0,
                    min=0,
                    max=1_000_000,
                    tooltip="Take only the first so many pictures; 0 takes all.",
                ),
                io.String.Input(
                    "caption_when_missing",
                    display_name="caption when missing",
                    default="",
                    tooltip="The caption of a picture that has no .txt file of the same name, or an empty one.",
                ),
                io.Color.Input(
                    "background",
                    default="#ffffff",
                    advanced=True,
                    tooltip="The colour behind pictures that are partly transparent; #ffffff is white.",
                ),
                io.Boolean.Input(
                    "alpha_as_mask",
                    display_name="alpha as mask",
                    default=False,
                    advanced=True,
                    tooltip="Make the mask from a picture's transparency: 1 where it is solid, 0 where it is "
                    "see-through. A .mask.png beside the picture comes first.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images", is_output_list=True, tooltip="The pictures, sorted by name: 2 before 10."
                ),
                io.String.Output(display_name="captions", is_output_list=True, tooltip="The caption of each picture."),
                io.Mask.Output(
                    display_name="masks",
                    is_output_list=True,
                    tooltip="The mask of each picture, 1 (white) where it counts; all white where there is none.",
                ),
                io.String.Output(display_name="names", is_output_list=True, tooltip="The file name of each picture."),
                io.String.Output(
                    display_name="report",
                    tooltip="How many pictures were loaded, and which files were skipped and why.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, folder=None):
        try:
            if folder is not None:  # None is a wire, whose value is not known yet
                files.check(str(folder), roots())
        except files.FolderError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, folder=None, recursive=None, limit=None, **_):
        if folder is None:  # a wire: what is in the folder cannot be seen from here, so it is read at every run
            return float("nan")
        return files.fingerprint(files.find(str(folder), recursive is not False, roots()).entries[: limit or None])

    @classmethod
    def execute(cls, folder, recursive, size, limit, caption_when_missing, background, alpha_as_mask) -> io.NodeOutput:
        listing = files.find(str(folder), recursive, roots())
        entries = listing.entries[: limit or None]
        how = files.How(size, files.colour(background), alpha_as_mask, caption_when_missing)
        reporter = Reporter(len(entries))
        examples, skipped = read_all(entries, how, reporter)
        skipped += listing.left_out
        for line in skipped:
            log.warning("Load Dataset skipped %s", line)
        for line in (note for example in examples for note in example.notes):
            log.warning("Load Dataset: %s", line)
        report = files.report(str(folder), len(listing.entries), examples, skipped)
        columns = [[getattr(e, field) for e in examples] for field in ("image", "caption", "mask", "name")]
        return io.NodeOutput(*columns, report, ui=ui.PreviewText(report))


NODES = [LoadDataset]
