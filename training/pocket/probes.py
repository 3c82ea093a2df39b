"""What can be read off an embedding: linear probes, and retrieval of a picture by its caption."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .world import ATTRIBUTES, MEDIUMS, Scenes


def labels(scenes: Scenes) -> dict[str, torch.Tensor]:
    """(n) class of each picture by attribute, and of its named medium: -1 where the medium has no name."""
    combinations = torch.tensor(list(MEDIUMS.values()))
    named = (scenes.factors()[:, None] == combinations[None]).all(2)
    medium = torch.where(named.any(1), named.int().argmax(1), -1)
    return {**{k: getattr(scenes, k) for k in ATTRIBUTES}, "medium": medium}


def linear_probe(known: torch.Tensor, truth: torch.Tensor, asked: torch.Tensor, steps: int = 100) -> torch.Tensor:
    """Classes of `asked` (m, d) by logistic regression on `known` (n, d), whitened; L-BFGS, a little weight decay."""
    mean, deviation = known.mean(0), known.std(0).clamp_min(1e-6)
    x, y = ((z - mean) / deviation for z in (known, asked))
    weights = torch.zeros(x.shape[1] + 1, int(truth.max()) + 1, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(x @ weights[:-1] + weights[-1], truth) + 1e-4 * weights.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    with torch.no_grad():
        return (y @ weights[:-1] + weights[-1]).argmax(1)


def probe_all(known: torch.Tensor, known_scenes: Scenes, asked: torch.Tensor, asked_scenes: Scenes) -> dict[str, float]:
    """Share of held-out pictures whose class a linear probe reads, by attribute; named mediums among named ones."""
    out = {}
    truth = labels(asked_scenes)
    for name, y in labels(known_scenes).items():
        fit, ask = y >= 0, truth[name] >= 0
        read = linear_probe(known[fit], y[fit], asked[ask])
        out[name] = (read == truth[name][ask]).float().mean().item()
    return out


def retrieval(pictures: torch.Tensor, texts: torch.Tensor, of: int = 100) -> float:
    """Share of pictures (n, d) whose own caption (n, d) is the nearest of `of`."""
    v, t = F.normalize(pictures, dim=1), F.normalize(texts, dim=1)
    hits = [(a @ b.T).argmax(1) == torch.arange(len(a)) for a, b in zip(v.split(of), t.split(of), strict=True)]
    return torch.cat(hits).float().mean().item()
