"""The index in a LanceDB table: the same surface, the same properties, and upkeep that stays bounded."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from ecliptic.apps.index import DiskFullError, Index, NoIndexError, OtherModelError, Signature, ann, lance
from ecliptic.apps.index.store import Item
from tests.apps.fakes import DIM, FakeEmbedder, content, expected, vector_of, write
from tests.apps.test_index import Changes, start_python

SIGNATURE = FakeEmbedder().signature


class LanceChanges(Changes):
    place = "pictures.lance"


TestLanceChanges = LanceChanges.TestCase
TestLanceChanges.settings = settings(
    max_examples=6, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)


def both(folder: Path, **options) -> tuple[Index, Index]:
    """The same files in a folder's index and in a table."""
    made = []
    for place in (".ecliptic", "pictures.lance"):
        index = Index.create(folder / place, SIGNATURE)
        index.add(folder, FakeEmbedder(), **options)
        made.append(index)
    return made[0], made[1]


def test_it_answers_as_the_index_in_a_folder(tmp_path):
    for i in range(60):
        write(tmp_path / ("it's" if i % 3 else "near") / f"{i} (1).png", f"bad {i}" if i % 10 == 9 else f"{i % 45}")
    flat, table = both(
        tmp_path,
        describe=lambda path: {"parity": int(path.stem.split()[0]) % 2, "name": path.name, "half": 0.5, "s": "'"},
    )
    assert content(table) == content(flat) == expected(tmp_path)
    assert (len(table), table.paths(), table.bad()) == (len(flat), flat.paths(), flat.bad())
    assert table.duplicates() == flat.duplicates() != []
    assert table.duplicates(0.3) == flat.duplicates(0.3)
    query = vector_of(b"query")
    for filters in (
        {},
        {"glob": "near/*.png"},
        {"glob": "ear/*"},
        {"glob": f"{tmp_path}/near/*"},
        {"glob": "it's/[1-3]? (1).png"},
        {"glob": "*[^05] (1).png"},
        {"where": {"parity": 1}},
        {"where": {"parity": 1.0}},
        {"where": {"parity": True, "half": 0.5, "s": "'"}},
        {"where": {"name": "7 (1).png"}},
        {"where": {"name": 7}},
        {"where": {'x"; DROP TABLE items': 1}},
        {"where": {"parity": 0}, "glob": "near/*"},
    ):
        for k in (1, 7, 100):
            assert table.search(query, k, **filters) == flat.search(query, k, **filters), (filters, k)
    assert table.search(vector_of(b"3"), 1, every=True) == flat.search(vector_of(b"3"), 1)


def test_ties_are_complete_and_ordered_by_path(tmp_path):
    for i in range(150):
        write(tmp_path / f"{i:03}.png", "same" if i % 2 else f"{i}")
    flat, table = both(tmp_path)
    assert table.search(vector_of(b"same"), 3) == flat.search(vector_of(b"same"), 3)
    assert [Path(hit.path).stem for hit in table.search(vector_of(b"same"), 3)] == ["001", "003", "005"]


def test_both_kinds_merge_into_each_other(tmp_path):
    write(tmp_path / "one/a.png", "a")
    write(tmp_path / "two/b.png", "b")
    with (
        Index.create(tmp_path / "one/.ecliptic", SIGNATURE) as flat,
        Index.create(tmp_path / "two/x.lance", SIGNATURE) as table,
    ):
        flat.add(tmp_path / "one", FakeEmbedder())
        table.add(tmp_path / "two", FakeEmbedder())
        flat.merge(table)
        table.merge(flat)
        assert content(flat) == content(table) == expected(tmp_path)
        assert table.remove(glob="one/*") == [f"{tmp_path}/one/a.png"]
        assert content(table) == expected(tmp_path / "two")


def test_another_model_is_refused_and_no_index_is_said_so(tmp_path):
    with pytest.raises(NoIndexError, match="there is no index in"):
        Index.open(tmp_path / "x.lance")
    assert not (tmp_path / "x.lance").exists()
    Index.create(tmp_path / "x.lance", SIGNATURE, source="tiny").close()
    with pytest.raises(OtherModelError, match="'fake', not 'other'"):
        Index.open(tmp_path / "x.lance", Signature("other", "bytes", DIM))
    with Index.create(tmp_path / "x.lance", SIGNATURE) as index:
        assert (index.source, len(index), index.search(np.ones(DIM))) == ("tiny", 0, [])
        assert index.check().problems == []


def test_pictures_and_table_can_move_together(tmp_path):
    write(tmp_path / "old/a.png", "a")
    with Index.create(tmp_path / "old/x.lance", SIGNATURE) as index:
        index.add(tmp_path / "old", FakeEmbedder())
    (tmp_path / "old").rename(tmp_path / "new")
    with Index.open(tmp_path / "new/x.lance") as index:
        assert index.paths() == [f"{tmp_path}/new/a.png"]


def test_a_url_keeps_its_slashes_through_a_path():
    assert lance.located(Path("s3://bucket/pictures.lance")) == "s3://bucket/pictures.lance"
    assert lance.is_lance(Path("gs://bucket/pictures"))
    assert lance.is_lance("here/pictures.lance/")
    assert not lance.is_lance("here/lance")
    assert not lance.is_lance("/a:/b")


def test_without_lancedb_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(ImportError, match=r"pip install 'ecliptic\[lance\]'"):
        Index.create(tmp_path / "x.lance", SIGNATURE)


def test_fragments_stay_few_and_what_is_gone_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(lance, "FRAGMENTS", 8)
    for i in range(60):
        write(tmp_path / f"{i:02}.png", f"{i}")
    with Index.create(tmp_path / "x.lance", SIGNATURE) as index:
        assert isinstance(index._store, lance.LanceStore)
        most = 0
        real = index._store.commit

        def commit(*args):
            nonlocal most
            stored = real(*args)
            most = max(most, index._store._fragments())
            return stored

        monkeypatch.setattr(index._store, "commit", commit)
        index.add(tmp_path, FakeEmbedder(), batch_size=2, commit_every=2)
        assert 4 < most <= 8
        for i in range(40):
            (tmp_path / f"{i:02}.png").unlink()
        index.remove(tmp_path / "00.png")
        assert index._store._table.count_rows("status = 'gone'") == index.compact() == 1
        assert len(index.add(tmp_path, FakeEmbedder()).removed) == 39
        assert index._store._table.count_rows() == 20  # more than half were gone: deleted for good
        assert content(index) == expected(tmp_path)


def test_a_large_table_is_indexed_and_recall_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(ann, "FROM", 1000)
    monkeypatch.setattr(ann, "TAIL", 100)
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((30, 32))

    def put(index: Index, start: int, n: int) -> None:
        rows = centres[rng.integers(0, 30, n)] + 0.5 * rng.standard_normal((n, 32))
        rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
        fields = ('{"p": 0}', '{"p": 1}')
        items = [Item(f"{i}.png", b"%d" % i, 1, 1, None, "ok", None, fields[i % 2]) for i in range(start, start + n)]
        index._store.commit((), list(zip(items, rows, strict=True)))
        index._store.tidy(None)

    with Index.create(tmp_path / "x.lance", Signature("m", "t", 32)) as index:
        put(index, 0, 1500)
        found = index.check(sample=30)
        assert (found.problems, found.pictures, found.covered) == ([], 1500, 1500)
        assert found.recall is not None
        assert found.recall >= 0.99
        put(index, 1500, 300)
        assert index._store.snapshot().graph == 1800
        query = centres[3]
        assert index.search(query, 20, where={"p": 1}) == index.search(query, 20, where={"p": 1}, every=True)


def test_killed_between_commits_and_run_to_the_end(tmp_path):
    for i in range(30):
        write(tmp_path / f"{i}.png", f"bad {i}" if i % 10 == 3 else f"{i}")
    code = f"""
        import os, signal
        from ecliptic.apps.index import Index, lance
        from tests.apps.fakes import FakeEmbedder
        real, passed = lance.LanceStore.commit, 0
        def commit(self, *args):
            global passed
            passed += 1
            if passed == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, *args)
        lance.LanceStore.commit = commit
        index = Index.create({str(tmp_path / "x.lance")!r}, FakeEmbedder().signature)
        index.add({str(tmp_path)!r}, FakeEmbedder(), batch_size=3, commit_every=3, workers=2)
    """
    process = start_python(code)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    embedder = FakeEmbedder()
    with Index.open(tmp_path / "x.lance") as index:
        assert 0 < len(index) < 27
        index.add(tmp_path, embedder)
        assert content(index) == expected(tmp_path)
        assert embedder.embedded < 27  # what was committed was not done again
        assert index.check().problems == []


def test_a_full_disk_is_said_so(tmp_path, monkeypatch):
    write(tmp_path / "a.png", "a")
    with Index.create(tmp_path / "x.lance", SIGNATURE) as index:
        assert isinstance(index._store, lance.LanceStore)

        def full(*args):
            raise RuntimeError("lance error: LanceError(IO): No space left on device (os error 28)")

        with monkeypatch.context() as patch:
            patch.setattr(type(index._store._table), "merge_insert", full)
            with pytest.raises(DiskFullError, match="free some space"):
                index.add(tmp_path, FakeEmbedder())
        index.add(tmp_path, FakeEmbedder())
        assert content(index) == expected(tmp_path)


def test_check_finds_what_is_wrong(tmp_path):
    write(tmp_path / "a.png", "a")
    write(tmp_path / "b.png", "b")
    with Index.create(tmp_path / "x.lance", SIGNATURE) as index:
        index.add(tmp_path, FakeEmbedder())
        (item,) = [item for item in index._store.items() if item.path == "a.png"]
        index._store.commit((), [(item, np.full(DIM, 2.0))])
        assert index.check().problems == ["1 vectors do not have length 1"]
        index._store.commit((), [(item, np.full(DIM, np.inf))])
        assert index.check().problems == ["1 vectors are not finite"]


def test_the_command_line_takes_a_table(cli, model, pictures):
    place = pictures.parent / "all.lance"
    assert (
        json.loads(cli("index", pictures, "--index", place, "--model", model, "--no-export", "--json").stdout)["added"]
        == 12
    )
    assert json.loads(cli("index", "--check", "--index", place, "--json").stdout)["sound"]
    assert len(cli("search", "a cat", "--index", place, "-f", "-k", 3).stdout.splitlines()) == 3


def test_the_folder_index_never_imports_lancedb(tmp_path):
    code = f"""
import sys
from ecliptic.apps.index import Index
from tests.apps.fakes import FakeEmbedder
Index.create({str(tmp_path / "x")!r}, FakeEmbedder().signature).close()
assert not {{"lancedb", "pyarrow", "faiss", "torch"}} & set(sys.modules)
"""
    process = start_python(code)
    assert process.wait(60) == 0, process.communicate()
    process.communicate()
    shutil.rmtree(tmp_path / "x")
    assert isinstance(process, subprocess.Popen)
