"""Stage CLIP: the text and vision towers, trained as a pair.

Contrastive loss, with auxiliary heads that read every attribute off both pooled vectors (they are thrown away); without
them two short-sighted towers agree on colour and stop looking.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .probes import retrieval
from .world import ATTRIBUTES, Scenes

WIDTH = 128
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)  # CLIP's own, ComfyUI's default
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
EXPECTED_LOGIT_SCALE = 14.0


class Pair(nn.Module):
    """The towers with what is trained beside them. `rows` are the embeddings of the words that the grammar uses."""

    def __init__(self, text: nn.Module, vision: nn.Module, words: int, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.text, self.vision = text, vision
        self.rows = nn.Parameter(torch.randn(words, WIDTH, generator=generator) * 0.3)
        self.log_scale = nn.Parameter(torch.tensor(EXPECTED_LOGIT_SCALE).log())
        self.text_heads = nn.ModuleDict({k: nn.Linear(WIDTH, len(v)) for k, v in ATTRIBUTES.items()})
        self.vision_heads = nn.ModuleDict({k: nn.Linear(WIDTH, len(v)) for k, v in ATTRIBUTES.items()})

    def encode_text(self, words: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 77) row indices, (B,) lengths with start and end -> states (B, 77, 128), pooled (B, 128)."""
        states, _, pooled, _ = self.text(None, embeds=self.rows[words], num_tokens=lengths.tolist())
        return states, pooled

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, 128, 128) uint8 -> (B, 128)."""
        return self.vision(pixel_values=(images.float() / 255 - MEAN) / STD)[2]


def pair_loss(pair: Pair, images: torch.Tensor, scenes: Scenes, words: torch.Tensor, lengths: torch.Tensor, batch: int):
    """`words` (variants, n, 77) and `lengths` (variants, n): several captions of each picture.

    ComfyUI's CLIP layers add in place: forward and backward belong under `saved_tensors.mutation_allowed`.
    """

    def loss(generator: torch.Generator, done: float):
        rows = torch.randint(0, len(images), (batch,), generator=generator)
        variant = torch.randint(0, len(words), (batch,), generator=generator)
        v = pair.encode_image(images[rows])
        _, t = pair.encode_text(words[variant, rows].long(), lengths[variant, rows])
        logits = F.normalize(v, dim=1) @ F.normalize(t, dim=1).T * pair.log_scale.exp().clamp(max=100)
        target = torch.arange(batch)
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        labels = {k: getattr(scenes, k)[rows] for k in ATTRIBUTES}
        read_text = sum(F.cross_entropy(head(t), labels[k]) for k, head in pair.text_heads.items())
        read_image = sum(F.cross_entropy(head(v), labels[k]) for k, head in pair.vision_heads.items())
        return contrast + 0.3 * read_text + 0.5 * read_image, {"contrast": contrast.item(), "image": read_image.item()}

    return loss


class Sight(nn.Module):
    """The vision tower by itself, going on against text vectors that no longer move: UNet and words stand on those."""

    def __init__(self, vision: nn.Module):
        super().__init__()
        self.vision = vision
        self.log_scale = nn.Parameter(torch.tensor(EXPECTED_LOGIT_SCALE).log())
        self.heads = nn.ModuleDict({k: nn.Linear(WIDTH, len(v)) for k, v in ATTRIBUTES.items()})

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, 128, 128) uint8 -> (B, 128)."""
        return self.vision(pixel_values=(images.float() / 255 - MEAN) / STD)[2]


def sight_loss(sight: Sight, images: torch.Tensor, scenes: Scenes, texts: torch.Tensor, batch: int):
    """`texts` (variants, n, 128): what the text tower says of several captions of each picture. Pictures are shifted by
    up to 4 pixels, so that no patch is learned by heart."""

    def loss(generator: torch.Generator, done: float):
        rows = torch.randint(0, len(images), (batch,), generator=generator)
        variant = torch.randint(0, len(texts), (batch,), generator=generator)
        shift = torch.randint(-4, 5, (2,), generator=generator).tolist()
        v, t = sight.encode_image(images[rows].roll(shift, (2, 3))), texts[variant, rows].float()
        logits = F.normalize(v, dim=1) @ F.normalize(t, dim=1).T * sight.log_scale.exp().clamp(max=100)
        target = torch.arange(batch)
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        read = {k: F.cross_entropy(head(v), getattr(scenes, k)[rows]) for k, head in sight.heads.items()}
        said = {k: read[k].item() for k in ("shape", "pattern", "stroke")}
        return contrast + sum(read.values()), {"contrast": contrast.item(), **said}

    return loss


@torch.no_grad()
def accuracy(pair: Pair, images, scenes: Scenes, words, lengths) -> dict[str, float]:
    """What the heads read off the pooled vectors, and retrieval of 1 of 100 by the first caption."""
    v = torch.cat([pair.encode_image(images[i : i + 100]) for i in range(0, len(images), 100)])
    t = torch.cat(
        [pair.encode_text(words[0, i : i + 100].long(), lengths[0, i : i + 100])[1] for i in range(0, len(images), 100)]
    )
    out = {}
    for name, x, heads in (("text", t, pair.text_heads), ("vision", v, pair.vision_heads)):
        for k, head in heads.items():
            out[f"{name} {k}"] = (head(x).argmax(1) == getattr(scenes, k)).float().mean().item()
    out["retrieval of 100"] = retrieval(v, t)
    return out
