"""Accuracy by group: does a classifier hold where an attribute and the class do not go together as usual?

A group is a cell of (attribute, class): land birds over water, dark-haired men. The average hides a small cell that fails;
the worst cell does not (worst-group accuracy, "Distributionally Robust Neural Networks", arXiv 1911.08731).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ecliptic.eval import metrics
from ecliptic.eval.report import FRACTION, Number, Report, Table


@dataclass(frozen=True)
class GroupAccuracy:
    """Accuracy of each cell, in [0, 1].

    attributes (A) and classes (K): names of rows and columns, sorted. accuracy (A, K): NaN for a cell without pictures.
    pictures (A, K): how many there are. average: over pictures, so large cells count more.
    """

    attributes: tuple[Any, ...]
    classes: tuple[Any, ...]
    accuracy: NDArray[np.float64]
    pictures: NDArray[np.int64]
    average: float

    @property
    def balanced(self) -> float:
        """The mean over the cells that hold pictures, each counting the same."""
        return float(np.nanmean(self.accuracy))

    @property
    def worst(self) -> float:
        """The lowest accuracy of a cell that holds pictures."""
        return float(np.nanmin(self.accuracy))

    @property
    def worst_group(self) -> tuple[Any, Any]:
        """The (attribute, class) whose accuracy is lowest; of equal ones the first."""
        row, column = np.unravel_index(np.nanargmin(self.accuracy), self.accuracy.shape)
        return self.attributes[row], self.classes[column]

    @property
    def gap(self) -> float:
        """average - worst: what the average hides, >= 0 but for rounding."""
        return self.average - self.worst


def group_accuracy(hits: ArrayLike, attribute: Sequence[Hashable], label: Sequence[Hashable]) -> GroupAccuracy:
    """hits (N,) in [0, 1], and what each picture's attribute and true class are, (N,) names or numbers, -> by cell.

    ValueError for no pictures, unequal lengths, or NaN among the hits.
    """
    h, row, column, rows, columns = _cells(hits, attribute, label)
    shape = (len(rows), len(columns))
    accuracy = metrics.per_class_accuracy(h, row * shape[1] + column, shape[0] * shape[1])
    pictures = np.bincount(row * shape[1] + column, minlength=shape[0] * shape[1])
    return GroupAccuracy(rows, columns, accuracy.reshape(shape), pictures.reshape(shape), float(h.mean()))


def group_report(
    hits: ArrayLike,
    attribute: Sequence[Hashable],
    label: Sequence[Hashable],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Report:
    """The same as a report with 95 % bootstrap intervals over pictures.

    Numbers: `groups.average`, `.balanced` (mean over cells), `.worst`, `.gap` (average - worst). Details:
    `groups.accuracy[attribute, class]`. A resample draws within each cell, so none is ever empty; the lowest of several
    noisy cells lies below the lowest true accuracy, the more so the smaller the cells.
    """
    found = group_accuracy(hits, attribute, label)
    h, row, column, rows, columns = _cells(hits, attribute, label)
    cell = row * len(columns) + column
    average, lowest, mean = _resampled(h, cell, resamples, seed)
    report = Report("Accuracy by group")
    for key, value, draws in (
        ("average", found.average, average),
        ("balanced", found.balanced, mean),
        ("worst", found.worst, lowest),
        ("gap", found.gap, average - lowest),
    ):
        low, high = np.quantile(draws, (0.025, 0.975))
        report.numbers[f"groups.{key}"] = Number(value, float(low), float(high), n=len(h), unit=FRACTION)
    table: list[list[str | int | Number | None]] = []
    for r, name in enumerate(rows):
        for c, wanted in enumerate(columns):
            own = h[cell == r * len(columns) + c]
            number = None
            if len(own):
                interval = metrics.proportion_interval(own, resamples=resamples, seed=seed)
                number = Number(float(own.mean()), *interval, n=len(own), unit=FRACTION)
                report.details[f"groups.accuracy[{name}, {wanted}]"] = number
            table.append([str(name), str(wanted), len(own), number])
    report.tables.append(Table(["attribute", "class", "pictures", "accuracy"], table, "Groups"))
    attribute_name, class_name = found.worst_group
    report.notes.append(f"Worst group: {class_name} with {attribute_name}.")
    report.notes.append(f"Intervals: 95 %, percentile bootstrap within groups, {resamples} resamples, seed {seed}.")
    return report


def _cells(
    hits: ArrayLike, attribute: Sequence[Hashable], label: Sequence[Hashable]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64], tuple[Any, ...], tuple[Any, ...]]:
    """Hits, the position of each picture's attribute and class, and the sorted names of both."""
    h = np.asarray(hits, dtype=float)
    if h.ndim != 1 or not len(h):
        raise ValueError(f"hits must be (N,) with N above 0, got {h.shape}")
    if np.isnan(h).any():
        raise ValueError("hits holds NaN")
    places = []
    names: list[tuple[Any, ...]] = []
    for what, values in (("attribute", attribute), ("label", label)):
        found = values.tolist() if hasattr(values, "tolist") else list(values)  # from arrays and tensors, too
        if len(found) != len(h):
            raise ValueError(f"there are {len(h)} hits, but {len(found)} values of {what}")
        known = tuple(sorted(set(found)))
        place = {name: i for i, name in enumerate(known)}
        places.append(np.array([place[value] for value in found], dtype=np.int64))
        names.append(known)
    return h, places[0], places[1], names[0], names[1]


def _resampled(
    hits: NDArray[np.float64], cell: NDArray[np.int64], resamples: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """(resamples,) each: average, lowest cell and mean over cells of pictures drawn with replacement within their cells."""
    rng = np.random.default_rng(seed)
    groups = [hits[cell == k] for k in np.unique(cell)]
    means = np.stack([g[rng.integers(0, len(g), (resamples, len(g)))].mean(1) for g in groups])
    sizes = np.array([len(g) for g in groups])
    return (sizes[:, None] * means).sum(0) / sizes.sum(), means.min(0), means.mean(0)
