"""A prior: from a text to the image embedding of a picture that it may describe. PRIOR on the canvas, and a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError

from .. import artefact
from .network import PriorNetwork, Shape, empty
from .pairs import Texts
from .process import LEVELS, SCHEDULES, Start, levels, noised, schedule
from .samplers import guided, sample
from .starts import StartDistribution

FORMAT = "clip_prior"
NETWORK = "net."
APART = 1_000_003  # seeds from one text to the next
AT_ONCE = 64  # embeddings of each text in one call of the network; their row of attention grows with the square


@dataclass
class Prior:
    """What public priors call clip_mean and clip_std is `start.norm`: what the network meets and says is in its units."""

    network: PriorNetwork
    start: StartDistribution
    schedule: str = "cosine"
    clamp: float = 0.0  # what the network says is kept within so many standard deviations; 0 is free
    one_shot: bool = False  # it answers in one evaluation, with the mean of the embeddings that a text may have
    text: str = ""  # identity of the text encoder it was trained with, "" where only its width is known
    image: str = ""  # the same of the image encoder
    space: str = ""  # name of the CLIP, for people
    facts: dict[str, object] = field(default_factory=dict)

    @property
    def dim(self) -> int:
        """Numbers of an embedding."""
        return self.network.shape.dim


@dataclass(frozen=True)
class Sampling:
    """How embeddings are drawn."""

    steps: int = 8
    sampler: str = "dpm++ 2m"
    guidance: float = 1.5  # 1 is none, and half the work
    guide_from: float = 0.0  # share of the steps before which there is none, 0..1
    guide_to: float = 1.0  # and after which there is none
    variation: float = 1.0  # of an image embedding: how far up its noise goes, 0..1


def sampled(prior: Prior, texts: Texts, negative: Texts | None, seeds: list[int], how: Sampling = Sampling(),
            image: torch.Tensor | None = None, tell: Callable[[int], None] = lambda step: None) -> torch.Tensor:  # fmt: skip
    """(n, len(seeds), d) on the CPU: for each of n texts an embedding for each seed; the noise of text i is that of seed + i * APART, the
    same whatever else is drawn.

    `negative` is one text, the empty one as a rule; it is asked for where there is guidance. Texts are read once for 64 seeds, and a
    step of those is one call of the network. `image` (1, d) is what is varied, where there is one. `tell(step)` after each of
    `steps_of(prior, how, len(seeds))` steps. Raises ValueError for what does not fit.
    """
    if prior.one_shot and image is not None:
        raise ValueError(
            "A one-shot prior answers from the text alone and cannot vary a picture: disconnect the picture, or use another prior."
        )
    made, before = [], 0
    for at in range(0, len(seeds), AT_ONCE):
        some = seeds[at : at + AT_ONCE]
        made.append(_sampled(prior, texts, negative, some, how, image, lambda step, before=before: tell(before + step)))
        before += steps_of(prior, how, len(some))
    return torch.cat(made, 1)


def steps_of(prior: Prior, how: Sampling, seeds: int) -> int:
    """How often `sampled` tells."""
    return -(-seeds // AT_ONCE) * (1 if prior.one_shot else how.steps)


def _sampled(prior, texts, negative, seeds, how, image, tell) -> torch.Tensor:
    count, each, device = len(texts.pooled), len(seeds), next(prior.network.parameters()).device
    noise = (x.to(device) for x in _noises(seeds, count, prior.dim))
    if prior.one_shot:
        said = prior.network(next(noise), None, _read(prior, texts, device))
        tell(1)
        return prior.start.norm.to(device).x0(said).view(count, each, -1).cpu()
    if how.guidance != 1 and negative is None:
        raise ValueError("Guidance compares with an empty text, and there is none: give it, or set guidance to 1.")
    begin, table = prior.start.start(texts.pooled).repeated(each).to(device), schedule(prior.schedule)
    places = levels(how.steps, max(how.steps, round((LEVELS - 1) * how.variation)))
    predict = _predicted(prior, texts, negative, how, places, begin, device)
    varied = None if image is None else noised(image.to(device), next(noise), table.level(places[0]), begin)
    steps = sample(predict, begin, table, places, noise, how.sampler, varied)
    for step in range(1, len(places) + 1):
        made = next(steps)
        tell(step)
    return made.view(count, each, -1).cpu()


def _predicted(prior, texts, negative, how: Sampling, places: list[int], begin: Start, device):
    """What the samplers ask: x0 (n, d) of z at a level, guided where it is to be."""
    table, units = schedule(prior.schedule), prior.start.norm.to(device)
    alone = both = _read(prior, texts, device)
    if how.guidance != 1:
        count = len(texts.pooled)
        both = _read(prior, Texts(*(torch.cat(pair) for pair in zip(texts, negative, strict=True))), device)
        alone, both = both.rows(slice(count)), both.rows([*range(count), *[count] * count])
    first, last = how.guide_from * len(places), how.guide_to * len(places)
    guides = {t for step, t in enumerate(places) if how.guidance != 1 and first <= step < last}

    def predict(z: torch.Tensor, t: int) -> torch.Tensor:
        shown = units.shown(z, table.level(t), begin)
        if t in guides:
            said = guided(*prior.network(torch.cat([shown, shown]), t, both).chunk(2), how.guidance)
        else:
            said = prior.network(shown, t, alone)
        return units.x0(said.clamp(-prior.clamp, prior.clamp) if prior.clamp else said)

    return predict


def _read(prior: Prior, texts: Texts, device):
    states = texts.states.to(device) if prior.network.shape.text_length else None
    return prior.network.read(states, texts.pooled.to(device), texts.mask.to(device))


def _noises(seeds: list[int], count: int, dim: int) -> Iterator[torch.Tensor]:
    """(count * len(seeds), dim) of N(0, I), without end. Each text has its own: with one noise for all, what many texts make together
    would have the spread of their means and of that noise alone."""
    generators = [torch.Generator().manual_seed(seed + i * APART) for i in range(count) for seed in seeds]
    while True:
        yield torch.stack([torch.randn(dim, generator=g) for g in generators])


def to_bytes(prior: Prior) -> bytes:
    """A whole prior as .safetensors: tensors net.*, start.*, norm.*; everything else in its metadata."""
    tensors = {NETWORK + k: v for k, v in prior.network.state_dict().items()} | dict(prior.start.tensors)
    plain = {k: getattr(prior, k) for k in ("schedule", "clamp", "one_shot", "text", "image", "space", "facts")}
    said = {"format": FORMAT, "version": 1, "arch": asdict(prior.network.shape), **plain, **prior.start.metadata()}
    return artefact.encode(tensors, said)


def is_ours(path: Path) -> bool:
    """Whether a file says that Save Prior wrote it."""
    if path.suffix != artefact.SUFFIX or not path.is_file():
        return False
    try:
        return artefact.facts(path).get("format") == FORMAT
    except SafetensorError:
        return False


def load(path: Path) -> Prior:
    """A prior that was saved here. Raises ValueError for a part of one."""
    return of_file(path.name, *artefact.read(path))


def of_file(name: str, tensors: Mapping[str, torch.Tensor], said: Mapping[str, str]) -> Prior:
    lacking = [k for k in ("arch", "schedule", "clamp", "one_shot", "text", "image", "space", "facts") if k not in said]
    if lacking:
        raise ValueError(f"{name} is not whole: its header lacks {', '.join(lacking)}. Save it again.")
    network = empty(Shape(**json.loads(said["arch"])))
    own = {k.removeprefix(NETWORK): v for k, v in tensors.items() if k.startswith(NETWORK)}
    try:
        network.load_state_dict(own, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"{name} is not whole: {len(own)} of the network's {len(network.state_dict())} tensors fit. Save it again."
        ) from error
    kept = {k: json.loads(said[k]) for k in ("clamp", "one_shot", "facts")}
    names = {k: said[k] for k in ("schedule", "text", "image", "space")}
    if names["schedule"] not in SCHEDULES:
        raise ValueError(f"{name} was made with the schedule {names['schedule']!r}, which is not known here.")
    try:
        start = StartDistribution.of_file(tensors, said)
    except ValueError as error:
        raise ValueError(f"{name} cannot be used. {error}") from error
    return Prior(network.requires_grad_(False).eval(), start, **kept, **names)
