"""How alike single pictures are: in style, in identity, and to their captions. All from features (n, d) of one extractor."""

from __future__ import annotations

import torch
import torch.nn.functional as F

NEIGHBOURS = 10  # of CSLS
BLOCK = 2048  # rows of a table of cosines at a time
CANDIDATES = 100  # captions among which R-precision looks for the right one
MARGIN = 0.1  # of the object's longer side, left around it in a crop
GREY = 0.5


def to_mean(made: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """(n) cosine of each picture with the mean of the reference's unit vectors: CSD's protocol (Somepalli et al. 2024)."""
    anchor = F.normalize(reference.double(), dim=1).mean(0, keepdim=True)
    return F.cosine_similarity(made.double(), anchor, eps=1e-6)


def csls(made: torch.Tensor, reference: torch.Tensor, others: torch.Tensor, k: int = NEIGHBOURS) -> torch.Tensor:
    """(n) 2 cos(x, a) - r(x) - r(a): a is the reference's mean, r the mean cosine with the k nearest of `others`.

    Some styles are near to everything; what other pictures are near to counts less (Conneau et al. 2018, equation 3).
    """
    made, reference, others = (F.normalize(x.double(), dim=1) for x in (made, reference, others))
    anchor = F.normalize(reference.mean(0, keepdim=True), dim=1)

    def crowd(x: torch.Tensor) -> torch.Tensor:
        near = [(rows @ others.T).topk(min(k, len(others)), dim=1).values for rows in x.split(BLOCK)]
        return torch.cat(near).mean(1)

    return 2 * (made @ anchor.T)[:, 0] - crowd(made) - crowd(anchor)


def to_each(made: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """(n, m) cosines of every picture with every picture of the reference."""
    return F.normalize(made.double(), dim=1) @ F.normalize(reference.double(), dim=1).T


def clip_scores(pictures: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """(n) 100 max(cos, 0) of each picture with its own caption (Hessel et al. 2021, with the factor 100 that is usual)."""
    return 100 * F.cosine_similarity(pictures.double(), texts.double()).clamp_min(0)


def found(pictures: torch.Tensor, texts: torch.Tensor, captions: list[str], seed: int = 0) -> torch.Tensor:
    """(n) 1 where a picture's own caption is nearer than up to 99 others, drawn among the distinct ones: R-precision
    (Xu et al. 2018, with 100 candidates)."""
    pictures, texts = (F.normalize(x.double(), dim=1) for x in (pictures, texts))
    first = {caption: i for i, caption in reversed(list(enumerate(captions)))}
    distinct, generator = torch.tensor(list(first.values())), torch.Generator().manual_seed(seed)
    hits = []
    for picture, caption in zip(pictures, captions, strict=True):
        others = distinct[distinct != first[caption]]
        drawn = others[torch.randperm(len(others), generator=generator)[: CANDIDATES - 1]]
        own = picture @ texts[first[caption]]
        hits.append(bool((texts[drawn] @ picture < own).all()))
    return torch.tensor(hits, dtype=torch.float64)


def cut_out(image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(1, H, W, 3) and (1, H, W) -> (1, S, S, 3): what the mask keeps, on grey, in a square with a little room around it.

    Raises ValueError where the mask is empty or of another size.
    """
    if mask.shape[-2:] != image.shape[1:3]:
        (h, w), (mh, mw) = image.shape[1:3], mask.shape[-2:]
        raise ValueError(f"A mask of {mw} x {mh} pixels does not fit a picture of {w} x {h}: scale the mask first.")
    rows, columns = (mask[0] > 0.5).nonzero(as_tuple=True)
    if not len(rows):
        raise ValueError("A mask is empty: it has to be white (above 0.5) where the object is.")
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    keep = mask[0, top:bottom, left:right, None].to(image)
    crop = image[0, top:bottom, left:right, :3] * keep + GREY * (1 - keep)
    height, width = crop.shape[:2]
    side = round(max(height, width) * (1 + 2 * MARGIN))
    square = image.new_full((1, side, side, 3), GREY)
    y, x = (side - height) // 2, (side - width) // 2
    square[0, y : y + height, x : x + width] = crop
    return square
