"""One press of Run on a training node, whatever it trains: checks, private copies, the loop, previews, the report."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io

from ..training import artefact
from ..training.checkpointing import blocks, checkpointed
from ..training.contrast import Contrast, Settings, Tensors
from ..training.features import images_hash
from ..training.learning_curves import trailing_mean
from ..training.memory import Kept, size
from ..training.run import Run, config_hash
from ..training.sheet import sheet
from .bridge import (
    TOKEN,
    TOKENS,
    ComfyDenoiser,
    check_trainable,
    family,
    plain,
    private_clip,
    private_model,
    training_mode,
)
from .generate import Recipe, sample
from .identity import fingerprint
from .progress import COMPLETE, Reporter, follow
from .training_inputs import RECOMMENDED

CAPTIONED = {"template": "the template", "caption": "its caption", "dropout": "its caption or the template"}
CURVE_POINTS = 500
TEMPLATE = f"The template needs {TOKEN} once, as in 'a picture in the style of {TOKEN}'."


def template_fault(template: list[str | None]) -> str:
    """What is wrong with the template of a node that takes lists; None comes from another node and is looked at later."""
    (text,) = template
    return "" if text is None or text.count(TOKEN) == 1 else TEMPLATE


def ways_to_caption(captions: list[str], template: str, use: str) -> list[list[str]]:
    """For each picture the captions that training may draw: the template alone, the caption in it, or either.

    A picture without a caption has the template. A caption that says {token} itself is left as it is.
    """
    found = template.find("in the style")
    tail = f" {template[found:]}" if found >= 0 and TOKEN in template[found:] else f", {TOKEN}"
    described = [c.strip() if TOKEN in c else c.strip() + tail if c.strip() else template for c in captions]
    return {
        "template": [[template] for _ in captions],
        "caption": [[d] for d in described],
        "dropout": [[template, d] for d in described],
    }[use]


def fit_size(image: torch.Tensor, pixels: int) -> torch.Tensor:
    """(1, H, W, C) -> (1, pixels, pixels, 3): the smaller side fitted, the middle kept."""
    x = image[..., :3].movedim(-1, 1)
    return comfy.utils.common_upscale(x, pixels, pixels, "lanczos", "center").movedim(1, -1)


def fit_mask(mask: torch.Tensor, pixels: int, latents: torch.Tensor) -> torch.Tensor:
    """(1, H, W) -> (1, 1, h, w): the part of it that the picture keeps, as shares of the latent's places."""
    x = comfy.utils.common_upscale(mask[:, None].float(), pixels, pixels, "bilinear", "center")
    return torch.nn.functional.adaptive_avg_pool2d(x, latents.shape[-2:])


def encode_pictures(vae, images: list[torch.Tensor], pixels: int) -> torch.Tensor:
    """Latents (n, C, h, w) of single pictures, on the CPU, as ordinary tensors."""
    return torch.cat([plain(vae.encode(fit_size(image, pixels))).cpu() for batch in images for image in batch.split(1)])


class Done(NamedTuple):
    """What a press of Run came to."""

    learned: object
    records: list[dict]  # one for each step
    report: str
    run: str  # name of its folder


class Job:
    """What a kind of training adds is said in the methods that raise NotImplementedError."""

    kind = ""  # first part of a run's folder

    def __init__(self, model, clip, vae, images, captions, negatives, values: dict, masks=None):
        self.model, self.clip, self.vae = model, clip, vae
        self.family = family(model)
        own = {"steps": self.family.steps, "size": self.family.size, **self.own_values()}
        self.values = values | {k: v for k, v in own.items() if not values[k]}
        if (
            values["method"] == RECOMMENDED
        ):  # evidence/nsync: captions leave negatives nothing to do, one sentence for all does not
            one_sentence = values["caption_use"] == "template" or not captions
            self.values["method"] = "paper" if negatives and one_sentence else "plain"
        values, self.pixels = self.values, self.values["size"]
        self.images = [picture for batch in images for picture in batch.split(1)]
        self.negatives = [picture for batch in negatives for picture in batch.split(1)] if negatives else []
        self.masks = [mask for batch in masks for mask in batch.split(1)] if masks else []
        self.captions = list(captions or [])
        self.settings = Settings(
            method=values["method"], strength=values["strength"], steps=values["steps"], batch=values["batch"],
            learning_rate=values["learning_rate"], weighting=values["weighting"], seed=values["seed"],
            keep_norm=values.get("keep_norm", False), together=values.get("together", False),
            empty=values.get("empty", 0.0),
        )  # fmt: skip
        self.mirror = values.get("mirror", False)
        self.contrastive = self.settings.method != "plain" and self.settings.strength > 0
        self._check()
        self.ways = self.captioned()

    # What a kind of training adds

    def own_values(self) -> dict:
        """What a value of 0 stands for, beside steps and size."""
        raise NotImplementedError

    def decides(self) -> dict:
        """Values that decide the result, beside the settings, the pictures and the models."""
        raise NotImplementedError

    def trainer(self, denoiser: ComfyDenoiser, model, clip, latents, ways, negatives, masks) -> Contrast:
        """On private copies, under training mode. Raises ValueError where MODEL and CLIP do not belong together."""
        raise NotImplementedError

    def previewed(self, learned: Tensors, model, clip) -> contextlib.AbstractContextManager[tuple]:
        """While it lasts, `model` knows what was learned so far; gives a CLIP that does, and the prompt to paint with."""
        raise NotImplementedError

    def unmoved(self, name: str) -> str:
        """Why a tensor may have stayed where it was."""
        return f"{name} was not changed."

    def file(self, learned: Tensors, name: str, facts: dict) -> bytes:
        """A snapshot as a file."""
        raise NotImplementedError

    def result(self, learned: Tensors, name: str, facts: dict):
        """The node's first output, and a few words about it."""
        raise NotImplementedError

    # What a kind of training without captions says otherwise

    def captioned(self) -> list[list[str]]:
        """For each picture what training may draw as its caption. Raises ValueError where captions and pictures do not match."""
        self.caption_use, captions = self.values["caption_use"], self.captions
        if self.caption_use == "auto":
            self.caption_use = "caption" if captions and not self.contrastive else "template"
        if self.values["template"].count(TOKEN) != 1:
            raise ValueError(TEMPLATE)
        if self.caption_use != "template" and len(captions) != len(self.images):
            raise ValueError(
                f"caption_use is {self.values['caption_use']!r} and there are {len(captions)} captions for {len(self.images)} pictures: "
                "give 1 each, or use 'template'."
            )
        ways = ways_to_caption(captions or [""] * len(self.images), self.values["template"], self.caption_use)
        self._check_tokens(ways)
        return ways

    def caption_settings(self) -> dict:
        """What of the captions decides the result."""
        said = "" if self.caption_use == "template" else hashlib.sha256(json.dumps(self.captions).encode()).hexdigest()
        return {"template": self.values["template"], "caption_use": self.caption_use, "captions": said[:16]}

    def each_with(self) -> str:
        """What the model is told of each picture, for the report."""
        return CAPTIONED[self.caption_use]

    def how(self) -> dict:
        """How it was learned, for the file's header."""
        return {**{k: getattr(self.settings, k) for k in ("method", "strength")}, "template": self.values["template"]}

    def conditionings(self, words, prompt) -> tuple[list, list]:
        """Of the four pictures of a preview, and what guidance leads away from; from what `previewed` gives."""
        cond, empty = (words.encode_from_tokens_scheduled(words.tokenize(text)) for text in (prompt, ""))
        return [cond] * 4, empty

    # What they share

    def _check(self) -> None:
        check_trainable(self.model, "MODEL")
        check_trainable(self.clip.patcher, "CLIP")
        n = len(self.images)
        if not n:
            raise ValueError("There are no pictures to learn from: connect Load Dataset or Pocket Pictures.")
        self._check_masks()
        if not self.contrastive:
            self.negatives = []
            return
        if len(self.negatives) != n:
            raise ValueError(
                f"The method {self.settings.method!r} needs 1 negative for each picture, and there are {len(self.negatives)} for {n}: "
                f"connect Negative Set with the same captions, or choose 'plain'."
            )
        sizes = {tuple(i.shape[1:3]) for i in self.negatives}
        if len(sizes) > 1:
            raise ValueError(
                f"The negatives have different sizes ({', '.join(f'{w}x{h}' for h, w in sorted(sizes))}): paint them all in one size."
            )

    def _check_masks(self) -> None:
        n = len(self.images)
        if len(self.masks) not in (0, 1, n):
            raise ValueError(f"There are {len(self.masks)} masks for {n} pictures: give 1 each, or 1 for all.")
        self.masks = self.masks * n if len(self.masks) == 1 else self.masks
        for i, (mask, picture) in enumerate(zip(self.masks, self.images, strict=bool(self.masks)), 1):
            (h, w), (high, wide) = mask.shape[1:3], picture.shape[1:3]
            if (h, w) != (high, wide) and mask.any():
                raise ValueError(
                    f"Mask {i} is {w}x{h} and its picture {wide}x{high}: give it a mask of the picture's own size."
                )
            if not fit_mask(mask, 64, torch.empty(8, 8)).any():
                raise ValueError(
                    f"Mask {i} is black where picture {i} is trained on, so nothing of it would be learned: paint white what is to be "
                    "learned, or leave the masks away. (A picture without transparency comes with such a mask.)"
                )

    def _check_tokens(self, ways: list[list[str]]) -> None:
        asked = {t[0] for text in (self.values["template"], *self.captions) for t in TOKENS.finditer(text)}
        if lost := sorted(asked - {t[0] for way in ways for text in way for t in TOKENS.finditer(text)}):
            raise ValueError(
                f"{lost[0]} stands in no caption that is learned from (each picture has {CAPTIONED[self.caption_use]}), so it would learn "
                "nothing: write it into the captions, or choose another caption_use."
            )

    def run(self) -> Done:
        with self._open_run() as run:
            stored = run.load_checkpoint()
            if stored and stored[0] >= self.settings.steps:
                return self._result(run, stored[1]["learned"], stored[0], [COMPLETE])
            return self._train(run)

    def _open_run(self) -> Run:
        decides = {k: v for k, v in asdict(self.settings).items() if k != "steps"}
        config = {
            **decides, **self.decides(), **self.caption_settings(), "size": self.pixels, "images": images_hash(self.images),
            "negatives": images_hash(self.negatives), "model": fingerprint(self.model), "clip": fingerprint(self.clip), "vae": fingerprint(self.vae),
            **({"masks": images_hash(self.masks)} if self.masks else {}), **({"mirror": True} if self.mirror else {}),
        }  # fmt: skip
        return Run(run_folder(self.values["run"], self.kind, config), config, {"steps": self.settings.steps})

    def _train(self, run: Run) -> Done:
        settings = self.settings
        latents = self._encode(self.images)
        negatives = self._encode(self.negatives) if self.negatives else None
        masks = torch.cat([fit_mask(m, self.pixels, latents) for m in self._both(self.masks)]) if self.masks else None
        reporter, said = Reporter(settings.steps), []
        with training_mode(), contextlib.ExitStack() as stack:
            model, clip = private_model(self.model), private_clip(self.clip)
            comfy.model_management.load_models_gpu([model, clip.patcher], force_full_load=True)
            prepared = [
                None if x is None else model.model.process_latent_in(plain(x)).to(model.load_device)
                for x in (latents, negatives)
            ]
            masks = None if masks is None else masks.to(model.load_device)
            ways = self.ways * (1 + self.mirror)
            trainer = self.trainer(ComfyDenoiser(model), model, clip, prepared[0], ways, prepared[1], masks)
            trainer.settings = replace(settings)
            networks = model.model.diffusion_model, clip.cond_stage_model
            trainer.settings.batch, lean, memory = self._fitting_batch(trainer, networks, model.load_device)
            if lean:
                stack.enter_context(checkpointed(*networks, learned_inside=trainer.learned_inside))
            reporter.say(
                f"Training {run.folder.name}: {settings.steps} steps of {trainer.settings.batch} pictures, {memory}."
            )
            if trainer.settings.batch < settings.batch:
                said.append(
                    f"{trainer.settings.batch} instead of {settings.batch} pictures per step, to fit into memory."
                )
            done, problem = follow(
                trainer, run, settings.steps, reporter, lambda p: self._preview(p.step, trainer, model, clip, run), f", {memory}"
            )  # fmt: skip
            said += [self.unmoved(name) for name in trainer.idle()]
            learned = {k: v.detach().cpu().clone() for k, v in trainer.learned.items()}
        if problem:
            said.append(problem)
        result = self._result(run, learned, done, said)
        reporter.say(result.report)
        return result

    def _both(self, pictures: list[torch.Tensor]) -> list[torch.Tensor]:
        """With their mirror images, where they are asked for: (1, H, W, ...) each."""
        return pictures + [p.flip(2) for p in pictures] if self.mirror else pictures

    def _encode(self, images: list[torch.Tensor]) -> torch.Tensor:
        latents = encode_pictures(self.vae, self._both(images), self.pixels)
        taken, given = self.model.model.latent_format.latent_channels, latents.shape[1]
        if taken != given:
            raise ValueError(
                f"MODEL and VAE do not belong together: the model takes latents of {taken} channels and this VAE gives {given}. "
                "Take both from the same checkpoint."
            )
        if lost := [i % len(images) + 1 for i, latent in enumerate(latents) if not latent.isfinite().all()]:
            raise ValueError(
                f"The VAE makes no numbers of picture {lost[0]}: start ComfyUI with --fp32-vae, so that it works in 32 bit, or leave "
                "the picture away."
            )
        return latents

    def _preview(self, step: int, trainer: Contrast, model, clip, run: Run):
        """Four pictures of what is learned so far; also kept in the run's folder."""
        every, snapshots = self.values["preview_every"], self.values["snapshot_every"]
        learned = {k: v.detach() for k, v in trainer.learned.items()}
        if snapshots and step % snapshots == 0:
            data = self.file({k: v.cpu() for k, v in learned.items()}, run.folder.name, {"step": step})
            artefact.write_whole(run.folder / "snapshots" / f"step-{step:06d}.safetensors", data)
        if not every or step % every or step == self.settings.steps:
            return None
        with torch.no_grad(), self.previewed(learned, model, clip) as (words, prompt):
            positives, negative = self.conditionings(words, prompt)
            recipe = Recipe("", self.pixels, self.pixels, 1, 12, self.family.cfg, "euler", "normal")
            latents = sample(model, positives, negative, recipe, [0, 1, 2, 3])
            pictures = (
                self.vae.decode(latents).flatten(0, -4).movedim(-1, 1)
            )  # a VAE of films gives pictures of 1 frame
        picture = sheet([pictures], columns=2)
        (run.folder / "previews").mkdir(exist_ok=True)
        picture.save(run.folder / "previews" / f"step-{step:06d}.jpg", quality=90)
        return picture

    def _fitting_batch(self, trainer: Contrast, networks: tuple, device) -> tuple[int, bool, str]:
        """How many pictures per step fit beside the private copies, whether with checkpoints, and what they take, in words."""
        free, wish = comfy.model_management.get_free_memory(device), self.values.get("memory", "auto")
        try:
            kept = trainer.memory_per_picture(block for network in networks for block in blocks(network))
        except comfy.model_management.OOM_EXCEPTION:
            kept = Kept(2 * free, free)  # it tried two pictures; one may fit
        lean = wish == "lean" or (wish == "auto" and free // kept.fast < self.settings.batch)
        per_picture = kept.lean if lean else kept.fast
        batch = min(self.settings.batch, int(free // per_picture))
        if batch == 0:
            raise ValueError(
                f"Training at {self.pixels} pixels needs about {size(per_picture)} beside the model and {size(free)} are free: "
                f"choose a smaller size than {self.pixels}, or close what else uses the memory."
            )
        how = " with gradient checkpointing" if lean else ""
        return batch, lean, f"about {size(batch * per_picture)}{how} of the {size(free)} of memory that are free"

    def _result(self, run: Run, learned: Tensors, steps: int, said: list[str]) -> Done:
        facts = {
            **self.how(), "steps": steps, "seed": self.settings.seed,
            "base_model": fingerprint(self.model), "base_clip": fingerprint(self.clip),
        }  # fmt: skip
        result, about = self.result(learned, run.folder.name, facts)
        report = (
            f"{self.settings.method} on {self.family.name}, {steps} steps on {len(self.images)} pictures at {self.pixels}, "
            f"each with {self.each_with()}, {about}, run {run.folder.name}. "
        )
        records = run.history(steps)
        if records and records[-1].get("skipped"):
            said = [*said, f"{records[-1]['skipped']:.0f} steps were skipped, because their gradient was not a number."]
        return Done(
            result, records, report + " ".join(text for text in (self.family.warning, *said) if text), run.folder.name
        )


def plottable(curve: list[float]) -> list[float]:
    """Core's plot divides by the range of what it gets."""
    return curve if len(set(curve)) > 1 else [*(curve or [0.0]), (curve or [0.0])[-1] + 1e-6]


def thinned(values: list[float]) -> list[float]:
    """At most 500 points, for the browser."""
    every = -(-len(values) // CURVE_POINTS) or 1
    return values[::every]


def run_folder(name: str, kind: str, config: dict) -> Path:
    """output/counterpoint/<name>; without a name one that belongs to these settings."""
    root = (Path(folder_paths.get_output_directory()) / "counterpoint").resolve()
    folder = (root / (name.strip() or f"{kind}-{config_hash(config)[:8]}")).resolve()
    if root not in folder.parents:
        raise ValueError(
            f"The run's name {name!r} would leave ComfyUI's output folder: use a plain name such as 'my-style'."
        )
    return folder


def defaults(node: type[io.ComfyNode]) -> dict:
    """What a node's widgets say when nobody has touched them."""
    return {i.id: i.default for i in node.define_schema().inputs if isinstance(i, io.WidgetInput)}


def output(
    kind: type[Job], model, clip, vae, images, captions=None, negatives=None, masks=None, **values
) -> io.NodeOutput:
    """Run a job on the inputs of a node that takes lists; what a training node returns."""
    first = {k: v[0] for k, v in values.items()}
    return told(kind(model[0], clip[0], vae[0], images, captions, negatives, first, masks).run())


def told(done: Done) -> io.NodeOutput:
    """What a training node returns and shows."""
    curve = trailing_mean([r["loss"] for r in done.records if "loss" in r], 20)
    shown = {
        "text": [done.report],
        "counterpoint_loss": thinned(curve),
        "counterpoint_steps": [done.records[-1]["step"] if done.records else 0],
    }
    return io.NodeOutput(done.learned, {"loss": plottable(curve)}, done.report, done.run, ui=shown)
