"""Image embeddings on the canvas: core's CLIP_VISION_OUTPUT, with a pooled embedding alone; kept, mixed, handed on."""

from __future__ import annotations

import json
from pathlib import Path

import comfy.clip_vision
import folder_paths
import torch
from comfy_api.latest import io, ui
from safetensors import SafetensorError

from ...training import artefact
from ...training.embedding import check_name
from ..embedding import name_fault
from .pairs import CATEGORY

PATCHES = ("last_hidden_state", "penultimate_hidden_states", "all_hidden_states", "mm_projected", "image_sizes")
FOLDER = "image_embeddings"  # of ComfyUI's models folder
FORMAT = "image_embedding"
EMPTY = f"there is none: save one, or put one into models/{FOLDER}"


class ImageEmbedding(comfy.clip_vision.Output):
    """One embedding (1, d), float32 on the CPU, as core's nodes take it: a batch would be summed by unCLIP."""

    def __init__(
        self, embedding: torch.Tensor, image: str = "", space: str = "", facts: dict[str, object] | None = None
    ):
        """`image` is the identity of the image encoder in whose space it lies, "" where it is not known; `space` its name."""
        self.image_embeds = embedding.detach().float().cpu().reshape(1, -1).clone()
        self.image, self.space, self.facts = image, space, facts or {}

    def __getattr__(self, name: str):
        if name in PATCHES:
            raise AttributeError(
                f"This image embedding is one vector of {self.image_embeds.shape[1]} numbers and has no patches ({name}): give it to "
                "unCLIPConditioning, to Apply Image Tokens or to an IP-Adapter without patches. Redux, Wan and Hunyuan3D need a real picture."
            )
        raise AttributeError(name)


def vector(output, dim: int | None, what: str) -> torch.Tensor:
    """(1, d) of a CLIP_VISION_OUTPUT. Raises ValueError for a batch, for another width, and where nothing is pooled."""
    embeds = output["image_embeds"]
    if embeds is None or embeds.ndim != 2:
        raise ValueError(f"{what} comes from a vision model without one pooled vector (SigLIP, DINO): use a CLIP.")
    if len(embeds) != 1:
        raise ValueError(f"{what} is a batch of {len(embeds)}: give 1 picture, or a list of single ones.")
    if dim is not None and embeds.shape[1] != dim:
        raise ValueError(
            f"{what} has {embeds.shape[1]} numbers and {dim} are needed: 768 are ViT-L's, 1024 ViT-H's, 1280 ViT-bigG's; use the CLIP Vision "
            "model that belongs here."
        )
    return embeds.detach().float().cpu()


def same_space(a, b) -> None:
    """Raises ValueError where both say in which space they lie, and it is not the same."""
    one, other = getattr(a, "image", ""), getattr(b, "image", "")
    if one and other and one != other:
        raise ValueError(
            f"These embeddings lie in different spaces ({getattr(a, 'space', '') or one} and {getattr(b, 'space', '') or other}), and a mix of "
            "them means nothing: make both with one CLIP."
        )


class MixImageEmbeddings(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointMixImageEmbeddings",
            display_name="Mix Image Embeddings",
            category=CATEGORY,
            description="What lies between two image embeddings, of pictures or of texts: a part of the way on the great circle from one to the "
            "other, with a length between theirs.",
            search_aliases=["slerp", "interpolate", "blend images", "style mixing"],
            inputs=[
                io.ClipVisionOutput.Input("a", tooltip="1 embedding: Sample Prior's, or CLIP Vision Encode's of 1 picture."),
                io.ClipVisionOutput.Input("b", tooltip="The other 1, in the same space."),
                io.Float.Input("share", default=0.5, min=0.0, max=1.0, step=0.01, tooltip="How much of b: 0 is a itself, 0.5 half-way, 1 is b."),
            ],
            outputs=[io.ClipVisionOutput.Output(display_name="embedding", tooltip="1 embedding; chain nodes to mix 3 and more.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, a, b, share) -> io.NodeOutput:
        same_space(a, b)
        first = vector(a, None, "a")
        mixed = spherical(first, vector(b, first.shape[1], "b"), share)
        image, space = (getattr(a, k, "") or getattr(b, k, "") for k in ("image", "space"))
        return io.NodeOutput(ImageEmbedding(mixed, image, space, {"mixed": share}))


def spherical(a: torch.Tensor, b: torch.Tensor, share: float) -> torch.Tensor:
    """(1, d) between a and b (1, d): direction along the great circle (Shoemake 1985), length in proportion. Opposite and parallel
    vectors, for which there is no such circle, are mixed along the line. 0 is a and 1 is b, bit for bit."""
    if share in (0, 1):
        return b if share else a
    lengths = a.norm(), b.norm()
    if not min(lengths) > 0:
        return torch.lerp(a, b, share)
    u, v = a / lengths[0], b / lengths[1]
    angle = (u * v).sum().clamp(-1, 1).acos()
    if angle.sin() < 1e-4:
        return torch.lerp(a, b, share)
    way = ((1 - share) * angle).sin() / angle.sin() * u + (share * angle).sin() / angle.sin() * v
    return way * torch.lerp(*lengths, share)


class SaveImageEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointSaveImageEmbedding",
            display_name="Save Image Embedding",
            category=CATEGORY,
            description="Writes an image embedding into models/image_embeddings, with the CLIP space it lies in: a look to share without sharing "
            "the picture. Nothing is overwritten.",
            search_aliases=["save clip vision output", "save embeds"],
            is_output_node=True,
            inputs=[
                io.ClipVisionOutput.Input("embedding", tooltip="1 embedding."),
                io.String.Input("name", default="my-look", tooltip="File name without ending. 1 word of letters, digits, - _ ."),
            ],
            outputs=[io.String.Output(display_name="name", tooltip="The name it was saved under.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, name):
        return name_fault(name) or True

    @classmethod
    def execute(cls, embedding, name) -> io.NodeOutput:
        said = {"format": FORMAT, **{k: getattr(embedding, k, "") for k in ("image", "space")}}
        said["facts"] = getattr(embedding, "facts", {})
        data = artefact.encode({"image_embeds": vector(embedding, None, "The embedding")}, said)
        file = artefact.write_new(
            Path(folder_paths.get_folder_paths(FOLDER)[0]) / f"{check_name(name)}.safetensors", data
        )
        return io.NodeOutput(file.stem, ui=ui.PreviewText(f"Saved as {file.name} in models/{FOLDER}."))


class LoadImageEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointLoadImageEmbedding",
            display_name="Load Image Embedding",
            category=CATEGORY,
            description="An image embedding from models/image_embeddings, exactly as it was saved.",
            search_aliases=["load clip vision output", "load embeds"],
            inputs=[
                io.Combo.Input(
                    "embedding",
                    options=folder_paths.get_filename_list(FOLDER) or [EMPTY],
                    tooltip="1 file in models/image_embeddings. Press R to see one you have just made.",
                )
            ],
            outputs=[io.ClipVisionOutput.Output(display_name="embedding", tooltip="1 embedding, with the space it lies in.")],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, embedding):
        if embedding in (None, EMPTY):  # a wire, or nothing to choose
            return float("nan")
        stat = Path(folder_paths.get_full_path_or_raise(FOLDER, embedding)).stat()
        return f"{stat.st_mtime_ns}-{stat.st_size}"

    @classmethod
    def execute(cls, embedding) -> io.NodeOutput:
        if embedding == EMPTY:
            raise ValueError(f"There is no image embedding yet: save one, or put one into models/{FOLDER} and press R.")
        return io.NodeOutput(load(Path(folder_paths.get_full_path_or_raise(FOLDER, embedding))))


def load(file: Path) -> ImageEmbedding:
    try:
        tensors, said = artefact.read(file)
    except SafetensorError as error:
        raise ValueError(
            f"{file.name} in models/{FOLDER} cannot be read: it is broken. Copy or save it again."
        ) from error
    if said.get("format") != FORMAT or tensors["image_embeds"].ndim != 2:
        raise ValueError(f"{file.name} in models/{FOLDER} is no image embedding: choose another file.")
    return ImageEmbedding(tensors["image_embeds"], said["image"], said["space"], json.loads(said["facts"]))


class ToIpAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointToIpAdapter",
            display_name="Image Embedding to EMBEDS",
            category=CATEGORY,
            description="An image embedding in the form that IPAdapter_plus calls EMBEDS, and an empty one for its negative input.",
            search_aliases=["ipadapter", "embeds"],
            inputs=[io.ClipVisionOutput.Input("embedding", tooltip="1 embedding: 1024 numbers for most IP-Adapters, 1280 for SDXL's own. Models with plus or face in their names want patches.")],
            outputs=[
                io.Custom("EMBEDS").Output(display_name="positive", tooltip="To IPAdapter Embeds, pos_embed: (1, numbers)."),
                io.Custom("EMBEDS").Output(display_name="negative", tooltip="Zeros, to neg_embed: (1, numbers)."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, embedding) -> io.NodeOutput:
        found = vector(embedding, None, "The embedding")
        return io.NodeOutput(found, torch.zeros_like(found))


NODES = [MixImageEmbeddings, SaveImageEmbedding, LoadImageEmbedding, ToIpAdapter]
