"""Choosing how to order pictures by a quantity, and saying honestly how well that does: `eval.nested` for rank correlation.

Correlations are computed within folds, whose pictures one fit has judged, and averaged by their size: the scores of two
fits, or of two methods, need not be of one scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ecliptic.eval.nested import Fold, choices, fits
from ecliptic.eval.ranking import pairwise_accuracy, spearman

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def deal_values(values: ArrayLike, folds: int = 4, seed: int = 0) -> Ints:
    """values (N,) -> (N,), the fold that holds each picture out; every fold gets its share of small and of large values.

    ValueError for fewer than three folds, or than three pictures a fold: two cannot tell a good order from luck.
    """
    values = np.asarray(values, dtype=float)
    if folds < 3:
        raise ValueError(f"folds={folds}: to choose, judge and learn takes at least three")
    if len(values) < 3 * folds:
        raise ValueError(f"{len(values)} pictures are too few for {folds} folds: it takes {3 * folds}")
    random = np.random.default_rng(seed)
    order = np.lexsort((random.random(len(values)), values))  # equal values in random order
    found = np.empty(len(values), dtype=np.int64)
    for start in range(0, len(values), folds):
        rows = order[start : start + folds]
        found[rows] = random.permutation(folds)[: len(rows)]
    return found


@dataclass(frozen=True)
class NestedRanking:
    """winner: of the highest mean correlation, by plain cross-validation. chosen: the one chosen without each fold.

    scores: of each method, (N,), by the fit that has not seen the picture. honest: those of whatever was chosen without its fold.
    """

    winner: str
    chosen: tuple[str, ...]
    scores: dict[str, Floats]
    honest: Floats


def judge_ranking(answers: Mapping[str, Mapping[Fold, ArrayLike]], values: ArrayLike, fold: ArrayLike) -> NestedRanking:
    """answers: method -> what a fit left out -> scores (N,), of which those of the folds left out are read."""
    values, fold = np.asarray(values, dtype=float), np.asarray(fold)
    if not answers:
        raise ValueError("there is no method to choose from")
    if short := [name for name, said in answers.items() if not set(fits(fold)) <= said.keys()]:
        raise ValueError(f"{short[0]} has not been fitted without every fold and every two of them")
    folds = sorted({*fold.tolist()})

    def said(name: str, left_out: Fold, j: int) -> Floats:
        own: Floats = np.asarray(answers[name][left_out], dtype=float)[fold == j]
        return own

    winner, chosen = choices(
        lambda name, left_out, j: float((fold == j).sum() * spearman(said(name, left_out, j), values[fold == j])),
        list(answers),
        folds,
    )
    scores = {name: np.empty(len(values)) for name in answers}
    honest = np.empty(len(values))
    for k, best in zip(folds, chosen, strict=True):
        for name, own in scores.items():
            own[fold == k] = said(name, frozenset({k}), k)
        honest[fold == k] = scores[best][fold == k]
    return NestedRanking(winner, chosen, scores, honest)


def mean_srcc(scores: Floats, values: Floats, fold: Ints) -> float:
    """Spearman's correlation within each fold, averaged by the number of its pictures."""
    return float(sum((fold == k).sum() * spearman(scores[fold == k], values[fold == k]) for k in set(fold)) / len(fold))


def mean_pairwise_accuracy(scores: Floats, values: Floats, fold: Ints) -> float:
    """Of the pairs of one fold whose values differ, the share in the right order; averaged alike, 0.5 for no pairs."""

    def share(k: int) -> float:
        own = values[fold == k]
        return pairwise_accuracy(scores[fold == k], own) if len(np.unique(own)) > 1 else 0.5

    return float(sum((fold == k).sum() * share(k) for k in set(fold)) / len(fold))


def srcc_interval(scores: Floats, values: Floats, fold: Ints, **options: int) -> tuple[float, float]:
    """95 % bootstrap interval of `mean_srcc`, which it always holds; the pictures of each fold are drawn anew."""
    return _around(mean_srcc(scores, values, fold), _drawn(_srcc, scores, values, fold, **options))


def pairwise_interval(scores: Floats, values: Floats, fold: Ints, **options: int) -> tuple[float, float]:
    """The same of `mean_pairwise_accuracy`."""
    return _around(
        mean_pairwise_accuracy(scores, values, fold), _drawn(_share_in_order, scores, values, fold, **options)
    )


def srcc_difference(new: Floats, old: Floats, values: Floats, fold: Ints, **options: int) -> tuple[float, float, float]:
    """(difference, low, high) of `mean_srcc` on the same draws; above 0 where the new orders better."""
    value = mean_srcc(new, values, fold) - mean_srcc(old, values, fold)
    drawn = (_drawn(_srcc, scores, values, fold, **options) for scores in (new, old))
    return value, *_around(value, next(drawn) - next(drawn))


def _drawn(
    measure: Callable[[Floats, Floats, Floats], Floats],
    scores: Floats,
    values: Floats,
    fold: Ints,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Floats:
    """(R,): a measure of each fold with its pictures drawn anew, averaged by the size of the fold.

    measure: scores (n,), values (n,), how often each picture was drawn (R, n) -> (R,).
    """
    random = np.random.default_rng(seed)
    total = np.zeros(resamples)
    for k in sorted({*fold.tolist()}):
        rows = np.flatnonzero(fold == k)
        counts = random.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), resamples).astype(float)
        total += len(rows) * measure(scores[rows], values[rows], counts)
    return total / len(fold)


def _srcc(scores: Floats, values: Floats, counts: Floats) -> Floats:
    """`spearman` where each picture stands as often as it was drawn, (R,)."""
    n = counts.sum(1, keepdims=True)
    ranks = []
    for x in (scores, values):
        below = (x[:, None] < x[None]) + (x[:, None] == x[None]) / 2  # (j, i): what a copy of j adds to the rank of i
        own = counts @ below
        ranks.append(own - (counts * own).sum(1, keepdims=True) / n)
    s, v = ranks
    size = np.sqrt((counts * s * s).sum(1) * (counts * v * v).sum(1))
    return np.asarray((counts * s * v).sum(1) / np.where(size > 1e-9, size, np.inf), dtype=float)


def _share_in_order(scores: Floats, values: Floats, counts: Floats) -> Floats:
    """`pairwise_accuracy` where each picture stands as often as it was drawn, (R,); 0.5 where no values differ."""
    above = (values[:, None] > values[None]).astype(float)
    right = above * (1 + np.sign(scores[:, None] - scores[None])) / 2
    pairs = ((counts @ above) * counts).sum(1)
    return np.asarray(np.where(pairs > 0, ((counts @ right) * counts).sum(1) / np.maximum(pairs, 1), 0.5), dtype=float)


def _around(value: float, draws: Floats) -> tuple[float, float]:
    """Percentiles, widened to hold the value: ties among drawn pictures pull correlations of few of them down."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return min(float(low), value), max(float(high), value)
