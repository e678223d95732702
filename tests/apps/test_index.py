"""The index against slow loops, rebuilds, kills, full disks and other models."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ecliptic.apps.index import DiskFullError, Index, IndexBusyError, NoIndexError, OtherModelError, Signature, exact
from tests.apps.fakes import DIM, FakeEmbedder, content, expected, vector_of, write

SIGNATURE = FakeEmbedder().signature


def fresh(folder: Path) -> Index:
    return Index.create(folder / ".ecliptic", SIGNATURE)


# Exact search


def test_topk_equals_a_slow_loop(monkeypatch):
    monkeypatch.setattr(exact, "BLOCK", 64)  # several blocks, the last one short
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((1000, 24))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    rows = np.sort(rng.permutation(1000)[:300])
    for allowed in (None, rows):
        for k in (1, 7, 299, 5000):
            query = rng.standard_normal(24).astype(np.float32)
            found, scores = exact.topk(query, vectors, k, allowed)
            slow = []
            for row in range(1000) if allowed is None else allowed.tolist():
                slow.append((-sum(float(a) * float(b) for a, b in zip(vectors[row], query)), row))
            slow.sort()
            assert found.tolist() == [row for _, row in slow[:k]]
            np.testing.assert_allclose(scores, [-score for score, _ in slow[:k]], atol=1e-9)


def test_ties_with_the_last_place_all_come_back_in_order():
    row = np.ones(5, np.float16) / 2
    vectors = np.stack([row * 0.5, row, row, -row, row])
    found, scores = exact.topk(np.ones(5, np.float32), vectors, 2)
    assert found.tolist() == [1, 2, 4]
    assert len(set(scores.tolist())) == 1


def test_equal_pictures_score_equally_and_stand_in_order_of_path(tmp_path):
    for i in range(70):
        write(tmp_path / f"{i:03}.png", "same" if i % 2 else f"other {i}")
    with fresh(tmp_path) as index:
        index.add(tmp_path, FakeEmbedder())
        hits = index.search(vector_of(b"same"), k=10)
        assert [Path(hit.path).name for hit in hits] == [f"{i:03}.png" for i in range(1, 20, 2)]
        assert len({hit.score for hit in hits}) == 1
        assert hits[0].score == pytest.approx(1, abs=1e-3)


def pairs(found) -> set[tuple[int, int]]:
    return {pair for first, second in found for pair in zip(first.tolist(), second.tolist(), strict=True)}


def test_neighbours_equal_a_slow_loop(monkeypatch):
    monkeypatch.setattr(exact, "PAIRS", 16)
    vectors = np.random.default_rng(1).standard_normal((50, 4)).astype(np.float16)
    rows = np.arange(3, 50)
    slow = [(i, j) for i in range(47) for j in range(i + 1, 47) if float(vectors[rows[i]] @ vectors[rows[j]]) >= 1.0]
    near = {
        p for p in slow if abs(float(vectors[rows[p[0]]].astype(float) @ vectors[rows[p[1]]].astype(float)) - 1) < 0.02
    }
    assert pairs(exact.neighbours(vectors, rows, 1.0)) ^ set(slow) <= near
    assert slow


def test_a_query_that_is_no_direction_is_refused(tmp_path):
    write(tmp_path / "a.png", "a")
    with fresh(tmp_path) as index:
        index.add(tmp_path, FakeEmbedder())
        for query in (np.zeros(DIM), np.full(DIM, np.nan)):
            with pytest.raises(ValueError, match="zero or not a number"):
                index.search(query)
        with pytest.raises(ValueError, match="holds vectors of 16"):
            index.search(np.ones(3))


def test_an_empty_index_answers_nothing(tmp_path):
    with fresh(tmp_path) as index:
        assert index.search(np.ones(DIM)) == []
        assert index.duplicates() == index.duplicates(0.5) == []
        assert len(index) == 0


def test_filters_are_resolved_before_the_search(tmp_path):
    for i in range(40):
        write(tmp_path / ("far" if i % 4 else "near") / f"{i}.png", f"{i}")
    with fresh(tmp_path) as index:
        index.add(tmp_path, FakeEmbedder(), describe=lambda path: {"parity": int(path.stem) % 2, "name": path.name})
        query = vector_of(b"anything")
        everything = index.search(query, k=40)
        assert len(everything) == 40
        near = index.search(query, k=10, glob="near/*.png")
        assert near == [
            hit for hit in everything if "/near/" in hit.path
        ]  # all ten, though few are in the overall top ten
        assert index.search(query, 10, glob=f"{tmp_path}/near/*") == near
        assert index.search(query, 10, glob="ear/*") == []
        odd = index.search(query, k=20, where={"parity": 1})
        assert odd == [hit for hit in everything if hit.extra["parity"] == 1]
        assert index.search(query, k=3, where={"name": "7.png"})[0].path.endswith("/7.png")
        assert index.search(query, k=3, where={'x"; DROP TABLE items': 1}) == []


def test_duplicates_by_content_and_by_likeness(tmp_path):
    for name, text in {"a": "x", "b": "y", "c/a": "x", "c/d": "x", "e": "bad", "f": "bad"}.items():
        write(tmp_path / f"{name}.png", text)
    with fresh(tmp_path) as index:
        index.add(tmp_path, FakeEmbedder())
        same = [[f"{tmp_path}/{name}.png" for name in ("a", "c/a", "c/d")]]
        assert index.duplicates() == same
        assert index.duplicates(0.999) == same


# Keeping in step


def test_unchanged_files_are_not_opened(tmp_path):
    write(tmp_path / "a.png", "a")
    write(tmp_path / "b.png", "bad b")
    embedder = FakeEmbedder()
    with fresh(tmp_path) as index:
        first = index.add(tmp_path, embedder)
        assert (len(first.added), first.unchanged, first.embedded) == (1, 0, 1)
        assert first.bad == [(f"{tmp_path}/b.png", "corrupt: bad b")]
        opened = []
        embedder.prepare = lambda data: opened.append(data)  # type: ignore[method-assign]
        second = index.add(tmp_path, embedder)
        assert (second.added, second.unchanged, second.embedded, opened) == ([], 2, 0, [])
        assert second.bad == first.bad  # still told, not tried again


def test_a_file_too_young_for_its_clock_is_looked_at_again(tmp_path):
    """Same size, same time stamp, other bytes: only seen because fresh stamps are not trusted."""
    path = write(tmp_path / "a.png", "one", age=0)
    stamp = path.stat().st_mtime_ns
    with fresh(tmp_path) as index:
        index.add(tmp_path, FakeEmbedder())
        path.write_text("two")
        os.utime(path, ns=(stamp, stamp))
        index.add(tmp_path, FakeEmbedder())
        assert content(index) == expected(tmp_path)


def test_moves_and_copies_take_their_vector_along(tmp_path):
    write(tmp_path / "a.png", "a")
    write(tmp_path / "b.png", "b")
    write(tmp_path / "broken.png", "bad")
    embedder = FakeEmbedder()
    with fresh(tmp_path) as index:
        index.add(tmp_path, embedder)
        (tmp_path / "new").mkdir()
        (tmp_path / "a.png").rename(tmp_path / "new/a.png")
        (tmp_path / "broken.png").rename(tmp_path / "new/broken.png")
        shutil.copy(tmp_path / "b.png", tmp_path / "c.png")
        change = index.add(tmp_path, embedder)
        assert sorted(change.moved) == [
            (f"{tmp_path}/a.png", f"{tmp_path}/new/a.png"),
            (f"{tmp_path}/broken.png", f"{tmp_path}/new/broken.png"),
        ]
        assert change.added == [f"{tmp_path}/c.png"]
        assert change.removed == []
        assert (change.embedded, embedder.embedded) == (0, 2)
        assert content(index) == expected(tmp_path)


def test_two_files_that_swap_their_names(tmp_path):
    write(tmp_path / "a.png", "first")
    write(tmp_path / "b.png", "other!")
    with fresh(tmp_path) as index:
        index.add(tmp_path, FakeEmbedder())
        (tmp_path / "a.png").rename(tmp_path / "t")
        (tmp_path / "b.png").rename(tmp_path / "a.png")
        (tmp_path / "t").rename(tmp_path / "b.png")
        assert index.add(tmp_path, FakeEmbedder()).embedded == 0
        assert content(index) == expected(tmp_path)


def test_bytes_that_come_back_under_another_name(tmp_path):
    """What a path held before it changed must not stand for those bytes any more."""
    write(tmp_path / "a.png", "first")
    with fresh(tmp_path) as index:
        index.add(tmp_path, FakeEmbedder())
        write(tmp_path / "a.png", "second", age=50)
        index.add(tmp_path, FakeEmbedder())
        write(tmp_path / "b.png", "first")
        index.add(tmp_path, FakeEmbedder())
        assert content(index) == expected(tmp_path)


def test_a_mended_picture_is_tried_again(tmp_path):
    write(tmp_path / "a.png", "bad")
    with fresh(tmp_path) as index:
        index.add(tmp_path, FakeEmbedder())
        write(tmp_path / "a.png", "good", age=50)
        change = index.add(tmp_path, FakeEmbedder())
        assert (change.changed, change.bad) == ([f"{tmp_path}/a.png"], [])


def test_only_what_was_looked_at_can_vanish(tmp_path):
    for name in ("one/a", "two/b", "two/c"):
        write(tmp_path / f"{name}.png", name)
    with fresh(tmp_path) as index:
        index.add(tmp_path, FakeEmbedder())
        shutil.rmtree(tmp_path / "one")
        (tmp_path / "two/b.png").unlink()
        assert index.add(tmp_path / "two", FakeEmbedder()).removed == [f"{tmp_path}/two/b.png"]
        assert len(index) == 2  # one/a is not below what was asked for
        assert index.add([tmp_path / "one/a.png"], FakeEmbedder()).removed == [f"{tmp_path}/one/a.png"]


def test_what_lies_in_an_unreadable_folder_stays(tmp_path, monkeypatch):
    write(tmp_path / "open/a.png", "a")
    write(tmp_path / "shut/b.png", "b")
    real = os.scandir

    def scandir(path):
        if Path(path).name == "shut":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    with fresh(tmp_path) as index:
        index.add(tmp_path, FakeEmbedder())
        monkeypatch.setattr(os, "scandir", scandir)
        change = index.add(tmp_path, FakeEmbedder())
        assert change.removed == []
        assert [path for path, _ in change.unreadable] == [f"{tmp_path}/shut"]
        assert len(index) == 2


def test_a_file_that_cannot_be_opened_today_keeps_its_vector(tmp_path, monkeypatch):
    path = write(tmp_path / "a.png", "a")
    write(tmp_path / "new.png", "new")
    with fresh(tmp_path) as index:
        index.add([path], FakeEmbedder())
        write(path, "later", age=10)
        real = Path.read_bytes

        def read(self):
            if self.suffix == ".png":
                raise PermissionError(13, "Permission denied")
            return real(self)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", read)
            change = index.add(tmp_path, FakeEmbedder())
        assert len(change.unreadable) == 2
        assert index.paths() == [path.as_posix()]
        assert index.bad() == [(f"{tmp_path}/new.png", "Permission denied")]
        index.add(tmp_path, FakeEmbedder())  # allowed again: no need to touch the files
        assert content(index) == expected(tmp_path)


def test_odd_files_are_recorded_or_left_alone(tmp_path):
    write(tmp_path / "notes.txt", "text")
    write(tmp_path / ".hidden.png", "hidden")
    write(tmp_path / ".cache/a.png", "hidden")
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.png").mkdir()
    write(tmp_path / "link target.png", "target")
    (tmp_path / "link.png").symlink_to(tmp_path / "link target.png")
    os.close(os.open(os.fsencode(tmp_path) + b"/caf\xe9.png", os.O_CREAT))
    with fresh(tmp_path) as index:
        for _ in range(2):
            change = index.add(tmp_path, FakeEmbedder())
            assert [Path(path).name for path in index.paths()] == ["link target.png", "link.png"]
            assert dict(change.bad) == {f"{tmp_path}/caf\\xe9.png": "the file name is not valid UTF-8"}


def test_vectors_that_are_not_finite_never_get_in(tmp_path):
    write(tmp_path / "a.png", "a")
    write(tmp_path / "b.png", "b")
    embedder = FakeEmbedder()
    embedder.embed = lambda prepared: np.array(  # type: ignore[method-assign]
        [np.full(DIM, np.nan) if data == b"b" else vector_of(data) for data in prepared]
    )
    with fresh(tmp_path) as index:
        assert index.add(tmp_path, embedder).bad == [(f"{tmp_path}/b.png", "the model's vector is not finite")]
        assert len(index) == 1


def test_pictures_and_index_can_move_together(tmp_path):
    write(tmp_path / "old/sub/a.png", "a")
    with fresh(tmp_path / "old") as index:
        index.add(tmp_path / "old", FakeEmbedder())
    (tmp_path / "old").rename(tmp_path / "new")
    with Index.open(tmp_path / "new/.ecliptic") as index:
        assert index.paths() == [f"{tmp_path}/new/sub/a.png"]
        change = index.add(tmp_path / "new", FakeEmbedder())
        assert (change.unchanged, change.removed) == (1, [])


def test_an_index_elsewhere_holds_several_folders(tmp_path):
    write(tmp_path / "one/a.png", "a")
    write(tmp_path / "two/b.png", "b")
    with Index.create(tmp_path / "index", SIGNATURE, root=tmp_path / "one") as index:
        index.add(tmp_path / "one", FakeEmbedder())
        index.add(tmp_path / "two", FakeEmbedder())
        assert index.paths() == [f"{tmp_path}/one/a.png", f"{tmp_path}/two/b.png"]


def test_vectors_that_nobody_owns_are_given_back(tmp_path):
    for i in range(30):
        write(tmp_path / f"{i}.png", f"{i}")
    with fresh(tmp_path) as index, Index.open(tmp_path / ".ecliptic") as reader:
        index.add(tmp_path, FakeEmbedder())
        assert len(reader.search(np.ones(DIM), 50)) == 30
        for i in range(20):
            (tmp_path / f"{i}.png").unlink()
        index.add(tmp_path, FakeEmbedder())
        assert index.compact() == 20
        assert (tmp_path / ".ecliptic/vectors-1.f16").stat().st_size == 10 * DIM * 2
        assert content(index) == content(reader) == expected(tmp_path)
        write(tmp_path / "more.png", "more")
        index.add(tmp_path, FakeEmbedder())
        assert content(index) == content(reader) == expected(tmp_path)
        assert index.compact() == 0


class Changes(RuleBasedStateMachine):
    """Whatever happens to the files, `add` makes the index equal to one built from nothing."""

    place = ".ecliptic"
    names = st.sampled_from([f"{folder}{name}.png" for folder in ("", "x/", "x/y/") for name in "abcd"])
    texts = st.sampled_from(["red", "blue", "grey", "bad one", "bad two", "a longer text"])

    @initialize()
    def start(self):
        self.top = Path(tempfile.mkdtemp())
        self.folder = self.top / "pictures"
        self.folder.mkdir()
        self.clock = 0.0

    @rule(name=names, text=texts)
    def put(self, name, text):
        self.clock += 1
        write(self.folder / name, text, age=1_000_000 - self.clock)

    @rule(name=names)
    def delete(self, name):
        (self.folder / name).unlink(missing_ok=True)

    @rule(old=names, new=names)
    def rename(self, old, new):
        if (self.folder / old).exists():
            (self.folder / new).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / old).rename(self.folder / new)

    @rule(name=names, text=texts)
    def put_and_add(self, name, text):
        self.put(name, text)
        self.add(100, 8)

    @rule(name=names)
    def touch(self, name):
        if (self.folder / name).exists():
            self.clock += 1
            os.utime(self.folder / name, (self.clock, self.clock))

    @rule(commit_every=st.sampled_from([1, 3, 100]), batch=st.sampled_from([1, 2, 8]))
    def add(self, commit_every, batch):
        embedder = FakeEmbedder()
        with Index.create(self.folder / self.place, SIGNATURE) as index:
            before = content(index)
            change = index.add(self.folder, embedder, commit_every=commit_every, batch_size=batch, workers=2)
            assert content(index) == expected(self.folder)
            gone = {old for old, _ in change.moved} | set(change.removed)
            assert set(before) - set(expected(self.folder)) == gone
            again = index.add(self.folder, embedder)
            assert (again.added, again.changed, again.moved, again.removed, again.embedded) == ([], [], [], [], 0)
            query = vector_of(b"query")
            scores = {path: float(index.vector(path) @ query) for path in index.paths()}
            hits = index.search(query, k=5)
            assert [hit.score for hit in hits] == pytest.approx(sorted(scores.values(), reverse=True)[:5], abs=1e-6)
            texts = [(self.folder / path).read_bytes() for path in scores]
            copies = {text: [path for path, other in zip(scores, texts) if other == text] for text in texts}
            groups = sorted(sorted(group) for group in copies.values() if len(group) > 1)
            assert index.duplicates() == index.duplicates(0.999) == groups

    @rule()
    def update(self):
        """Only what was known is looked at, and that is then as the files say."""
        if (self.folder / self.place).exists():
            with Index.open(self.folder / self.place) as index:
                known = set(content(index))
                index.update(FakeEmbedder())
                held, wanted = content(index), expected(self.folder)
                assert held.items() <= wanted.items()
                assert known & set(wanted) <= set(held)

    @rule(name=names)
    def forget(self, name):
        if (self.folder / self.place).exists():
            with Index.open(self.folder / self.place) as index:
                before = content(index)
                gone = index.remove(self.folder / name)
                assert content(index) == {path: value for path, value in before.items() if path not in gone}
                assert gone == [path for path in before if path == f"{self.folder}/{name}"]

    @rule()
    def compact(self):
        if (self.folder / self.place).exists():
            with Index.open(self.folder / self.place) as index:
                before = content(index)
                index.compact()
                assert content(index) == before

    @invariant()
    def one_row_each(self):
        if hasattr(self, "folder") and (self.folder / self.place).exists():
            with Index.open(self.folder / self.place) as index:
                rows = [item.row for item in index._store.items() if item.status == "ok"]
                assert len(set(rows)) == len(rows) == len(index)
                assert None not in rows

    def teardown(self):
        if hasattr(self, "top"):
            shutil.rmtree(self.top)


TestChanges = Changes.TestCase
TestChanges.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)


# Other models, other writers


def test_another_model_is_refused_and_both_are_named(tmp_path):
    write(tmp_path / "a.png", "a")
    with fresh(tmp_path) as index:
        index.add(tmp_path, FakeEmbedder())
        with pytest.raises(OtherModelError, match=r"built with model 'fake', not 'other'"):
            index.add(tmp_path, FakeEmbedder("other"))
        with pytest.raises(OtherModelError, match="'fake', not 'other'"):
            Index.open(tmp_path / ".ecliptic", Signature("other", "bytes", DIM))
        with pytest.raises(OtherModelError, match="image transform 'bytes', not 'crop'"):
            Index.create(tmp_path / ".ecliptic", Signature("fake", "crop", DIM))
        assert content(index) == expected(tmp_path)


def test_no_index_is_said_so(tmp_path):
    with pytest.raises(NoIndexError, match="there is no index in"):
        Index.open(tmp_path)
    (tmp_path / "index.db").touch()  # creation interrupted before its transaction
    with pytest.raises(NoIndexError, match="interrupted"):
        Index.open(tmp_path)
    Index.create(tmp_path, SIGNATURE).close()
    assert len(Index.open(tmp_path)) == 0


def test_one_writer_at_a_time_while_readers_go_on(tmp_path):
    for i in range(20):
        write(tmp_path / f"{i}.png", f"{i}")
    with fresh(tmp_path) as index:
        index.add(tmp_path, FakeEmbedder())
        write(tmp_path / "new.png", "new")
        seen: list[object] = []

        class Nosy(FakeEmbedder):
            def embed(self, prepared):
                with Index.open(tmp_path / ".ecliptic") as reader:
                    seen.append(len(reader.search(np.ones(DIM), 100)))
                    with pytest.raises(IndexBusyError, match="another process is writing"):
                        reader.add(tmp_path, FakeEmbedder())
                return super().embed(prepared)

        index.add(tmp_path, Nosy())
        assert seen == [20]
        assert len(index) == 21


def test_search_needs_no_torch(tmp_path):
    write(tmp_path / "a.png", "a")
    with fresh(tmp_path) as index:
        index.add(tmp_path, FakeEmbedder())
    code = f"""
        import sys, numpy as np
        from ecliptic.apps.index import Index
        assert len(Index.open({str(tmp_path / ".ecliptic")!r}).search(np.ones({DIM}))) == 1
        assert not {{"torch", "transformers", "PIL.Image"}} & set(sys.modules), "heavy"
    """
    run_python(code)


# Kills and full disks


def run_python(code: str, **options) -> subprocess.Popen:
    process = start_python(code, **options)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    return process


def start_python(code: str, **options) -> subprocess.Popen:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


KILL_POINTS = ["prepared", "rows written", "rows synced", "before commit", "after commit", "created"]


@pytest.mark.parametrize("point", KILL_POINTS)
def test_killed_at_each_step_and_run_again(tmp_path, point):
    """SIGKILL from inside, at the third time the point is passed (the first for `created`)."""
    for i in range(40):
        write(tmp_path / f"{i}.png", f"bad {i}" if i % 10 == 3 else f"{i}")
    write(tmp_path / "gone.png", "39")
    with fresh(tmp_path) as index:
        if point == "created":
            shutil.rmtree(tmp_path / ".ecliptic")
        else:
            index.add([tmp_path / "gone.png", tmp_path / "0.png"], FakeEmbedder())
    (tmp_path / "gone.png").unlink()
    code = f"""
        import os, signal, sqlite3, sys
        from pathlib import Path
        from ecliptic.apps.index import Index, store
        from tests.apps.fakes import FakeEmbedder
        point, passed = {point!r}, 0
        def die():
            global passed
            passed += 1
            if passed == (1 if point == "created" else 3):
                os.kill(os.getpid(), signal.SIGKILL)
        def around(module, name, before=False):
            real = getattr(module, name)
            def wrapper(*args, **kwargs):
                if before: die()
                out = real(*args, **kwargs)
                if not before: die()
                return out
            setattr(module, name, wrapper)
        if point == "prepared": around(FakeEmbedder, "embed")
        if point == "rows written": around(store, "write_all")
        if point == "rows synced": around(store.os, "fsync")
        if point == "after commit": around(store.Store, "commit")
        if point == "before commit": around(store.Store, "_set", before=True)
        if point == "created":
            class Database(sqlite3.Connection):
                def executemany(self, *args):
                    die()
            real = sqlite3.connect
            store.sqlite3.connect = lambda *args, **options: real(*args, factory=Database, **options)
        index = Index.create({str(tmp_path / ".ecliptic")!r}, FakeEmbedder().signature)
        index.add({str(tmp_path)!r}, FakeEmbedder(), batch_size=4, commit_every=4, workers=2)
    """
    process = start_python(code)
    process.wait(timeout=60)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    embedder = FakeEmbedder()
    with Index.create(tmp_path / ".ecliptic", SIGNATURE) as index:
        before = len(index)
        index.add(tmp_path, embedder, batch_size=4, commit_every=4)
        assert content(index) == expected(tmp_path)
        rows = index._store.snapshot().rows
        size = next((tmp_path / ".ecliptic").glob("vectors-*.f16")).stat().st_size
        assert size == rows * DIM * 2
        assert rows == len(index) == 36  # nothing doubled: no row without an owner
        if point == "after commit":
            assert before > 8  # what was committed was not done again
            assert embedder.embedded <= 36 - 8


def test_killed_twenty_times_and_run_to_the_end(tmp_path):
    """At the end nothing tells it from an index that was never disturbed."""
    for i in range(400):
        write(tmp_path / "pictures" / f"{i}.png", f"bad {i}" if i % 10 == 3 else f"{i % 350}")
    code = f"""
        from ecliptic.apps.index import Index
        from tests.apps.fakes import FakeEmbedder
        index = Index.create({str(tmp_path / "killed")!r}, FakeEmbedder().signature)
        print("go", flush=True)
        index.add({str(tmp_path / "pictures")!r}, FakeEmbedder(delay=0.01), batch_size=2, commit_every=2, workers=2)
    """
    rng = random.Random(0)
    wanted, counts = expected(tmp_path / "pictures"), [0]
    for _ in range(20):
        process = start_python(code)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.12))
        process.kill()
        process.communicate()
        with Index.open(tmp_path / "killed") as index:
            counts.append(len(index))
            assert wanted.items() >= content(index).items()
    assert counts == sorted(counts)  # nothing lost
    assert 0 < counts[-1] < 360
    run_python(code)
    with (
        Index.open(tmp_path / "killed") as index,
        Index.create(tmp_path / "whole", SIGNATURE) as undisturbed,
    ):
        undisturbed.add(tmp_path / "pictures", FakeEmbedder())
        assert content(index) == content(undisturbed) == wanted
        both = [
            {(i.path, i.hash, i.size, i.status, i.reason) for i in one._store.items()} for one in (index, undisturbed)
        ]
        assert both[0] == both[1]
        assert index._store.snapshot().rows == len(index) == 360  # no row doubled
        assert (tmp_path / "killed/vectors-0.f16").stat().st_size == 360 * DIM * 2


def test_a_compaction_killed_on_its_way_changes_nothing(tmp_path):
    for i in range(12):
        write(tmp_path / f"{i}.png", f"{i}")
    with fresh(tmp_path) as index:
        index.add(tmp_path, FakeEmbedder())
        (tmp_path / "3.png").unlink()
        index.add(tmp_path, FakeEmbedder())
    code = f"""
        import os, signal
        from ecliptic.apps.index import Index, store
        store.sync_folder = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
        Index.open({str(tmp_path / ".ecliptic")!r}).compact()
    """
    process = start_python(code)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    with Index.open(tmp_path / ".ecliptic") as index:
        assert (tmp_path / ".ecliptic/vectors-1.f16").exists()
        assert content(index) == expected(tmp_path)
        index.add(tmp_path, FakeEmbedder())
        assert not (tmp_path / ".ecliptic/vectors-1.f16").exists()  # the draft is cleared away
        assert index.compact() == 1
        assert content(index) == expected(tmp_path)


def test_ctrl_c_keeps_what_is_done(tmp_path):
    for i in range(40):
        write(tmp_path / f"{i}.png", f"{i}")

    class Impatient(FakeEmbedder):
        def embed(self, prepared):
            if self.embedded >= 20:
                raise KeyboardInterrupt
            return super().embed(prepared)

    with fresh(tmp_path) as index:
        with pytest.raises(KeyboardInterrupt):
            index.add(tmp_path, Impatient(), batch_size=5)
        assert len(index) == 20
        embedder = FakeEmbedder()
        index.add(tmp_path, embedder)
        assert embedder.embedded == 20
        assert content(index) == expected(tmp_path)


def test_a_full_disk_is_said_so_and_harms_nothing(tmp_path):
    """A real limit on file size, which the system reports in the middle of a write."""
    for i in range(300):
        write(tmp_path / f"{i:03}.png", f"{i}")
    wide = FakeEmbedder(dim=2048)  # rows of 4 KiB: the limit is met by the vectors, not by the catalogue
    with Index.create(tmp_path / ".ecliptic", wide.signature) as index:
        index.add([tmp_path / f"{i:03}.png" for i in range(100)], wide)
        before = content(index)
    code = f"""
        import resource, signal
        from ecliptic.apps.index import DiskFullError, Index
        from tests.apps.fakes import FakeEmbedder
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (150 * 4096 + 7, resource.RLIM_INFINITY))
        try:
            Index.open({str(tmp_path / ".ecliptic")!r}).add({str(tmp_path)!r}, FakeEmbedder(dim=2048))
        except DiskFullError as error:
            assert "no space left" in str(error) and "intact" in str(error), error
        else:
            raise SystemExit("it noticed nothing")
    """
    run_python(code)
    with Index.open(tmp_path / ".ecliptic") as index:
        assert content(index) == before
        assert (tmp_path / ".ecliptic/vectors-0.f16").stat().st_size == 100 * 4096
        index.add(tmp_path, wide)
        assert content(index) == expected(tmp_path, dim=2048)


def test_a_full_disk_under_the_catalogue_rolls_back(tmp_path, monkeypatch):
    for i in range(10):
        write(tmp_path / f"{i}.png", f"{i}")
    with fresh(tmp_path) as index:
        index.add([tmp_path / "0.png"], FakeEmbedder())
        before = content(index)

        def full(*args):
            raise sqlite3.OperationalError("database or disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(index._store, "_set", full)
            with pytest.raises(DiskFullError, match="no space left"):
                index.add(tmp_path, FakeEmbedder())
        assert content(index) == before
        index.add(tmp_path, FakeEmbedder())
        assert content(index) == expected(tmp_path)


def test_rows_that_were_never_committed_are_cut_off(tmp_path):
    for i in range(4):
        write(tmp_path / f"{i}.png", f"{i}")
    with fresh(tmp_path) as index:
        index.add(tmp_path, FakeEmbedder())
        file = tmp_path / ".ecliptic/vectors-0.f16"
        with file.open("ab") as vectors:
            vectors.write(b"x" * 777)  # as a killed run leaves them
        assert content(index) == expected(tmp_path)
        index.add(tmp_path, FakeEmbedder())
        assert file.stat().st_size == 4 * DIM * 2
        assert content(index) == expected(tmp_path)


def test_vectors_cut_short_are_noticed_and_mended(tmp_path):
    for i in range(10):
        write(tmp_path / f"{i}.png", f"{i}")
    with fresh(tmp_path) as index:
        index.add(tmp_path, FakeEmbedder())
    os.truncate(tmp_path / ".ecliptic/vectors-0.f16", 6 * DIM * 2 + 3)
    with Index.open(tmp_path / ".ecliptic") as index:
        with pytest.raises(Exception, match="shorter than its catalogue says"):
            index.search(np.ones(DIM))
        assert index.add(tmp_path, FakeEmbedder()).repaired == 4
        assert content(index) == expected(tmp_path)
