"""Sets of pictures that show one object: Multi-Image Set paints them, Load Image Sets reads them, ours and SynCD's."""

from __future__ import annotations

import logging
from pathlib import Path

import comfy.model_management
import torch
from comfy_api.latest import io, ui

from ..training import folder as files
from ..training import image_sets
from .dataset import CATEGORY, choices, roots
from .generate import generate_set, painted_set, recipe_inputs, recipe_of, set_outputs
from .progress import Reporter
from .prompts import lines

log = logging.getLogger("counterpoint")


def member_outputs() -> list:
    """What both nodes say of each picture besides picture and prompt."""
    return [
        io.Int.Output(display_name="sets", is_output_list=True, tooltip="The number of each picture's set, from 1: for Filter Set."),
        io.Mask.Output(display_name="masks", is_output_list=True, tooltip="The subject of each picture in white (1); all white where no mask is known."),
    ]  # fmt: skip


class MultiImageSet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointMultiImageSet",
            display_name="Multi-Image Set",
            category=CATEGORY,
            description="Paints sets of pictures, each set of one object in several scenes and in one batch, so that Shared Attention on the "
            "model makes it the same object. Stopped, it goes on where it was; run again with nothing changed, it takes what is there.",
            is_experimental=True,
            search_aliases=["syncd", "consistent character", "same object", "subject dataset", "multi view dataset"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="Paints the pictures; with Shared Attention before it they show 1 object."),
                io.Clip.Input("clip", tooltip="Reads the prompts; from the same checkpoint. 1 for all."),
                io.Vae.Input("vae", tooltip="From the same checkpoint; 1 for all."),
                io.String.Input("objects", multiline=True, tooltip="A list of descriptions of objects, or 1 per line: what does not change in a set."),
                io.String.Input("scenes", multiline=True, tooltip="A list of scenes, or 1 per line: what is around the object. As many as per_set, 3, or more."),
                io.Int.Input("per_set", default=3, min=2, max=16, tooltip="Pictures in a set, painted at once: 3 as in SynCD; 2 and up."),
                io.String.Input("template", default="{object}, {scene}",
                                tooltip="The prompt of each picture; {object} and {scene} must stand in it. '{object} {scene}' suits Pocket; SynCD "
                                        "has '{scene}. {object}. wide angle shot'. 1 for all."),
                io.Combo.Input("dealing", options=[image_sets.IN_ORDER, image_sets.SHUFFLED], default=image_sets.IN_ORDER,
                               tooltip="How scenes are put into groups of per_set, 3 by default: as they are listed, as in SynCD, or shuffled by the seed for each object."),
                io.Int.Input("sets_per_object", default=0, min=0, max=100_000,
                             tooltip="Groups of scenes in which each object is painted; 0 takes all: 12 scenes and 3 per set are 4 sets for each object."),
                *recipe_inputs(seed="Each set has a seed of its own, made from this number, its object and its scenes; 1 by default.")[:-1],
            ],
            outputs=[*set_outputs(), *member_outputs()],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, template):
        (text,) = template  # a list, as everything that a node with is_input_list gets
        return (text is not None and image_sets.template_fault(text)) or True

    @classmethod
    def execute(cls, model, clip, vae, objects, scenes, per_set, template, dealing, sets_per_object, **rest):
        values = {k: v[0] for k, v in rest.items()}
        if fault := image_sets.template_fault(template[0]):
            raise ValueError(fault)
        sets = image_sets.deal(
            lines(objects), lines(scenes), per_set[0], dealing[0], values["seed"], sets_per_object[0]
        )
        prompts = [prompt for each in sets for prompt in each.prompts(template[0])]
        recipe = recipe_of(model[0], values)
        images, folder = generate_set(
            model[0], clip[0], vae[0], prompts, recipe, values["name"], "multi-image-set", sets=sets
        )
        shown = painted_set(images, prompts, folder)
        numbers = [number for number, each in enumerate(sets, 1) for _ in each.scenes]
        masks = [mask_of(folder / f"{i:05d}{files.MASK}", image) for i, image in enumerate(images)]
        return io.NodeOutput(*shown.args, numbers, masks, ui=shown.ui)


def mask_of(file: Path, image: torch.Tensor) -> torch.Tensor:
    """(1, H, W) in 0..1 from a mask that we wrote beside a picture (1, H, W, 3); all white without one."""
    if not file.is_file():
        return torch.ones(image.shape[:3])
    return files.read_picture(file, files.BLACK)[0].mean(-1)[None]


class LoadImageSets(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointLoadImageSets",
            display_name="Load Image Sets",
            category=CATEGORY,
            description="Loads sets of pictures of one object each, with captions, masks and set numbers: a folder of Multi-Image Set, or one "
            "with SynCD's metadata.json. What the list names and the folder lacks is left out and named.",
            is_experimental=True,
            search_aliases=["syncd", "metadata.json", "multi image dataset", "load sets"],
            inputs=[
                io.Combo.Input("folder", options=choices(), tooltip="A folder in ComfyUI's input or output with 1 manifest.json or metadata.json in it. Press R to see one you have just made."),
                io.Int.Input("first", default=1, min=1, max=10_000_000, tooltip="The number of the first set to load, from 1."),
                io.Int.Input("limit", default=100, min=0, max=10_000_000,
                             tooltip="Load so many sets at most; 0 loads all. SynCD has about 90 000, and 100 sets of 3 pictures of 1024 pixels take 5 GB."),
                io.Int.Input("size", default=0, min=0, max=8192, step=8,
                             tooltip="0 keeps every picture as it is. Any other number, such as 512, cuts out the middle square and scales it."),
            ],
            outputs=[
                io.Image.Output(display_name="images", is_output_list=True, tooltip="The pictures, set by set."),
                io.String.Output(display_name="captions", is_output_list=True, tooltip="What the list says of each picture; in SynCD the scene alone."),
                io.String.Output(display_name="folder", tooltip="The folder, for the scores of Filter Set."),
                *member_outputs(),
                io.String.Output(display_name="names", is_output_list=True, tooltip="The file name of each picture."),
                io.String.Output(display_name="report", tooltip="How many sets were loaded, and what was left out."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, folder=None):
        try:
            if folder is not None:  # None is a wire, whose value is not known yet
                members_of(str(folder), 1, 1)
        except files.FolderError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, folder=None, first=1, limit=0, **_):
        if folder is None:
            return float("nan")
        members, *_ = members_of(str(folder), first or 1, limit or 0)
        return [files.fingerprint([m.entry for m in members]), *(m.caption for m in members)]

    @classmethod
    def execute(cls, folder, first, limit, size) -> io.NodeOutput:
        members, count, skipped = members_of(str(folder), first, limit)
        examples, kept, reporter = [], [], Reporter(len(members))
        for number, member in enumerate(members, 1):
            comfy.model_management.throw_exception_if_processing_interrupted()
            try:
                examples.append(member.load(files.How(size)))
                kept.append(member)
            except files.Unreadable as error:
                skipped.append(f"{member.entry.name}: {error}")
            reporter.bar.update_absolute(number)
        for line in skipped:
            log.warning("Load Image Sets skipped %s", line)
        report = outcome(str(folder), first, count, kept, examples, skipped)
        return io.NodeOutput(
            [e.image for e in examples], [e.caption for e in examples], str(folder), [m.set for m in kept],
            [e.mask for e in examples], [e.name for e in examples], report, ui=ui.PreviewText(report),
        )  # fmt: skip


def members_of(folder: str, first: int, limit: int) -> tuple[list[image_sets.Member], int, list[str]]:
    place = files.resolve(folder, roots())
    return image_sets.listed(place, list(roots().values()), first, limit)


def outcome(folder: str, first: int, count: int, members: list, examples: list, skipped: list[str]) -> str:
    """What became of the sets of a folder. Raises ValueError where no picture is left."""
    if not examples:
        why = (
            f"{skipped[0]}, and {len(skipped) - 1} more"
            if skipped
            else f"the last of its sets is number {count}, and the first to load is {first}"
        )
        raise ValueError(
            f"No picture of {folder!r} could be loaded ({why}): look at the folder, or choose another first set."
        )
    sets, masked = len({m.set for m in members}), sum(e.masked for e in examples)
    left = f", {len(skipped)} left out" if skipped else ""
    head = f"{sets} of {count} sets from {folder}: {len(examples)} pictures{left}, {masked} with a mask"
    notes = [note for e in examples for note in e.notes]
    return "\n".join([head, *(f"- {line}" for line in skipped + notes)])


NODES = [MultiImageSet, LoadImageSets]
