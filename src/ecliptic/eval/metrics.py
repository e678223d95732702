"""Metrics as plain numpy functions: ranks, accuracy, calibration, area under the curve, and bootstrap intervals.

Everything takes arrays and returns arrays or floats; nothing here knows a model. Functions that end in `hits` return
one value in [0, 1] per query, so that the same bootstrap serves them all. Randomness comes from a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Ranks(NamedTuple):
    """Where the first right item of each query stands, ties kept apart. Each field is (Q,) int64.

    above: wrong items that score strictly higher than the best right one. tied_wrong: wrong items that score the same.
    tied_right: right items that score the same, itself included.
    """

    above: Ints
    tied_wrong: Ints
    tied_right: Ints


def ranks(similarity: ArrayLike, query_group: ArrayLike | None = None, gallery_group: ArrayLike | None = None) -> Ranks:
    """similarity (Q, G), higher is closer. An item is right for a query when their groups agree.

    Without groups query i belongs to item i (square matrix). Several captions of one picture share its group.
    """
    s = _matrix(similarity, "similarity")
    q = np.arange(s.shape[0]) if query_group is None else np.asarray(query_group)
    g = np.arange(s.shape[1]) if gallery_group is None else np.asarray(gallery_group)
    if q.shape != s.shape[:1] or g.shape != s.shape[1:]:
        raise ValueError(f"similarity is {s.shape}, but there are {q.shape} query and {g.shape} gallery groups")
    right = q[:, None] == g[None, :]
    if not right.any(1).all():
        raise ValueError(f"query {int(np.argmin(right.any(1)))} has no right item in the gallery")
    best = np.where(right, s, -np.inf).max(1, keepdims=True)
    tied = s == best
    return Ranks(((s > best) & ~right).sum(1), (tied & ~right).sum(1), (tied & right).sum(1))


def recall_hits(ranks: Ranks, k: int) -> Floats:
    """Probability that a right item is among the first k when ties are broken at random; (Q,) in [0, 1].

    Without ties this is plain recall@k. With ties it is its expected value, so a model that scores everything alike
    gets chance, neither 1 (the optimistic rule) nor 0. With m = k - above places left among p right and t wrong tied
    items, the chance to miss is C(t, m) / C(p + t, m).
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    places = np.maximum(k - ranks.above, 0)
    both = ranks.tied_wrong + ranks.tied_right
    miss = np.ones(len(places))
    for j in range(int(ranks.tied_right.max(initial=0))):  # right item j also falls outside the m places
        chance = np.maximum(both - places - j, 0) / np.maximum(both - j, 1)
        miss = np.where(j < ranks.tied_right, miss * chance, miss)
    return 1.0 - miss


def expected_rank(ranks: Ranks) -> Floats:
    """Mean rank of the first right item over random tie breaks, from 1; (Q,). `above + (p + t + 1) / (p + 1)`."""
    return np.asarray(ranks.above + (ranks.tied_right + ranks.tied_wrong + 1) / (ranks.tied_right + 1), dtype=float)


def recall_at_k(
    similarity: ArrayLike, caption_group: ArrayLike | None = None, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Both ways at once. similarity (N pictures, M captions); caption_group (M,) is the picture of each caption.

    Image to text counts a picture as found when any of its captions is among the first k (the usual protocol of
    COCO and Flickr30k); text to image averages over captions. Ties: see `recall_hits`.
    """
    s = _matrix(similarity, "similarity")
    owner = np.arange(s.shape[1]) if caption_group is None else np.asarray(caption_group)
    pictures = np.arange(s.shape[0])
    ways = {"text_to_image": ranks(s.T, owner, pictures), "image_to_text": ranks(s, pictures, owner)}
    return {f"{way}.recall@{k}": float(recall_hits(r, k).mean()) for way, r in ways.items() for k in ks}


def top_k_hits(scores: ArrayLike, truth: ArrayLike, k: int = 1) -> Floats:
    """scores (N, K), truth (N,) class indices -> (N,): is the truth among the k best? Ties as in `recall_hits`."""
    s, t = _scores(scores, truth)
    own = s[np.arange(len(s)), t][:, None]
    above, tied = (s > own).sum(1), (s == own).sum(1) - 1
    return np.asarray(np.clip((k - above) / (tied + 1), 0.0, 1.0))


def accuracy(scores: ArrayLike, truth: ArrayLike, k: int = 1) -> float:
    """Top-k accuracy in [0, 1]."""
    return float(top_k_hits(scores, truth, k).mean())


def per_class_accuracy(hits: ArrayLike, truth: ArrayLike, classes: int) -> Floats:
    """hits (N,), truth (N,) -> (classes,) mean of the hits of each class, NaN for a class without pictures."""
    h, t = np.asarray(hits, dtype=float), np.asarray(truth)
    count = np.bincount(t, minlength=classes).astype(float)
    count[count == 0] = np.nan
    return np.asarray(np.bincount(t, weights=h, minlength=classes) / count)


def confusion_matrix(truth: ArrayLike, answer: ArrayLike, classes: int) -> Ints:
    """(classes, classes) counts: row is the truth, column the answer."""
    t, a = np.asarray(truth, dtype=np.int64), np.asarray(answer, dtype=np.int64)
    if t.shape != a.shape:
        raise ValueError(f"truth is {t.shape}, answer is {a.shape}")
    if len(t) and (min(t.min(), a.min()) < 0 or max(t.max(), a.max()) >= classes):
        raise ValueError(f"class indices must lie in 0..{classes - 1}")
    return np.bincount(t * classes + a, minlength=classes * classes).reshape(classes, classes)


class Bins(NamedTuple):
    """A reliability diagram; per bin (lower, upper]: pictures, mean confidence and mean accuracy, NaN if empty."""

    lower: Floats
    upper: Floats
    pictures: Ints
    confidence: Floats
    accuracy: Floats


def reliability(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> Bins:
    """confidence (N,) in [0, 1], correct (N,) in [0, 1]; equal-width bins, each open below and closed above."""
    c, r = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=float)
    if c.shape != r.shape or c.ndim != 1:
        raise ValueError(f"confidence is {c.shape}, correct is {r.shape}; both must be (N,)")
    if len(c) and not (c.min() >= 0 and c.max() <= 1 + 1e-6):
        raise ValueError(f"confidence must lie in [0, 1], got {c.min()} to {c.max()}: pass probabilities, not logits")
    edges = np.linspace(0.0, 1.0, bins + 1)
    where = np.searchsorted(edges[1:-1], c, side="left")
    count = np.bincount(where, minlength=bins)
    safe = np.where(count == 0, np.nan, count.astype(float))
    return Bins(
        edges[:-1],
        edges[1:],
        count,
        np.bincount(where, weights=c, minlength=bins) / safe,
        np.bincount(where, weights=r, minlength=bins) / safe,
    )


def calibration_error(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """Expected calibration error, arXiv 1706.04599 eq. 3: mean |accuracy - confidence| over bins, by their share.

    In [0, 1], lower is better. 15 equal-width bins are that paper's choice (section 5).
    """
    b = reliability(confidence, correct, bins)
    if not b.pictures.sum():
        raise ValueError("calibration error needs at least one picture")
    gap = np.where(b.pictures > 0, np.abs(b.accuracy - b.confidence), 0.0)
    return float((gap * b.pictures).sum() / b.pictures.sum())


def brier_score(probabilities: ArrayLike, truth: ArrayLike) -> float:
    """Brier (1950), all classes: mean over pictures of sum_k (p_k - [k is the truth])^2; in [0, 2], lower is better."""
    p, t = _scores(probabilities, truth)
    return float(((p**2).sum(1) - 2 * p[np.arange(len(p)), t] + 1).mean())


def softmax(logits: ArrayLike) -> Floats:
    """Rows of (N, K) logits to probabilities."""
    x = np.asarray(logits, dtype=float)
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


class Roc(NamedTuple):
    """How many positives and negatives have each distinct score, the highest score first; both (U,) int64.

    All that a ROC curve is made of: after the first u scores it stands at (share of negatives, share of positives) so far.
    """

    positives: Ints
    negatives: Ints

    def area(self) -> float:
        """The chance that a positive scores above a negative, ties counting one half."""
        return float(_area(self.positives[None], self.negatives[None])[0])

    def fpr(self, tpr: float = 0.95) -> float:
        """Share of negatives let through where the curve first reaches `tpr`, straight between its points."""
        return float(_false_positives(self.positives[None], self.negatives[None], tpr)[0])

    def intervals(
        self, tpr: float = 0.95, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
    ) -> tuple[tuple[float, float], tuple[float, float]]:
        """Percentile intervals of `area` and of `fpr(tpr)`; positives and negatives are each drawn anew, their numbers fixed."""
        rng = np.random.default_rng(seed)
        areas, rates = [], []
        owners = [np.repeat(np.arange(len(side)), side) for side in self]
        block = max(1, 2_000_000 // sum(map(len, owners)))
        for first in range(0, resamples, block):
            rows = min(block, resamples - first)
            yes, no = (_resampled(side, rows, len(self.positives), rng) for side in owners)
            areas.append(_area(yes, no))
            rates.append(_false_positives(yes, no, tpr))
        return _percentiles(np.concatenate(areas), level), _percentiles(np.concatenate(rates), level)


def roc(scores: ArrayLike, positive: ArrayLike) -> Roc:
    """scores (N,), positive (N,) of truth values. ValueError for NaN, or unless there are positives and negatives."""
    s, y = np.asarray(scores, dtype=float).ravel(), np.asarray(positive).ravel().astype(bool)
    if s.shape != y.shape:
        raise ValueError(f"scores has {s.size} values, positive has {y.size}")
    if np.isnan(s).any():
        raise ValueError("scores holds NaN")
    if not y.any() or y.all():
        raise ValueError(f"AUROC needs both kinds: there are {int(y.sum())} positives and {int((~y).sum())} negatives")
    levels, code = np.unique(-s, return_inverse=True)
    return Roc(*(np.bincount(code[side], minlength=len(levels)) for side in (y, ~y)))


def auroc(scores: ArrayLike, positive: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting one half."""
    return roc(scores, positive).area()


def fpr_at_tpr(scores: ArrayLike, positive: ArrayLike, tpr: float = 0.95) -> float:
    """The share of negatives above a threshold that keeps `tpr` of the positives; lower is better.

    The ROC curve is read where it first reaches `tpr`, by linear interpolation between its points, one a distinct score.
    """
    return roc(scores, positive).fpr(tpr)


def balanced_accuracy(said: ArrayLike, positive: ArrayLike) -> float:
    """said (N,) and positive (N,), truth values -> mean of the shares of positives and of negatives said right; chance is 0.5.

    For a yes-or-no decision, whatever the numbers of both kinds are. ValueError where one kind is missing.
    """
    a, y = np.asarray(said).ravel().astype(bool), np.asarray(positive).ravel().astype(bool)
    if a.shape != y.shape:
        raise ValueError(f"said has {a.size} values, positive has {y.size}")
    if not y.any() or y.all():
        raise ValueError(f"it takes both kinds: there are {int(y.sum())} positives and {int((~y).sum())} negatives")
    return float((a[y].mean() + (~a[~y]).mean()) / 2)


def _area(positives: Ints, negatives: Ints) -> Floats:
    """(R, U) counts each, highest score first -> (R,)."""
    below = negatives.sum(1, keepdims=True) - negatives.cumsum(1)
    wins = (positives * (below + negatives / 2)).sum(1)
    return np.asarray(wins / (positives.sum(1) * negatives.sum(1)), dtype=float)


def _false_positives(positives: Ints, negatives: Ints, tpr: float) -> Floats:
    """(R, U) counts each, highest score first -> (R,)."""
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr={tpr}: it must lie above 0 and not above 1")
    rows = np.arange(len(positives))
    hits, alarms = ((np.cumsum(n, 1) / n.sum(1, keepdims=True)) for n in (positives, negatives))
    at = (hits >= tpr - 1e-12).argmax(1)  # the first point that high; sums of shares are off by a rounding error
    share = positives[rows, at] / positives.sum(1)
    part = np.clip(1 - (hits[rows, at] - tpr) / share, 0, 1)  # of the way from the point before
    return np.asarray(alarms[rows, at] - (1 - part) * negatives[rows, at] / negatives.sum(1), dtype=float)


def _resampled(owners: Ints, rows: int, levels: int, rng: np.random.Generator) -> Ints:
    """(n,) the level of each value -> (rows, levels) counts of n values drawn from them with replacement."""
    drawn = owners[rng.integers(0, len(owners), (rows, len(owners)))] + levels * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * levels).reshape(rows, levels)


def bootstrap_mean(
    values: ArrayLike, groups: ArrayLike | None = None, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of `values` (N,), drawing pictures with replacement.

    groups (N,) names the picture of each value (several captions per picture): whole pictures are drawn, because
    captions of one picture are not independent.
    """
    v = _values(values)
    sums: Floats = v
    counts: Ints | None = None
    if groups is not None:
        _, index = np.unique(np.asarray(groups), return_inverse=True)
        if index.shape != v.shape:
            raise ValueError(f"there are {len(v)} values and {len(index)} groups")
        sums = np.asarray(np.bincount(index, weights=v), dtype=float)
        counts = np.bincount(index)
    means = np.concatenate(
        [
            sums[draw].mean(1) if counts is None else sums[draw].sum(1) / counts[draw].sum(1)
            for draw in _draws(len(sums), resamples, seed)
        ]
    )
    return _percentiles(means, level)


def bootstrap(
    statistic: Callable[..., float], *arrays: ArrayLike, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of any statistic of arrays that share their first axis (rows are drawn together)."""
    given: list[NDArray[Any]] = [np.asarray(a) for a in arrays]
    if not given or len({len(a) for a in given}) != 1 or not len(given[0]):
        raise ValueError(f"bootstrap needs arrays of one length above 0, got {[len(a) for a in given]}")
    draws = _draws(len(given[0]), resamples, seed)
    return _percentiles(np.array([statistic(*(a[row] for a in given)) for draw in draws for row in draw]), level)


def proportion_interval(
    hits: ArrayLike, groups: ArrayLike | None = None, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """`bootstrap_mean`, but honest when all hits agree.

    If every hit is 1 (or 0), every resample is too, and the percentile interval shrinks to a point, however few the
    pictures. Then the exact binomial bound (Clopper and Pearson 1934) is returned: ((1-level)/2)^(1/n) to 1 for n of n.
    """
    h = _values(hits)
    if h.min() < 0 or h.max() > 1:
        raise ValueError(f"hits must lie in [0, 1], got {h.min()} to {h.max()}")
    n = len(h) if groups is None else len(np.unique(np.asarray(groups)))
    bound = float(((1 - level) / 2) ** (1 / n))
    if (h == 1).all():
        return bound, 1.0
    if (h == 0).all():
        return 0.0, 1 - bound
    return bootstrap_mean(h, groups, resamples=resamples, level=level, seed=seed)


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean of a - b over the same pictures with its percentile interval: (difference, low, high); a better: above 0.

    Each resample draws the same pictures for both, so what makes a picture hard for both cancels.
    """
    x, y = _values(a), _values(b)
    if x.shape != y.shape:
        raise ValueError(f"a has {len(x)} values, b has {len(y)}: a paired difference needs the same pictures")
    low, high = bootstrap_mean(x - y, groups, resamples=resamples, level=level, seed=seed)
    return float((x - y).mean()), low, high


def _draws(n: int, resamples: int, seed: int) -> list[NDArray[np.int64]]:
    """Index blocks (rows, n) that together hold `resamples` rows; blocks bound the memory to about 16 MB each."""
    rng = np.random.default_rng(seed)
    block = max(1, 2_000_000 // n)
    return [rng.integers(0, n, (min(block, resamples - i), n), dtype=np.int64) for i in range(0, resamples, block)]


def _percentiles(values: Floats, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _values(values: ArrayLike) -> Floats:
    v = np.asarray(values, dtype=float)
    if v.ndim != 1 or not len(v):
        raise ValueError(f"values must be (N,) with N above 0, got {v.shape}")
    if np.isnan(v).any():
        raise ValueError("values holds NaN")
    return v


def _matrix(values: ArrayLike, name: str) -> NDArray[Any]:
    m = np.asarray(values)
    if m.ndim != 2 or 0 in m.shape:
        raise ValueError(f"{name} must be a matrix with at least one row and column, got {m.shape}")
    if np.isnan(m).any():
        raise ValueError(f"{name} holds NaN")
    return m


def _scores(scores: ArrayLike, truth: ArrayLike) -> tuple[NDArray[Any], Ints]:
    s, t = _matrix(scores, "scores"), np.asarray(truth, dtype=np.int64)
    if t.shape != s.shape[:1]:
        raise ValueError(f"scores has {len(s)} rows, truth has shape {t.shape}")
    if t.min() < 0 or t.max() >= s.shape[1]:
        raise ValueError(f"truth must lie in 0..{s.shape[1] - 1}, got {t.min()} to {t.max()}")
    return s, t
