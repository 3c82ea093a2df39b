"""Shared attention as a patch of ComfyUI's models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.lumina.model import NextDiT
from comfy.ldm.modules.attention import BasicTransformerBlock, SpatialVideoTransformer, optimized_attention
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.patcher_extension import WrappersMP

from .sampling import KEY, Sampling
from .shared import moved, neighbours, shared, subject_tokens
from .subject import attention_to

GRID = "counterpoint.shared_attention.grid"
OWN = "counterpoint.shared_attention.own"  # this call of attention is a picture's look at itself and the others
OVERRIDE = "optimized_attention_override"
LAYERS = ("all", "second half")
FIRST_STEP = ("auto", "subject", "whole picture", "nothing")
POSITIONS = ("auto", "below", "reference", "in place")


@dataclass(frozen=True)
class How:
    """What is shared, and when. `start` and `end` are shares of the sampling, 0..1."""

    start: float = 0.0
    end: float = 1.0
    strength: float = 1.0  # 0 is off; what subjects of others weigh before the softmax
    layers: str = "all"
    first_step: str = "auto"  # auto: the subject where it is known, else the whole picture, as the reference does
    anchors: int = 0  # pictures that all look at; 0 is all at all
    per_set: int = 0  # pictures of one set; 0 is the whole batch
    dropout: float = 0.0  # share of a subject's tokens that is left out, drawn anew at each step
    positions: str = "auto"  # where the subjects of others seem to lie, in models that know positions


def with_shared_attention(model, masks: torch.Tensor | None = None, how: How = How()):
    """A clone of a MODEL whose pictures of one batch see each other's subjects.

    `masks` (1, per set, or per batch, H, W) show the subjects; without, they are read from the words that the prompts name as subject
    while sampling; without these, whole pictures are shared. Raises ValueError for a model that cannot do it.
    """
    network = model.model.diffusion_model
    kind = next((kind for known, kind in KINDS.items() if isinstance(network, known)), None)
    if kind is None or any(isinstance(part, SpatialVideoTransformer) for part in network.modules()):
        raise ValueError(
            f"Shared Attention does not know {type(model.model).__name__} with {type(network).__name__}: use SD 1.5, SD 2, SDXL, SD 3, "
            "FLUX, Qwen-Image, Z-Image, or Pocket."
        )
    if masks is not None and not masks.any():
        raise ValueError(
            "The masks are black, so no picture would see anything of the others: paint the subject white."
        )
    sampling, clone = model.get_model_object("model_sampling"), model.clone()
    sharing = kind(masks, how, sampling.percent_to_sigma(how.start), sampling.percent_to_sigma(how.end))
    sharing.install(clone, network)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, sharing.sample)
    clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, Sampling.told)
    clone.set_attachments(KEY, sharing)
    return clone


def found_masks(model, latents: torch.Tensor) -> torch.Tensor | None:
    """Where the words of the prompt showed the subject when these latents were painted, (N, height, width) at the grid of tokens, 1 where
    it is; None where nothing was read, or the latents are not from this model."""
    sharing = model.get_attachment(KEY)
    return None if sharing is None else sharing.found(latents)


class Sharing:
    """In the place of a model's self-attention. What belongs to one run of a sampler is kept by `Sampling`."""

    def __init__(self, masks: torch.Tensor | None, how: How, most: float, least: float):
        """Acts from noise level `most` down to `least`, which is left out."""
        self.masks, self.how, self.most, self.least = masks, how, most, least
        self._found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def install(self, clone, network) -> None:
        raise NotImplementedError

    def sample(self, executor, noise, *args, **kwargs):
        """Around one whole sampling, which gets a memory of its own."""
        sampling = Sampling(len(noise), noise.shape[-2:])
        options = executor.class_obj.model_options
        options["transformer_options"] = {**options.get("transformer_options", {}), KEY: sampling}
        latents = executor(noise, *args, **kwargs)
        if (masks := sampling.finished()) is not None:
            self._found = [*self._found[-7:], (_some(latents), masks.cpu())]
        return latents

    def found(self, latents: torch.Tensor) -> torch.Tensor | None:
        some = _some(latents)
        for known, masks in reversed(self._found):
            if known.shape == some.shape and (known - some).abs().max() <= 0.02 * known.abs().max():
                return masks
        return None

    def pictures(self, rows: int, options: dict) -> int:
        """Of each prompt in a batch, with and without guidance; each has them all."""
        prompts = len(options["cond_or_uncond"])
        count, odd = divmod(rows, prompts)
        sampling = options.get(KEY)
        if odd or (sampling is not None and sampling.count != count):
            raise ValueError(
                f"Shared Attention got {rows} rows for {prompts} prompts: something cuts the batch into pieces, context windows for "
                "one. Take it out of the graph."
            )
        if count % (self.how.per_set or count):
            raise ValueError(
                f"Shared Attention has sets of {self.how.per_set} pictures, and {count} are painted together: make the batch a "
                "multiple of it, or write 0 for one set of all."
            )
        return count

    def active(self, options: dict) -> bool:
        sigma = float(options["sigmas"][0])
        if self.how.strength == 0 or not self.least < sigma <= self.most:
            return False
        return self.how.first_step != "nothing" or not _first(options, sigma)

    def of_sets(self, attention, q, k, v, options: dict, grid: tuple[int, int], mask=None, **how) -> torch.Tensor:
        """Attention of all rows: for each prompt all its pictures, in sets that each keep to themselves."""
        count = self.pictures(len(q), options)
        size = self.how.per_set or count
        masks = [None] * (len(q) // size) if mask is None else mask.split(size)
        sets = zip(q.split(size), k.split(size), v.split(size), masks, strict=True)
        order, answers = neighbours(size, self.how.anchors), []
        for number, (*each, own) in enumerate(sets):
            chunk, of_chunk = divmod(number, count // size)
            subjects = self.subjects(count, chunk, options, *grid)
            subjects = [tokens.to(q.device) for tokens in subjects[of_chunk * size : (of_chunk + 1) * size]]
            answers.append(shared(attention, *each, subjects, mask=own, seen_by=order, weight=self.how.strength, **how))
        return torch.cat(answers)

    def subjects(self, count: int, chunk: int, options: dict, height: int, width: int) -> list[torch.Tensor]:
        """For each picture of a prompt the tokens of the subject."""
        sampling, sigma = options.get(KEY), float(options["sigmas"][0])
        area = None if sampling is None else sampling.area(options, chunk)
        places = {} if sampling is None else sampling.places
        key = height, width, area
        if key not in places:
            masks = self._shown(sampling, _first(options, sigma))
            size = self.how.per_set or count
            if len(masks) not in (1, size, count):
                raise ValueError(
                    f"Shared Attention has {len(masks)} masks, and {size} pictures are painted together: give it 1 for each, or 1 for "
                    "all."
                )
            rows = subject_tokens(masks if area is None else _cropped(masks, sampling.size, area), height, width)
            places[key] = rows * (count // len(rows))
        return self._dropped(places[key], sigma, height * width)

    def _shown(self, sampling: Sampling | None, first: bool) -> torch.Tensor:
        """What the others see of each picture at this noise level: masks (1, per set, or per batch, H, W)."""
        rule, whole = self.how.first_step, torch.ones(1, 1, 1)
        if first and rule == "whole picture":
            return whole
        if self.masks is not None:
            return self.masks
        if sampling is None or not sampling.names:
            return whole
        if sampling.masks is None:  # nothing is read yet
            return whole if rule == "auto" else torch.zeros(1, 1, 1)
        return sampling.masks

    def _dropped(self, subjects: list[torch.Tensor], sigma: float, tokens: int) -> list[torch.Tensor]:
        """A part of each subject; equal in all layers of one size and for both prompts, another at each step."""
        if not self.how.dropout:
            return subjects
        generator = torch.Generator().manual_seed(round(sigma * 1e6) + tokens)
        kept = [round(len(rows) * (1 - self.how.dropout)) for rows in subjects]
        drawn = [torch.randperm(len(rows), generator=generator) for rows in subjects]
        return [
            rows[order[:n].sort().values.to(rows.device)] for rows, order, n in zip(subjects, drawn, kept, strict=True)
        ]


def _first(options: dict, sigma: float) -> bool:
    """Whether this is the first step, of a sampling that begins in the middle too."""
    schedule = options.get("sample_sigmas")
    return schedule is not None and sigma >= float(schedule[0])


def _some(latents: torch.Tensor) -> torch.Tensor:
    """32 numbers from everywhere, by which latents are known again."""
    flat = latents.detach().flatten()
    return flat[:: max(1, len(flat) // 32)][:32].float().cpu().clone()


def _cropped(masks: torch.Tensor, whole: tuple[int, int], area: tuple[int, int, int, int]) -> torch.Tensor:
    """What of masks (n, H, W) lies in an area (height, width, y, x) of latents of size `whole`."""
    height, width, y, x = area
    fine = torch.nn.functional.adaptive_max_pool2d((masks > 0.5).float()[:, None], tuple(whole))[:, 0]
    return fine[:, y : y + height, x : x + width]


class UNetSharing(Sharing):
    """Its self-attention has image tokens alone, without positions; words are read in its cross-attention."""

    def install(self, clone, network) -> None:
        parts = {"input": network.input_blocks, "middle": [network.middle_block], "output": network.output_blocks}
        names = [n for n in parts if self.how.layers == "all" or n == "output"]
        attends = [
            (name, number)
            for name in names
            for number, block in enumerate(parts[name])
            if any(isinstance(part, BasicTransformerBlock) for part in block.modules())
        ]
        taken = clone.model_options["transformer_options"].get("patches_replace", {}).get("attn1", {})
        self.before = {place: patch for place, patch in taken.items() if place[:2] in attends}
        for place in {*attends, *self.before}:  # a block, or one of its layers
            clone.set_model_attn1_replace(self, *place)
        options = clone.model_options["transformer_options"]  # a compiled model cannot do without what once was there
        options[OVERRIDE] = Reader(options.get(OVERRIDE), self.masks is None)

    @torch.compiler.disable  # core drops every guard on options, so a compiled graph would keep the first step's masks
    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict) -> torch.Tensor:
        layer, told = (*options["block"], options["block_index"]), {**options, OWN: True}
        before = self.before.get(layer) or self.before.get(layer[:2])

        def attention(q, k, v, _=None) -> torch.Tensor:
            if before is not None:
                return before(q, k, v, told)
            precision = options["attn_precision"]
            return optimized_attention(q, k, v, options["n_heads"], attn_precision=precision, transformer_options=told)

        if self.pictures(len(q), options) == 1 or not self.active(options):
            return attention(q, k, v)
        grid = options["activations_shape"][-2:]
        return self.of_sets(attention, q, k, v, options, tuple(grid), heads=options["n_heads"])


class Reader:
    """Reads a UNet's cross-attention on its way; whoever stood in the place of attention before is asked as ever."""

    def __init__(self, before, reads: bool):
        self.before, self.reads = before, reads

    @torch.compiler.disable
    def __call__(self, function, q, k, v, heads, *args, **more) -> torch.Tensor:
        options = more["transformer_options"]
        sampling = options.get(KEY)
        late = options.get("block", ("",))[0] == "output"  # where it is known what will be where: see subject.py
        if self.reads and late and sampling is not None and sampling.names and not options.get(OWN):
            inside = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k)]
            sampling.read(*inside, options, tuple(options["activations_shape"][-2:]), attention_to)
        if self.before is not None:
            return self.before(function, q, k, v, heads, *args, **more)
        return function(q, k, v, heads, *args, **more)


class JointSharing(Sharing):
    """Words and image tokens in one sequence. Where these have rotary positions, the subjects of the others seem to lie below the
    picture, one picture's height for each, as in SynCD; or where the model was taught to look for reference pictures."""

    def install(self, clone, network) -> None:
        positions = getattr(network, "pe_embedder", None) or getattr(network, "rope_embedder", None)
        self.patch, self.multiple = network.patch_size, getattr(network, "pad_tokens_multiple", None) or 1
        self.refines = hasattr(network, "noise_refiner")  # words and picture by themselves, in blocks of no type
        self.widths, self.theta = (list(positions.axes_dim), positions.theta) if positions else ([], 0)
        params = getattr(network, "params", network)
        self.ends = bool(getattr(params, "txt_ids_dims", None))  # FLUX.2 fills its text up at the beginning
        learned = (
            isinstance(network, Flux) and params.default_ref_method == "index"
        )  # FLUX.2, which is at home with references
        self.place = self.how.positions if self.how.positions != "auto" else "reference" if learned else "below"
        self.index = getattr(params, "ref_index_scale", 1.0)
        self.double = len(getattr(network, "double_blocks", getattr(network, "transformer_blocks", ())))
        self.blocks = self.double + len(getattr(network, "single_blocks", getattr(network, "layers", ())))
        options = clone.model_options["transformer_options"]
        self.before, options[OVERRIDE] = options.get(OVERRIDE), self
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self.tell_size)
        if isinstance(network, MMDiT):  # the only one that does not say which block asks
            self.blocks, replaced = len(network.joint_blocks), options.get("patches_replace", {}).get("dit", {})
            for number in range(self.blocks):
                told = Numbered(number, replaced.get(("double_block", number)))
                clone.set_model_patch_replace(told, "dit", "double_block", number)

    def tell_size(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **conds
    ):
        """Attention itself is told how many tokens there are, not how they lie."""
        grid = tuple(-(-side // self.patch) for side in x.shape[-2:])
        return executor(x, t, c_concat, c_crossattn, control, {**(transformer_options or {}), GRID: grid}, **conds)

    @torch.compiler.disable
    def __call__(
        self, function, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask=None, **more
    ) -> torch.Tensor:
        def attention(q, k, v, mask=mask) -> torch.Tensor:
            if self.before is not None:
                return self.before(function, q, k, v, heads, mask=mask, **more)
            return function(q, k, v, heads, mask=mask, **more)

        options = more["transformer_options"]
        if self.refines and not options.get("block_type"):
            return attention(q, k, v)
        grid, axis = options[GRID], 2 if more.get("skip_reshape") else 1
        images = -(grid[0] * grid[1] // -self.multiple) * self.multiple  # they may be filled up
        words = q.shape[axis] - images - sum(options.get("reference_image_num_tokens") or ())
        sampling = options.get(KEY)
        late = self._late(options)
        if late and self.masks is None and sampling is not None and sampling.names:
            inside = [x if axis == 2 else x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k)]
            seen = inside[0].narrow(2, words, grid[0] * grid[1])
            sampling.read(seen, inside[1][:, :, :words], options, grid, attention_to, from_end=self.ends)
        if self.pictures(len(q), options) == 1 or not self.active(options) or not (late or self.how.layers == "all"):
            return attention(q, k, v)
        if options.get("reference_image_num_tokens") or (mask is not None and mask.shape[-2] != 1):
            raise ValueError(
                "Shared Attention cannot be combined with reference pictures or Redux: take one or the other."
            )

        def elsewhere(keys: torch.Tensor, slot: int) -> torch.Tensor:
            axes = {"below": (1, float(slot * grid[0])), "reference": (0, slot * self.index)}.get(self.place)
            if not axes or not self.widths:
                return keys
            by = [axes[1] * (number == axes[0]) for number in range(len(self.widths))]
            return moved(keys, by, self.widths, self.theta)

        inside = {} if axis == 2 else {"heads": heads}
        return self.of_sets(attention, q, k, v, options, grid, mask, text=words, axis=axis, place=elsewhere, **inside)

    def _late(self, options: dict) -> bool:
        before = self.double if options.get("block_type") == "single" else 0
        return before + options["block_index"] >= self.blocks / 2


class Numbered:
    """A block of an MMDiT that says which one it is."""

    def __init__(self, number: int, before):
        self.number, self.before = number, before

    def __call__(self, args: dict, more: dict) -> dict:
        args = {**args, "transformer_options": {**args["transformer_options"], "block_index": self.number}}
        return self.before(args, more) if self.before is not None else more["original_block"](args)


KINDS = {UNetModel: UNetSharing, **dict.fromkeys((MMDiT, Flux, QwenImageTransformer2DModel, NextDiT), JointSharing)}
