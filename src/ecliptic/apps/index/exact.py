"""Exact nearest rows: fp16 blocks, fp32 matmul, the few best computed again so that equal rows score equally."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BLOCK = 512  # rows widened at a time: 512 x 512 in fp32 is 1 MiB, which stays in the second-level cache
PAIRS = 2048  # rows compared with as many others at a time, where all pairs are wanted
SLACK = 1e-5  # far above fp32 rounding of a dot product of unit rows, far below any difference that matters
SKETCH = 64  # dimensions of the bound that spares most pairs their full dot product; ours

# An fp16 number's bits, moved to where fp32 has sign, exponent and fraction, read as the number times 2**-112 (the two
# exponents differ in their bias, 15 and 127). numpy's own conversion takes five times as long.
_WIDEN = np.float32(2.0**112)
_FIELDS = np.int32(-0x7000_2000)  # 0x8fffe000: all but the copies of the sign that the shift brought along


def topk(query: Array, vectors: Array, k: int, rows: Array | None = None) -> tuple[Array, Array]:
    """query (D,) and vectors (N, D) -> (row numbers, cosines in float64), best first, ties by row number.

    Every row that ties with the k-th is returned too, so that the caller can settle ties by something that means more
    than a row number. `rows` restricts the search; it is applied before, never after.
    """
    query = checked(query, vectors)
    return rank(query, vectors, near(query, vectors, k, rows), k)


def checked(query: Array, vectors: Array) -> Array:
    """The query as (D,) fp32, if that is what the rows can be compared with."""
    query = np.ascontiguousarray(query, dtype=np.float32)
    if query.shape != (vectors.shape[1],):
        raise ValueError(f"the query has shape {query.shape}, the index holds vectors of {vectors.shape[1]}")
    if not np.isfinite(query).all():
        raise ValueError("the query vector is not finite")
    return query


def near(query: Array, vectors: Array, k: int, rows: Array | None = None) -> Array:
    """Rows that may be among the k best, (n,) int64 ascending: those within rounding of the k-th fp32 score."""
    if rows is not None and len(rows) == len(vectors):
        rows = None  # all of them: slices are read straight from the map
    total = len(vectors) if rows is None else len(rows)
    if total == 0 or k <= 0:
        return np.empty(0, np.int64)
    scores = _scores(query, vectors, rows, total)
    kth = scores.max() if k == 1 else np.partition(scores, max(total - k, 0))[max(total - k, 0)]
    found = np.flatnonzero(scores >= kth - SLACK)
    return np.asarray(found if rows is None else rows[found], np.int64)


def rank(query: Array, vectors: Array, chosen: Array, k: int) -> tuple[Array, Array]:
    """The k best of the `chosen` rows and whatever ties with the k-th, as `topk` returns them."""
    if len(chosen) == 0 or k <= 0:
        return np.empty(0, np.int64), np.empty(0, np.float64)
    parts = (chosen[start : start + PAIRS] for start in range(0, len(chosen), PAIRS))
    exact = np.concatenate([_rescore(vectors[part], query) for part in parts])
    order = np.lexsort((chosen, -exact))
    chosen, exact = chosen[order], exact[order]
    keep = exact >= exact[min(k, len(exact)) - 1]
    return chosen[keep].astype(np.int64), exact[keep]


def neighbours(vectors: Array, rows: Array, at_least: float) -> Iterator[tuple[Array, Array]]:
    """All pairs (i, j), i < j, of `rows` whose cosine is `at_least` or more, as positions in `rows`, a block at a time.

    Most pairs never see a full dot product. Turned onto the principal axes a row x is a head of SKETCH numbers and a
    rest, and by Cauchy and Schwarz <x, y> <= <head x, head y> + |rest x| |rest y|: a dot product of SKETCH + 1 numbers
    that bounds the cosine from above, whatever the axes.
    """
    if len(rows) < 2:
        return
    dim = vectors.shape[1]
    axes = _principal_axes(vectors, rows)[:, : min(SKETCH, dim)]
    sketch = np.empty((len(rows), axes.shape[1] + 1), np.float32)
    for start in range(0, len(rows), PAIRS):
        part = np.asarray(vectors[rows[start : start + PAIRS]], np.float32)
        head = part @ axes
        rest = (part * part).sum(1) - (head * head).sum(1)
        sketch[start : start + PAIRS] = np.column_stack((head, np.sqrt(rest.clip(min=0) + SLACK)))
    for start in range(0, len(rows), PAIRS):
        left = sketch[start : start + PAIRS]
        for other in range(start, len(rows), PAIRS):
            right = sketch[other : other + PAIRS]
            first, second = np.nonzero(left @ right.T >= at_least - SLACK)
            first, second = first + start, second + other
            above = first < second
            first, second = first[above], second[above]
            close = _close(vectors, rows, first, second, at_least)
            yield first[close], second[close]


def _close(vectors: Array, rows: Array, first: Array, second: Array, at_least: float) -> Array:
    """Which of the pairs of positions really are that close, (n,) bool."""
    if len(first) > PAIRS * PAIRS // 16:  # so many that one product of the two blocks is cheaper
        low, left = first.min(), np.asarray(vectors[rows[first.min() : first.max() + 1]], np.float32)
        base, right = second.min(), np.asarray(vectors[rows[second.min() : second.max() + 1]], np.float32)
        return np.asarray((left @ right.T)[first - low, second - base] >= at_least)
    close = np.empty(len(first), bool)
    for at in range(0, len(first), PAIRS):
        a, b = vectors[rows[first[at : at + PAIRS]]], vectors[rows[second[at : at + PAIRS]]]
        close[at : at + PAIRS] = (np.asarray(a, np.float32) * np.asarray(b, np.float32)).sum(1) >= at_least
    return close


def widen(block: Array, room: Array) -> Array:
    """(n, D) fp16 -> the same numbers times 2**-112 as fp32, in `room` (at least n rows of D int32)."""
    wide = room[: len(block)]
    np.copyto(wide, block.view(np.int16))
    np.left_shift(wide, 13, out=wide)
    np.bitwise_and(wide, _FIELDS, out=wide)
    return wide.view(np.float32)


def _scores(query: Array, vectors: Array, rows: Array | None, total: int) -> Array:
    """(total,) fp32 dot products, block by block through a room that stays in cache."""
    scores = np.empty(total, np.float32)
    halves = vectors.dtype == np.float16
    room = np.empty((min(BLOCK, total), vectors.shape[1]), np.int32)
    factor = query * _WIDEN if halves else query
    for start in range(0, total, BLOCK):
        stop = min(start + BLOCK, total)
        block = vectors[start:stop] if rows is None else vectors[rows[start:stop]]
        block = widen(block, room) if halves else np.asarray(block, np.float32)
        np.dot(block, factor, out=scores[start:stop])
    return scores


def _principal_axes(vectors: Array, rows: Array) -> Array:
    """(D, D): directions of the rows' second moment, the greatest first, from some thousands of them."""
    sample = np.asarray(vectors[rows[:: max(1, len(rows) // PAIRS)]], np.float32)
    axes: Array = np.linalg.eigh((sample.T @ sample).astype(np.float64))[1][:, ::-1]
    return np.ascontiguousarray(axes, np.float32)


def _rescore(part: Array, query: Array) -> Array:
    """Row by row in float64, so that a row's score does not depend on where in the file it stands."""
    return np.asarray((np.asarray(part, np.float64) * query.astype(np.float64)).sum(axis=1))
