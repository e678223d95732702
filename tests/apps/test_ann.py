"""The search graph against exact search: recall, equal scores, filters, deletions, copies, growth, damage, kills."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from ecliptic.apps.index import DamagedGraphWarning, DiskFullError, Index, Signature, SlowSearchWarning, ann, exact
from ecliptic.apps.index.store import Item, Store

DIM = 32
SIGNATURE = Signature("fake", "bytes", DIM)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Everything that is about large indexes, at a size that tests can afford."""
    monkeypatch.setattr(ann, "FROM", 2000)
    monkeypatch.setattr(ann, "TAIL", 200)
    monkeypatch.setattr(ann, "EF_SEARCH", 100)
    monkeypatch.setattr(ann, "WORTH", 1)


def clustered(n: int, seed: int = 0) -> np.ndarray:
    """(n, DIM) fp16 unit rows around 40 centres."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).standard_normal((40, DIM))
    rows = centres[rng.integers(0, 40, n)] + 0.5 * rng.standard_normal((n, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def put(store: Store, vectors: np.ndarray, start: int = 0, extra: bool = False) -> None:
    """Rows as an indexing run leaves them, under the names 0.png, 1.png ..."""
    fields = '{"parity": %d}'
    store.commit(
        (),
        [
            (
                Item(f"{i}.png", b"%016d" % i, 1, 1, None, "ok", None, fields % (i % 2) if extra else None),
                vector.astype(np.float32),
            )
            for i, vector in enumerate(vectors, start)
        ],
    )


def filled(folder: Path, vectors: np.ndarray, extra: bool = False) -> Store:
    Store.create(folder, SIGNATURE, folder, "")
    store = Store(folder)
    store.recover()
    put(store, vectors, extra=extra)
    store.tidy(None)
    return store


def covered(store: Store) -> int:
    return store.snapshot().graph


def missed(index: Index, queries: np.ndarray, k: int = 10, **filters) -> float:
    """Share of the true k best that search does not bring; what it brings must have its true score."""
    wrong = 0
    for query in queries:
        true = index.search(query, k, every=True, **filters)
        found = index.search(query, k, **filters)
        assert len(found) == len(true)
        scores = {hit.path: hit.score for hit in index.search(query, 3 * k, every=True, **filters)}
        assert all(scores.get(hit.path, hit.score) == hit.score for hit in found)
        assert [hit.score for hit in found] == sorted((hit.score for hit in found), reverse=True)
        wrong += len({hit.path for hit in true} - {hit.path for hit in found})
    return wrong / (k * len(queries))


def test_the_graph_finds_what_exact_search_finds(tmp_path):
    store = filled(tmp_path / "index", clustered(3000))
    assert covered(store) == 3000
    assert missed(Index(store), clustered(60, seed=1)) <= 0.005


def test_the_graph_is_really_asked(tmp_path, monkeypatch):
    """Otherwise every test here would pass on exact search alone."""
    store = filled(tmp_path / "index", clustered(3000))
    looked_at = []
    real = exact._scores

    def counted(query, vectors, rows, total):
        looked_at.append(total)
        return real(query, vectors, rows, total)

    monkeypatch.setattr(exact, "_scores", counted)
    Index(store).search(clustered(1, seed=2)[0])
    Index(store).search(clustered(1, seed=2)[0], every=True)
    assert looked_at == [100, 3000]


def test_rows_added_since_are_found_and_later_join_the_graph(tmp_path):
    store = filled(tmp_path / "index", clustered(2500))
    late = clustered(150, seed=5)
    put(store, late, start=2500)
    store.tidy(None)
    assert covered(store) == 2500  # few enough to be looked at one by one
    index = Index(store)
    for i in (0, 77, 149):
        assert Path(index.search(late[i].astype(np.float32), 1)[0].path).name == f"{2500 + i}.png"
    assert missed(index, clustered(30, seed=1)) <= 0.005
    put(store, clustered(100, seed=6), start=2650)
    store.tidy(None)
    assert covered(store) == 2750
    assert [path.name for path in (tmp_path / "index").glob("ann-*")] == ["ann-0-2750"]
    assert missed(index, clustered(30, seed=1)) <= 0.005


def test_growing_reads_the_old_graph_and_adds_the_new_rows_alone(tmp_path):
    vectors = clustered(2600)
    ann.build(vectors[:2400], tmp_path / "old")
    added = []
    ann.build(vectors, tmp_path / "new", tmp_path / "old", lambda done, total: added.append((done, total)))
    assert added == [(2600, 2600)]
    (tmp_path / "old" / ann.GRAPH).write_bytes(b"rubbish")
    ann.build(vectors, tmp_path / "anew", tmp_path / "old")  # damaged: from nothing
    graph = ann.Graph(tmp_path / "anew", 2600, DIM)
    rows, scores = graph.topk(vectors[3].astype(np.float32), vectors, 5, np.arange(2600))
    assert rows[0] == 3
    np.testing.assert_array_equal(scores, exact.topk(vectors[3], vectors, 5)[1])


def test_deleted_pictures_are_never_found_and_k_hits_come_back(tmp_path):
    vectors = clustered(3000)
    store = filled(tmp_path / "index", vectors)
    index = Index(store)
    query = clustered(1, seed=1)[0]
    best = [hit.path for hit in index.search(query, 40, every=True)]
    index.remove(best[:30])
    assert covered(store) == 3000  # the graph stays
    hits = index.search(query, 10)
    assert [hit.path for hit in hits] == best[30:40]
    index.remove(glob="*[02468].png")
    assert missed(index, clustered(30, seed=2)) <= 0.01


def test_filters_are_resolved_before_the_graph_is_walked(tmp_path):
    store = filled(tmp_path / "index", clustered(4000), extra=True)
    index, queries = Index(store), clustered(30, seed=1)
    assert missed(index, queries, where={"parity": 1}) <= 0.005
    assert missed(index, queries, glob="*[1-7].png") <= 0.005
    assert missed(index, queries, glob="12*.png") == 0  # few: looked at one by one
    assert index.search(queries[0], glob="none*.png") == []


def test_a_filter_that_excludes_where_the_query_points_is_still_right(tmp_path):
    """Half of the rows qualify, and none of them lies near the query: no walk through its neighbourhood finds any."""
    rng = np.random.default_rng(0)
    middle = np.eye(DIM)[[0, 1]]
    vectors = np.concatenate([middle[kind] + 0.05 * rng.standard_normal((2000, DIM)) for kind in (0, 1)])
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    store = filled(tmp_path / "index", vectors)
    index = Index(store)
    queries = np.eye(DIM)[:1] + 0.02 * rng.standard_normal((10, DIM))
    assert missed(index, queries, glob="[23]???.png") == 0


def test_many_copies_are_one_node_and_all_come_back(tmp_path):
    vectors = clustered(3000)
    vectors[500:900] = vectors[3]
    store = filled(tmp_path / "index", vectors)
    index = Index(store)
    graph = store._opened(store.snapshot())
    assert graph is not None
    assert graph._index.ntotal == 2600
    hits = index.search(vectors[3].astype(np.float32), 401)
    assert {Path(hit.path).stem for hit in hits} == {"3", *map(str, range(500, 900))}
    assert len({hit.score for hit in hits}) == 1
    assert missed(index, clustered(30, seed=1)) <= 0.005
    index.remove(tmp_path / "index" / "3.png")  # the copy that stands for the others in the graph
    assert Path(index.search(vectors[3].astype(np.float32), 1)[0].path).stem == "500"
    groups = index.duplicates(0.9999)
    assert {Path(path).stem for path in max(groups, key=len)} == set(map(str, range(500, 900)))


def test_distinct_rows_equal_a_dictionary(monkeypatch):
    rng = np.random.default_rng(0)
    vectors = rng.integers(-1, 2, (500, 5)).astype(np.float16)
    rows = rng.permutation(500)[:400]
    for collide in (False, True):
        if collide:  # a hash that tells nothing: every match must be compared for real
            monkeypatch.setattr(ann.np.random, "default_rng", lambda seed: _Zeros())
        firsts, owner = ann.distinct(vectors, rows)
        seen: dict[bytes, int] = {}
        for position, row in enumerate(rows.tolist()):
            seen.setdefault((vectors[row] + 0).tobytes(), position)
        like = [int(firsts[o]) for o in owner]
        assert all(((vectors[rows[i]] == vectors[rows[like[i]]]).all() and like[i] <= i) for i in range(400))
        if not collide:
            assert sorted(seen.values()) == firsts.tolist()


class _Zeros:
    def integers(self, *args, **options):
        return np.zeros(5, np.uint64)


def test_compaction_drops_the_graph_and_a_new_one_is_built(tmp_path):
    store = filled(tmp_path / "index", clustered(5000))
    index = Index(store)
    index.remove(index.folder / f"{i}.png" for i in range(2600))  # more than half: compacts by itself
    state = store.snapshot()
    assert (state.generation, state.rows, state.graph) == (1, 2400, 2400)
    assert sorted(path.name for path in index.folder.iterdir() if path.name.startswith("ann")) == ["ann-1-2400"]
    index.remove(glob="4999.png")
    assert (index.compact(), covered(store)) == (1, 2399)
    assert missed(index, clustered(30, seed=1)) <= 0.005


def test_a_reader_goes_on_while_a_writer_puts_a_new_graph_in_place(tmp_path):
    store = filled(tmp_path / "index", clustered(2500))
    with Index.open(tmp_path / "index") as reader:
        before = reader.search(clustered(1, seed=1)[0])
        put(store, -clustered(300, seed=5), start=2500)
        store.tidy(None)
        assert covered(store) == 2800
        assert reader.search(clustered(1, seed=1)[0]) == before
        assert missed(reader, clustered(10, seed=1)) <= 0.005


def test_without_faiss_search_is_exact_and_says_what_would_help(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.warns(SlowSearchWarning, match=r"ecliptic\[search\]"):
        store = filled(tmp_path / "index", clustered(2500))
    assert covered(store) == 0
    with Index.open(tmp_path / "index") as index, pytest.warns(SlowSearchWarning, match="2,500 rows"):
        assert len(index.search(clustered(1)[0])) == 10


def test_a_small_index_needs_no_faiss(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    store = filled(tmp_path / "index", clustered(100))
    assert len(Index(store).search(clustered(1)[0])) == 10  # a warning would be an error here


def test_a_damaged_graph_is_told_and_search_is_exact(tmp_path):
    store = filled(tmp_path / "index", clustered(2500))
    query = clustered(1, seed=1)[0]
    wanted = Index(store).search(query, every=True)
    (tmp_path / "index" / "ann-0-2500" / ann.GRAPH).write_bytes(b"rubbish")
    with Index.open(tmp_path / "index") as index, pytest.warns(DamagedGraphWarning, match="every row is searched"):
        assert index.search(query) == wanted
    shutil.rmtree(tmp_path / "index" / "ann-0-2500")
    with Index.open(tmp_path / "index") as index:
        assert index.search(query) == wanted  # gone altogether
        assert "search graph is missing" in index.check().problems[0]
        index.remove(glob="0.png")  # any writer puts it back
        assert index.check().problems == []
        assert covered(index._store) == 2500


@pytest.mark.parametrize("moment", ["while adding", "before it counts"])
def test_killed_while_the_graph_is_built(tmp_path, moment):
    store = filled(tmp_path / "index", clustered(1900))
    put(store, clustered(300, seed=1), start=1900)
    code = f"""
        import os, signal
        from pathlib import Path
        from ecliptic.apps.index import ann, store
        ann.FROM, ann.CHUNK = 2000, 100
        die = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        if {moment!r} == "before it counts": store.Store._set = die
        store.Store(Path({str(tmp_path / "index")!r})).tidy(die if {moment!r} == "while adding" else None)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert covered(store) == 0
    assert len(Index(store).search(clustered(1)[0])) == 10
    store.recover()
    assert list((tmp_path / "index").glob("*ann-*")) == []
    store.tidy(None)
    assert covered(store) == 2200
    assert missed(Index(store), clustered(10, seed=3)) <= 0.01


def test_a_disk_that_fills_while_the_graph_is_written(tmp_path, monkeypatch):
    store = filled(tmp_path / "index", clustered(1900))
    put(store, clustered(300, seed=1), start=1900)
    real = Path.open

    def opened(self, *args, **options):
        if self.name == ann.GRAPH and args == ("wb",):
            return real(Path("/dev/full"), "wb")
        return real(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        with pytest.raises(DiskFullError, match="free some space") as caught:
            store.tidy(None)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert list((tmp_path / "index").glob("*ann-*")) == []
    assert len(Index(store).search(clustered(1)[0])) == 10
    store.tidy(None)
    assert covered(store) == 2200


def test_check_measures_recall_and_says_what_is_broken(tmp_path, monkeypatch):
    store = filled(tmp_path / "index", clustered(2500))
    index = Index(store)
    found = index.check(sample=50)
    assert (found.problems, found.pictures, found.covered) == ([], 2500, 2500)
    assert found.recall is not None
    assert found.recall >= 0.99
    assert found.interval is not None
    assert found.interval[0] <= found.recall <= found.interval[1]
    # A graph that answers wrongly is noticed: half of every answer is replaced.
    real = ann.Graph.topk

    def half(self, query, vectors, k, allowed):
        rows, scores = real(self, query, vectors, 2 * k, allowed)
        return rows[k // 2 : k // 2 + k], scores[k // 2 : k // 2 + k]

    with monkeypatch.context() as patch:
        patch.setattr(ann.Graph, "topk", half)
        assert index.check(sample=30).recall == pytest.approx(0.5, abs=0.01)
    file = tmp_path / "index" / "vectors-0.f16"
    for value, told in ((np.nan, "1 vectors are not finite"), (7.0, "1 vectors do not have length 1")):
        with file.open("r+b") as data:
            data.seek(5 * DIM * 2)
            data.write(np.full(DIM, value, np.float16).tobytes())
        assert index.check().problems == [told]
    os.truncate(file, 100)
    assert "2,500" not in index.check().problems[0]
    assert "has 100 bytes" in index.check().problems[0]
