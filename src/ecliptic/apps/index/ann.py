"""Approximate nearest rows for a large index: an HNSW graph over the stored rows, in a folder beside them.

The graph only proposes: whatever it finds is scored again exactly as exact search does, so an answer's score never
depends on how it was found. It covers the rows that were there when it was built; rows added since are searched exactly
and merged, until there are so many that the graph is extended. Deleted rows and filters are resolved before the search:
the graph is walked as it is, but only rows that may be answered with are kept.

Copies (rows with the same bytes) stand in the graph once. Left in, a few hundred of them would have only each other as
neighbours, and whoever enters such an island does not get out.

HNSW: Malkov and Yashunin, arXiv 1603.09320; M, efConstruction and efSearch are its names. Needs faiss.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ecliptic.apps.index import exact
from ecliptic.apps.index.errors import SlowSearchWarning
from ecliptic.core.files import atomic_folder

Array = NDArray[Any]
Progress = Callable[[int, int], None]

# All ours, measured by benchmarks/index.py.
FROM = 100_000  # rows; below, exact search answers within some 50 ms and there is nothing to gain
M = 32  # links of a row (twice that on the lowest level)
EF_CONSTRUCTION = 200  # with 100, one text in fifty misses a hit at any efSearch
EF_SEARCH = 512  # 256 is enough for pictures that resemble stored ones; texts lie off the pictures' cloud and need more
TAIL = 10_000  # rows that may wait outside the graph ...
TAIL_SHARE = 16  # ... or one in so many, whichever is more
WORTH = 10  # rows that exact search looks at in the time in which the graph gains one candidate
CHUNK = 4096  # rows added between two looks at Ctrl-C

GRAPH, COPIES = "graph.faiss", "copies.npy"


def available(rows: int) -> bool:
    """Whether faiss is there; if not, say once what it would be good for."""
    try:
        import faiss  # noqa: F401
    except ImportError:
        warnings.warn(
            f"the index holds {rows:,} rows and every one is compared with each query; "
            "`pip install 'ecliptic[search]'` brings faiss, which answers from a graph in a tenth of the time",
            SlowSearchWarning,
            stacklevel=2,
        )
        return False
    return True


def place(folder: Path, generation: int, rows: int) -> Path:
    """Where the graph over the first `rows` rows of a vector file lives."""
    return folder / f"ann-{generation}-{rows}"


def due(rows: int, covered: int) -> bool:
    """Whether so many rows with a graph over the first `covered` of them deserve a new one."""
    return rows >= FROM and rows - covered > (max(TAIL, rows // TAIL_SHARE) if covered else 0)


def build(vectors: Array, target: Path, old: Path | None = None, progress: Progress | None = None) -> None:
    """Write the graph over all of `vectors` (N, D) to the folder `target`, whole or not at all.

    old: a graph over the first rows of the same vectors, which is read and extended instead of starting from nothing.
    """
    faiss = _faiss()
    first, owner = distinct(vectors)
    graph = None
    if old is not None:
        with contextlib.suppress(RuntimeError):  # gone or damaged: start from nothing
            graph = _read(old / GRAPH, mapped=False)
    if graph is None:
        graph = faiss.IndexHNSWSQ(vectors.shape[1], faiss.ScalarQuantizer.QT_fp16, M, faiss.METRIC_L2)
        graph.hnsw.efConstruction = EF_CONSTRUCTION
    for start in range(graph.ntotal, len(first), CHUNK):
        graph.add(np.asarray(vectors[first[start : start + CHUNK]], np.float32))
        if progress is not None:
            progress(min(start + CHUNK, len(first)), len(first))
    with atomic_folder(target, replace=True) as draft:
        _write(graph, draft / GRAPH)
        if len(first) < len(vectors):
            with (draft / COPIES).open("wb") as file:
                np.save(file, owner.astype(np.int32))
                file.flush()
                os.fsync(file.fileno())


def distinct(vectors: Array, rows: Array | None = None) -> tuple[Array, Array]:
    """(N, D) fp16 and n of its rows -> positions in `rows` that no earlier one equals, ascending, and for all n the
    position of their like among these.

    By a 64-bit hash of the bits, each match then compared for real; of two rows that collide both are kept.
    """
    rows = np.arange(len(vectors)) if rows is None else rows
    factors = np.random.default_rng(0).integers(0, 2**63, vectors.shape[1], dtype=np.uint64) | np.uint64(1)
    hashes = np.empty(len(rows), np.uint64)
    for start in range(0, len(rows), CHUNK):
        bits = np.ascontiguousarray(vectors[rows[start : start + CHUNK]]).view(np.uint16)
        hashes[start : start + CHUNK] = (bits.astype(np.uint64) * factors).sum(axis=1)
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    like = first[group]  # the first position with the same hash
    again = np.flatnonzero(like != np.arange(len(rows)))
    for start in range(0, len(again), CHUNK):
        part = again[start : start + CHUNK]
        differ = (vectors[rows[part]] != vectors[rows[like[part]]]).any(axis=1)
        like[part[differ]] = part[differ]
    firsts = np.flatnonzero(like == np.arange(len(rows)))
    return firsts, np.searchsorted(firsts, like)


class Graph:
    """An opened graph over the first `rows` rows; its file is mapped, so opening costs nothing and processes share it."""

    def __init__(self, folder: Path, rows: int, dim: int):
        self.rows = rows
        self._index = _read(folder / GRAPH, mapped=True)
        self._owner = np.load(folder / COPIES) if (folder / COPIES).is_file() else None
        nodes = rows if self._owner is None else int(self._owner.max()) + 1
        if (
            self._index.ntotal != nodes
            or self._index.d != dim
            or (self._owner is not None and len(self._owner) != rows)
        ):
            raise ValueError(f"{folder} is no graph over {rows} rows of {dim}")
        self._mask: tuple[Array, int, Any] | None = None

    def topk(self, query: Array, vectors: Array, k: int, allowed: Array) -> tuple[Array, Array]:
        """As `exact.topk` over the `allowed` rows: candidates from the graph, and every row added since."""
        query = exact.checked(query, vectors)
        edge = len(allowed) if len(allowed) == self.rows else int(np.searchsorted(allowed, self.rows))
        found = self._candidates(query, k, allowed, edge)
        if found is None:
            return exact.topk(query, vectors, k, allowed)
        found = np.concatenate((np.sort(found), allowed[edge:]))
        return exact.topk(query, vectors, k, found)

    def _candidates(self, query: Array, k: int, allowed: Array, edge: int) -> Array | None:
        """Rows of allowed[:edge] likely to hold the k nearest, with all their copies.

        None where an exact look at the allowed rows is cheaper or safer: because they are few, because k is large, or
        because hardly any lies where the query points, as when one asks for cats among the pictures of dogs.
        """
        faiss = _faiss()
        wanted = max(EF_SEARCH, 4 * k)
        share = edge / self.rows
        if edge * share < WORTH * wanted:
            return None
        options, nodes = faiss.SearchParametersHNSW(efSearch=int(wanted / share)), self._index.ntotal
        if edge < self.rows:
            options.sel, nodes = self._selector(allowed, edge)
        _, found = self._index.search(query[None], wanted, params=options)
        near = found[0][found[0] >= 0]
        if len(near) < min(wanted // 2, nodes):
            return None
        if self._owner is None:
            return np.asarray(near, np.int64)
        hit = np.zeros(self._index.ntotal, bool)
        hit[near] = True
        return np.asarray(allowed[:edge][hit[self._owner[allowed[:edge]]]], np.int64)

    def _selector(self, allowed: Array, edge: int) -> tuple[Any, int]:
        """The nodes that stand for an allowed row, as bits, and how many; kept, since without a filter they stay."""
        faiss = _faiss()
        if self._mask is None or self._mask[0] is not allowed:
            bits, rows = np.zeros(self._index.ntotal, bool), allowed[:edge]
            bits[rows if self._owner is None else self._owner[rows]] = True
            selector = faiss.IDSelectorBitmap(np.packbits(bits, bitorder="little"))
            self._mask = (allowed, int(bits.sum()), selector)
        return self._mask[2], self._mask[1]


def remove(folder: Path, keep: Path | None = None) -> None:
    """Delete graphs that no longer count, and what killed builds left; a reader goes on with what it has mapped."""
    for path in [*folder.glob("ann-*"), *folder.glob(".ann-*.tmp")]:
        if path != keep:
            shutil.rmtree(path, ignore_errors=True)


def _faiss() -> Any:
    """The package; its own type stubs know but half of it."""
    return import_module("faiss")


def _read(path: Path, mapped: bool) -> Any:
    faiss = _faiss()
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0)


def _write(graph: Any, path: Path) -> None:
    """Through a file of Python's, so that a full disk is an OSError with its number, not a C++ exception."""
    faiss = _faiss()
    faults: list[OSError] = []
    with path.open("wb") as file:

        def write(data: bytes) -> None:
            try:
                file.write(data)
            except OSError as error:
                faults.append(error)
                raise

        try:
            faiss.write_index(graph, faiss.PyCallbackIOWriter(write))
        except RuntimeError:
            if faults:
                raise faults[0] from None
            raise
        file.flush()
        os.fsync(file.fileno())
