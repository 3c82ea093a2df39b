"""Load Features: what pictures are measured with."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import comfy.clip_vision
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io
from safetensors import SafetensorError

from ..training import inception
from ..training.features import Extractor
from . import pocket_models
from .identity import fingerprint
from .pocket import pocket_size

CATEGORY = "Counterpoint/metrics"
FeaturesType = io.Custom("FEATURES")
FOLDER = "features"  # of ComfyUI's models folder
SUFFIXES = {".safetensors", ".pth", ".pt"}
TEXTS = 64  # read at a time
POCKET, OBJECTS, CONNECTED = "Pocket", "Pocket's objects", "the CLIP_VISION that is connected"


def folders() -> list[Path]:
    return [Path(f) for f in folder_paths.get_folder_paths(FOLDER)]


def choices() -> list[str]:
    """Pocket twice, whatever is connected, weights files, and folders as transformers saves them."""
    found = [
        item.name
        for folder in folders()
        if folder.is_dir()
        for item in folder.iterdir()
        if item.suffix in SUFFIXES or (item / "config.json").is_file()
    ]
    return [POCKET, OBJECTS, CONNECTED, *sorted(set(found))]


class LoadFeatures(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointLoadFeatures",
            display_name="Load Features",
            category=CATEGORY,
            description="Chooses what pictures are measured with. Nothing is downloaded: weights (CSD for style, Inception for FID) and "
            "folders as transformers saves them (CLIP, DINOv2) go into models/features.",
            search_aliases=["feature extractor", "inception", "fid", "dino", "csd", "clip score"],
            inputs=[
                io.Combo.Input(
                    "extractor",
                    options=choices(),
                    default=POCKET,
                    tooltip=f"{POCKET}: its own vision tower, 128 numbers each, for 128 x 128 pictures of its world. "
                    f"{OBJECTS}: 64 numbers for which object it is, to the lie of its pattern. {CONNECTED}: CLIP, SigLIP or DINO from Load CLIP Vision. The rest lies in models/features; press R after adding a file.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="Only for the 3rd choice: from core's Load CLIP Vision, or from Load Pocket Models.",
                ),
            ],
            outputs=[FeaturesType.Output(display_name="features", tooltip="To Compare Sets and its kin.")],
        )

    @classmethod
    def fingerprint_inputs(cls, extractor, **_):
        if extractor is None:  # a wire
            return float("nan")
        file = find(extractor)
        return "" if file is None else [(f.name, f.stat().st_size, f.stat().st_mtime) for f in parts_of(file)]

    @classmethod
    def execute(cls, extractor, clip_vision=None) -> io.NodeOutput:
        if extractor == POCKET:
            return io.NodeOutput(pocket())
        if extractor == OBJECTS:
            return io.NodeOutput(pocket_objects())
        if extractor == CONNECTED:
            if clip_vision is None:
                raise ValueError(
                    "No CLIP_VISION is connected: connect core's Load CLIP Vision, or choose another extractor."
                )
            return io.NodeOutput(of_clip_vision(clip_vision))
        file = find(extractor)
        if file is None:
            raise ValueError(
                f"There is no {extractor!r} in models/{FOLDER}: put it there and press R, or choose another."
            )
        return io.NodeOutput(of_folder(file) if file.is_dir() else of_weights(file))


def find(name: str) -> Path | None:
    """The file or folder of models/features with this name; names with a path are never looked up."""
    if name in ("", POCKET, OBJECTS, CONNECTED) or Path(name).name != name:
        return None
    return next((folder / name for folder in folders() if (folder / name).exists()), None)


def parts_of(file: Path) -> list[Path]:
    return sorted(f for f in file.iterdir() if f.is_file()) if file.is_dir() else [file]


def pocket() -> Extractor:
    """Pocket's pair: pictures through its vision tower, texts through its text tower."""
    vision, clip = pocket_models.load_vision(), pocket_models.load_clip()

    def see(images: torch.Tensor) -> torch.Tensor:
        return vision.encode_image(pocket_size(images).movedim(1, -1))["image_embeds"]

    def read(texts: list[str]) -> torch.Tensor:
        return torch.cat([clip.encode_from_tokens(clip.tokenize(t), return_pooled=True)[1] for t in texts]).cpu()

    return Extractor(POCKET, fingerprint(vision), see, read)


def pocket_objects() -> Extractor:
    """The instance probe, which looks at whole pictures of Pocket's world."""
    probe, _ = pocket_models.load_instance_probe()
    patcher = managed(probe)

    def see(images: torch.Tensor) -> torch.Tensor:
        comfy.model_management.load_model_gpu(patcher)
        return probe(pocket_size(images).to(patcher.load_device))

    return Extractor("Pocket's instance probe", fingerprint(patcher), see)


def of_clip_vision(vision, name: str = "CLIP vision") -> Extractor:
    """Core's own preprocessing; the projected embedding of CLIP, the class token of DINO, the mean patch of SigLIP, whose
    pooling core does not load."""

    def see(images: torch.Tensor) -> torch.Tensor:
        seen = vision.encode_image(images)["image_embeds"]
        return seen.mean(1) if seen.ndim == 3 else seen

    return Extractor(f"{name}, {vision.image_size} pixels", fingerprint(vision), see)


def read_weights(file: Path, folder: str) -> dict:
    """What is in a weights file of models/`folder`. Legacy files are read without unpickling code; raises ValueError where one cannot be read so."""
    try:
        return comfy.utils.load_torch_file(str(file), safe_load=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, ValueError, EOFError) as error:
        raise ValueError(
            f"{file.name} in models/{folder} cannot be read: it is broken, or holds more than tensors, which might be code. "
            "Fetch it again, or save its tensors as .safetensors."
        ) from error


def of_weights(file: Path) -> Extractor:
    """CSD's or Inception's weights, told apart by what is in the file."""
    state = read_weights(file, FOLDER)
    for wrapper in ("model_state_dict", "state_dict"):
        state = state.get(wrapper, state)
    state = {k.removeprefix("module."): v for k, v in state.items()}
    if "last_layer_style" in state:
        return csd(state)
    try:
        network = inception.build(state)
    except ValueError as error:
        raise ValueError(
            f"{file.name} cannot be used: {error}, nor those of CSD. Put CSD's checkpoint, or Inception's, into models/{FOLDER}."
        ) from None
    kind = "Inception (FID's)" if network.prepare is inception.tensorflow else "Inception (torchvision's)"
    patcher = managed(network)

    def see(images: torch.Tensor) -> torch.Tensor:
        comfy.model_management.load_model_gpu(patcher)
        return network(images.movedim(-1, 1).float().to(patcher.load_device))

    return Extractor(kind, fingerprint(patcher), see)


def csd(state: dict[str, torch.Tensor]) -> Extractor:
    """CSD (Somepalli et al. 2024): CLIP ViT-L/14 with a style head in the place of its projection, unit length.

    Through core's CLIP vision, whose projection becomes the head: features are those of `last_layer_style`.
    """
    tower = {f"visual.{k.removeprefix('backbone.')}": v for k, v in state.items() if k.startswith("backbone.")}
    tower["visual.proj"] = state["last_layer_style"]
    vision = comfy.clip_vision.load_clipvision_from_sd(tower, prefix="visual.", convert_keys=True)
    if vision is None:
        raise ValueError(
            f"This CSD checkpoint does not stand on CLIP ViT-L/14: put the original one into models/{FOLDER}."
        )
    whole = of_clip_vision(vision, "CSD")
    return Extractor(
        "CSD", whole.identity, lambda images: torch.nn.functional.normalize(whole.pictures(images).float(), dim=1)
    )


def managed(module: torch.nn.Module) -> comfy.model_patcher.ModelPatcher:
    """A torch module under ComfyUI's memory management, which hangs a `device` on it; transformers' models have their own."""
    shell = torch.nn.Sequential(module)
    return comfy.model_patcher.ModelPatcher(
        shell, comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    )


def of_folder(folder: Path) -> Extractor:
    """CLIP, SigLIP, DINO... as transformers saves them; from this folder only, safetensors only, no code from it."""
    import transformers

    safe = {"local_files_only": True, "trust_remote_code": False}
    newer = int(transformers.__version__.split(".")[0]) >= 5
    resize_as_the_reference = {"backend": "pil"} if newer else {"use_fast": False}
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, **resize_as_the_reference, **safe)
        model = transformers.AutoModel.from_pretrained(folder, use_safetensors=True, **safe)
        model = model.float().eval().requires_grad_(False)  # some are saved as bfloat16, and pixels are float32
        reads = hasattr(model, "get_text_features")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **safe) if reads else None
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder.name} in models/{FOLDER} is not complete: {str(error).splitlines()[0]} Copy the whole folder: config.json, "
            "preprocessor_config.json, model.safetensors, and the tokenizer's files for CLIP."
        ) from None

    def prepare(images: torch.Tensor) -> torch.Tensor:
        pictures = list((images.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())
        return processor(pictures, return_tensors="pt")["pixel_values"]

    def embed(pixels: torch.Tensor) -> torch.Tensor:
        if hasattr(model, "get_image_features"):
            return pooled(model.get_image_features(pixel_values=pixels))
        return pooled(model(pixel_values=pixels))

    patcher = managed(model)

    def see(images: torch.Tensor) -> torch.Tensor:
        comfy.model_management.load_model_gpu(patcher)
        return embed(prepare(images).to(patcher.load_device))

    def read(texts: list[str]) -> torch.Tensor:
        comfy.model_management.load_model_gpu(patcher)
        length = model.config.text_config.max_position_embeddings  # not every tokenizer knows it
        parts = []
        for start in range(0, len(texts), TEXTS):
            some = texts[start : start + TEXTS]
            tokens = tokenizer(some, return_tensors="pt", padding="max_length", truncation=True, max_length=length)
            parts.append(pooled(model.get_text_features(**tokens.to(patcher.load_device))).cpu())
        return torch.cat(parts)

    how = hashlib.sha256(json.dumps(processor.to_dict(), sort_keys=True, default=str).encode()).hexdigest()[:4]
    return Extractor(folder.name, fingerprint(patcher) + how, see, read if reads else None)


def pooled(output) -> torch.Tensor:
    """(B, d) of what a model of transformers returns: a tensor, or a class with a pooled output."""
    if isinstance(output, torch.Tensor):
        return output
    return output.last_hidden_state[:, 0] if output.pooler_output is None else output.pooler_output


NODES = [LoadFeatures]
