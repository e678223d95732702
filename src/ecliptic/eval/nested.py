"""Choosing among methods on few labelled pictures, and saying honestly how good the chosen one is.

The accuracy of the best of twenty methods, cross-validated, is too good: it was chosen for being high. Nested
cross-validation (Varma and Simon 2006, doi 10.1186/1471-2105-7-91) repeats the choice itself without each fold and judges
on that fold whatever was chosen there. Here inner fits are shared: what was learnt without the folds {j, k} serves the choice
made for k, on the pictures of j, and the choice made for j, on those of k. K folds then cost K (K + 1) / 2 fits of each
method instead of K * K.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Fold = frozenset[int]
"""The folds that one fit has not seen: one of them, or two."""


@dataclass(frozen=True)
class Nested:
    """What came out. hits: of each method, (N,) 0 or 1 by plain cross-validation, NaN for pictures never held out.

    winner: the method of the highest cross-validated accuracy; among equals the first. chosen: the one chosen without each
    fold. probabilities (N, K): what the procedure as a whole, choice included, says of pictures it has not seen, NaN
    where never held out; its accuracy is the honest figure for the winner.
    """

    winner: str
    hits: dict[str, NDArray[np.float64]]
    chosen: tuple[str, ...]
    probabilities: NDArray[np.float64]

    @property
    def judged(self) -> NDArray[np.int64]:
        """Positions of the pictures that were held out once."""
        return np.flatnonzero(~np.isnan(self.probabilities[:, 0]))


def deal(labels: ArrayLike, folds: int = 4, seed: int = 0) -> NDArray[np.int64]:
    """labels (N,) integers -> (N,), the fold that holds each picture out, or -1 for never.

    Any two folds together leave every class a picture to learn from, so a class of two has one of them held out, and a class
    of one none. Each class starts at another fold, so that the folds are of one size. ValueError for fewer than two folds.
    """
    if folds < 2:
        raise ValueError(f"folds={folds}: at least two are needed")
    labels = np.asarray(labels)
    random = np.random.default_rng(seed)
    found = np.full(len(labels), -1)
    start = 0
    for k in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == k))
        held = rows[: {1: 0, 2: 1}.get(len(rows), len(rows))]
        if folds == 2 and len(held) == len(rows):  # both folds at once would leave nothing
            held = rows[1:]
        found[held] = (start + np.arange(len(held))) % folds
        start += len(held)
    return found


def fits(fold: ArrayLike) -> list[Fold]:
    """What must be left out of each fit: every fold, then every two of them."""
    present = sorted({int(k) for k in np.asarray(fold)} - {-1})
    return [frozenset(chosen) for count in (1, 2) for chosen in combinations(present, count)]


def judge(answers: Mapping[str, Mapping[Fold, ArrayLike]], truth: ArrayLike, fold: ArrayLike) -> Nested:
    """The choice, and its honest figure.

    answers: method -> what was left out of a fit -> probabilities (N, K) of that fit, of which only the rows of the folds left
    out are read; every method needs all of `fits(fold)`. truth (N,): classes; fold (N,): as `deal` gives it. The order of the
    methods decides between equals.
    """
    if not answers:
        raise ValueError("there is no method to choose from")
    truth, fold = np.asarray(truth), np.asarray(fold)
    wanted = set(fits(fold))
    if not wanted:
        raise ValueError("no picture is ever held out: every class needs at least two")
    if short := [name for name, said in answers.items() if not wanted <= said.keys()]:
        raise ValueError(f"{short[0]} has not been fitted without every fold and every two of them")
    singles = sorted(k for (k,) in (chosen for chosen in wanted if len(chosen) == 1))
    hits: dict[str, NDArray[np.float64]] = {}
    for name, said in answers.items():
        own = np.full(len(truth), np.nan)
        for k in singles:
            rows = fold == k
            own[rows] = _right(said[frozenset({k})], truth, rows)
        hits[name] = own
    size = np.asarray(next(iter(next(iter(answers.values())).values()))).shape[1]
    honest = np.full((len(truth), size), np.nan)
    winner, chosen = choices(
        lambda name, left_out, j: float(_right(answers[name][left_out], truth, fold == j).sum()), list(answers), singles
    )
    for k, best in zip(singles, chosen, strict=True):
        honest[fold == k] = np.asarray(answers[best][frozenset({k})])[fold == k]
    return Nested(winner, hits, chosen, honest)


def choices(
    worth: Callable[[str, Fold, int], float], methods: Sequence[str], folds: Sequence[int]
) -> tuple[str, tuple[str, ...]]:
    """The winner over all folds, and the one chosen without each of them: of the largest sum, among equals the first.

    worth(method, left out, j): how good the fit of a method that has not seen the folds `left out` is on fold j, one of them. For
    the choice without k that is asked of the fits without {j, k}, for the winner of those without {j}.
    """
    chosen = tuple(
        _first_best({name: sum(worth(name, frozenset({j, k}), j) for j in folds if j != k) for name in methods})
        for k in folds
    )
    return _first_best({name: sum(worth(name, frozenset({j}), j) for j in folds) for name in methods}), chosen


def _right(probabilities: Any, truth: NDArray[Any], rows: NDArray[np.bool_]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = (np.asarray(probabilities)[rows].argmax(1) == truth[rows]).astype(np.float64)
    return found


def _first_best(score: Mapping[str, float]) -> str:
    names: Sequence[str] = list(score)
    return names[int(np.argmax([score[name] for name in names]))]
