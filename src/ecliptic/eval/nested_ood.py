"""Choosing how to tell known pictures from unknown ones, and saying honestly how well that does: `eval.nested` for AUROC.

Two kinds of unknown. Given pictures of none of the classes are dealt into folds as the known ones are. Without any, whole classes
stand for the unknown in turn: what a fit learns from lacks a group of classes, and some pictures of every other class, and is
asked about both. A fit's scores are compared with each other only, for those of another fit may have another scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ecliptic.core.known import keeping_threshold
from ecliptic.eval.nested import Fold, choices, deal, fits

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Part(NamedTuple):
    """What one fit says of pictures it has not seen: their positions and scores, higher is more known."""

    known: Ints
    unknown: Ints
    known_scores: Floats
    unknown_scores: Floats


@dataclass(frozen=True)
class Split:
    """Which fold holds each of T pictures out as known, and which as unknown; -1 for never. (T,) each.

    labelled: whether it may be learnt from. group: what an unknown picture is drawn with when an interval is computed, its class
    where whole classes are left out.
    """

    known: Ints
    unknown: Ints
    labelled: NDArray[np.bool_]
    group: Ints

    @property
    def folds(self) -> list[int]:
        """Those with pictures of both kinds."""
        return [k for k in sorted({*self.known} & {*self.unknown} - {-1}) if all(map(len, self.held({k}, k)))]

    @property
    def plan(self) -> list[Fold]:
        """What must be left out of each fit: every fold, then every two of them."""
        return fits(self.folds)

    def learnt(self, left_out: Fold | set[int]) -> Ints:
        """Positions of the pictures that a fit learns from."""
        out = list(left_out)
        return np.flatnonzero(self.labelled & ~np.isin(self.known, out) & ~np.isin(self.unknown, out))

    def held(self, left_out: Fold | set[int], j: int) -> tuple[Ints, Ints]:
        """Positions of the known, and of the unknown, pictures of fold j that a fit without `left_out` is judged on."""
        known = (self.known == j) & ~np.isin(self.unknown, list(left_out))
        return np.flatnonzero(known), np.flatnonzero(self.unknown == j)


def with_unknown(labels: ArrayLike, unknown: int, folds: int = 4, seed: int = 0) -> Split:
    """labels (N,) integers of known pictures, followed by so many unknown ones -> the split of all N + unknown."""
    labels = np.asarray(labels)
    random = np.random.default_rng([seed, 1])
    held = random.permutation(unknown) % folds
    n, total = len(labels), len(labels) + unknown
    return Split(
        np.concatenate([deal(labels, folds, seed), np.full(unknown, -1)]),
        np.concatenate([np.full(n, -1), held]),
        np.arange(total) < n,
        np.arange(total),
    )


def with_classes_left_out(labels: ArrayLike, folds: int = 4, seed: int = 0) -> Split:
    """labels (N,) integers -> the split in which every class is unknown once, and known in the fits of other folds.

    Any two folds together leave two classes, and a picture of each, to learn from: with few classes there are more folds than
    asked for, and fewer than four classes are a ValueError.
    """
    labels = np.asarray(labels)
    classes = np.unique(labels)
    count = next(
        (f for f in range(max(folds, 4), len(classes) + 1) if len(classes) - 2 * math.ceil(len(classes) / f) > 1), 0
    )
    if not count:
        raise ValueError(f"{len(classes)} classes are too few to leave some out in turn: it takes four")
    random = np.random.default_rng([seed, 2])
    group = dict(zip(random.permutation(classes).tolist(), (np.arange(len(classes)) % count).tolist(), strict=True))
    unknown = np.array([group[k] for k in labels.tolist()])
    known = np.full(len(labels), -1)
    start = 0
    for k in classes:
        others = [f for f in range(count) if f != group[k]]
        rows = random.permutation(np.flatnonzero(labels == k))
        held = rows[: {1: 0, 2: 1}.get(len(rows), len(rows))]  # as `deal` has it: something must be left to learn from
        known[held] = [others[(start + i) % len(others)] for i in range(len(held))]
        start += len(held)
    return Split(known, unknown, np.ones(len(labels), dtype=bool), labels)


@dataclass(frozen=True)
class NestedOod:
    """winner: of the highest AUROC, by plain cross-validation. chosen: the one chosen without each fold.

    parts: of each method by fold. honest: of whatever was chosen without the fold, which is what the procedure as a whole does.
    """

    winner: str
    chosen: tuple[str, ...]
    parts: dict[str, list[Part]]
    honest: list[Part]


def judge_ood(answers: Mapping[str, Mapping[Fold, ArrayLike]], split: Split) -> NestedOod:
    """answers: method -> what a fit left out -> scores (T,), of which those of held-out pictures are read."""
    if not answers:
        raise ValueError("there is no method to choose from")
    if not split.folds:
        raise ValueError("no fold holds both known and unknown pictures")
    if short := [name for name, said in answers.items() if not set(split.plan) <= said.keys()]:
        raise ValueError(f"{short[0]} has not been fitted without every fold and every two of them")

    def part(name: str, left_out: Fold, j: int) -> Part:
        scores = np.asarray(answers[name][left_out], dtype=float)
        known, unknown = split.held(left_out, j)
        return Part(known, unknown, scores[known], scores[unknown])

    winner, chosen = choices(
        lambda name, left_out, j: float(_wins(part(name, left_out, j)).sum()), list(answers), split.folds
    )
    parts = {name: [part(name, frozenset({k}), k) for k in split.folds] for name in answers}
    return NestedOod(winner, chosen, parts, [parts[name][i] for i, name in enumerate(chosen)])


def mean_auroc(parts: Sequence[Part]) -> float:
    """The chance that a known picture scores above an unknown one of the same fold, ties counting one half."""
    return float(sum(_wins(p).sum() for p in parts) / sum(len(p.known) * len(p.unknown) for p in parts))


def auroc_interval(parts: Sequence[Part], split: Split, **options: int) -> tuple[float, float]:
    """95 % bootstrap interval of `mean_auroc`: known pictures drawn anew in each fold, unknown ones by their group."""
    return _percentiles(next(_resampled([parts], split, **options)))


def auroc_difference(
    new: Sequence[Part], old: Sequence[Part], split: Split, **options: int
) -> tuple[float, float, float]:
    """(difference, low, high) of `mean_auroc` on the same draws; above 0 where the new is better."""
    one, two = _resampled([new, old], split, **options)
    return mean_auroc(new) - mean_auroc(old), *_percentiles(one - two)


def refusals(parts: Sequence[Part], keep: float) -> tuple[Ints, Floats]:
    """The unknown pictures, and whether each is refused (1) by the threshold that keeps a share of the known of its fold."""
    rows, hits = [], []
    for part in parts:
        threshold = keeping_threshold(torch.from_numpy(part.known_scores), keep)
        rows.append(part.unknown)
        hits.append((part.unknown_scores < threshold).astype(float))
    return np.concatenate(rows), np.concatenate(hits)


def _wins(part: Part) -> Floats:
    """(known, unknown): 1 where the known scores higher, one half for a tie."""
    difference = part.known_scores[:, None] - part.unknown_scores[None, :]
    return np.asarray((1 + np.sign(difference)) / 2, dtype=float)


def _resampled(
    several: Sequence[Sequence[Part]], split: Split, *, resamples: int = 1000, seed: int = 0
) -> Iterator[Floats]:
    """`mean_auroc` of each on the same resamples, (R,)."""
    random = np.random.default_rng(seed)
    groups, where = np.unique(np.concatenate([part.unknown for part in several[0]]), return_inverse=True)
    owners, owner = np.unique(split.group[groups], return_inverse=True)
    drawn = random.multinomial(len(owners), np.full(len(owners), 1 / len(owners)), resamples)
    of_unknown = drawn[:, owner[where]]
    of_known = [
        random.multinomial(len(part.known), np.full(len(part.known), 1 / len(part.known)), resamples)
        for part in several[0]
    ]
    cuts = np.cumsum([len(part.unknown) for part in several[0]])[:-1]
    weights = list(zip(of_known, np.split(of_unknown, cuts, axis=1), strict=True))
    pairs = sum((k.sum(1) * u.sum(1) for k, u in weights), start=np.zeros(resamples))
    for parts in several:
        won = sum(
            (((k @ _wins(part)) * u).sum(1) for part, (k, u) in zip(parts, weights, strict=True)),
            start=np.zeros(resamples),
        )
        yield np.asarray(won / np.maximum(pairs, 1), dtype=float)


def _percentiles(values: Floats) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
