"""One layer of attention over a set of pictures: each by itself, with the others' subjects gathered (ours), and with all keys of the
set behind a dense mask (SynCD's own way, without projecting them again for every picture).

    python dev.py bench attention                      24 cases, about 25 minutes
    python dev.py bench attention "4 pictures, 10%"    those with these words in their names

Shapes of FLUX at 512 pixels (256 words, 1024 image tokens, 24 heads of 128) and of SDXL at 1024 (4096 tokens, 10 heads of 64), float32.
Predicted are the ratios of the multiplications, 2 x queries x keys x width for each of both products. Peaks are of one layer, in a
process of its own. Goals: 0.60 of dense for 4 pictures whose subject covers 10 %, 0.85 for 3 and 30 %; within 15 % of what is
predicted over none.
"""

import functools
import itertools
import json
import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple

from harness.boot import boot, load_pack, prepare
from harness.timing import MEMORY_OF, Way, interleaved, peak, peak_elsewhere

ROUNDS = 5
WAYS = ("each by itself", "ours", "dense mask")


class Case(NamedTuple):
    kind: str
    pictures: int
    share: float  # of a picture that its subject covers

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.pictures} pictures, {self.share:.0%}"


KINDS = {"FLUX 512": (256, 1024, 24, 128), "SDXL 1024": (0, 4096, 10, 64)}  # words, image tokens, heads, their width
CASES = [Case(*each) for each in itertools.product(KINDS, (2, 3, 4, 8), (0.1, 0.3, 0.5))]


def main(argv: list[str]) -> None:
    prepare(Path(tempfile.mkdtemp(prefix="counterpoint-bench-")))
    boot()
    pack = load_pack()
    if argv[:1] == [MEMORY_OF]:
        case, way = argv[1].split("; ")
        found = next(c for c in CASES if c.name == case)
        print(json.dumps(peak(ways(pack, found)[way])))
        return
    print(
        f"{'':32}{'none':>8}{'ours':>8}{'dense':>8}  {'ours / dense':>20} {'said':>5}  {'ours / none':>20} {'said':>5}  peak MB"
    )
    for case in (c for c in CASES if not argv or any(words in c.name for words in argv)):
        timings = interleaved(ways(pack, case), ROUNDS)
        none, ours, dense = (t.seconds for t in timings)
        seconds = "".join(f"{t.median:8.3f}" for t in timings)
        said_dense, said_none = predicted(case)
        peaks = ""
        if case.share == 0.3:
            peaks = " ".join(f"{peak_elsewhere('attention', f'{case.name}; {way}').main / 1e6:6.0f}" for way in WAYS)
        print(
            f"{case.name:32}{seconds}  {ratio(ours, dense):>20} {said_dense:5.2f}  {ratio(ours, none):>20} {said_none:5.2f}  {peaks}",
            flush=True,
        )


def ratio(ones: list[float], others: list[float]) -> str:
    found = sorted(a / b for a, b in zip(ones, others, strict=True))
    return f"{statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})"


def predicted(case: Case) -> tuple[float, float]:
    """Multiplications of ours over those of the dense mask, and over those of each by itself."""
    words, tokens, *_ = KINDS[case.kind]
    foreign = (case.pictures - 1) * round(tokens * case.share)
    none = (words + tokens) ** 2
    dense = (words + tokens) * (words + case.pictures * tokens)
    ours = none + tokens * foreign
    return ours / dense, ours / none


def ways(pack, case: Case) -> dict[str, Way]:
    import torch
    from comfy.ldm.modules.attention import attention_pytorch

    words, tokens, heads, width = KINDS[case.kind]
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(case.pictures, heads, words + tokens, width, generator=generator) for _ in range(3))
    subjects = [torch.randperm(tokens, generator=generator)[: round(tokens * case.share)] for _ in range(case.pictures)]

    def attention(q, k, v, mask=None):
        return attention_pytorch(q, k, v, heads, mask=mask, skip_reshape=True)

    order = [[(n - slot) % case.pictures for slot in range(case.pictures)] for n in range(case.pictures)]

    @functools.cache
    def mask() -> torch.Tensor:
        hidden = torch.zeros(case.pictures, 1, words + tokens, words + case.pictures * tokens)
        for n, row in enumerate(order):
            for slot, m in enumerate(row[1:], 1):
                unseen = torch.full((words + tokens, tokens), -torch.inf)
                unseen[words:, subjects[m]] = 0
                first = words + slot * tokens
                hidden[n, 0, :, first : first + tokens] = unseen
        return hidden

    def behind_a_mask() -> torch.Tensor:
        keys, values = (
            torch.stack(
                [torch.cat([t[n, :, :words], *(t[m, :, words:] for m in row)], dim=1) for n, row in enumerate(order)]
            )
            for t in (k, v)
        )
        return attention(q, keys, values, mask())

    ours = functools.partial(pack.nodes.attention.shared.shared, attention, q, k, v, subjects, text=words, axis=2)
    found = {"each by itself": lambda: attention(q, k, v), "ours": ours, "dense mask": behind_a_mask}
    return {name: torch.inference_mode()(work) for name, work in found.items()}
