"""Choosing how to order pictures by a quantity, and saying honestly how well that does: `eval.nested` for rank correlation.

Correlations are computed within folds, whose pictures one fit has judged, and averaged by their size: the scores of two
fits, or of two methods, need not be of one scale.
"""

from __future__ import annotations

from collections.abc import Mapping
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
        return np.asarray(answers[name][left_out], dtype=float)[fold == j]

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


def resampled(fold: Ints, resamples: int = 1000, seed: int = 0) -> Ints:
    """(R, N) positions: the pictures of each fold drawn anew, with replacement."""
    random = np.random.default_rng(seed)
    drawn = [rows[random.integers(0, len(rows), (resamples, len(rows)))] for rows in _rows(fold)]
    return np.concatenate(drawn, axis=1)


def srcc_interval(
    scores: Floats, values: Floats, fold: Ints, *, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval of `mean_srcc`, which it always holds."""
    draws = resampled(fold, resamples, seed)
    return _around(
        mean_srcc(scores, values, fold), [mean_srcc(scores[draw], values[draw], fold[draw]) for draw in draws]
    )


def srcc_difference(
    new: Floats, old: Floats, values: Floats, fold: Ints, *, resamples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """(difference, low, high) of `mean_srcc` on the same draws; above 0 where the new orders better."""

    def difference(rows: Ints) -> float:
        return mean_srcc(new[rows], values[rows], fold[rows]) - mean_srcc(old[rows], values[rows], fold[rows])

    value = difference(np.arange(len(fold)))
    return value, *_around(value, [difference(draw) for draw in resampled(fold, resamples, seed)])


def _rows(fold: Ints) -> list[Ints]:
    return [np.flatnonzero(fold == k) for k in sorted({*fold.tolist()})]


def _around(value: float, draws: list[float]) -> tuple[float, float]:
    """Percentiles, widened to hold the value: ties among drawn pictures pull correlations of few of them down."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return min(float(low), value), max(float(high), value)
