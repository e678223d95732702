"""The index itself: keep a folder's pictures in step with their vectors, and search them."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ecliptic.apps.index import exact
from ecliptic.apps.index.errors import IndexBusyError, OtherModelError
from ecliptic.apps.index.scan import Found, Scan, absolute, scan
from ecliptic.apps.index.store import Item, Signature, Snapshot, Store, to_json
from ecliptic.core.files import sync_folder
from ecliptic.data.cache import lock

Array = NDArray[Any]
Progress = Callable[[int, int], None]

MAX_BYTES = 256 << 20  # a larger file is refused rather than read into memory; ours
RACY_NS = 2_000_000_000  # a file this young may change again within one tick of its clock (FAT counts in 2 s)
COMPACT_FROM = 1024  # rows nobody owns before a rewrite is worth it; ours


class Refused(Exception):
    """A picture cannot be embedded; the text says why."""


class Embedder(Protocol):
    """What the index needs of a model."""

    signature: Signature

    def prepare(self, data: bytes) -> Any:
        """A file's bytes -> what `embed` takes; called from several threads; raises Refused for a bad picture."""

    def embed(self, prepared: Sequence[Any]) -> Array:
        """B prepared pictures -> (B, dim) unit rows."""


class Hit(NamedTuple):
    """One answer. `score` is the cosine with the query."""

    path: str
    score: float
    extra: dict[str, Any]


@dataclass
class Change:
    """What one `add` did, by path. bad: every picture below the sources that has no vector, with the reason."""

    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    moved: list[tuple[str, str]] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    unchanged: int = 0
    embedded: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    repaired: int = 0


class Index:
    """Open one with `Index.open`, make one with `Index.create`."""

    def __init__(self, store: Store):
        self._store = store
        self.folder = store.folder
        state = store.snapshot()
        self.signature, self.source, self.root = state.signature, state.source, state.root

    @classmethod
    def create(
        cls, folder: str | Path, signature: Signature, root: str | Path | None = None, source: str = ""
    ) -> Index:
        """Make an empty index, or open the one that is there if the same model made it.

        root: paths below it are kept relative to it (default: the folder that holds `folder`), so that pictures and
        index can move together. source: what `ecliptic.load` opens the model with, for those who search later.
        """
        folder = absolute(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not Store.exists(folder):
            top = folder.parent if root is None else absolute(root)
            with _writing(folder):
                if not Store.exists(folder):
                    Store.create(folder, signature, top, source).close()
                    sync_folder(folder)
        return cls.open(folder, signature)

    @classmethod
    def open(cls, folder: str | Path, signature: Signature | None = None) -> Index:
        """Open an index; with a signature, only if the same model and transform made it (OtherModelError)."""
        index = cls(Store(absolute(folder)))
        if signature is not None:
            index.require(signature)
        return index

    def require(self, signature: Signature) -> None:
        """Refuse a model whose vectors would not be comparable with those in the index."""
        for what, ours, theirs in zip(("model", "image transform", "size"), self.signature, signature, strict=True):
            if ours != theirs:
                hint = f"use --model {self.source}, or " if self.source else ""
                raise OtherModelError(
                    f"the index {self.folder} was built with {what} {ours!r}, not {theirs!r}: "
                    f"{hint}make another index with --index"
                )

    def close(self) -> None:
        self._store.close()

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return int(self._store.select("COUNT(*)", "WHERE status = 'ok'")[0][0])

    def paths(self) -> list[str]:
        """Absolute paths of the searchable pictures, sorted."""
        return sorted(self._absolute(path) for (path,) in self._store.select("path", "WHERE status = 'ok'"))

    def bad(self) -> list[tuple[str, str]]:
        """(path, reason) of the pictures that could not be embedded, sorted."""
        rows = self._store.select("path, reason", "WHERE status = 'bad' ORDER BY path")
        return [(self._absolute(path), reason) for path, reason in rows]

    # Searching

    def search(
        self, query: Array, k: int = 10, glob: str | None = None, where: Mapping[str, Any] | None = None
    ) -> list[Hit]:
        """(D,) query -> the k pictures with the greatest cosine; equal scores are ordered by path.

        glob restricts to paths that match (`*` crosses folders; from any folder downwards unless absolute), where to
        extra fields that are equal; both are resolved before the search, so k hits come back whenever k pictures
        qualify.
        """
        query = np.asarray(query, np.float32)
        norm = float(np.linalg.norm(query))
        if not norm > 0:
            raise ValueError("the query vector is zero or not a number")
        with self._view() as (_, vectors):
            allowed = self._allowed(glob, where)
            found, scores = exact.topk(query / norm, vectors, k, allowed)
            described = self._describe(found.tolist())
        ranked = zip(found.tolist(), scores.tolist(), strict=True)
        hits = [Hit(described[row][0], score, described[row][1]) for row, score in ranked]
        return sorted(hits, key=lambda hit: (-hit.score, hit.path))[:k]

    def vector(self, path: str | Path) -> Array | None:
        """(D,) float32: the stored vector of a picture, None where the index does not hold it."""
        with self._view() as (_, vectors):
            rows = self._store.select("row", "WHERE path = ? AND status = 'ok'", (self._key(path),))
            return np.asarray(vectors[rows[0][0]], np.float32) if rows else None

    def duplicates(self, at_least: float | None = None) -> list[list[str]]:
        """Groups of two or more paths, sorted: same bytes, or with `at_least`, linked by cosines of that or more."""
        if at_least is None:
            same = defaultdict(list)
            for path, digest in self._store.select("path, hash", "WHERE status = 'ok'"):
                same[digest].append(self._absolute(path))
            return sorted(sorted(group) for group in same.values() if len(group) > 1)
        with self._view() as (_, vectors):
            items = self._store.select("path, row", "WHERE status = 'ok' ORDER BY row")
            pairs = exact.neighbours(vectors, np.array([row for _, row in items], np.int64), at_least)
        return sorted(sorted(self._absolute(items[i][0]) for i in group) for group in _linked(pairs))

    # Keeping in step

    def add(
        self,
        sources: str | Path | Iterable[str | Path],
        embedder: Embedder,
        *,
        batch_size: int = 32,
        commit_every: int = 256,
        workers: int | None = None,
        describe: Callable[[Path], Mapping[str, Any]] | None = None,
        progress: Progress | None = None,
    ) -> Change:
        """Bring the index in step with folders or files: new, changed, moved and vanished pictures.

        A file with the size and time it had is not opened; one whose bytes are known under another path takes over
        that vector. Bad pictures are recorded with their reason and left alone until they change. Work is committed
        every `commit_every` pictures, also on Ctrl-C, and a run killed at any moment is simply run again.

        describe: extra fields of a newly embedded picture. progress: called with (done, total) files to look at.
        """
        self.require(embedder.signature)
        with _writing(self.folder):
            repaired = self._store.recover()
            named = [sources] if isinstance(sources, (str, Path)) else list(sources)
            update = _Update(self, embedder, scan(named), describe)
            update.change.repaired = repaired
            update.run(batch_size, commit_every, workers or min(8, os.cpu_count() or 1), progress)
            dead = self._store.snapshot().rows - len(self)
            if dead >= COMPACT_FROM and dead > len(self):
                self._store.compact()
            return update.change

    def compact(self) -> int:
        """Give back the space of vectors that no picture owns; returns how many there were."""
        with _writing(self.folder):
            self._store.recover()
            return self._store.compact()

    # Parts

    @contextmanager
    def _view(self) -> Iterator[tuple[Snapshot, Array]]:
        """One committed moment: its snapshot and vectors, with a read transaction held open."""
        for last in (False, False, True):
            with self._store.reading() as state:
                try:
                    vectors = self._store.vectors(state)
                except FileNotFoundError:
                    if last:
                        raise
                    continue  # a compaction switched files between the two looks
                yield state, vectors
                return

    def _allowed(self, glob: str | None, where: Mapping[str, Any] | None) -> Array:
        """Rows that may be answered with, ascending."""
        if glob is None and not where:
            return self._store.live_rows()
        clause, values = self._filter(glob, where)
        rows = self._store.select("row", clause + " ORDER BY row", values)
        return np.array(rows, np.int64).reshape(-1)

    def _filter(self, glob: str | None, where: Mapping[str, Any] | None) -> tuple[str, list[Any]]:
        clauses, values = ["status = 'ok'"], list[Any]()
        if glob is not None:
            top = self.root.as_posix().rstrip("/") + "/"
            glob = glob.removeprefix(top).removeprefix("./")
            clauses.append("(path GLOB ? OR path GLOB ?)")
            values += [glob, glob if glob.startswith("/") else f"*/{glob}"]
        for name, value in (where or {}).items():
            clauses.append("json_extract(extra, ?) = ?")
            values += [f'$."{name}"', value]
        return "WHERE " + " AND ".join(clauses), values

    def _describe(self, rows: list[int]) -> dict[int, tuple[str, dict[str, Any]]]:
        described = {}
        for start in range(0, len(rows), 500):
            part = rows[start : start + 500]
            marks = ",".join("?" * len(part))
            for row, path, extra in self._store.select("row, path, extra", f"WHERE row IN ({marks})", part):
                described[row] = (self._absolute(path), json.loads(extra) if extra else {})
        return described

    def _absolute(self, key: str) -> str:
        return (self.root / key).as_posix()

    def _key(self, path: str | Path) -> str:
        full = absolute(path)
        return (full.relative_to(self.root) if full.is_relative_to(self.root) else full).as_posix()


class _Prepared(NamedTuple):
    """A file after its bytes were read: hashed, and decoded unless the hash was known."""

    found: Found
    digest: bytes | None
    ready: Any = None
    reason: str | None = None
    missing: bool = False


class _Update:
    """One run of `Index.add`: compares the files found with the catalogue and commits the difference in chunks."""

    def __init__(
        self,
        index: Index,
        embedder: Embedder,
        found: Scan,
        describe: Callable[[Path], Mapping[str, Any]] | None,
    ):
        self.index, self.store = index, index._store
        self.embedder, self.found, self.describe = embedder, found, describe
        self.change = Change(unreadable=[(path.as_posix(), reason) for path, reason in found.unreadable])
        self.known = {item.path: item for item in self.store.items()}
        self.vectors = self.store.vectors(self.store.snapshot())
        self.by_hash = {item.hash: item for item in self.known.values() if item.hash is not None}
        self.put: list[tuple[Item, Array | None]] = []
        self.remove: list[str] = []
        self.now = time.time_ns()

    def run(self, batch_size: int, commit_every: int, workers: int, progress: Progress | None) -> None:
        fresh = [found for found in self.found.files if not self._untouched(found)]
        self.change.unchanged = len(self.found.files) - len(fresh)
        self.vanished = self._vanished()
        batch: list[_Prepared] = []
        try:
            for done, prepared in enumerate(self._prepared(fresh, workers, 2 * batch_size), start=1):
                if not self._settled(prepared):
                    batch.append(prepared)
                if len(batch) >= batch_size or done == len(fresh):
                    self._embed(batch)
                    batch = []
                if len(self.put) >= commit_every:
                    self._commit()
                if progress is not None:
                    progress(done, len(fresh))
        except KeyboardInterrupt:
            self._commit()
            raise
        for name, reason in self.found.refused:
            if name not in self.known:
                self.put.append((Item(name, None, 0, -1, None, "bad", reason), None))
        leftovers = [path for paths in self.vanished.values() for path in paths]
        self.remove += leftovers
        self.change.removed = sorted(self.index._absolute(path) for path in leftovers)
        self._commit()
        below = self._below()
        self.change.bad = [(path, reason) for path, reason in self.index.bad() if below(Path(path))]

    def _untouched(self, found: Found) -> bool:
        item = self.known.get(self.index._key(found.path))
        return item is not None and (item.size, item.mtime_ns) == (found.size, found.mtime_ns)

    def _below(self) -> Callable[[Path], bool]:
        """Whether a path belongs to what this run was asked to look at."""
        tops = {folder.as_posix() for folder in self.found.folders}
        named = {found.path.as_posix() for found in self.found.files} | {name for name, _ in self.found.refused}
        return lambda path: path.as_posix() in named or any(top.as_posix() in tops for top in path.parents)

    def _vanished(self) -> dict[bytes | None, deque[str]]:
        """Known paths below the sources that are there no more, by hash; what could not be looked at stays."""
        here = {self.index._key(found.path) for found in self.found.files}
        here |= {name for name, _ in self.found.refused}
        gone = {self.index._key(path) for path in self.found.gone}
        hidden = [path for path, _ in self.found.unreadable]
        below = self._below()
        result: dict[bytes | None, deque[str]] = defaultdict(deque)
        for key in sorted(self.known):
            path = self.index.root / key
            if key in here or not (key in gone or below(path)):
                continue
            if any(path == top or top in path.parents for top in hidden):
                continue
            result[self.known[key].hash].append(key)
        return result

    def _prepared(self, fresh: list[Found], workers: int, ahead: int) -> Iterator[_Prepared]:
        """Read, hash and decode in threads, at most `ahead` files in advance, in order."""
        waiting: deque[Future[_Prepared]] = deque()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        try:
            for found in fresh:
                waiting.append(pool.submit(self._prepare, found))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _prepare(self, found: Found) -> _Prepared:
        if found.size > MAX_BYTES:
            digest = hashlib.blake2b(f"{found.size} {found.mtime_ns}".encode(), digest_size=16).digest()
            return _Prepared(found, digest, reason=f"the file has {found.size >> 20} MiB, more than {MAX_BYTES >> 20}")
        try:
            data = found.path.read_bytes()
        except FileNotFoundError:
            return _Prepared(found, None, missing=True)
        except OSError as error:
            return _Prepared(found, None, reason=error.strerror or str(error))
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if digest in self.by_hash:
            return _Prepared(found, digest)
        try:
            return _Prepared(found, digest, ready=self.embedder.prepare(data))
        except Refused as error:
            return _Prepared(found, digest, reason=str(error))

    def _settled(self, prepared: _Prepared) -> bool:
        """Deal with a file that needs no model; False where it must be embedded."""
        found, digest = prepared.found, prepared.digest
        key = self.index._key(found.path)
        if prepared.missing:  # it went away between the walk and now
            if key in self.known:
                self.vanished[self.known[key].hash].append(key)
            return True
        if digest is None:
            self._unreadable(found, key, prepared.reason or "cannot be read")
            return True
        item = Item(key, digest, found.size, self._time(found), None, "ok")
        mine = self.known.get(key)
        if mine is not None and mine.hash == digest:  # only its date is new
            self.put.append((mine._replace(size=item.size, mtime_ns=item.mtime_ns), None))
            self.change.unchanged += 1
            return True
        if prepared.reason is not None:
            self._note(key, item._replace(status="bad", reason=prepared.reason), None)
            return True
        same = self.by_hash.get(digest)
        if same is None:
            return False
        if mine is None and self.vanished.get(digest):
            old = self.vanished[digest].popleft()
            self.remove.append(old)
            # Another path may already have taken the vector over: then `old` still names its own row.
            self.put.append((self.known[old]._replace(path=key, size=item.size, mtime_ns=item.mtime_ns), None))
            self.change.moved.append((self.index._absolute(old), self.index._absolute(key)))
            return True
        vector = None if same.row is None else self._stored(same.row)
        self._note(key, item._replace(status=same.status, reason=same.reason, extra=self._extra(found)), vector)
        return True

    def _embed(self, batch: list[_Prepared]) -> None:
        distinct = {prepared.digest: prepared.ready for prepared in batch}
        if not distinct:
            return
        vectors = np.asarray(self.embedder.embed(list(distinct.values())), np.float32)
        if vectors.shape != (len(distinct), self.index.signature.dim):
            raise ValueError(f"the model gave {vectors.shape} for {len(distinct)} pictures")
        self.change.embedded += len(distinct)
        place = {digest: row for row, digest in enumerate(distinct)}
        for prepared in batch:
            found, vector = prepared.found, vectors[place[prepared.digest]]
            key = self.index._key(found.path)
            item = Item(key, prepared.digest, found.size, self._time(found), None, "ok", None, self._extra(found))
            if np.isfinite(vector).all():
                self._note(key, item, vector)
            else:
                self._note(key, item._replace(status="bad", reason="the model's vector is not finite"), None)

    def _note(self, key: str, item: Item, vector: Array | None) -> None:
        self.put.append((item, vector))
        if item.status == "ok":
            (self.change.changed if key in self.known else self.change.added).append(self.index._absolute(key))

    def _unreadable(self, found: Found, key: str, reason: str) -> None:
        """A file that cannot be opened now keeps what is known of it, and is looked at again next time."""
        self.change.unreadable.append((found.path.as_posix(), reason))
        if key not in self.known:
            self.put.append((Item(key, None, found.size, -1, None, "bad", reason), None))

    def _stored(self, row: int) -> Array:
        if row >= len(self.vectors):
            self.vectors = self.store.vectors(self.store.snapshot())
        return np.asarray(self.vectors[row])

    def _time(self, found: Found) -> int:
        return -1 if found.mtime_ns > self.now - RACY_NS else found.mtime_ns

    def _extra(self, found: Found) -> str | None:
        return to_json(self.describe(found.path)) if self.describe is not None else None

    def _commit(self) -> None:
        if not (self.put or self.remove):
            return
        for item in self.store.commit(self.remove, self.put):
            if item.hash is not None:
                self.by_hash.setdefault(item.hash, item)
        self.put, self.remove = [], []


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """One writer at a time; the system lets go of the lock when its process dies."""
    with ExitStack() as stack:
        try:
            stack.enter_context(lock(folder / "index", timeout=0))
        except TimeoutError as error:
            raise IndexBusyError(f"another process is writing to the index {folder}; wait until it is done") from error
        yield


def _linked(pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Connected groups of positions."""
    parent: dict[int, int] = {}

    def top(i: int) -> int:
        while parent.setdefault(i, i) != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, j in pairs:
        parent[top(j)] = top(i)
    groups: dict[int, list[int]] = defaultdict(list)
    for i in sorted(parent):
        groups[top(i)].append(i)
    return list(groups.values())
