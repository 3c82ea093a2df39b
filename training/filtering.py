"""Which pictures of sets of one object are kept, by how alike, how pretty and how true to their prompts they are.

The rule is SynCD's (Kumari et al. 2025): a picture is kept if its aesthetic score is high enough and it makes at least one pair
with another picture of its set, whose cosine lies between two bounds; a set is kept if two of its pictures are. The least prompt
fidelity is ours and acts as the aesthetic score does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .similarity import to_each

LEAST, MOST = 0.7, 0.98  # cosines of DINOv2 ViT-L/14 with registers, as published
AESTHETIC = 6.0  # of LAION's linear head on CLIP ViT-L/14, as published
OTHER, ALIKE, PROMPT, PLAIN, EMPTY, ALONE = (
    "another object", "too alike", "off its prompt", "not pretty enough", "an empty mask", "alone in its set",
)  # fmt: skip


class Bounds(NamedTuple):
    """Between which a picture is kept; these are as wide as they can be."""

    least: float = -1.0  # cosine of a pair
    most: float = 1.0
    fidelity: float = 0.0  # 100 x cosine of picture and prompt
    aesthetic: float = -torch.inf


class Fault(NamedTuple):
    """A reason to drop a picture."""

    kind: str
    text: str


@dataclass(frozen=True)
class Scores:
    """What was measured of n pictures; what was not, is missing and drops none."""

    cosines: Mapping[int, torch.Tensor] = field(
        default_factory=dict
    )  # {set: (k, k)}; NaN for a picture without a subject
    fidelity: torch.Tensor | None = None  # (n)
    aesthetic: torch.Tensor | None = None  # (n)


def rows_of(sets: Sequence[int]) -> dict[int, list[int]]:
    """{set: its pictures, from 0}, in order of appearance."""
    rows: dict[int, list[int]] = {}
    for i, number in enumerate(sets):
        rows.setdefault(number, []).append(i)
    return rows


def pairs(features: torch.Tensor, sets: Sequence[int], subject: Sequence[bool]) -> dict[int, torch.Tensor]:
    """{set: (k, k) cosines in -1..1} of features (n, d); NaN in row and column of a picture without a subject."""
    tables = {}
    for number, rows in rows_of(sets).items():
        table = to_each(features[rows], features[rows]).clamp(-1, 1)
        missing = ~torch.tensor([subject[i] for i in rows])
        table[missing], table[:, missing] = torch.nan, torch.nan
        tables[number] = table
    return tables


def judge(sets: Sequence[int], scores: Scores, bounds: Bounds) -> list[list[Fault]]:
    """What speaks against each picture; nothing for those that are kept."""
    faults: list[list[Fault]] = [[] for _ in sets]
    for what, kind, least in (("aesthetic", PLAIN, bounds.aesthetic), ("fidelity", PROMPT, bounds.fidelity)):
        values = getattr(scores, what)
        if values is None:
            continue
        for own, value in zip(faults, values.tolist(), strict=True):
            if not value >= least:
                own.append(Fault(kind, f"{kind}: {value:.4g}, under {least:g}"))
    for number, rows in rows_of(sets).items():
        if number in scores.cosines:
            for i, found in zip(rows, _of_pairs(scores.cosines[number], rows, bounds), strict=True):
                faults[i] += found
        kept = [i for i in rows if not faults[i]]
        if len(kept) == 1:
            why = "the only picture of its set" if len(rows) == 1 else "no other picture of its set is kept"
            faults[kept[0]].append(Fault(ALONE, f"{ALONE}: {why}"))
    return faults


def _of_pairs(table: torch.Tensor, rows: list[int], bounds: Bounds) -> list[list[Fault]]:
    """For each picture of a set a fault where it makes no pair between the bounds."""
    others = table.masked_fill(torch.eye(len(rows), dtype=torch.bool), torch.nan)
    paired = ((others >= bounds.least) & (others <= bounds.most)).any(1)
    nearest, at = others.nan_to_num(-2.0).max(1)
    found = []
    for k in range(len(rows)):
        best = nearest[k].item()
        if paired[k] or (best == -2 and not table[k, k].isnan()):  # nothing to compare it with: it will be alone
            found.append([])
        elif table[k, k].isnan():
            found.append([Fault(EMPTY, f"{EMPTY}: nothing of it can be compared")])
        elif best > bounds.most:
            found.append(
                [Fault(ALIKE, f"{ALIKE}: {best:.4g} with picture {rows[int(at[k])] + 1}, over {bounds.most:g}")]
            )
        else:
            found.append([Fault(OTHER, f"{OTHER}: {best:.4g} at best, under {bounds.least:g}")])
    return found


def pair_values(cosines: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """(m) the cosine of every pair in sets that can be compared, each pair once."""
    values = [table[torch.ones_like(table).triu(1).bool()] for table in cosines.values()]
    found = torch.cat(values) if values else torch.zeros(0)
    return found[~found.isnan()]


def linear_head(state: Mapping[str, torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (d) and bias () of a file with one linear layer to one number. Raises ValueError for any other."""
    weight, bias = state.get("weight"), state.get("bias")
    if len(state) != 2 or weight is None or bias is None or weight.ndim != 2 or len(weight) != 1 or bias.numel() != 1:
        raise ValueError(
            f"{name} is no linear aesthetic head (one weight of 1 x d and one bias): use LAION's, such as sa_0_4_vit_l_14_linear."
        )
    return weight[0].double(), bias.double().squeeze()


def aesthetics(features: torch.Tensor, head: tuple[torch.Tensor, torch.Tensor], name: str) -> torch.Tensor:
    """(n) scores, mostly 1 to 10, of image features (n, d), which are brought to unit length first. Raises ValueError where
    the head is for features of another width."""
    weight, bias = head
    if len(weight) != features.shape[1]:
        raise ValueError(
            f"{name} is for features of {len(weight)} numbers, and these have {features.shape[1]}: choose the CLIP that it was trained "
            "on in Load Features (ViT-L/14 has 768, ViT-B/32 has 512)."
        )
    return torch.nn.functional.normalize(features.double(), dim=1) @ weight + bias


def counted(faults: list[list[Fault]]) -> Counter:
    """How many pictures each kind of fault speaks against; a picture may have several."""
    return Counter(fault.kind for own in faults for fault in own)


def told(captions: Sequence[str], sets: Sequence[int], scores: Scores, faults: list[list[Fault]]) -> dict:
    """Every score, set by set, as JSON takes it: pictures are counted from 1, and what could not be compared is null."""
    found = []
    for number, rows in rows_of(sets).items():
        pictures = []
        for i in rows:
            facts = {
                "picture": i + 1,
                "caption": captions[i],
                "kept": not faults[i],
                "reasons": [f.text for f in faults[i]],
            }
            for what in ("fidelity", "aesthetic"):
                values = getattr(scores, what)
                facts |= {} if values is None else {what: round(values[i].item(), 6)}
            pictures.append(facts)
        found.append({"set": number, "pictures": pictures})
        if number in scores.cosines:
            table = scores.cosines[number].tolist()
            found[-1]["cosines"] = [[None if c != c else round(c, 6) for c in row] for row in table]
    return {"sets": found}


def line(sets: Sequence[int], faults: list[list[Fault]]) -> str:
    """For people: how much is kept, and why the rest is not."""
    kept = [number for number, own in zip(sets, faults, strict=True) if not own]
    said = ", ".join(f"{count} {kind}" for kind, count in counted(faults).most_common())
    dropped = f"; dropped: {said}" if said else ""
    return f"{len(kept)} of {len(sets)} pictures kept, {len(set(kept))} of {len(set(sets))} sets{dropped}"
