"""How well scores order things: rank and linear correlation, pairs in the right order, distance in units.

Plain numpy functions over scores and true values (N,); higher scores should go with higher values. All but the error ignore the
scale of the scores.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ecliptic.eval import metrics
from ecliptic.eval.report import FRACTION, Number, Report

Floats = NDArray[np.float64]


def pearson(scores: ArrayLike, values: ArrayLike) -> float:
    """Linear correlation (PLCC) in [-1, 1]; 0 where either is constant."""
    s, v = _both(scores, values)
    a, b = s - s.mean(), v - v.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(np.clip(a @ b / size, -1, 1)) if size > 0 else 0.0


def spearman(scores: ArrayLike, values: ArrayLike) -> float:
    """Rank correlation (SRCC) in [-1, 1]: `pearson` of the ranks, ties at their mean rank; 0 where either is constant."""
    s, v = _both(scores, values)
    return pearson(_ranks(s), _ranks(v))


def pairwise_accuracy(scores: ArrayLike, values: ArrayLike) -> float:
    """Of all pairs whose values differ, the share that the scores put in the right order; equal scores count one half.

    In [0, 1], 0.5 is chance. ValueError where all values are equal.
    """
    s, v = _both(scores, values)
    order = np.sign(v[:, None] - v[None, :])
    if not order.any():
        raise ValueError("all values are equal: there is no order to find")
    agree = (1 + order * np.sign(s[:, None] - s[None, :])) / 2
    return float(agree[order != 0].mean())


def mean_absolute_error(scores: ArrayLike, values: ArrayLike) -> float:
    """Mean |score - value|, in units of the values."""
    s, v = _both(scores, values)
    return float(np.abs(s - v).mean())


def ranking_report(scores: ArrayLike, values: ArrayLike, *, resamples: int = 1000, seed: int = 0) -> Report:
    """The four as a report with 95 % bootstrap intervals: `ranking.srcc`, `.plcc`, `.pairwise_accuracy`, `.mae`."""
    s, v = _both(scores, values)
    report = Report("Ranking", subtitle=f"{len(s)} things")
    pairwise_accuracy(s, v)  # raises where there is no order at all

    def pairs(a: Floats, b: Floats) -> float:
        return pairwise_accuracy(a, b) if len(set(b.tolist())) > 1 else 0.5

    measures: tuple[tuple[str, Any, str], ...] = (
        ("srcc", spearman, ""),
        ("plcc", pearson, ""),
        ("pairwise_accuracy", pairs, FRACTION),
        ("mae", mean_absolute_error, ""),
    )
    for name, measure, unit in measures:
        low, high = metrics.bootstrap(measure, s, v, resamples=resamples, seed=seed)
        report.numbers[f"ranking.{name}"] = Number(measure(s, v), low, high, n=len(s), unit=unit)
    report.notes.append(f"Intervals: 95 %, percentile bootstrap, {resamples} resamples, seed {seed}.")
    return report


def _ranks(values: Floats) -> Floats:
    """(N,) -> ranks from 1, equal values at their mean rank."""
    _, inverse, count = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(count) - (count - 1) / 2)[inverse]
    return ranks


def _both(scores: ArrayLike, values: ArrayLike) -> tuple[Floats, Floats]:
    s, v = np.asarray(scores, dtype=float), np.asarray(values, dtype=float)
    if s.shape != v.shape or s.ndim != 1 or not len(s):
        raise ValueError(f"scores and values must be (N,) with N above 0, got {s.shape} and {v.shape}")
    if not (np.isfinite(s).all() and np.isfinite(v).all()):
        raise ValueError("scores and values must be finite")
    return s, v
