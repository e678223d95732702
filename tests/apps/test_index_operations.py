"""Merging, removing, updating and finding duplicates; and what a full disk does to each place that writes."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from ecliptic.apps.index import DiskFullError, Index, IndexBusyError, OtherModelError, exact, store
from tests.apps.fakes import FakeEmbedder, content, expected, vector_of, write

SIGNATURE = FakeEmbedder().signature


def indexed(folder: Path, texts: dict[str, str], **options) -> Index:
    for name, text in texts.items():
        write(folder / f"{name}.png", text)
    index = Index.create(folder / ".ecliptic", SIGNATURE)
    index.add(folder, FakeEmbedder(), **options)
    return index


# Merge


def test_a_merge_knows_what_both_knew_and_embeds_nothing(tmp_path):
    left = indexed(tmp_path / "left", {"a": "a", "sub/b": "b", "broken": "bad left"})
    fields = lambda path: {"name": path.stem}  # noqa: E731
    right = indexed(tmp_path / "right", {"c": "c", "broken": "bad right"}, describe=fields)
    change = left.merge(right)
    assert change.added == [f"{tmp_path}/right/c.png"]
    assert change.bad == [(f"{tmp_path}/right/broken.png", "corrupt: bad right")]
    wanted = expected(tmp_path / "left") | expected(tmp_path / "right")
    assert content(left) == wanted
    assert left.search(vector_of(b"c"), 1)[0].extra == {"name": "c"}
    assert content(right) == expected(tmp_path / "right")
    again = left.merge(right)
    assert (again.added, again.changed, again.unchanged) == ([], [], 2)
    # The files are where they were, so nothing has to be looked at again.
    assert left.add([tmp_path / "left", tmp_path / "right"], FakeEmbedder()).embedded == 0
    assert content(left) == wanted


def test_merged_paths_below_the_root_become_relative_and_move_along(tmp_path):
    top = indexed(tmp_path / "all", {"a": "a"})
    inner = indexed(tmp_path / "all/year", {"b": "b"})
    top.remove(tmp_path / "all/year")
    top.merge(inner)
    assert {item.path for item in top._store.items()} == {"a.png", "year/b.png"}
    for index in (top, inner):
        index.close()
    (tmp_path / "all").rename(tmp_path / "moved")
    with Index.open(tmp_path / "moved/.ecliptic") as index:
        assert index.paths() == [f"{tmp_path}/moved/a.png", f"{tmp_path}/moved/year/b.png"]


def test_the_same_picture_is_taken_once_unless_copies_are_wanted(tmp_path):
    left = indexed(tmp_path / "left", {"a": "same"})
    right = indexed(tmp_path / "right", {"x": "same", "y": "twice", "z": "twice"})
    change = left.merge(right)
    assert (change.added, change.unchanged) == ([f"{tmp_path}/right/y.png"], 2)
    left.merge(right, copies=True)
    assert content(left) == expected(tmp_path / "left") | expected(tmp_path / "right")


def test_a_path_that_both_know_stays_unless_it_was_bad(tmp_path):
    write(tmp_path / "p/a.png", "old")
    write(tmp_path / "p/b.png", "bad")
    with Index.create(tmp_path / "one", SIGNATURE) as one, Index.create(tmp_path / "two", SIGNATURE) as two:
        one.add(tmp_path / "p", FakeEmbedder())
        write(tmp_path / "p/a.png", "newer", age=50)
        write(tmp_path / "p/b.png", "mended", age=50)
        two.add(tmp_path / "p", FakeEmbedder())
        change = one.merge(two)
        assert (change.added, change.changed) == ([], [f"{tmp_path}/p/b.png"])
        held = content(one)
        assert held[f"{tmp_path}/p/a.png"] == vector_of(b"old").astype(np.float16).astype(np.float32).tobytes()
        assert held[f"{tmp_path}/p/b.png"] == expected(tmp_path / "p")[f"{tmp_path}/p/b.png"]
        one.add(tmp_path / "p", FakeEmbedder())  # the file decides
        assert content(one) == expected(tmp_path / "p")


def test_merging_is_refused_for_another_model_for_itself_and_while_another_writes(tmp_path):
    left = indexed(tmp_path / "left", {"a": "a"})
    other = Index.create(tmp_path / "other", FakeEmbedder("other").signature)
    with other, pytest.raises(OtherModelError, match="built with model 'fake', not 'other'"):
        left.merge(other)
    with (
        Index.open(tmp_path / "left/.ecliptic") as same,
        pytest.raises(ValueError, match="cannot be merged into itself"),
    ):
        left.merge(same)
    right = indexed(tmp_path / "right", {"b": "b"})
    with right._store.writing(), pytest.raises(IndexBusyError):
        right.merge(left)
    assert content(left) == expected(tmp_path / "left")


def test_a_merge_that_was_cut_short_is_finished_by_the_same_call(tmp_path, monkeypatch):
    left = indexed(tmp_path / "left", {"a": "a"})
    right = indexed(tmp_path / "right", {f"{i}": f"{i}" for i in range(20)})
    monkeypatch.setattr("ecliptic.apps.index.index.CHUNK", 6)
    real, calls = left._store.commit, []

    def commit(*args):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.EIO, "torn")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(left._store, "commit", commit)
        with pytest.raises(OSError, match="torn"):
            left.merge(right)
    assert len(left) == 13
    assert len(left.merge(right).added) == 8
    assert content(left) == expected(tmp_path / "left") | expected(tmp_path / "right")
    assert left._store.snapshot().rows == 21


# Remove and update


def test_remove_by_file_folder_and_pattern_leaves_the_files(tmp_path):
    index = indexed(tmp_path, {"a": "a", "x/b": "b", "x/c": "bad c", "xx/d": "d", "e1": "e", "e2": "f"})
    assert index.remove(tmp_path / "x") == [f"{tmp_path}/x/b.png", f"{tmp_path}/x/c.png"]
    assert index.remove([str(tmp_path / "a.png"), tmp_path / "nowhere.png"]) == [f"{tmp_path}/a.png"]
    assert index.remove(glob="e?.png") == [f"{tmp_path}/e1.png", f"{tmp_path}/e2.png"]
    assert index.remove() == []
    assert index.paths() == [f"{tmp_path}/xx/d.png"]
    assert index.bad() == []
    index.add(tmp_path, FakeEmbedder())
    assert content(index) == expected(tmp_path)


def test_update_looks_at_what_is_known_wherever_it_lies(tmp_path):
    index = indexed(tmp_path / "one", {"a": "a", "b": "b", "c": "bad"})
    write(tmp_path / "two/d.png", "d")
    index.add(tmp_path / "two", FakeEmbedder())
    write(tmp_path / "one/a.png", "changed", age=50)
    write(tmp_path / "one/c.png", "mended", age=50)
    write(tmp_path / "one/new.png", "new")
    (tmp_path / "two/d.png").unlink()
    change = index.update(FakeEmbedder())
    assert change.changed == [f"{tmp_path}/one/a.png", f"{tmp_path}/one/c.png"]
    assert change.removed == [f"{tmp_path}/two/d.png"]
    assert f"{tmp_path}/one/new.png" not in index.paths()
    index.add(tmp_path / "one", FakeEmbedder())
    assert content(index) == expected(tmp_path / "one")


# Duplicates


@pytest.mark.parametrize("at_least", [0.999, 0.9, 0.3, -1.0])
def test_likeness_equals_a_full_product(monkeypatch, at_least):
    """Longer rows than the bound's, in groups; low thresholds take the way for very many pairs."""
    monkeypatch.setattr(exact, "PAIRS", 32)
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((20, 200))
    vectors = centres[rng.integers(0, 20, 150)] + 0.3 * rng.random((150, 1)) * rng.standard_normal((150, 200))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    rows = np.sort(rng.permutation(150)[:130])
    true = vectors[rows].astype(float) @ vectors[rows].astype(float).T
    found = {(i, j) for a, b in exact.neighbours(vectors, rows, at_least) for i, j in zip(a.tolist(), b.tolist())}
    assert len(found) > 10
    for i in range(130):
        for j in range(130):
            if i < j and abs(true[i, j] - at_least) > 1e-5:
                assert ((i, j) in found) == (true[i, j] >= at_least)
            assert i < j or (i, j) not in found


def test_few_pairs_see_a_full_dot_product(monkeypatch):
    """Rows without any structure: the bound alone must settle nearly all pairs."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((400, 256))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    vectors[7] = vectors[3]
    seen = []
    real = exact._close
    monkeypatch.setattr(exact, "_close", lambda *args: (seen.append(len(args[2])), real(*args))[1])
    assert [(a.tolist(), b.tolist()) for a, b in exact.neighbours(vectors, np.arange(400), 0.97)] == [([3], [7])]
    assert sum(seen) < 10


def test_groups_are_linked_through_copies_and_chains(tmp_path):
    index = indexed(tmp_path, {"a": "x", "b": "x", "c": "y", "d": "z", "e": "w"})
    chain = np.zeros((3, 16))
    chain[:, 0], chain[:, 1] = np.cos([0, 0.2, 0.4]), np.sin([0, 0.2, 0.4])
    for path, row in {"a": 0, "b": 0, "c": 1, "d": 2}.items():
        (item,) = [item for item in index._store.items() if item.path == f"{path}.png"]
        index._store.commit((), [(item, chain[row])])
    # cos 0.2 = 0.980, cos 0.4 = 0.921: a and d are joined by c alone, b by being a's copy.
    assert index.duplicates(0.97) == [[f"{tmp_path}/{name}.png" for name in "abcd"]]
    assert index.duplicates(0.99) == [[f"{tmp_path}/{name}.png" for name in "ab"]]


# A full disk, at each place that writes


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_then_full(handle: int, data: bytes) -> None:
    os.write(handle, data[: len(data) // 2 + 1])
    full()


class _Full(sqlite3.Connection):
    """A connection whose disk is full at one kind of statement."""

    at = ""

    def execute(self, statement, *args):
        if self.at and statement.startswith(self.at):
            raise sqlite3.OperationalError("database or disk is full")
        return super().execute(statement, *args)

    def executemany(self, statement, *args):
        if self.at and statement.startswith(self.at):
            raise sqlite3.OperationalError("database or disk is full")
        return super().executemany(statement, *args)


@pytest.mark.parametrize("passes", [0, 2])
@pytest.mark.parametrize(
    "point", ["rows", "half of the rows", "fsync", "BEGIN IMMEDIATE", "DELETE", "INSERT", "COMMIT"]
)
def test_full_while_adding(tmp_path, monkeypatch, point, passes):
    """`passes` commits go through first; what they stored stays, and the same call goes on when there is space."""
    index = indexed(tmp_path, {f"{i}": f"{i}" for i in range(4)})
    index.close()
    real_connect, left = sqlite3.connect, [passes]

    def late(action, real):
        def run(*args, **options):
            if left[0] > 0:
                left[0] -= 1
                return real(*args, **options)
            return action(*args, **options)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(store.sqlite3, "connect", lambda *args, **options: real_connect(*args, factory=_Full, **options))
        index = Index.open(tmp_path / ".ecliptic")
        for i in range(4, 24):
            write(tmp_path / f"{i}.png", f"bad {i}" if i % 7 == 0 else f"{i}")
        (tmp_path / "0.png").unlink()
        if point == "rows":
            patch.setattr(store, "write_all", late(full, store.write_all))
        elif point == "half of the rows":
            patch.setattr(store, "write_all", late(half_then_full, store.write_all))
        elif point == "fsync":
            patch.setattr(store.os, "fsync", late(full, os.fsync))
        else:
            real_commit = store.Store.commit

            def commit(self, *args):
                self._database.at = "" if left[0] > 0 else point
                left[0] -= 1
                return real_commit(self, *args)

            patch.setattr(store.Store, "commit", commit)
        with pytest.raises(DiskFullError, match=r"no space left .* intact"):
            index.add(tmp_path, FakeEmbedder(), batch_size=2, commit_every=4, workers=2)
        index.close()
    with Index.open(tmp_path / ".ecliptic") as index:
        held, wanted = content(index), expected(tmp_path)
        assert len(held) >= 3 + 4 * passes
        assert all(wanted[path] == value for path, value in held.items() if not path.endswith("/0.png"))
        assert index.check().problems == []
        index.add(tmp_path, FakeEmbedder())
        assert content(index) == wanted
        assert index._store.snapshot().rows - len(index) == 1  # only the row of 0.png has no owner


@pytest.mark.parametrize("point", ["fsync", "sync_folder", "transaction"])
def test_full_while_compacting(tmp_path, monkeypatch, point):
    index = indexed(tmp_path, {f"{i}": f"{i}" for i in range(10)})
    (tmp_path / "3.png").unlink()
    index.add(tmp_path, FakeEmbedder())
    with monkeypatch.context() as patch:
        if point == "fsync":
            patch.setattr(store.os, "fsync", full)
        elif point == "sync_folder":
            patch.setattr(store, "sync_folder", full)
        else:
            patch.setattr(index._store, "_set", full)
        with pytest.raises(DiskFullError, match="intact"):
            index.compact()
    assert content(index) == expected(tmp_path)
    assert [path.name for path in (tmp_path / ".ecliptic").glob("vectors-*")] == ["vectors-0.f16"]
    assert index.compact() == 1
    assert content(index) == expected(tmp_path)


def test_full_while_an_index_is_created(tmp_path, monkeypatch):
    write(tmp_path / "a.png", "a")
    real = sqlite3.connect
    with monkeypatch.context() as patch:
        patch.setattr(_Full, "at", "INSERT")
        patch.setattr(store.sqlite3, "connect", lambda *args, **options: real(*args, factory=_Full, **options))
        with pytest.raises(DiskFullError):
            Index.create(tmp_path / ".ecliptic", SIGNATURE)
    with Index.create(tmp_path / ".ecliptic", SIGNATURE) as index:
        index.add(tmp_path, FakeEmbedder())
        assert content(index) == expected(tmp_path)


def test_a_merged_index_may_go(tmp_path):
    """The vectors of a merged index are its own: the other index may go."""
    left, right = indexed(tmp_path / "left", {"a": "a"}), indexed(tmp_path / "right", {"b": "b"})
    left.merge(right)
    right.close()
    shutil.rmtree(tmp_path / "right/.ecliptic")
    assert Path(left.search(vector_of(b"b"), 1)[0].path) == tmp_path / "right/b.png"
