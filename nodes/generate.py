"""Sets of pictures painted from prompts: Generate Set, and Negative Set, which is a preset of it."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.sample
import comfy.samplers
import folder_paths
import latent_preview
import numpy
import torch
from comfy_api.latest import io
from PIL import Image

from ..training import artefact
from ..training.loop import Progress
from ..training.run import Run, config_hash
from ..training.sheet import sheet
from .bridge import Conditioning, check_belong_together, native_size, unknown_words
from .identity import fingerprint
from .progress import Reporter

CATEGORY = "Counterpoint/dataset"
SHOWN = 16  # pictures on the node itself
log = logging.getLogger("counterpoint")


@dataclass
class Recipe:
    """How every picture of a set is painted."""

    negative: str
    width: int
    height: int
    seed: int
    steps: int
    cfg: float
    sampler: str
    scheduler: str


def set_folder(name: str, kind: str, config: dict) -> Path:
    """output/<name>; without a name output/<kind>-<hash>, so that changed settings make a new set."""
    root = Path(folder_paths.get_output_directory()).resolve()
    folder = (root / (name.strip() or f"{kind}-{config_hash(config)[:8]}")).resolve()
    if root not in folder.parents:
        raise ValueError(f"The name {name!r} would leave ComfyUI's output folder: use a plain name such as 'my-set'.")
    return folder


def generate_set(model, clip, vae, prompts: list[str], recipe: Recipe, name: str, kind: str, batch: int = 0):
    """Paint what is not on disk yet; returns pictures (1, H, W, 3) in order, and the folder.

    A picture depends on its prompt and its place in the list only, never on the batch it was painted in.
    """
    if not prompts:
        raise ValueError("There are no prompts to paint: connect captions, or type one prompt per line.")
    if unknown := unknown_words(clip, dict.fromkeys([*prompts, recipe.negative])):
        raise ValueError(
            f"The prompts say embedding:{unknown[0]}, and this CLIP does not know that word: connect Use Embedding with this name, or put "
            "the word's file into models/embeddings."
        )
    encoded = {
        p: clip.encode_from_tokens_scheduled(clip.tokenize(p)) for p in dict.fromkeys([*prompts, recipe.negative])
    }
    for (states, facts), *_ in encoded.values():
        check_belong_together(model, Conditioning(states, facts.get("pooled_output")))
    # What the prompts mean, rather than which CLIP reads them: a learned word may come from memory or from a file.
    config = {
        "prompts": _hash(prompts, encoded),
        **asdict(recipe),
        "model": fingerprint(model),
        "vae": fingerprint(vae),
    }
    folder = set_folder(name, kind, config)
    if folder.exists() and not (folder / "config.json").exists() and any(folder.iterdir()):
        raise ValueError(f"The folder {folder.name!r} in ComfyUI's output holds something else: choose another name.")
    with Run(folder, config) as run:
        files = [run.folder / f"{i:05d}.png" for i in range(len(prompts))]
        missing = [i for i, f in enumerate(files) if not f.exists()]
        if len(missing) < len(prompts):
            log.info(
                "%s: %d of %d pictures are on disk and are used again.",
                folder.name,
                len(prompts) - len(missing),
                len(prompts),
            )
        _paint(model, vae, prompts, encoded, recipe, files, missing, batch or _fitting_batch(model, recipe))
        manifest = {
            "recipe": asdict(recipe),
            "model": config["model"],
            "clip": fingerprint(clip),
            "vae": config["vae"],
            "pictures": [{"file": f.name, "prompt": p} for f, p in zip(files, prompts, strict=True)],
        }
        artefact.write_whole(run.folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    return [read_picture(f) for f in files], folder


def _hash(prompts: list[str], encoded: dict) -> str:
    digest = hashlib.sha256(json.dumps(prompts).encode())
    for conditioning in encoded.values():
        for states, facts in conditioning:
            for t in (states, facts.get("pooled_output")):
                digest.update(b"" if t is None else t.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def read_picture(file: Path) -> torch.Tensor:
    """(1, H, W, 3) in 0..1 of a PNG that we wrote."""
    with Image.open(file) as image:
        return torch.from_numpy(numpy.asarray(image.convert("RGB"), dtype=numpy.float32) / 255)[None]


def write_picture(file: Path, picture: torch.Tensor, caption: str) -> None:
    """(H, W, 3) in 0..1 as PNG, its caption beside it; the picture last, as it says that the pair is whole."""
    artefact.write_whole(file.with_suffix(".txt"), caption.encode())
    temporary = file.with_suffix(".png.tmp")
    Image.fromarray((picture.clamp(0, 1) * 255 + 0.5).to(torch.uint8).cpu().numpy()).save(temporary, format="PNG")
    temporary.replace(file)


def _fitting_batch(model, recipe: Recipe) -> int:
    """The largest of 16, 8, 4, 2, 1 pictures whose two halves fit in 60 % of the free memory."""
    free = comfy.model_management.get_free_memory(model.load_device)
    scale = model.get_model_object("latent_format").spacial_downscale_ratio
    for batch in (16, 8, 4, 2):
        shape = [2 * batch, 4, recipe.height // scale, recipe.width // scale]
        if model.model.memory_required(shape) < 0.6 * free:
            return batch
    return 1


def _paint(
    model, vae, prompts: list[str], encoded: dict, recipe: Recipe, files: list[Path], missing: list[int], batch: int
) -> None:
    groups: dict[int, list[int]] = {}
    for i in missing:  # only prompts of equal token length can share a batch
        groups.setdefault(encoded[prompts[i]][0][0].shape[1], []).append(i)
    batch = 1 if draws_noise(recipe.sampler) else batch
    batches = [rows[k : k + batch] for rows in groups.values() for k in range(0, len(rows), batch)]
    reporter, finished = Reporter(len(batches) * recipe.steps), []
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
    for number, rows in enumerate(batches):

        def tell(step, x0, x, total, number=number):
            preview = previewer.decode_latent_to_preview(x0) if previewer else None
            reporter.update(Progress(number * recipe.steps + step + 1, len(batches) * recipe.steps, {}, 0, 0), preview)

        latents = sample(model, [encoded[prompts[i]] for i in rows], encoded[recipe.negative], recipe, rows, tell)
        pictures = vae.decode(latents).flatten(0, -4)  # a VAE of films (Qwen-Image) gives pictures of 1 frame
        for i, picture in zip(rows, pictures, strict=True):
            write_picture(files[i], picture, prompts[i])
        finished += [shrunk(picture) for picture in pictures[: SHOWN - len(finished)]]
        # The last preview stays on the node, so it shows what is done, not the last latents.
        done = Progress((number + 1) * recipe.steps, len(batches) * recipe.steps, {}, 0, 0)
        reporter.update(done, sheet([torch.stack(finished)], columns=4))


def shrunk(picture: torch.Tensor, most: int = 256) -> torch.Tensor:
    """(H, W, 3) -> (3, h, w), `most` pixels at most."""
    x = picture.movedim(-1, 0)[None].float().cpu()
    scale = min(1.0, most / max(x.shape[-2:]))
    return torch.nn.functional.interpolate(x, scale_factor=scale, mode="area")[0] if scale < 1 else x[0]


def sample(model, positives: list, negative, recipe: Recipe, numbers: list[int], tell=None) -> torch.Tensor:
    """Latents (B, C, h, w), one per conditioning; picture i starts from the noise of seed + numbers[i]."""
    scale = model.get_model_object("latent_format").spacial_downscale_ratio
    empty = torch.zeros(len(numbers), 4, recipe.height // scale, recipe.width // scale)
    latents = comfy.sample.fix_empty_latent_channels(model, empty)
    noise = torch.cat(
        [torch.randn(latents[:1].shape, generator=torch.Generator().manual_seed(recipe.seed + i)) for i in numbers]
    )
    return comfy.sample.sample(
        model, noise, recipe.steps, recipe.cfg, recipe.sampler, recipe.scheduler, together(positives), negative, latents,
        callback=tell, disable_pbar=True, seed=recipe.seed + numbers[0],
    )  # fmt: skip


def draws_noise(sampler: str) -> bool:
    """Whether a sampler adds noise of its own on the way; it would depend on who else is in the batch."""
    function = getattr(comfy.k_diffusion.sampling, f"sample_{sampler}", None)
    return function is not None and "noise_sampler" in inspect.signature(function).parameters


def together(conditionings: list) -> list:
    """Conditionings of equal length as one of B rows; only what concerns the whole prompt is joined."""
    states = torch.cat([c[0][0] for c in conditionings])
    facts = dict(conditionings[0][0][1])
    if facts.get("pooled_output") is not None:
        facts["pooled_output"] = torch.cat([c[0][1]["pooled_output"] for c in conditionings])
    return [[states, facts]]


def recipe_inputs() -> list:
    """The inputs that Generate Set and its presets share, in order."""
    size = "0 takes the model's own size: 128 for Pocket, 512 for SD 1.5, 1024 for SDXL."
    return [
        io.String.Input(
            "negative",
            default="",
            multiline=True,
            tooltip="What should not be in any picture; empty for Pocket. 1 prompt for all.",
        ),
        io.Int.Input("width", default=0, min=0, max=8192, step=8, tooltip=f"Pixels. {size}"),
        io.Int.Input("height", default=0, min=0, max=8192, step=8, tooltip=f"Pixels. {size}"),
        io.Int.Input(
            "seed",
            default=1,
            min=0,
            max=2**53,
            control_after_generate=False,  # the same set again is taken from disk
            tooltip="Picture number i uses seed + i, counted from 0.",
        ),
        io.Int.Input(
            "steps", default=20, min=1, max=200, tooltip="Sampling steps per picture; 20 is enough for most models."
        ),
        io.Float.Input(
            "cfg",
            default=4.0,
            min=0.0,
            max=30.0,
            step=0.1,
            tooltip="How strictly the prompt is followed: 4 for Pocket, 7 for SD 1.5.",
        ),
        io.Combo.Input(
            "sampler", options=comfy.samplers.KSampler.SAMPLERS, default="euler", tooltip="One of ComfyUI's samplers."
        ),
        io.Combo.Input(
            "scheduler",
            options=comfy.samplers.KSampler.SCHEDULERS,
            default="normal",
            tooltip="One of ComfyUI's noise schedules.",
        ),
        io.String.Input(
            "name",
            default="",
            tooltip="Folder under ComfyUI's output; empty makes one from the settings (8 characters of their hash). "
            "What is there already is used again, and another set is never overwritten.",
        ),
        io.Int.Input(
            "batch",
            default=0,
            min=0,
            max=64,
            advanced=True,
            tooltip="Pictures painted at once; 0 takes what fits in memory, 16 at most.",
        ),
    ]


def set_outputs() -> list:
    return [
        io.Image.Output(
            display_name="images", is_output_list=True, tooltip="The pictures, in the order of the prompts."
        ),
        io.String.Output(display_name="prompts", is_output_list=True, tooltip="The prompt of each picture."),
        io.String.Output(display_name="folder", tooltip="Where they lie: PNG, .txt and manifest.json."),
    ]


def _recipe(model, v: dict) -> Recipe:
    native = native_size(model)
    return Recipe(
        v["negative"],
        v["width"] or native,
        v["height"] or native,
        v["seed"],
        v["steps"],
        v["cfg"],
        v["sampler"],
        v["scheduler"],
    )


def _output(images, prompts, folder: Path) -> io.NodeOutput:
    """The node shows its first pictures at once, from where they lie; other nodes may be long in coming."""
    place = folder.relative_to(Path(folder_paths.get_output_directory()).resolve()).as_posix()
    shown = [{"filename": f"{i:05d}.png", "subfolder": place, "type": "output"} for i in range(min(SHOWN, len(images)))]
    said = f"{len(images)} pictures in output/{place}"
    return io.NodeOutput(images, prompts, place, ui={"images": shown, "text": [said]})


class GenerateSet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointGenerateSet",
            display_name="Generate Set",
            category=CATEGORY,
            description="Paints a picture for each prompt, several at a time, into a folder with captions. Stopped, it goes on where it "
            "was; run again with nothing changed, it takes what is there.",
            search_aliases=["batch prompts", "synthetic dataset"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="Paints the pictures; 1 model for all."),
                io.Clip.Input("clip", tooltip="Reads the prompts; from the same checkpoint."),
                io.Vae.Input("vae", tooltip="From the same checkpoint."),
                io.String.Input("prompts", multiline=True, tooltip="A list of prompts, or 1 prompt per line."),
                io.Int.Input("per_prompt", default=1, min=1, max=1000, tooltip="Pictures for each prompt, 1 and up."),
                *recipe_inputs(),
            ],
            outputs=set_outputs(),
        )

    @classmethod
    def execute(cls, model, clip, vae, prompts, per_prompt, **rest) -> io.NodeOutput:
        values = {k: v[0] for k, v in rest.items()}
        lines = [
            line.strip() for text in prompts for line in text.splitlines() if line.strip() for _ in range(per_prompt[0])
        ]
        images, folder = generate_set(
            model[0], clip[0], vae[0], lines, _recipe(model[0], values), values["name"], "generate-set", values["batch"]
        )
        return _output(images, lines, folder)


def template_fault(text: str | None) -> str:
    """What is wrong with a template; None is one that another node will give."""
    missing = [] if text is None else [w for w in ("{caption}", "{generic}") if w not in text]
    return (
        f"The template needs {' and '.join(missing)}, as in '{{caption}} in the style of {{generic}}'."
        if missing
        else ""
    )


class NegativeSet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointNegativeSet",
            display_name="Negative Set",
            category=CATEGORY,
            description="For each caption of your pictures, the model paints the same content in no style in particular. What your pictures "
            "and these have in common is not your style: Train Embedding learns what is left.",
            search_aliases=["nsync", "regularization images", "class images", "synthetic negatives"],
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="The model you will train on; 1 for all."),
                io.Clip.Input("clip", tooltip="From the same checkpoint."),
                io.Vae.Input("vae", tooltip="From the same checkpoint."),
                io.String.Input(
                    "captions",
                    force_input=True,
                    tooltip="What is in each of your pictures, 1 caption each, with no word about the style.",
                ),
                io.String.Input(
                    "template",
                    default="{caption} in the style of {generic}",
                    tooltip="The prompt of each negative. {caption} and {generic} must stand in it, 1 time each.",
                ),
                io.String.Input(
                    "generic",
                    default="picture",
                    tooltip="The 1 word that stands where the style's word will stand: picture for Pocket; painting, photo, drawing elsewhere.",
                ),
                *recipe_inputs(),
            ],
            outputs=set_outputs(),
        )

    @classmethod
    def validate_inputs(cls, template):
        (text,) = template  # a list, as everything that a node with is_input_list gets
        return template_fault(text) or True

    @classmethod
    def execute(cls, model, clip, vae, captions, template, generic, **rest) -> io.NodeOutput:
        values = {k: v[0] for k, v in rest.items()}
        if fault := template_fault(template[0]):
            raise ValueError(fault)
        prompts = [template[0].replace("{caption}", c.strip()).replace("{generic}", generic[0]) for c in captions]
        images, folder = generate_set(
            model[0],
            clip[0],
            vae[0],
            prompts,
            _recipe(model[0], values),
            values["name"],
            "negative-set",
            values["batch"],
        )
        return _output(images, prompts, folder)


NODES = [GenerateSet, NegativeSet]
