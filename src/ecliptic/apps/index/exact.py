"""Exact nearest rows: fp16 blocks, fp32 matmul, the few best computed again so that equal rows score equally."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BLOCK = 4096  # rows converted at a time: 4096 x 512 in fp32 is 8 MiB, which stays in cache
SLACK = 1e-5  # far above fp32 rounding of a dot product of unit rows, far below any difference that matters


def topk(query: Array, vectors: Array, k: int, rows: Array | None = None) -> tuple[Array, Array]:
    """query (D,) and vectors (N, D) -> (row numbers, cosines in float64), best first, ties by row number.

    Every row that ties with the k-th is returned too, so that the caller can settle ties by something that means more
    than a row number. `rows` restricts the search; it is applied before, never after.
    """
    query = np.ascontiguousarray(query, dtype=np.float32)
    if query.shape != (vectors.shape[1],):
        raise ValueError(f"the query has shape {query.shape}, the index holds vectors of {vectors.shape[1]}")
    if not np.isfinite(query).all():
        raise ValueError("the query vector is not finite")
    if rows is not None and len(rows) == len(vectors):
        rows = None  # all of them: slices are read straight from the map
    total = len(vectors) if rows is None else len(rows)
    if total == 0 or k <= 0:
        return np.empty(0, np.int64), np.empty(0, np.float64)
    scores = np.empty(total, np.float32)
    for start in range(0, total, BLOCK):
        stop = min(start + BLOCK, total)
        scores[start:stop] = _block(vectors, rows, start, stop) @ query
    kth = scores.max() if k == 1 else np.partition(scores, max(total - k, 0))[max(total - k, 0)]
    near = np.flatnonzero(scores >= kth - SLACK)
    chosen = near if rows is None else rows[near]
    exact = np.concatenate([_rescore(vectors[part], query) for part in _parts(chosen)])
    order = np.lexsort((chosen, -exact))
    chosen, exact = chosen[order], exact[order]
    keep = exact >= exact[min(k, len(exact)) - 1]
    return chosen[keep].astype(np.int64), exact[keep]


def neighbours(vectors: Array, rows: Array, at_least: float) -> list[tuple[int, int]]:
    """All pairs (i, j), i < j, of `rows` whose cosine is `at_least` or more, as positions in `rows`."""
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(rows), BLOCK):
        left = _block(vectors, rows, start, min(start + BLOCK, len(rows)))
        for other in range(start, len(rows), BLOCK):
            right = _block(vectors, rows, other, min(other + BLOCK, len(rows)))
            first, second = np.nonzero(left @ right.T >= at_least)
            first, second = first + start, second + other
            above = first < second
            pairs.extend(zip(first[above].tolist(), second[above].tolist(), strict=True))
    return pairs


def _block(vectors: Array, rows: Array | None, start: int, stop: int) -> Array:
    part = vectors[start:stop] if rows is None else vectors[rows[start:stop]]
    return np.asarray(part, dtype=np.float32)


def _parts(chosen: Array) -> list[Array]:
    return [chosen[start : start + BLOCK] for start in range(0, len(chosen), BLOCK)]


def _rescore(part: Array, query: Array) -> Array:
    """Row by row in float64, so that a row's score does not depend on where in the file it stands."""
    return np.asarray((np.asarray(part, np.float64) * query.astype(np.float64)).sum(axis=1))
