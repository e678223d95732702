"""The picture index at 10,000, 100,000 and 200,000 rows of 512: python -m benchmarks.index [--rounds N]

Rows are a mixture made to resemble CLIP's picture embeddings: a common cone, 2,000 centres of very different size, and
noise whose spectrum decays, so that two pictures have a cosine of about 0.5 and nearest neighbours one of about 0.9.
Queries are new pictures from the mixture, and "texts": points off the cone (the modality gap) that lean towards a centre,
with much noise of their own; their best cosines are about 0.37. Such queries are harder for a graph than pictures are.
Uniformly random rows, which have no structure a graph could use, are reported as the limit of the method.

Every comparison runs on one thread in rounds that take turns. Exact search must return the rows that a brute-force fp32
product returns; the graph's recall is against that, and its scores must be the exact ones.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from numpy.typing import NDArray

from benchmarks.measure import Row, compare, line, save
from ecliptic.apps.index import Index, Signature, ann, exact
from ecliptic.apps.index.store import Item, Store

Array = NDArray[Any]
DIM, K = 512, 10
SIZES, RANDOM = (10_000, 100_000, 200_000), 100_000
PER_CALL = 5  # queries in one measured call
STEP = 25_000  # rows that join a graph at a time
ASKED = 300  # queries of each kind behind a recall


def unit(rows: Array) -> Array:
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True))


class Mixture:
    """Unit rows like a contrastive model's; the weights are ours, chosen for the cosines that the docstring states."""

    def __init__(self, seed: int = 0, centres: int = 2000):
        rng = np.random.default_rng(seed)
        self.cone = unit(rng.standard_normal(DIM))
        self.own = unit(rng.standard_normal((centres, DIM)))
        self.spread = unit(np.arange(1, DIM + 1) ** -0.5)
        self.basis = np.linalg.qr(rng.standard_normal((DIM, DIM)))[0]
        self.gap = rng.standard_normal(DIM)
        self.gap = unit(self.gap - self.gap @ self.cone * self.cone)
        size = rng.zipf(1.5, centres).clip(max=50).astype(float)
        self.size = size / size.sum()

    def pictures(self, n: int, seed: int) -> Iterator[Array]:
        """(n, DIM) fp32 in parts of at most 10,000."""
        rng = np.random.default_rng(seed)
        for start in range(0, n, 10_000):
            which = rng.choice(len(self.own), min(10_000, n - start), p=self.size)
            noise = (rng.standard_normal((len(which), DIM)) * self.spread) @ self.basis
            yield unit(0.70 * self.cone + 0.62 * self.own[which] + 0.42 * noise).astype(np.float32)

    def texts(self, n: int, seed: int) -> Array:
        rng = np.random.default_rng(seed)
        which = rng.choice(len(self.own), n, p=self.size)
        noise = unit(rng.standard_normal((n, DIM)))
        rows = 0.35 * self.own[which] + 0.75 * self.gap + 0.15 * self.cone + 0.50 * noise
        return unit(rows).astype(np.float32)


def uniform(n: int, seed: int) -> Iterator[Array]:
    rng = np.random.default_rng(seed)
    for start in range(0, n, 10_000):
        yield unit(rng.standard_normal((min(10_000, n - start), DIM), dtype=np.float32))


def fill(folder: Path, parts: Iterator[Array], stop: float) -> tuple[Store, dict[str, float]]:
    """An index with these rows, committed 256 at a time as `Index.add` does, then its graph, STEP rows at a time.

    What is there already is used as it is. At the time `stop` it gives up after the step in hand: run again to go on.
    """
    import faiss

    known = folder / "figures.json"
    if not known.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        Store.create(folder, Signature("mixture", "none", DIM), folder, "")
        store = Store(folder)
        store.recover()
        start, row = time.process_time(), 0
        for part in parts:
            for at in range(0, len(part), 256):
                put = []
                for vector in part[at : at + 256]:
                    put.append((Item(f"{row}.jpg", row.to_bytes(16, "big"), 1, 1, None, "ok"), vector))
                    row += 1
                store.commit((), put)
        spent = time.process_time() - start
        store.close()
        known.write_text(json.dumps({"rows": row, "commit_rows_per_second": row / spent, "build_seconds": 0.0}))
    store = Store(folder)
    figures: dict[str, float] = json.loads(known.read_text())
    state, vectors = store.snapshot(), store.matrix()[1]
    faiss.omp_set_num_threads(os.cpu_count())
    covered = state.graph
    while state.rows >= ann.FROM and covered < state.rows:
        if time.time() > stop:
            raise SystemExit(f"{folder.name}: {covered:,} of {state.rows:,} rows are in the graph; run again to go on")
        rows, start = min(covered + STEP, state.rows), time.process_time()
        ann.build(vectors[:rows], ann.place(folder, 0, rows), ann.place(folder, 0, covered) if covered else None)
        store._set("graph", rows)
        ann.remove(folder, keep=ann.place(folder, 0, rows))
        covered = rows
        figures["build_seconds"] += time.process_time() - start
        figures["graph_bytes"] = (ann.place(folder, 0, rows) / ann.GRAPH).stat().st_size
        known.write_text(json.dumps(figures))
    faiss.omp_set_num_threads(1)
    figures["vector_bytes"] = store.vector_file(0).stat().st_size
    return store, figures


def adding(folder: Path, n: int = 5_000) -> float:
    """Pictures per CPU second through the whole of `Index.add`, with a model that costs nothing."""
    rng = np.random.default_rng(0)
    table = unit(rng.standard_normal((n, DIM))).astype(np.float32)

    class Free:
        signature = Signature("free", "none", DIM)

        def prepare(self, data: bytes) -> int:
            return int(data)

        def embed(self, prepared: Any) -> Array:
            return table[list(prepared)]

    for i in range(n):
        (folder / f"{i}.png").write_text(str(i))
    with Index.create(folder / ".ecliptic", Free.signature) as index:
        start = time.process_time()
        index.add(folder, Free(), workers=1)
        spent = time.process_time() - start
        assert len(index) == n
    return n / spent


def ids(index: Index, query: Array, every: bool) -> list[int]:
    return [int(Path(hit.path).stem) for hit in index.search(query, K, every=every)]


def recall(index: Index, stored: Array, queries: Array) -> float:
    """Of the graph against brute force; scores must be those of exact search."""
    right = 0
    for query, scores in zip(queries, queries @ stored.T, strict=True):
        tenth = np.partition(scores, -K)[-K]
        found = [(hit.score, float(scores[int(Path(hit.path).stem)])) for hit in index.search(query, K)]
        assert max(abs(ours - brute) for ours, brute in found) < 1e-5
        right += sum(brute >= tenth - 1e-6 for _, brute in found)
    return float(right) / (K * len(queries))


def measure(name: str, store: Store, kinds: dict[str, Array], rounds: int) -> tuple[list[Row], dict[str, float]]:
    import faiss

    index = Index(store)
    vectors = store.matrix()[1]
    stored = np.asarray(vectors, np.float32)
    flat = faiss.IndexFlatIP(DIM)
    flat.add(stored)
    figures: dict[str, float] = {}
    for kind, queries in kinds.items():
        best = np.stack([np.sort(stored @ query)[::-1][:K] for query in queries[:50]])
        figures[f"best_cosine_{kind}"], figures[f"tenth_cosine_{kind}"] = (
            float(best[:, 0].mean()),
            float(best[:, -1].mean()),
        )
        if store.snapshot().graph:
            figures[f"recall_{kind}"] = recall(index, stored, queries)
    queries = next(iter(kinds.values()))[:PER_CALL]

    def brute() -> list[list[int]]:
        out = []
        for query in queries:
            scores = stored @ query
            part = np.argpartition(scores, -K)[-K:]
            out.append(part[np.argsort(-scores[part], kind="stable")].tolist())
        return out

    def faiss_flat() -> list[list[int]]:
        return [flat.search(query[None], K)[1][0].tolist() for query in queries]

    def ours_exact() -> list[list[int]]:
        return [exact.topk(query, vectors, K)[0][:K].tolist() for query in queries]

    def searching(every: bool) -> list[list[int]]:
        return [ids(index, query, every) for query in queries]

    wanted = brute()
    assert ours_exact() == wanted == faiss_flat() == searching(True), "exact search and brute force disagree"

    def compared(
        job: str, peer: str, ours: Callable[[], Any], theirs: Callable[[], Any], difference: float | None
    ) -> Row:
        row = compare(f"{name}, {job}", peer, ours, theirs, rounds=rounds, difference=difference)
        return replace(row, ours_seconds=row.ours_seconds / PER_CALL, peer_seconds=row.peer_seconds / PER_CALL)

    rows = [
        compared("exact search", "numpy, fp32 product", ours_exact, brute, 0.0),
        compared("exact search", "faiss IndexFlatIP", ours_exact, faiss_flat, 0.0),
    ]
    if store.snapshot().graph:
        for peer, call in (
            ("the same with every row", lambda: searching(True)),
            ("numpy, fp32 product", brute),
            ("faiss IndexFlatIP", faiss_flat),
        ):
            rows.append(compared("Index.search", peer, lambda: searching(False), call, None))
    return rows, figures


def main() -> None:
    import faiss

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--work", type=Path, help="keep the indexes in this folder, and use those that are there")
    parser.add_argument("--build-for", type=float, default=np.inf, help="stop building after so many seconds")
    given = parser.parse_args()
    rounds, stop = given.rounds, time.time() + given.build_for
    faiss.omp_set_num_threads(1)
    mixture, rows, sizes = Mixture(), list[Row](), dict[str, dict[str, float]]()
    top = Path(tempfile.mkdtemp())
    work = given.work or top
    plans = [(f"{n:,} x {DIM}", mixture.pictures(n, seed=1), None) for n in SIZES]
    plans.append((f"{RANDOM:,} x {DIM} uniformly random", uniform(RANDOM, 1), next(uniform(ASKED, 2))))
    try:
        (top / "adding").mkdir()
        settings = {
            "threads": 1,
            "rounds": rounds,
            "k": K,
            "queries_per_call": PER_CALL,
            "faiss": version("faiss-cpu"),
            "graph": {"M": ann.M, "efConstruction": ann.EF_CONSTRUCTION, "efSearch": ann.EF_SEARCH, "rows": "fp16"},
            "add_pictures_per_second": adding(top / "adding"),
        }
        for name, parts, random in plans:
            store, figures = fill(work / name, parts, stop)
            pictures = next(mixture.pictures(ASKED, seed=2))
            kinds = (
                {"pictures": pictures, "texts": mixture.texts(ASKED, seed=3)} if random is None else {"random": random}
            )
            found, more = measure(name, store, kinds, rounds)
            store.close()
            rows += found
            sizes[name] = figures | more
            print(name, sizes[name], file=sys.stderr, flush=True)
            written = save("index", rows, settings | {"sizes": sizes})
    finally:
        shutil.rmtree(top)
    largest = f"{SIZES[-1]:,} x {DIM}"
    faster = next(
        row for row in rows if row.job == f"{largest}, Index.search" and row.peer == "the same with every row"
    )
    print("\n".join(line(row) for row in rows), f"\n{written}")
    assert min(sizes[largest]["recall_pictures"], sizes[largest]["recall_texts"]) >= 0.99
    assert faster.ratio >= 10


if __name__ == "__main__":
    main()
