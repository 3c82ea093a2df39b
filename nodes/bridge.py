"""ComfyUI's MODEL and CLIP as what trainers see of them."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import comfy.model_management
import comfy.sd1_clip
import comfy.supported_models
import torch

from ..training.embedding import ENCODER, Embedding, by_word, word_name
from ..training.protocols import Conditioning, Vectors
from ..training.saved_tensors import mutation_allowed

TOKEN = "{token}"  # stands for the vectors in captions and templates
TOKENS = re.compile(r"\{token(?::([A-Za-z0-9_-]+))?\}")  # {token:dog} stands for a second word, which starts as "dog"


@contextlib.contextmanager
def training_mode() -> Iterator[None]:
    """Leave the executor's inference mode; make ComfyUI's in-place residuals and rope differentiable.

    For synchronous `execute` only: the flags belong to the thread.
    """
    before = comfy.model_management.in_training
    with torch.inference_mode(False), torch.enable_grad(), mutation_allowed():
        comfy.model_management.in_training = True
        try:
            yield
        finally:  # an interruption is a BaseException
            comfy.model_management.in_training = before


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """An ordinary copy of a tensor that was made under inference mode."""
    return tensor.detach().clone()


def check_trainable(patcher, what: str) -> None:
    """Raises ValueError for a MODEL's or CLIP's patcher that nothing can be trained through."""
    # GGUF's loaders give tensors of their own kind, which hold blocks of packed numbers and say so in `tensor_type`.
    if any(hasattr(p, "tensor_type") for p in patcher.model.parameters()):
        raise ValueError(
            f"This {what} was loaded from a GGUF file, whose packed weights nothing can be trained through: load the same model from a "
            ".safetensors file, in fp8 if memory is short."
        )
    if patcher.injections:  # they sit on the shared layers, and a private copy would be trained without them
        raise ValueError(
            f"This {what} has a LoRA on it that was loaded in bypass mode, which nothing can be trained through: load it with core's "
            "Load LoRA instead."
        )


def private_model(model):
    """A MODEL of our own with ordinary weights, its patches kept, not streamed. Call under `training_mode`."""
    if model.cached_patcher_init is not None:
        return model.clone(disable_dynamic=True, force_deepcopy=True)
    base = model.model  # a loader that left no factory: a new shell around copies of the networks
    shell = copy.copy(base)
    shell._parameters, shell._buffers = dict(base._parameters), dict(base._buffers)
    shell._modules = {name: copy.deepcopy(child) for name, child in base._modules.items()}
    shell.current_patcher = None
    for name in ("dynamic_vbars", "dynamic_pins", "dynamic_patchers"):
        shell.__dict__.pop(name, None)
    shell.model_loaded_weight_memory, shell.current_weight_patches_uuid = 0, None
    return model.clone(model_override=(shell, ({}, {}, {}, set())))


def private_clip(clip):
    """A CLIP of our own with ordinary weights, its patches kept. Call under `training_mode`."""
    module = copy.deepcopy(clip.cond_stage_model)
    own = clip.clone()
    own.patcher = clip.patcher.clone(model_override=(module, ({}, {}, {}, set())))
    own.cond_stage_model = module
    return own


class ComfyDenoiser:
    """Any ComfyUI MODEL as a Denoiser: pooled vectors, sizes and guidance come from core's own `extra_conds`."""

    def __init__(self, model):
        """`model` is a private copy, already loaded."""
        self.base, self.device = model.model, model.load_device
        self.base.requires_grad_(False)
        self.sampling = self.base.model_sampling

    def sigmas(self, n: int, generator: torch.Generator) -> torch.Tensor:
        time = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
        return torch.tensor([float(self.sampling.percent_to_sigma(t)) for t in time.clamp(1e-6, 1 - 1e-6).tolist()])

    def snr(self, sigma: torch.Tensor) -> torch.Tensor:
        one, zero = torch.ones_like(sigma), torch.zeros_like(sigma)
        signal = self.sampling.noise_scaling(sigma, zero.clone(), one.clone())
        return (signal / self.sampling.noise_scaling(sigma, one.clone(), zero.clone())) ** 2

    def error(
        self, latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, cond: Conditioning
    ) -> torch.Tensor:
        return cond.by_length(lambda rows: self._error(latents[rows], noise[rows], sigma[rows], cond.expand(rows)))

    def _error(self, latents, noise, sigma, cond: Conditioning) -> torch.Tensor:
        each = (-1, *[1] * (latents.ndim - 1))
        noisy = self.sampling.noise_scaling(sigma.view(each), noise, latents)
        denoised = self.base.apply_model(noisy, sigma, transformer_options={}, **self._conditions(noisy, cond))
        # Every parameterisation is linear in what the network says; its slope turns an error of x0 into one of its own.
        unit = torch.ones_like(sigma)
        slope = self.sampling.calculate_denoised(sigma, unit, torch.zeros_like(unit))
        return ((denoised - latents) / slope.view(each)).flatten(1, -3)

    def _conditions(self, noisy: torch.Tensor, cond: Conditioning) -> dict:
        scale = self.base.latent_format.spacial_downscale_ratio
        facts = {"width": noisy.shape[-1] * scale, "height": noisy.shape[-2] * scale, "prompt_type": "positive"}
        if cond.pooled is not None:
            facts["pooled_output"] = cond.pooled
        made = self.base.extra_conds(cross_attn=cond.states, noise=noisy, device=self.device, **facts)
        return {k: v.process_cond(batch_size=len(noisy), area=None, device=self.device).cond for k, v in made.items()}


class ComfyTextEncoder:
    """Any ComfyUI CLIP as a TextEncoder. Equal captions with the same vectors are encoded once."""

    def __init__(self, clip, name: str = "the-word-being-learned"):
        """`clip` is a private copy."""
        self.clip, self.name = clip, name
        clip.cond_stage_model.requires_grad_(False)

    def encode(self, captions: list[str], vectors: list[Vectors]) -> Conditioning:
        distinct, rows = {}, []
        for caption, leaves in zip(captions, vectors, strict=True):
            rows.append(distinct.setdefault((caption, id(leaves)), (len(distinct), caption, leaves))[0])
        prompts = [self._tokens(caption, leaves) for _, caption, leaves in distinct.values()]
        with encoded_together(self.clip, prompts):
            made = [Conditioning(*self.clip.encode_from_tokens(tokens, return_pooled=True)) for tokens in prompts]
        return Conditioning.stacked(made).expand(rows)

    def _tokens(self, caption: str, leaves: Vectors) -> dict[str, list]:
        clip = with_embeddings(self.clip, {word_name(self.name, o): v for o, v in by_word(leaves).items()})
        return clip.tokenize(spell(caption, self.name))


@contextlib.contextmanager
def encoded_together(clip, prompts: list[dict[str, list]]) -> Iterator[None]:
    """While it lasts, the encoders of a private CLIP answer for these prompts from one pass for each length of text; core asks them
    for one prompt at a time."""
    module, answering = clip.cond_stage_model, []
    for key in prompts[0]:  # "l", "g", "t5xxl"
        names = (f"clip_{key}", key, getattr(module, "clip", ""))
        encoder = next((getattr(module, name) for name in names if hasattr(module, name)), None)
        if isinstance(encoder, comfy.sd1_clip.SDClipModel):
            encoder.encode = _Together(encoder.encode, [section for prompt in prompts for section in prompt[key]])
            answering.append(encoder)
    try:
        yield
    finally:
        for encoder in answering:
            del encoder.encode


class _Together:
    """Answers as core's `SDClipModel.encode` does: (states, pooled or None) of sections, and a dict of more where there is more."""

    def __init__(self, encode, sections: list[list[tuple]]):
        self.encode, self.said = encode, {}
        tokens = [[token for token, *_ in section] for section in sections]
        self.waiting = {self._name(section): section for section in tokens}

    def __call__(self, sections: list[list]) -> tuple:
        self.waiting |= {self._name(s): s for s in sections if self._name(s) not in self.said}
        for length in {len(s) for s in self.waiting.values()}:
            same = {name: s for name, s in self.waiting.items() if len(s) == length}
            answer = self.encode(list(same.values()))
            self.said |= {name: (answer, slice(i, i + 1)) for i, name in enumerate(same)}
        self.waiting = {}
        rows = [self.said[self._name(s)] for s in sections]
        _, pooled, *more = rows[0][0]
        return (
            torch.cat([answer[0][row] for answer, row in rows]),
            None if pooled is None else torch.cat([answer[1][row] for answer, row in rows]),
            *({k: torch.cat([answer[2][k][row] for answer, row in rows]) for k in each} for each in more),
        )

    @staticmethod
    def _name(section: list) -> tuple:
        return tuple(token if isinstance(token, int) else id(token) for token in section)


def spell(caption: str, name: str) -> str:
    """`{token}` as ComfyUI's own `embedding:name`, which must stand after a blank and end at one; `{token:dog}` is `name-dog`."""

    def word(found: re.Match) -> str:
        before, after = caption[: found.start()], caption[found.end() :]
        gap = " " if before and not before[-1].isspace() else ""
        stop = " " if after and not after[0].isspace() and after[0] != ")" else ""
        return f"{gap}embedding:{word_name(name, found[1])}{stop}"

    return TOKENS.sub(word, caption)


def encoder_tokenizers(clip) -> dict[str, object]:
    """ComfyUI's tokenizers of a CLIP by the embedding key of their encoder ("clip_l", "clip_g", "t5xxl"...).

    SD3's tokenizer splits words for three encoders even where only two were loaded; the third is left out.
    """
    parts = [
        t for t in vars(clip.tokenizer).values() if hasattr(t, "embedding_key") and hasattr(t, "_try_get_embedding")
    ]
    if not parts or not _takes_words(clip, parts):
        raise ValueError(
            f"This CLIP ({type(clip.tokenizer).__name__}) has no encoder that takes learned words: use Train Style LoRA for such a model."
        )
    return {t.embedding_key: t for t in parts if encoder_module(clip, t.embedding_key) is not None}


def _takes_words(clip, tokenizers: list) -> bool:
    """Whether core's tokenizer of whole prompts bears vectors among its numbers. Qwen-Image's does not."""
    word = {t.embedding_key: torch.zeros(1, t.embedding_size) for t in tokenizers}
    try:
        with_embeddings(clip, {"word": word}).tokenize("a embedding:word")
    except RuntimeError:  # it compares them with the number of a picture
        return False
    return True


def with_embeddings(clip, table: dict[str, Vectors]):
    """A clone of a CLIP whose prompts find `embedding:NAME` in `table` first and on disk otherwise."""
    return _with_lookups(clip, lambda otherwise, key: WordLookup(otherwise, key, table))


def unknown_words(clip, prompts: Iterable[str]) -> list[str]:
    """Names after `embedding:` that no encoder of the CLIP finds, in memory or on disk. Core leaves them out and goes on."""
    found: dict[str, bool] = {}

    def listening(otherwise, _):
        def look(text: str):
            vectors, name, rest = otherwise(text)
            found[name] = found.get(name, False) or vectors is not None
            return vectors, name, rest

        return look

    clone = _with_lookups(clip, listening)
    for prompt in prompts:
        clone.tokenize(prompt)
    return [name.strip(",") for name, known in found.items() if not known]


def _with_lookups(clip, make):
    """A clone of a CLIP whose tokenizers ask `make(what they asked, their embedding key)` for words."""
    clone = clip.clone()
    clone.tokenizer = copy.copy(clip.tokenizer)
    for attribute, part in list(vars(clone.tokenizer).items()):
        if hasattr(part, "embedding_key") and hasattr(part, "_try_get_embedding"):
            own = copy.copy(part)
            own.embedding_directory = part.embedding_directory or []
            own._try_get_embedding = make(own._try_get_embedding, part.embedding_key)
            setattr(clone.tokenizer, attribute, own)
    return clone


class WordLookup:
    """Answers as core's `_try_get_embedding` does: (vectors or None, name, what is left of the text)."""

    def __init__(self, otherwise, key: str, table: dict[str, Vectors]):
        self.otherwise, self.key, self.table = otherwise, key, table

    def __call__(self, text: str):
        word = re.match(r"[^\s<\[]*", text.lstrip()).group()
        rest = " ".join(text.lstrip()[len(word) :].split())
        bare = word.rstrip(",")
        name = bare.removesuffix(".safetensors")
        if name not in self.table:
            return self.otherwise(text)
        return self.table[name].get(self.key), name, f"{word[len(bare) :]} {rest}".strip()


def starting_vectors(clip, phrase: str, count: int) -> Vectors:
    """`count` vectors per encoder from the words of a phrase, repeated when it is shorter, cut when it is longer.

    The phrase is read as core reads a prompt, so `embedding:NAME` stands for the vectors of a word that was learned before.
    Raises ValueError for words and embeddings that an encoder does not know.
    """
    vectors = {}
    for key, tokenizer in encoder_tokenizers(clip).items():
        table = encoder_module(clip, key).transformer.get_input_embeddings().weight
        batches = tokenizer.tokenize_with_weights(phrase, return_word_ids=True)
        pieces = [piece for batch in batches for piece, _, word in batch if word]  # 0 is what core puts around words
        known = getattr(tokenizer, "known_ids", None)  # Pocket's; others know every piece of a word
        strange = known and not {p for p in pieces if isinstance(p, int)} <= known
        if not pieces or strange:
            lost = "has no vectors for" if "embedding:" in phrase else "does not know"
            raise ValueError(
                f"This CLIP's {key} {lost} the start {phrase!r}: use a plain word such as 'picture', or a word learned on such a model."
            )
        rows = [plain(table[p] if isinstance(p, int) else p).float().to(table.device) for p in pieces]
        if wrong := {len(r) for r in rows} - {table.shape[1]}:
            raise ValueError(
                f"The start {phrase!r} has {wrong.pop()} numbers per vector, and this CLIP's {key} takes {table.shape[1]}: it was learned on "
                "another kind of model."
            )
        vectors[key] = torch.stack([rows[i % len(rows)] for i in range(count)])
    return vectors


def encoder_module(clip, key: str):
    """The encoder of a CLIP that belongs to an embedding key; None where it was not loaded."""
    for name in (key, key.removeprefix("clip_"), getattr(clip.cond_stage_model, "clip", "")):
        if hasattr(clip.cond_stage_model, name):
            return getattr(clip.cond_stage_model, name)
    raise ValueError(f"This CLIP ({type(clip.cond_stage_model).__name__}) has no encoder named {key!r}.")


class Family(NamedTuple):
    """What is usual for a kind of model. Only Pocket's figures were measured here; the others are those people work with."""

    name: str
    size: int  # pixels of the square that it was trained on
    steps: int  # of training a word
    vectors: int  # of a word
    cfg: float
    warning: str = ""


FAMILIES = {  # the first class that fits
    comfy.supported_models.SD15: Family("SD 1.5", 512, 1000, 4, 7.0),
    comfy.supported_models.SD20: Family("SD 2", 768, 1000, 4, 7.0),
    comfy.supported_models.SDXL: Family("SDXL", 1024, 1000, 4, 7.0),
    comfy.supported_models.SD3: Family("SD 3", 1024, 1500, 4, 4.5),
    comfy.supported_models.Flux2: Family("FLUX.2", 1024, 1500, 4, 1.0),
    comfy.supported_models.QwenImage: Family("Qwen-Image", 1024, 1500, 4, 4.0),
    comfy.supported_models.ZImage: Family("Z-Image", 1024, 1500, 4, 1.0),
    comfy.supported_models.Flux: Family(
        "FLUX.1", 1024, 1500, 4, 1.0, "Words for FLUX.1 are experimental: people report that they do little."
    ),
}


def family(model) -> Family:
    """The family of a MODEL; of one that is not listed, SDXL's figures under its own name."""
    config = model.model.model_config
    if hasattr(type(config), "family"):
        return type(config).family
    found = next((f for kind, f in FAMILIES.items() if isinstance(config, kind)), None)
    unknown = f"{type(config).__name__} was never tried with Counterpoint."
    return found or FAMILIES[comfy.supported_models.SDXL]._replace(name=type(config).__name__, warning=unknown)


def native_size(model) -> int:
    """Pixels of the square that a model was trained on."""
    return family(model).size


RATE = (
    1 / 15
)  # learning rate over the root mean square of an encoder's vocabulary; 0.02 for Pocket, where it was measured


def own_learning_rates(clip) -> dict[str, float]:
    """By encoder: Adam moves every number by about its rate, so the rate goes with the numbers of the encoder's words."""
    return {key: float(f"{RATE * vocabulary_scale(clip, key):.3g}") for key in encoder_tokenizers(clip)}


def vocabulary_scale(clip, key: str) -> float:
    """Root mean square of the numbers in the vectors of an encoder's words."""
    return _vocabulary(clip, key).square().mean().sqrt().item()


def usual_lengths(clip) -> dict[str, float]:
    """Median length of the vectors of an encoder's words, by encoder."""
    return {key: _vocabulary(clip, key).norm(dim=1).median().item() for key in encoder_tokenizers(clip)}


def _vocabulary(clip, key: str) -> torch.Tensor:
    """(n, width) vectors of words, at most about 8000 from everywhere in a large table."""
    table = encoder_module(clip, key).transformer.get_input_embeddings().weight
    known = getattr(encoder_tokenizers(clip)[key], "known_ids", None)  # Pocket's; others know every word
    return plain(table[sorted(known)] if known else table[:: max(1, len(table) // 4096)]).float()


def for_encoders(clip, vectors: Vectors) -> Vectors:
    """A1111's and diffusers' files name no encoder; the only one is meant, or the only one of that width."""
    (key, only), *more = vectors.items()
    if more or ENCODER.fullmatch(key):
        return vectors
    widths = {k: t.embedding_size for k, t in encoder_tokenizers(clip).items()}
    meant = [k for k, width in widths.items() if len(widths) == 1 or width == only.shape[-1]]
    return {meant[0]: only} if len(meant) == 1 else vectors


def check_embedding_fits(clip, embedding: Embedding) -> None:
    """ComfyUI drops vectors of another width with a warning in the log; this says it where it is seen."""
    embedding.vectors = for_encoders(clip, embedding.vectors)
    for key, tokenizer in encoder_tokenizers(clip).items():
        for vectors in embedding.words(embedding.name).values():
            if key in vectors and vectors[key].shape[-1] != tokenizer.embedding_size:
                raise ValueError(
                    f"The embedding {embedding.name!r} has {vectors[key].shape[-1]} numbers per vector for {key}, and this CLIP "
                    f"takes {tokenizer.embedding_size}: it was learned on another kind of model."
                )
    if not encoder_tokenizers(clip).keys() & embedding.vectors.keys():
        raise ValueError(
            f"The embedding {embedding.name!r} is for {', '.join(embedding.vectors)}, and this CLIP has {', '.join(encoder_tokenizers(clip))}."
        )


def what_does_not_meet(clip, embedding: Embedding) -> str:
    """One sentence if some encoders of a CLIP have no part in a word, or some parts no encoder; it works, but not as it was trained."""
    has, takes = list(embedding.vectors), list(encoder_tokenizers(clip))
    unknown, unused = [k for k in takes if k not in has], [k for k in has if k not in takes]
    if not unknown and not unused:
        return ""
    result = f"{', '.join(unknown)} will not know it" if unknown else f"its part for {', '.join(unused)} is not used"
    return (
        f"The embedding {embedding.name!r} is for {', '.join(has)} and this CLIP has {', '.join(takes)}, so {result}: expect less of it "
        "than on the kind of model it was trained on."
    )


def check_belong_together(model, cond: Conditioning) -> None:
    """MODEL and CLIP from different checkpoints: say so before the matrix product does."""
    config = model.model.model_config.unet_config
    expected = config.get("context_dim") or config.get("context_in_dim")
    expected = expected or (config.get("context_embedder_config") or {}).get("params", {}).get("in_features")
    expected = expected or config.get("cap_feat_dim")  # Z-Image
    if not expected:  # Qwen-Image
        expected = getattr(getattr(model.model.diffusion_model, "txt_in", None), "in_features", None)
    if expected and cond.states.shape[-1] != expected:
        raise ValueError(
            f"MODEL and CLIP do not belong together: the model expects {expected} numbers per token and this CLIP gives "
            f"{cond.states.shape[-1]}. Take both from the same checkpoint."
        )
