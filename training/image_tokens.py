"""Image tokens: the embedding of a picture as k words of its own, learned from pictures alone.

A linear layer and a LayerNorm make them (as in IP-Adapter, Ye et al. 2023), and they stand behind the text encoder's words. As in the
language-free tuning of Shifted Diffusion (Zhou et al. 2023), no caption is read: a model that is told the empty prompt and the tokens of
a picture has to paint that picture. Some pictures are left out; the tokens for nothing are learned with them, and stay in the file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn

from . import artefact
from .contrast import Contrast, Settings, Tensors
from .lora import UP, applied
from .protocols import Conditioning, Denoiser

FORMAT = "image_tokens"
WEIGHT, BIAS, GAIN, SHIFT, NULL = PROJECTION = ("proj.weight", "proj.bias", "norm.weight", "norm.bias", "null")
MEAN, STD, EMPTY, POOLED = "embedding.mean", "embedding.std", "empty.states", "empty.pooled"
LEAST_STD = 0.01  # of the typical one: a number that hardly varies over the pictures would be divided by nearly 0
CROSS_ATTENTION = ".attn2."  # in the names of ComfyUI's UNets
LORA_SHARE = 0.3  # of the projection's learning rate: at more, on Pocket, the projection learned less; at .1 as much
WATCHED = 8  # pictures whose tokens are measured after each step


def moments(embeddings: torch.Tensor) -> Tensors:
    """Mean and standard deviation (d) of each number of embeddings (n, d); 1 where they are all the same."""
    std = embeddings.std(0, correction=0)
    typical = std.square().mean().sqrt()
    return {
        MEAN: embeddings.mean(0),
        STD: std.clamp_min(LEAST_STD * typical) if typical > 0 else torch.ones_like(std),
    }


def usual_sizes(states: torch.Tensor) -> torch.Tensor:
    """(width) root mean square of each number of a text encoder's states (1, tokens, width): as large the tokens begin."""
    return states[0].float().square().mean(0).sqrt()


def starting_projection(dim: int, count: int, width: int, seed: int) -> Tensors:
    """From embeddings of `dim` numbers to `count` tokens; those for nothing begin as zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight, bias = ((torch.rand(count * width, n, generator=generator) * 2 - 1) / dim**0.5 for n in (dim, 1))
    return {
        WEIGHT: weight,
        BIAS: bias[:, 0],
        GAIN: torch.ones(width),
        SHIFT: torch.zeros(width),
        NULL: torch.zeros(count, width),
    }


def projected(tensors: Tensors, whitened: torch.Tensor) -> torch.Tensor:
    """(B, d) -> (B, k, width)."""
    width = len(tensors[GAIN])
    tokens = F.linear(whitened, tensors[WEIGHT], tensors[BIAS]).unflatten(1, (-1, width))
    return F.layer_norm(tokens, (width,), tensors[GAIN], tensors[SHIFT])


def cross_attention(network: nn.Module) -> list[str]:
    """Names of the linear layers with which pictures look at words."""
    return [n for n, m in network.named_modules() if CROSS_ATTENTION in n and hasattr(m, "in_features")]


class ImageTokens(Contrast):
    """Learns the projection, in units of the usual sizes, and the matrices of a LoRA where `start` has some. In the place of a caption
    each picture has its whitened embedding."""

    def __init__(self, denoiser: Denoiser, network: nn.Module, empty: Conditioning, latents: torch.Tensor, whitened: torch.Tensor,
                 start: Tensors, settings: Settings, noise: float = 0.0):  # fmt: skip
        """`empty` is what the text encoder says of no text, one row; `whitened` (n, d) the pictures' embeddings, to which noise of a
        level between 0 and `noise` is added at each step: what a prior makes is not exact either."""
        super().__init__(denoiser, latents, [[each] for each in whitened], start, settings)
        self.network, self.empty, self.noise = network, empty, noise
        self.sizes = usual_sizes(empty.states)
        self.watched = whitened[:WATCHED]
        self.learned_inside = any(name.endswith(UP) for name in start)
        for group, name in zip(self.optimiser.param_groups, self.learned, strict=True):
            group["most"] *= 1 if name in PROJECTION else LORA_SHARE

    def _pick_captions(self, rows: list[int], generator: torch.Generator) -> list[torch.Tensor | str]:
        """ "" for a picture that is left out."""
        picked = super()._pick_captions(rows, generator)
        level = torch.rand(len(rows), 1, generator=generator) * self.noise
        noise = (level * torch.randn(len(rows), self.watched.shape[1], generator=generator)).to(self.watched)
        return [c if isinstance(c, str) else c + n for c, n in zip(picked, noise, strict=True)]

    def conditions(self, captions: list[torch.Tensor | str], groups: list[Tensors]) -> Conditioning:
        share = len(captions) // len(groups)
        parts = [self._tokens(captions[i * share : (i + 1) * share], leaves) for i, leaves in enumerate(groups)]
        told = self.empty.expand([0] * len(captions))
        return Conditioning(torch.cat([told.states, torch.cat(parts).to(told.states)], 1), told.pooled)

    def _tokens(self, captions: list[torch.Tensor | str], leaves: Tensors) -> torch.Tensor:
        nothing = torch.tensor([isinstance(c, str) for c in captions], device=self.watched.device)
        whitened = torch.stack([torch.zeros_like(self.watched[0]) if isinstance(c, str) else c for c in captions])
        return torch.where(nothing[:, None, None], leaves[NULL], projected(leaves, whitened)) * self.sizes

    def error(self, latents, noise, sigma, captions, groups: list[Tensors]) -> torch.Tensor:
        with applied(self.network, groups):
            return super().error(latents, noise, sigma, captions, groups)

    def idle(self) -> list[str]:
        return [name for name in super().idle() if name in PROJECTION]

    def size(self) -> dict[str, float]:
        """`norm`: mean length of the tokens of some pictures, relative to the text encoder's own states."""
        with torch.no_grad():
            tokens = projected(self.learned, self.watched) * self.sizes
        return {"norm": (tokens.norm(dim=-1).mean() / self.sizes.norm()).item()}


@dataclass
class Projector:
    """The type IMAGE_TOKENS. `tensors` are the projection, now in the text encoder's own units, the moments of the embeddings it was
    taught on, and what the text encoder says of the empty prompt."""

    tensors: Tensors
    name: str
    lora: Tensors = field(default_factory=dict)  # by core's names
    facts: dict = field(default_factory=dict)  # what it was taught on, steps, seed...: goes into the file's header

    @staticmethod
    def of(learned: Tensors, moments: Tensors, empty: Conditioning, name: str, lora: Tensors, facts: dict) -> Projector:
        """From what a training learns."""
        sizes, own = usual_sizes(empty.states).cpu(), {k: learned[k].float() for k in PROJECTION}
        own |= {k: own[k] * sizes for k in (GAIN, SHIFT, NULL)}
        pooled = {} if empty.pooled is None else {POOLED: empty.pooled[0].float().cpu()}
        tensors = {**own, **moments, EMPTY: empty.states[0].float().cpu(), **pooled}
        return Projector(tensors, name, lora, facts)

    @property
    def dim(self) -> int:
        """Numbers of an embedding."""
        return self.tensors[WEIGHT].shape[1]

    @property
    def width(self) -> int:
        """Numbers of a token."""
        return len(self.tensors[GAIN])

    @property
    def count(self) -> int:
        """Tokens of a picture."""
        return len(self.tensors[NULL])

    def tokens(self, embeddings: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
        """(n, d) -> (n, k, width), as they come from the image encoder. Strength 0 gives the tokens for nothing, more than 1 goes
        beyond those of the picture."""
        whitened = (embeddings.float().cpu() - self.tensors[MEAN]) / self.tensors[STD]
        return torch.lerp(self.tensors[NULL], projected(self.tensors, whitened), strength)

    def nothing(self) -> torch.Tensor:
        """(1, k, width) the tokens for no picture, to guide away from."""
        return self.tensors[NULL][None]

    def weighted(self, states: torch.Tensor, weight: float, behind: int = 0) -> torch.Tensor:
        """States (n, tokens, width) of texts turned down towards the empty prompt, section by section; 1 leaves them, 0 is the empty
        prompt, as it was in training. The last `behind` are not text, nor is what does not fill a section; they stay."""
        check_width(self.width, states)
        empty = self.tensors[EMPTY].to(states)
        sections = (states.shape[1] - behind) // len(empty)
        text, rest = states[:, : sections * len(empty)], states[:, sections * len(empty) :]
        return torch.cat([torch.lerp(empty.repeat(sections, 1), text, weight), rest], 1)


def check_width(width: int, states: torch.Tensor) -> None:
    """Raises ValueError for states of a text encoder of another width."""
    if states.shape[2] != width:
        raise ValueError(
            f"These image tokens have {width} numbers each and the conditioning has {states.shape[2]}: they were trained on another kind of "
            "model. Paint with that one, or train tokens for this one."
        )


def appended(states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """States (m, tokens, width) of texts with tokens (n, k, width) behind them. Row by row where there are as many; one text goes with
    every picture, one picture with every text. Raises ValueError for other numbers of rows and for another width."""
    check_width(tokens.shape[2], states)
    texts, pictures = len(states), len(tokens)
    if texts != pictures and 1 not in (texts, pictures):
        raise ValueError(
            f"There are {pictures} image embeddings for {texts} prompts: give 1 embedding, or 1 prompt, or as many of one as of the other."
        )
    rows = max(texts, pictures)
    return torch.cat([states.expand(rows, -1, -1), tokens.to(states).expand(rows, -1, -1)], 1)


def to_bytes(projector: Projector) -> bytes:
    """Flat tensors; the LoRA's by core's names, so that core's loader takes the same file."""
    facts = {"format": FORMAT, "modelspec.title": projector.name, **projector.facts}
    return artefact.encode({**projector.tensors, **projector.lora}, facts)


def load(path: Path) -> Projector:
    """Raises ValueError for a file that is broken, holds something else, or whose parts do not fit together."""
    try:
        tensors, said = artefact.read(path)
    except SafetensorError as error:
        raise ValueError(f"{path.name} cannot be read: it is broken. Copy or save it again.") from error
    own = {k: tensors.pop(k).float() for k in (*PROJECTION, MEAN, STD, EMPTY, POOLED) if k in tensors}
    if said.get("format") != FORMAT or misfit(own):
        raise ValueError(f"{path.name} holds no image tokens{misfit(own)}: choose a file that Save Image Tokens wrote.")
    facts = {k: _plain(v) for k, v in said.items() if k != "format" and not k.startswith("modelspec.")}
    return Projector(own, path.stem, tensors, facts)


def misfit(tensors: Tensors) -> str:
    """What is wrong with the tensors of a file, in brackets; nothing where they fit together."""
    if absent := [k for k in (*PROJECTION, MEAN, STD, EMPTY) if k not in tensors]:
        return f" ({absent[0]} is missing)"
    count, text, dim, width = (len(tensors[k]) for k in (NULL, EMPTY, MEAN, GAIN))
    wanted = {
        NULL: (count, width), WEIGHT: (count * width, dim), BIAS: (count * width,), SHIFT: (width,), STD: (dim,), EMPTY: (text, width),
    }  # fmt: skip
    if wrong := [k for k, shape in wanted.items() if tensors[k].shape != shape]:
        return f" ({wrong[0]} has the shape {tuple(tensors[wrong[0]].shape)} and not {wanted[wrong[0]]})"
    return "" if (tensors[STD] > 0).all() else f" ({STD} has zeros, by which nothing can be divided)"


def _plain(value: str):
    try:
        return json.loads(value)
    except ValueError:
        return value
