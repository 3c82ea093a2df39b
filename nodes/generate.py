"""Sets of pictures painted from prompts: Generate Set, and Negative Set, which is a preset of it."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from dataclasses import asdict, dataclass, replace
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

from ..training import artefact, image_sets
from ..training.folder import MASK
from ..training.loop import Progress
from ..training.run import Run, config_hash
from ..training.sheet import sheet
from .attention.patch import KEY as SHARING
from .attention.patch import found_masks
from .attention.words import name_subject
from .bridge import Conditioning, check_belong_together, native_size
from .identity import fingerprint
from .progress import Reporter
from .prompts import check_words, encoded_alike, together

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


@dataclass
class Batch:
    """Pictures that are painted at once."""

    rows: list[int]  # of all pictures
    positives: list  # a conditioning for each, or one with a row for each
    recipe: Recipe
    numbers: list[int]  # picture k starts from the noise of the recipe's seed + numbers[k]


def set_folder(name: str, kind: str, config: dict) -> Path:
    """output/<name>; without a name output/<kind>-<hash>, so that changed settings make a new set."""
    root = Path(folder_paths.get_output_directory()).resolve()
    folder = (root / (name.strip() or f"{kind}-{config_hash(config)[:8]}")).resolve()
    if root not in folder.parents:
        raise ValueError(f"The name {name!r} would leave ComfyUI's output folder: use a plain name such as 'my-set'.")
    return folder


def generate_set(
    model, clip, vae, prompts: list[str], recipe: Recipe, name: str, kind: str, batch: int = 0,
    sets: list[image_sets.ImageSet] | None = None,
):  # fmt: skip
    """Paint what is not on disk yet; returns pictures (1, H, W, 3) in order, and the folder.

    A picture depends on its prompt and its place in the list only, never on the batch it was painted in. Pictures of `sets`,
    whose prompts follow each other, belong together: each set is painted in one batch, and whole, from its own seed.
    """
    if not prompts:
        raise ValueError("There are no prompts to paint: connect captions, or type one prompt per line.")
    check_words(clip, [*prompts, recipe.negative])
    encoded = _encoded(clip, [*prompts, recipe.negative])
    for (states, facts), *_ in encoded.values():
        check_belong_together(model, Conditioning(states, facts.get("pooled_output")))
    # What the prompts mean, rather than which CLIP reads them: a learned word may come from memory or from a file.
    config = {
        "prompts": _hash(prompts, encoded),
        **asdict(recipe),
        "model": fingerprint(model),
        "vae": fingerprint(vae),
        **({"sets": config_hash({"sets": [asdict(each) for each in sets]})[:16]} if sets else {}),
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
        if sets:
            looks = model.get_attachment(SHARING) is not None
            batches = _by_set(clip, prompts, encoded, recipe, sets, missing, looks)
        else:
            batches = _by_length(prompts, encoded, recipe, missing, batch or _fitting_batch(model, recipe))
        _paint(model, vae, prompts, encoded[recipe.negative], files, batches, keep_masks=bool(sets))
        _write_lists(run, config, clip, recipe, files, prompts, sets or [])
    return [read_picture(f) for f in files], folder


def _write_lists(
    run: Run, config: dict, clip, recipe: Recipe, files: list[Path], prompts: list[str], sets: list
) -> None:
    """manifest.json, and the metadata of SynCD where pictures belong together."""
    pictures = [{"file": f.name, "prompt": p} for f, p in zip(files, prompts, strict=True)]
    if sets:
        of_each = [(n, each.object, scene) for n, each in enumerate(sets, 1) for scene in each.scenes]
        for picture, facts in zip(pictures, of_each, strict=True):
            picture.update(zip(("set", "object", "scene"), facts, strict=True))
        names = [[p["file"] for p in pictures if p["set"] == n] for n in range(1, len(sets) + 1)]
        told = json.dumps(image_sets.metadata(sets, names), indent=1)
        artefact.write_whole(run.folder / "metadata.json", told.encode())
    manifest = {
        "recipe": asdict(recipe),
        "model": config["model"],
        "clip": fingerprint(clip),
        "vae": config["vae"],
        "pictures": pictures,
    }
    artefact.write_whole(run.folder / "manifest.json", json.dumps(manifest, indent=1).encode())


def _encoded(clip, prompts: list[str]) -> dict:
    """{prompt: conditioning}, each prompt once. Raises ComfyUI's interruption between two of them."""
    encoded = {}
    for prompt in dict.fromkeys(prompts):
        comfy.model_management.throw_exception_if_processing_interrupted()
        encoded[prompt] = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    return encoded


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


def write_mask(file: Path, mask: torch.Tensor, shape: tuple[int, int]) -> None:
    """(h, w) in 0..1 as a grey PNG of another shape (H, W)."""
    scaled = torch.nn.functional.interpolate(mask[None, None].float().cpu(), tuple(shape), mode="bilinear")[0, 0]
    temporary = file.with_name(f"{file.name}.tmp")
    Image.fromarray((scaled.clamp(0, 1) * 255 + 0.5).to(torch.uint8).numpy()).save(temporary, format="PNG")
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


def _by_length(prompts: list[str], encoded: dict, recipe: Recipe, missing: list[int], batch: int) -> list[Batch]:
    """Single pictures; only prompts of equal token length can share a batch."""
    groups: dict[int, list[int]] = {}
    for i in missing:
        groups.setdefault(encoded[prompts[i]][0][0].shape[1], []).append(i)
    batch = 1 if draws_noise(recipe.sampler) else batch
    batches = [rows[k : k + batch] for rows in groups.values() for k in range(0, len(rows), batch)]
    return [Batch(rows, [encoded[prompts[i]] for i in rows], recipe, rows) for rows in batches]


def _by_set(
    clip,
    prompts: list[str],
    encoded: dict,
    recipe: Recipe,
    sets: list[image_sets.ImageSet],
    missing: list[int],
    looks: bool,
) -> list[Batch]:
    """Sets of which a picture is missing, each whole. With `looks` the prompts say which of their words name the object, for
    Shared Attention. Raises ValueError before anything is painted."""
    batches, first, wanted = [], 0, set(missing)
    for each in sets:
        comfy.model_management.throw_exception_if_processing_interrupted()
        rows = list(range(first, first := first + len(each.scenes)))
        if wanted.isdisjoint(rows):
            continue
        texts = [prompts[i] for i in rows]
        alike = len({encoded[p][0][0].shape[1] for p in texts}) == 1
        positives = [encoded[p] for p in texts] if alike else encoded_alike(clip, texts)
        if looks:
            positives = [name_subject(together(positives), clip, texts, each.subject)]
        batches.append(Batch(rows, positives, replace(recipe, seed=each.seed), list(range(len(rows)))))
    return batches


def _paint(model, vae, prompts: list[str], negative, files: list[Path], batches: list[Batch], keep_masks: bool) -> None:
    steps = batches[0].recipe.steps if batches else 0
    total = len(batches) * steps
    reporter, finished = Reporter(total), []
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
    for number, batch in enumerate(batches):

        def tell(step, x0, x, _, before=number * steps):
            preview = previewer.decode_latent_to_preview(x0) if previewer else None
            reporter.update(Progress(before + step + 1, total, {}, 0, 0), preview)

        latents = sample(model, batch.positives, negative, batch.recipe, batch.numbers, tell)
        masks = found_masks(model, latents) if keep_masks else None
        pictures = vae.decode(latents).flatten(0, -4)  # a VAE of films (Qwen-Image) gives pictures of 1 frame
        for k, (i, picture) in enumerate(zip(batch.rows, pictures, strict=True)):
            if masks is not None and masks[k].any():  # where nothing was found the whole picture counts
                write_mask(files[i].with_suffix(MASK), masks[k], picture.shape[:2])
            write_picture(files[i], picture, prompts[i])
        finished += [shrunk(picture) for picture in pictures[: SHOWN - len(finished)]]
        # The last preview stays on the node, so it shows what is done, not the last latents.
        reporter.update(Progress((number + 1) * steps, total, {}, 0, 0), sheet([torch.stack(finished)], columns=4))


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


def recipe_inputs(seed: str = "Picture number i uses seed + i, counted from 0.") -> list:
    """The inputs that Generate Set and its presets share, in order; `seed` says what the seed does."""
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
            tooltip=seed,
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


def recipe_of(model, v: dict) -> Recipe:
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


def painted_set(images, prompts, folder: Path) -> io.NodeOutput:
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
            model[0],
            clip[0],
            vae[0],
            lines,
            recipe_of(model[0], values),
            values["name"],
            "generate-set",
            values["batch"],
        )
        return painted_set(images, lines, folder)


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
            recipe_of(model[0], values),
            values["name"],
            "negative-set",
            values["batch"],
        )
        return painted_set(images, prompts, folder)


NODES = [GenerateSet, NegativeSet]
