"""How relevant a hit is, and whether an index holds what was asked for at all.

The best cosine of a query says little by itself: what it reaches by chance differs from model to model and from collection
to collection, and some pictures lie near every text. So a score is not held against a fixed cosine but against a background,
a thousand captions of common things (`ecliptic.apps.index.background`):

1. A picture's score is lowered by half of how well it fits the background captions that fit it best. This is the picture's
   half of CSLS (arXiv 1710.04087 eq. 3): a picture that everything resembles has to be met by more.
2. Each background caption is itself asked of the index. Their best scores, lowered likewise, say what is reached by something
   that has no more to do with these pictures than common things have; a hit's score is counted from their median, in units
   of their spread. That is its `excess`.

A logistic function turns the excess into a relevance in [0, 1]. Its two numbers come from clip art and serve all models and
collections: what goes in is in units of the background. docs/relevance.md tells how often the verdict is right. numpy only.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ecliptic.apps.index import background
from ecliptic.core.files import atomic_file
from ecliptic.data.cache import cache_dir, read_json, write_json

if TYPE_CHECKING:
    from ecliptic.apps.index.index import Index

Array = NDArray[Any]
Floats = NDArray[np.float64]

SAMPLE = 512  # pictures that the background is asked of; `_rise` allows for the others. Ours
LARGEST = 100_000  # pictures of an index about which anything is said; ours
FEWEST = 50  # background captions; percentiles of fewer are noise. Ours
SAME = 0.999  # cosine from which a background caption is the query itself, and left out
SLOPE = 0.53  # of the log-odds, per unit of excess: `python -m benchmarks.relevance calibrate`
LIMIT = 0.2  # the excess of relevance 0.5: four of five queries that clip art answers lie above (same command)
# Both with the weights of "offline" before its class names were made richer, at commit 881f2a5.
FIRST = 10  # hits that a verdict looks at, however few are shown: it must not depend on that. Ours


class Verdict(NamedTuple):
    """What is to be said of one query's hits. relevance: (k,) in [0, 1], one per hit, comparable across queries.

    matches: whether any hit is relevant, at 0.5 or more.
    """

    relevance: Floats
    matches: bool


@dataclass(frozen=True, eq=False)
class Relevance:
    """The background as one index sees it. Make one with `Relevance.fit`.

    background: (M, D) unit rows. level, unit: of the best scores of background captions, the median and the distance from it
    down to the 16th percentile (one standard deviation, were they normal; things that are there are in the upper half).
    """

    background: Array
    level: float
    unit: float

    @classmethod
    def fit(cls, captions: ArrayLike, pictures: ArrayLike, total: int | None = None) -> Relevance:
        """captions (M, D), the background's vectors, and pictures (N, D), of the same model; only directions count.

        total: how many pictures the index holds if `pictures` are a sample of them. The order of either does not matter.
        """
        texts, seen = _rows(captions, "captions"), _rows(pictures, "pictures")
        if len(texts) < FEWEST:
            raise ValueError(f"the background holds {len(texts)} captions; give at least {FEWEST}")
        if not len(seen):
            raise ValueError("pictures is empty: there is nothing to be relevant")
        scores = texts @ seen.T
        lowered = scores - 0.5 * _crowding(scores, leave_out=True)
        low, middle = np.percentile(lowered.max(1), [16, 50])
        rise = _rise(len(seen), total or len(seen)) * float(np.median(lowered.std(1)))
        return cls(texts, float(middle) + rise, max(float(middle - low), 1e-3))

    def excess(self, query: ArrayLike, hits: ArrayLike) -> Floats:
        """query (D,) text vector, hits (k, D) -> (k,): how far each hit lies above the level, in units.

        For one picture it grows with the cosine, at a fixed rate.
        """
        (asked,) = _rows(np.reshape(np.asarray(query), (1, -1)), "query")
        found = _rows(hits, "hits")
        others = self.background[self.background @ asked < SAME]
        if len(others) < FEWEST:  # a model to which all texts are alike
            others = self.background
        score = found @ asked - 0.5 * _crowding(others @ found.T)
        return np.asarray((score.astype(np.float64) - self.level) / self.unit)

    def score(self, query: ArrayLike, hits: ArrayLike) -> Floats:
        """query (D,) text vector and the vectors of its hits (k, D) -> (k,) relevance in [0, 1]."""
        return np.asarray(1 / (1 + np.exp(-SLOPE * (self.excess(query, hits) - LIMIT))))

    def judge(self, query: ArrayLike, hits: ArrayLike) -> Verdict:
        """The same with the verdict. `hits` must hold the best `FIRST`, or all there are."""
        relevance = self.score(query, hits)
        return Verdict(relevance, bool((relevance >= 0.5).any()))


def of_index(index: Index, encode: Callable[[list[str]], Any]) -> Relevance | None:
    """The background as an index sees it, looked at again only after the index has changed.

    encode: texts -> (M, D) by the index's model. None where there is nothing to judge by: an empty index, or one of more than
    `LARGEST` pictures, in which so many of the common things are that the background is none.
    """
    if not 0 < len(index) <= LARGEST:
        return None
    captions = load_background(index.signature.model, encode)
    state = index._store.snapshot()
    key = (str(index.folder), *index.signature, state.generation, state.rows, len(index), len(captions), SAMPLE)
    path = cache_dir() / "background" / f"{_digest(map(str, key))}.json"
    kept = read_json(path)
    if isinstance(kept, list) and len(kept) == 2:
        return Relevance(_rows(captions, "captions"), *map(float, kept))
    _, vectors, rows = index._store.matrix()
    spread = np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows))).round().astype(np.int64)
    found = Relevance.fit(captions, np.asarray(vectors[rows[spread]], np.float32), total=len(rows))
    with contextlib.suppress(OSError):
        write_json(path, [found.level, found.unit])
    return found


def load_background(model: str, encode: Callable[[list[str]], Any]) -> Array:
    """The background's vectors (M, D) for a model, by its id; computed by `encode` at first, then kept in the cache.

    A cache that cannot be written costs the time to encode again, nothing else.
    """
    captions = background.captions(model)
    path = cache_dir() / "background" / f"{_digest([model, *captions])}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):
        return np.asarray(np.load(path))
    vectors = np.asarray(encode(captions), np.float16)
    with contextlib.suppress(OSError), atomic_file(path) as file:
        np.save(file, vectors)
    return vectors


def _digest(parts: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def _rows(values: ArrayLike, name: str) -> Array:
    """(n, D) -> unit rows in float32; refuses what has no direction."""
    rows = np.asarray(values, np.float32)
    if rows.ndim != 2:
        raise ValueError(f"{name} must be rows of vectors (n, D), got the shape {rows.shape}")
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    if not (np.isfinite(length) & (length > 0)).all():
        raise ValueError(f"{name} holds a vector that is zero or not finite")
    return np.asarray(rows / length)


def _crowding(scores: Array, leave_out: bool = False) -> Array:
    """scores (M, N) of background captions and pictures -> (N,): mean of each picture's best hundredth, at least ten.

    leave_out: (M, N) instead, for each caption the mean without itself.
    """
    k = min(max(10, round(len(scores) / 100)), len(scores) - 1)
    best = -np.partition(-scores, k, axis=0)[: k + 1]
    following = best.min(0)  # the one after the k best
    total = best.sum(0) - following
    if not leave_out:
        return np.asarray(total / k)
    return np.asarray((total - np.maximum(scores - following, 0)) / k)


def _rise(seen: int, total: int) -> float:
    """How much higher, in standard deviations, the best of `total` normal scores is expected to lie than that of `seen`.

    Blom's approximation (1958) to the greatest of n: the quantile at (n - 0.375) / (n + 0.25).
    """

    def best(n: int) -> float:
        return NormalDist().inv_cdf((n - 0.375) / (n + 0.25))

    return best(total) - best(seen)
