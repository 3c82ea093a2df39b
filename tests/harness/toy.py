"""A world of 360 pictures, small enough that every measure of a learned word is exact, and a diffusion model of it.

A picture is 8x8x3: one of 6 contents (masks) on one of 2 canvases, painted in one of 5 textures and 6 palettes. A style
is a texture with a palette; one of the 30 styles is never seen by the model. Captions have up to four words, in any
slots: a content or "thing", a style, its texture, its palette or "painting"; some words mean a content and a style at
once, so that one vector can hold both. As a trainer sees it (training/protocols.py), `Toy` is Denoiser and TextEncoder.
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import torch
from torch import nn

MASKS = {
    "disc": "........ ..####.. .######. .######. .######. .######. ..####.. ........",
    "cross": "...##... ...##... ...##... ######## ######## ...##... ...##... ...##...",
    "frame": "######## ######## ##....## ##....## ##....## ##....## ######## ########",
    "stairs": "##...... ##...... ####.... ####.... ######.. ######.. ######## ########",
    "band": "......## .....### ....###. ...###.. ..###... .###.... ###..... ##......",
    "posts": "###..### ###..### ###..### ###..### ###..### ###..### ###..### ###..###",
}
TEXTURES = {
    "flat": lambda y, x: y * 0,
    "rows": lambda y, x: y % 2,
    "columns": lambda y, x: x % 2,
    "checks": lambda y, x: (x + y) % 2,
    "blocks": lambda y, x: (x // 2 + y // 2) % 2,
}
PALETTES = {  # two colours each, which a texture mixes
    "embers": ((0.9, -0.7, -0.8), (0.9, 0.6, -0.8)),
    "lagoon": ((-0.8, 0.1, 0.9), (-0.5, 0.9, 0.7)),
    "meadow": ((-0.5, 0.7, -0.7), (0.6, 0.9, -0.5)),
    "plum": ((0.4, -0.8, 0.5), (0.9, 0.3, 0.9)),
    "rust": ((0.3, -0.4, -0.8), (0.7, 0.1, -0.2)),
    "frost": ((0.2, 0.5, 0.9), (0.9, 0.9, 0.9)),
}
CANVASES = (-0.9, 0.3)  # grey levels; no caption speaks of them
CONTENTS = tuple(MASKS)
STYLES = tuple((texture, palette) for texture in TEXTURES for palette in PALETTES)
UNSEEN = ("checks", "plum")
SEEN = tuple(style for style in STYLES if style != UNSEEN)
SLOTS, WIDTH, LAYERS, HIDDEN, BLOCKS, LEVELS = 4, 48, 2, 216, 3, 200

STYLE_WORDS = {f"{kind}-{i}": style for i, style in enumerate(SEEN) for kind in ("style", "manner")}
PAIRS = random.Random(1).sample([(content, style) for content in CONTENTS for style in SEEN], 40)
COMPOUNDS = {f"compound-{i}": pair for i, pair in enumerate(PAIRS)}
WORDS = ("", "thing", "painting", *CONTENTS, *TEXTURES, *PALETTES, *STYLE_WORDS, *COMPOUNDS)
NUMBER = {word: i for i, word in enumerate(WORDS)}


class Scene(NamedTuple):
    content: str
    style: tuple[str, str]
    canvas: int


SCENES = tuple(Scene(c, s, v) for c in CONTENTS for s in STYLES for v in range(len(CANVASES)))


def render(scene: Scene) -> torch.Tensor:
    """(3, 8, 8) in -1..1."""
    mask = torch.tensor([[dot == "#" for dot in row] for row in MASKS[scene.content].split()])
    y, x = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    texture, palette = scene.style
    painted = torch.tensor(PALETTES[palette])[TEXTURES[texture](y, x)].movedim(-1, 0)
    return torch.where(mask, painted, torch.tensor(CANVASES[scene.canvas]))


def renders(scenes) -> torch.Tensor:
    return torch.stack([render(scene) for scene in scenes])


def nearest(pictures: torch.Tensor) -> list[Scene]:
    """Which of all scenes each picture is: the one whose render is nearest."""
    distances = torch.cdist(pictures.flatten(1), renders(SCENES).flatten(1))
    return [SCENES[i] for i in distances.argmin(1).tolist()]


def example(chance: random.Random) -> tuple[Scene, list[str]]:
    """A scene of a seen style and some true words for it. A content that is named is the one that is shown; a word that
    means a content and a style decides the content where none is named."""
    content, style, canvas = chance.choice(CONTENTS), chance.choice(SEEN), chance.randrange(len(CANVASES))
    if chance.random() < 0.3:
        word, (own, style) = chance.choice(list(COMPOUNDS.items()))
        words = chance.choice([[content, word], [content, word], ["thing", word], [word]])
        return Scene(content if words[0] == content else own, style, canvas), words
    texture, palette = style
    names = [word for word, meant in STYLE_WORDS.items() if meant == style]
    ways = [[chance.choice(names)], [texture, palette], [texture], [palette], ["painting"]]
    words = chance.choices(ways, weights=(8, 5, 1, 1, 5))[0]
    return Scene(content, style, canvas), [content if chance.random() < 0.8 else "thing", *words]


def slots(words: list[str], chance: random.Random) -> list[int]:
    """The words' numbers in random slots of four."""
    numbers = [NUMBER[word] for word in words] + [0] * (SLOTS - len(words))
    chance.shuffle(numbers)
    return numbers


class Text(nn.Module):
    """A small transformer over four slots."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(len(WORDS), WIDTH)
        self.places = nn.Parameter(torch.randn(SLOTS, WIDTH) * 0.1)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        nn.init.normal_(self.words.weight, std=0.25)

    def forward(self, embedded: torch.Tensor) -> torch.Tensor:
        """(B, slots, width) vectors of words to states of the same shape."""
        x = embedded + self.places
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Noise(nn.Module):
    """An MLP that sees the picture, the text's mean state and the level. It says v, the rotation of eps that needs no
    width to pass the noise on; `Toy.error` is of eps."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(192, HIDDEN), nn.Linear(HIDDEN, 192)
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(BLOCKS))
        self.first = nn.ModuleList(nn.Linear(HIDDEN + 2 * WIDTH, HIDDEN) for _ in range(BLOCKS))
        self.second = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(BLOCKS))
        self.register_buffer("turns", torch.exp(torch.linspace(0, math.log(200), WIDTH // 2)), persistent=False)

    def forward(self, x: torch.Tensor, level: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        angles = (level / LEVELS)[:, None] * self.turns
        told = torch.cat([text, angles.sin(), angles.cos()], 1)
        h = self.into(x.flatten(1))
        for norm, first, second in zip(self.norms, self.first, self.second, strict=True):
            h = h + second(nn.functional.silu(first(torch.cat([norm(h), told], 1))))
        return self.out(h).view_as(x)


class Toy(nn.Module):
    """The model: text and noise predictor over 200 levels of DDPM's linear schedule (Ho et al. 2020, scaled to 200)."""

    def __init__(self):
        super().__init__()
        self.text, self.noise = Text(), Noise()
        kept = torch.cumprod(1 - torch.linspace(5e-4, 0.1, LEVELS, dtype=torch.float64), 0)
        self.register_buffer("kept", kept.float(), persistent=False)  # share of the signal's energy, alpha bar
        self.register_buffer("sigma", ((1 - kept) / kept).sqrt().float(), persistent=False)

    def eps(self, noisy: torch.Tensor, level: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """(B, 3, 8, 8) noise in sqrt(kept) x + sqrt(1 - kept) eps, for whole levels (B,) and states (B, slots, width)."""
        kept = self.kept[level].view(-1, 1, 1, 1)
        return (1 - kept).sqrt() * noisy + kept.sqrt() * self.noise(noisy, level, states.mean(1))

    def sigmas(self, n: int, generator: torch.Generator) -> torch.Tensor:
        places = (torch.arange(n) + torch.rand(n, generator=generator)) / n
        return self.sigma[(places * LEVELS).long().clamp(max=LEVELS - 1)]

    def snr(self, sigma: torch.Tensor) -> torch.Tensor:
        return sigma**-2

    def error(self, latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, cond) -> torch.Tensor:
        level = (sigma[:, None] - self.sigma).abs().argmin(1)
        s = sigma.view(-1, 1, 1, 1)
        return self.eps((latents + s * noise) / (1 + s * s).sqrt(), level, cond.states) - noise

    def encode(self, captions: list[str], vectors: list[dict[str, torch.Tensor]]):
        """Words stand in the first slots; `{token}` takes as many as it has vectors, under the key "word"."""
        from counterpoint.training.protocols import Conditioning

        table = self.text.words.weight
        rows = []
        for said, own in zip(captions, vectors, strict=True):
            parts = [own["word"] if w == "{token}" else table[NUMBER[w]][None] for w in said.split()]
            row = torch.cat(parts)
            if len(row) > SLOTS:
                raise ValueError(f"The toy's captions have {SLOTS} slots; {said!r} needs {len(row)}.")
            rows.append(torch.cat([row, table[:1].expand(SLOTS - len(row), -1)]))
        return Conditioning(self.text(torch.stack(rows)), None)

    @torch.no_grad()
    def sample(self, captions: list[str], generator: torch.Generator, vector: torch.Tensor | None = None):
        """(B, 3, 8, 8) by ancestral sampling through all levels (DDPM, algorithm 2), without guidance."""
        states = self.encode(captions, [{"word": vector}] * len(captions)).states
        x = torch.randn(len(captions), 3, 8, 8, generator=generator)
        for level in range(LEVELS - 1, -1, -1):
            kept, before = self.kept[level], self.kept[level - 1] if level else torch.tensor(1.0)
            beta = 1 - kept / before
            eps = self.eps(x, torch.full((len(x),), level), states)
            x = (x - beta / (1 - kept).sqrt() * eps) / (1 - beta).sqrt()
            if level:
                noise = torch.randn(x.shape, generator=generator)
                x = x + (beta * (1 - before) / (1 - kept)).sqrt() * noise
        return x


def train_base(steps: int = 12_000, batch: int = 256, rate: float = 2e-3, seed: int = 0) -> Toy:
    """From nothing, on all scenes of the seen styles; what comes back is the running mean of the weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        toy = Toy()
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    pictures = dict(zip(SCENES, renders(SCENES), strict=True))
    optimiser = torch.optim.AdamW(toy.parameters(), lr=rate, weight_decay=1e-4)
    smooth = torch.optim.swa_utils.AveragedModel(toy, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    for i in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1, (i + 1) / 200) * (0.02 + 0.98 * (1 + math.cos(math.pi * i / steps)) / 2)
        scenes, words = zip(*(example(chance) for _ in range(batch)), strict=True)
        numbers = torch.tensor([slots(each, chance) for each in words])
        noise = torch.randn(batch, 3, 8, 8, generator=generator)
        level = torch.randint(LEVELS, (batch,), generator=generator)
        kept = toy.kept[level].view(-1, 1, 1, 1)
        noisy = kept.sqrt() * torch.stack([pictures[scene] for scene in scenes]) + (1 - kept).sqrt() * noise
        loss = (toy.eps(noisy, level, toy.text(toy.text.words(numbers))) - noise).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        smooth.update_parameters(toy)
        if (i + 1) % 500 == 0:
            print(f"step {i + 1} of {steps}, loss {loss.item():.4f}", flush=True)
    return smooth.module.eval().requires_grad_(False)
