"""Where a prior begins: a Gaussian N(mu, scale^2) in the space of image embeddings, chosen by the text.

none                   N(0, I), whatever the embeddings are
whitened               mean and standard deviation of all embeddings, as in Karlo and Kandinsky
clusters               k-means of the texts; each cluster begins at the mean and the standard deviation of its pictures
clusters as published  k-means of the pictures; a text takes the cluster whose mean is nearest by cosine (Zhou et al. 2023)
ridge                  mu = A text + b, by ridge regression, and what it leaves: clusters without number and without borders

Of the authors' clusters only the rule by which a text chooses is published, not how they were found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .process import Norm, Start

NORM = ("norm.mean", "norm.std")
KINDS = {  # and the tensors each is made of
    "none": NORM,
    "whitened": NORM,
    "clusters": (*NORM, "start.mean", "start.std", "start.text_centroid", "text.mean", "text.std"),
    "clusters as published": (*NORM, "start.mean", "start.std"),
    "ridge": (*NORM, "start.linear.weight", "start.linear.bias", "start.linear.std"),
}
SHAPES = {  # d numbers of an image embedding, t of a text embedding, K clusters
    "norm.mean": "d", "norm.std": "d", "text.mean": "t", "text.std": "t",
    "start.mean": "K d", "start.std": "K d", "start.text_centroid": "K t",
    "start.linear.weight": "d t", "start.linear.bias": "d", "start.linear.std": "d",
}  # fmt: skip

LEAST_STD = 1e-4  # of the typical one: a coordinate that hardly varies would be divided by nearly 0
ROUNDING = 1e-12  # of the largest number: equal rows differ from their mean by less
ROUNDS = 50  # of k-means, if it does not settle before
BLOCK = 4096  # rows of a table of distances
FROM_ALL = 10.0  # pictures' worth of a wider variance in that of a cluster, which may have few
FOLDS, JUDGED = 5, 2000  # of the ridge's strength: parts of the texts, and rows of each that are looked at
STRENGTHS = (*(10 ** (i / 2) for i in range(-8, 5)), torch.inf)  # times the number of pairs; at infinity mu is the mean

Tell = Callable[[], None]


def nothing() -> None:
    pass


@dataclass(frozen=True, eq=False)
class StartDistribution:
    """A kind of KINDS with its tensors, by the names they have in a file. `scale` multiplies every standard deviation: 1 is that of
    the embeddings, 5 was published. Raises ValueError where tensors are missing, do not fit each other, or a deviation is not above 0.
    """

    kind: str
    tensors: Mapping[str, torch.Tensor]
    scale: float = 1.0

    def __post_init__(self):
        _check(self.kind, self.tensors)
        if not 0 < self.scale < torch.inf:
            raise ValueError(
                f"The scale of a start distribution is {self.scale:g}: it has to be above 0; 1 is recommended."
            )

    @property
    def norm(self) -> Norm:
        return Norm(*(self.tensors[name] for name in NORM))

    def start(self, text: torch.Tensor | None = None) -> Start:
        """For texts (n, t); for none, and for kinds that ask no text, one for all rows. Raises ValueError for texts of another width."""
        if self.kind == "none":
            mean, std = torch.zeros_like(self.norm.mean), torch.ones_like(self.norm.std)
        elif text is None or self.kind == "whitened":
            mean, std = self.norm
        elif self.kind == "ridge":
            weight, bias, std = (self.tensors[f"start.linear.{name}"] for name in ("weight", "bias", "std"))
            mean = self._fitting(text) @ weight.T + bias
        else:
            index = self.cluster(text)
            mean, std = self.tensors["start.mean"][index], self.tensors["start.std"][index]
        return Start(mean, self.scale * std)

    def cluster(self, text: torch.Tensor) -> torch.Tensor:
        """(n) which cluster each text (n, t) begins in."""
        text = self._fitting(text)
        if self.kind == "clusters as published":
            return (F.normalize(text, dim=1) @ F.normalize(self.tensors["start.mean"], dim=1).T).argmax(1)
        return nearest(
            (text - self.tensors["text.mean"]) / self.tensors["text.std"], self.tensors["start.text_centroid"]
        )

    def _fitting(self, text: torch.Tensor) -> torch.Tensor:
        name = {"ridge": "start.linear.weight", "clusters": "start.text_centroid"}.get(self.kind, "start.mean")
        width = self.tensors[name].shape[1]
        if text.ndim != 2 or text.shape[1] != width:
            raise ValueError(
                f"A text embedding of the shape {tuple(text.shape)} does not fit a start distribution for (n, {width}): "
                "use the text encoder it was fitted with."
            )
        return text.to(self.tensors[name])

    def metadata(self) -> dict[str, str]:
        return {"start_kind": self.kind, "std_scale": repr(float(self.scale))}

    @staticmethod
    def of_file(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> StartDistribution:
        """From a file's tensors, among which there may be others, and its metadata. Raises ValueError where something is missing."""
        kind = metadata.get("start_kind", "")
        own = {name: tensors[name] for name in KINDS.get(kind, ()) if name in tensors}
        return StartDistribution(kind, own, float(metadata.get("std_scale", "1")))


def _check(kind: str, tensors: Mapping[str, torch.Tensor]) -> None:
    if kind not in KINDS:
        raise ValueError(f'There is no start distribution "{kind}": it is one of {", ".join(KINDS)}.')
    missing = [name for name in KINDS[kind] if name not in tensors]
    if missing:
        raise ValueError(f'The start distribution "{kind}" lacks {", ".join(missing)}: fit it again.')
    sizes: dict[str, int] = {}
    for name in KINDS[kind]:
        x, letters = tensors[name], SHAPES[name].split()
        if x.ndim != len(letters) or any(sizes.setdefault(k, n) != n for k, n in zip(letters, x.shape, strict=True)):
            raise ValueError(
                f"{name} of a start distribution has the shape {tuple(x.shape)}, unlike its other tensors: fit it again."
            )
        if not x.isfinite().all():
            raise ValueError(f"{name} of a start distribution has numbers that are not finite: fit it again.")
        if name.endswith("std") and not (x > 0).all():
            raise ValueError(
                f"{name} of a start distribution has {int((x <= 0).sum())} of {x.numel()} numbers that are not above 0, "
                "and sampling would begin without noise there: fit it again."
            )


def fit(
    kind: str,
    text: torch.Tensor,
    image: torch.Tensor,
    clusters: int = 64,
    generator: torch.Generator | None = None,
    scale: float = 1.0,
    tell: Tell = nothing,
) -> StartDistribution:
    """From pairs of embeddings, text (n, t) and image (n, d), n >= 2. `clusters` are of use where there are any, `generator` is on the
    CPU (seed 0 without one), and `tell()` comes now and then, to stop it by an exception. The tensors are float32, on the CPU.

    Raises ValueError for pairs of which nothing can be learned, and for more clusters than different texts or pictures.
    """
    text, image = _pairs(text, image)
    generator = generator or torch.Generator().manual_seed(0)
    norm = moments(image, "image embeddings")
    if kind == "clusters":
        found = _fit_clusters(text, image, clusters, generator, tell)
    elif kind == "clusters as published":
        found = _fit_published(text, image, clusters, generator, tell)
    else:
        found = _fit_ridge(text, image, norm, generator, tell) if kind == "ridge" else {}
    tensors = {**dict(zip(NORM, norm, strict=True)), **found}
    return StartDistribution(
        kind, {name: x.float().contiguous() for name, x in tensors.items()}, scale
    )  # as a file has them


def unexplained(starts: StartDistribution, text: torch.Tensor, image: torch.Tensor) -> float:
    """Share of the variance of image (n, d) around the mean of all that is left around mu(text): 1 is no better than the mean."""
    left = (image - starts.start(text).mean.to(image)).double().square().sum()
    return (left / (image - starts.norm.mean.to(image)).double().square().sum()).item()


def moments(x: torch.Tensor, what: str) -> Norm:
    """Mean and standard deviation of each coordinate of x (n, d). Raises ValueError where all rows are the same."""
    std = x.std(0)
    typical = std.square().mean().sqrt()
    if not typical > ROUNDING * x.abs().max():
        raise ValueError(
            f"All {len(x)} {what} are the same, so there is nothing to learn: use different pictures and captions."
        )
    return Norm(x.mean(0), std.clamp_min(LEAST_STD * typical))


def _pairs(text: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64 on the CPU."""
    if text.ndim != 2 or image.ndim != 2 or len(text) != len(image):
        raise ValueError(
            f"Text embeddings of the shape {tuple(text.shape)} and image embeddings of {tuple(image.shape)} are no pairs: "
            "there has to be one row in each for every picture."
        )
    if len(text) < 2:
        raise ValueError(f"There are {len(text)} pairs: a start distribution needs 2 at the least.")
    for name, x in (("text", text), ("image", image)):
        wrong = (~x.isfinite()).any(1).nonzero().flatten()
        if len(wrong):
            raise ValueError(
                f"The {name} embedding of pair {int(wrong[0]) + 1} has numbers that are not finite: embed the pairs again."
            )
    return text.cpu().double(), image.cpu().double()


def _fit_clusters(text, image, clusters, generator, tell) -> dict[str, torch.Tensor]:
    norm = _text_moments(text)
    centroids, index = kmeans(norm.whitened(text), clusters, generator, "texts", tell)
    mean, std = _paired(image, index, clusters)
    own = {"start.mean": mean, "start.std": std, "start.text_centroid": centroids}
    return {**own, "text.mean": norm.mean, "text.std": norm.std}


def _fit_published(text, image, clusters, generator, tell) -> dict[str, torch.Tensor]:
    if text.shape[1] != image.shape[1]:
        raise ValueError(
            f"Text embeddings of {text.shape[1]} numbers have no cosine with image embeddings of {image.shape[1]}: "
            "take both from one CLIP, or fit clusters by the texts."
        )
    _, index = kmeans(F.normalize(image, dim=1), clusters, generator, "pictures", tell)
    mean, std = _paired(image, index, clusters)
    return {"start.mean": mean, "start.std": std}


def _text_moments(text: torch.Tensor) -> Norm:
    """Texts that are all the same say nothing, which is no error: then nothing is divided."""
    mean, std = text.mean(0), text.std(0)
    typical = std.square().mean().sqrt()
    typical = typical if typical > ROUNDING * text.abs().max() else torch.ones_like(typical)
    return Norm(mean, torch.where(std > LEAST_STD * typical, std, typical))


def _paired(image: torch.Tensor, index: torch.Tensor, clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation (K, d) of the pictures of each cluster. The variance is drawn towards the clusters' common one, and that
    towards the variance of all: a cluster of one picture has none of its own."""
    count = index.bincount(minlength=clusters)[:, None].double()
    whole = moments(image, "image embeddings")
    mean = image.new_zeros(clusters, image.shape[1]).index_add_(0, index, image) / count.clamp_min(1)
    mean = torch.where(count > 0, mean, whole.mean)
    squares = image.new_zeros(mean.shape).index_add_(0, index, (image - mean[index]).square())
    free = len(image) - int((count > 0).sum())
    common = (squares.sum(0) + FROM_ALL * whole.std.square()) / (free + FROM_ALL)
    variance = (squares + FROM_ALL * common) / ((count - 1).clamp_min(0) + FROM_ALL)
    return mean, variance.sqrt().maximum(LEAST_STD * whole.std)


def nearest(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """(n) which of the centroids (K, d) is nearest to each row of x (n, d)."""
    half = centroids.square().sum(1) / 2
    return torch.cat([(half - rows @ centroids.T).argmin(1) for rows in x.split(BLOCK)])


def kmeans(
    x: torch.Tensor, clusters: int, generator: torch.Generator, what: str = "rows", tell: Tell = nothing
) -> tuple[torch.Tensor, torch.Tensor]:
    """Centroids (K, d) and the nearest of them for each row of x (n, d): Lloyd's algorithm from the seeds of k-means++ (Arthur and
    Vassilvitskii 2007). A cluster that loses its last row takes the row that is farthest from its own centroid.

    Raises ValueError where fewer than K rows are different.
    """
    centroids = _seeds(x, clusters, generator, what, tell)
    index = nearest(x, centroids)
    for _ in range(ROUNDS):
        tell()
        count = index.bincount(minlength=clusters)
        centroids = torch.zeros_like(centroids).index_add_(0, index, x) / count.clamp_min(1)[:, None]
        empty = count == 0
        centroids[empty] = x[(x - centroids[index]).square().sum(1).topk(int(empty.sum())).indices]
        before, index = index, nearest(x, centroids)
        if torch.equal(before, index):
            break
    return centroids, index


def _seeds(x: torch.Tensor, clusters: int, generator: torch.Generator, what: str, tell: Tell) -> torch.Tensor:
    """Rows of x (n, d), each drawn with the square of its distance to the nearest of those before it."""
    chosen = [int(torch.randint(len(x), (1,), generator=generator))]
    distance = (x - x[chosen[0]]).square().sum(1)
    while len(chosen) < clusters:
        tell()
        if not distance.max() > 0:
            raise ValueError(
                f"There are {len(chosen)} different {what} for {clusters} clusters: take {len(chosen)} clusters at the most, or more pairs."
            )
        at = torch.rand(1, dtype=x.dtype, generator=generator) * distance.sum()
        chosen.append(min(int(torch.searchsorted(distance.cumsum(0), at, right=True)), int(distance.nonzero()[-1])))
        distance = distance.minimum((x - x[chosen[-1]]).square().sum(1))
    return x[chosen]


class _Sums(NamedTuple):
    """All that a regression on [text 1] asks of its pairs; those of a part can be taken away."""

    gram: torch.Tensor  # (t + 1, t + 1)
    cross: torch.Tensor  # (t + 1, d)

    @staticmethod
    def of(text: torch.Tensor, image: torch.Tensor) -> _Sums:
        text = F.pad(text, (0, 1), value=1.0)
        return _Sums(text.T @ text, text.T @ image)

    def without(self, part: _Sums) -> _Sums:
        return _Sums(self.gram - part.gram, self.cross - part.cross)

    def solver(self) -> Callable[[float], tuple[torch.Tensor, torch.Tensor]]:
        """strength -> weight (t, d) and bias (d) that make |image - text weight - bias|^2 + strength n |weight|^2 least."""
        n = self.gram[-1, -1]
        text, image = self.gram[-1, :-1] / n, self.cross[-1] / n
        values, vectors = torch.linalg.eigh(self.gram[:-1, :-1] - n * text.outer(text))
        turned = vectors.T @ (self.cross[:-1] - n * text.outer(image))

        def solve(strength: float) -> tuple[torch.Tensor, torch.Tensor]:
            weight = vectors @ (turned / (values.clamp_min(0) + strength * n)[:, None])
            return weight, image - text @ weight

        return solve


def _fit_ridge(text, image, norm, generator, tell) -> dict[str, torch.Tensor]:
    """The strength is that with the least error on texts that were held out, and the deviation is that error: what is left on
    the pairs themselves would be next to nothing where they are fewer than the numbers of a text."""
    scaling = _text_moments(text)
    text, fold = scaling.whitened(text), _folds(text, generator)
    whole = _Sums.of(text, image)
    left, judged = image.new_zeros(len(STRENGTHS), image.shape[1]), 0
    for part in range(FOLDS):
        tell()
        rows = (fold == part).nonzero().flatten()
        solve = whole.without(_Sums.of(text[rows], image[rows])).solver()
        rows = rows[torch.randperm(len(rows), generator=generator)[:JUDGED]]
        judged += len(rows)
        for squares, strength in zip(left, STRENGTHS, strict=True):
            weight, bias = solve(strength)
            squares += (image[rows] - text[rows] @ weight - bias).square().sum(0)
    best = int((left / norm.std.square()).sum(1).argmin())
    weight, bias = whole.solver()(STRENGTHS[best])
    weight = weight / scaling.std[:, None]
    std = (left[best] / judged).sqrt().maximum(LEAST_STD * norm.std)
    linear = {"weight": weight.T, "bias": bias - scaling.mean @ weight, "std": std}
    return {f"start.linear.{name}": x for name, x in linear.items()}


def _folds(text: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(n) the part each pair belongs to. Pairs of one text stay together, or what is held out would be known already; where all
    texts are one the pairs are parted."""
    different, which = text.unique(dim=0, return_inverse=True)
    if len(different) == 1:
        which = torch.arange(len(text))
    return (torch.randperm(int(which.max()) + 1, generator=generator) % FOLDS)[which]
