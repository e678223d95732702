"""The index itself: keep a folder's pictures in step with their vectors, and search them."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ecliptic.apps.index import ann, exact
from ecliptic.apps.index.errors import OtherModelError
from ecliptic.apps.index.lance import LanceStore, is_lance, located
from ecliptic.apps.index.scan import Found, Scan, absolute, scan
from ecliptic.apps.index.store import Backend, Item, Progress, Signature, Store, to_json

Array = NDArray[Any]

MAX_BYTES = 256 << 20  # a larger file is refused rather than read into memory; ours
RACY_NS = 2_000_000_000  # a file this young may change again within one tick of its clock (FAT counts in 2 s)
NOISE = 0.48  # length of what turns a unit vector to a cosine of 0.9 with itself, 1 / sqrt(1 + 0.48^2); ours
CHUNK = 4096  # pictures of another index that are taken over in one commit


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
    """What one `add`, `update` or `merge` did, by path.

    bad: every picture below the sources that has no vector, with the reason.
    """

    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    moved: list[tuple[str, str]] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    unchanged: int = 0
    embedded: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    repaired: int = 0


class Check(NamedTuple):
    """What `Index.check` found. Without problems and with pictures, the figures are there.

    problems: one sentence each. covered: rows in the search graph (0: search compares with every row, and recall is 1).
    recall: of the k best; interval: 95 %. milliseconds: median of one search as it is, and with every row.
    """

    problems: list[str]
    pictures: int
    covered: int
    recall: float | None
    interval: tuple[float, float] | None
    milliseconds: float | None
    milliseconds_every: float | None


class Index:
    """Open one with `Index.open`, make one with `Index.create`.

    It lives in a folder, or in a LanceDB table where its place is a URL (`s3://bucket/pictures.lance`) or ends in .lance.
    """

    def __init__(self, store: Backend):
        self._store = store
        self.folder = store.place
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
        place: str | Path = located(folder) if is_lance(folder) else absolute(folder)
        if isinstance(place, str):
            LanceStore.create(place, signature, Path(place).parent if root is None else absolute(root), source)
        else:
            Store.create(place, signature, place.parent if root is None else absolute(root), source)
        return cls.open(place, signature)

    @classmethod
    def open(cls, folder: str | Path, signature: Signature | None = None) -> Index:
        """Open an index; with a signature, only if the same model and transform made it (OtherModelError)."""
        index = cls(LanceStore(located(folder)) if is_lance(folder) else Store(absolute(folder)))
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
        return self._store.count()

    def paths(self) -> list[str]:
        """Absolute paths of the searchable pictures, sorted."""
        return sorted(self._absolute(item.path) for item in self._store.items() if item.status == "ok")

    def bad(self) -> list[tuple[str, str]]:
        """(path, reason) of the pictures that could not be embedded, sorted."""
        bad = [item for item in self._store.items() if item.status == "bad"]
        return sorted((self._absolute(item.path), item.reason or "") for item in bad)

    # Searching

    def search(
        self,
        query: Array,
        k: int = 10,
        glob: str | None = None,
        where: Mapping[str, Any] | None = None,
        *,
        every: bool = False,
    ) -> list[Hit]:
        """(D,) query -> the k pictures with the greatest cosine; equal scores are ordered by path.

        glob restricts to paths that match (`*` crosses folders; from any folder downwards unless absolute), where to
        extra fields that are equal; both are resolved before the search, so k hits come back whenever k pictures
        qualify. A large index is searched through its graph (`check` measures what that misses); every=True compares
        with all rows.
        """
        query = np.asarray(query, np.float32)
        norm = float(np.linalg.norm(query))
        if not norm > 0:
            raise ValueError("the query vector is zero or not a number")
        found = self._store.search(query / norm, k, glob, where, every)
        hits = [
            Hit(self._absolute(match.path), match.score, json.loads(match.extra) if match.extra else {})
            for match in found
        ]
        return sorted(hits, key=lambda hit: (-hit.score, hit.path))[:k]

    def vector(self, path: str | Path) -> Array | None:
        """(D,) float32: the stored vector of a picture, None where the index does not hold it."""
        item = self._store.find(self._key(path))
        if item is None or item.status != "ok":
            return None
        (vector,) = self._store.stored([item])
        return None if vector is None else vector.astype(np.float32)

    def duplicates(self, at_least: float | None = None) -> list[list[str]]:
        """Groups of two or more paths, sorted: same bytes, or with `at_least`, linked by cosines of that or more."""
        if at_least is None:
            same = defaultdict(list)
            for item in self._store.items():
                if item.status == "ok":
                    same[item.hash].append(self._absolute(item.path))
            return sorted(sorted(group) for group in same.values() if len(group) > 1)
        paths, vectors, rows = self._store.matrix()
        if not paths:
            return []
        firsts, owner = ann.distinct(vectors, rows)  # copies would make very many pairs
        linked = _linked(owner, exact.neighbours(vectors, rows[firsts], at_least))
        return sorted(sorted(self._absolute(paths[i]) for i in group) for group in linked)

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
        graph_progress: Progress | None = None,
    ) -> Change:
        """Bring the index in step with folders or files: new, changed, moved and vanished pictures.

        A file with the size and time it had is not opened; one whose bytes are known under another path takes over
        that vector. Bad pictures are recorded with their reason and left alone until they change. Work is committed
        every `commit_every` pictures, also on Ctrl-C, and a run killed at any moment is simply run again.

        describe: extra fields of a newly embedded picture. progress: called with (done, total) files to look at;
        graph_progress: the same for the rows that a large index puts into its search graph when all is stored.
        """
        self.require(embedder.signature)
        with self._store.writing():
            repaired = self._store.recover()
            named = [sources] if isinstance(sources, (str, Path)) else list(sources)
            update = _Update(self, embedder, scan(named), describe)
            update.change.repaired = repaired
            update.run(batch_size, commit_every, workers or min(8, os.cpu_count() or 1), progress)
            self._store.tidy(graph_progress)
            return update.change

    def update(self, embedder: Embedder, **options: Any) -> Change:
        """Look again at every picture the index knows, wherever it lies: `add` without looking for new ones."""
        return self.add([self.root / item.path for item in self._store.items()], embedder, **options)

    def merge(self, other: Index, *, copies: bool = False, graph_progress: Progress | None = None) -> Change:
        """Take over the pictures of another index of the same model, with their vectors; nothing is embedded.

        Paths stay those of the other index's pictures: relative where they lie below this one's root, absolute
        elsewhere. Pictures whose bytes are held under another path are left out unless `copies`. Where both know a
        path, this index's entry stays, unless it is a bad one. Running it again finishes a merge that was killed.
        """
        self.require(other.signature)
        if self.folder == other.folder:
            raise ValueError(f"{self.folder} cannot be merged into itself")
        change = Change()
        with self._store.writing():
            change.repaired = self._store.recover()
            known = {item.path: item for item in self._store.items()}
            held = {item.hash for item in known.values() if item.status == "ok"}
            wanted: list[tuple[Item, Item]] = []
            for item in sorted(other._store.items()):
                renamed = item._replace(path=self._key(other.root / item.path), row=None)
                mine = known.get(renamed.path)
                usable = mine is None or (mine.status, item.status) == ("bad", "ok")
                if not usable or (item.status == "ok" and item.hash in held and not copies):
                    change.unchanged += 1
                    continue
                if item.status == "ok":
                    held.add(item.hash)
                    (change.added if mine is None else change.changed).append(self._absolute(renamed.path))
                else:
                    change.bad.append((self._absolute(renamed.path), item.reason or ""))
                wanted.append((item, renamed))
            for start in range(0, len(wanted), CHUNK):
                part = wanted[start : start + CHUNK]
                vectors = other._store.stored([item for item, _ in part])
                put = [(renamed, vector) for (_, renamed), vector in zip(part, vectors, strict=True)]
                self._store.commit(
                    (), [(item, vector) for item, vector in put if item.status == "bad" or vector is not None]
                )
            self._store.tidy(graph_progress)
        return change

    def remove(self, paths: str | Path | Iterable[str | Path] = (), *, glob: str | None = None) -> list[str]:
        """Forget pictures, by path (a folder stands for all below it) or by `glob` as in `search`; returns which.

        Files are not touched, so `add` on the folder they lie in brings them back.
        """
        named = {self._key(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)}
        with self._store.writing():
            self._store.recover()
            gone = {item.path for item in self._store.items(glob)} if glob is not None else set()
            if named:
                below = {item.path for item in self._store.items() if _under(item.path, named)}
                gone |= below
            ordered = sorted(gone)
            for start in range(0, len(ordered), CHUNK):
                self._store.commit(ordered[start : start + CHUNK], ())
            self._store.tidy(None)
        return sorted(self._absolute(path) for path in gone)

    def compact(self, *, graph_progress: Progress | None = None) -> int:
        """Give back the space of vectors that no picture owns; returns how many there were."""
        with self._store.writing():
            self._store.recover()
            dropped = self._store.compact()
            self._store.tidy(graph_progress)
            return dropped

    def check(self, sample: int = 100, k: int = 10, seed: int = 0, queries: Array | None = None) -> Check:
        """Whether everything stored is sound, and how much the graph misses: recall of its k best among the true k best.

        The queries are `sample` stored vectors, each turned by noise to a cosine of about 0.9 with itself, as another
        picture of the same thing would be; or `queries` (Q, D), to ask what is really asked. A hit counts if it scores
        as well as the true k-th.
        """
        problems = self._store.problems()
        paths, vectors, rows = ([], np.empty((0, 0)), np.empty(0)) if problems else self._store.matrix()
        if not paths:
            return Check(problems, 0, 0, None, None, None, None)
        from ecliptic.eval.metrics import proportion_interval

        if queries is None:
            rng = np.random.default_rng(seed)
            drawn = np.asarray(vectors[rng.choice(rows, min(sample, len(rows)), replace=False)], np.float32)
            noise = rng.standard_normal(drawn.shape)
            queries = drawn + NOISE * noise / np.linalg.norm(noise, axis=1, keepdims=True)
        recalls, spent = [], {False: list[float](), True: list[float]()}
        for query in queries:
            found: dict[bool, list[Hit]] = {}
            for every in (False, True):
                start = time.perf_counter()
                found[every] = self.search(query, k, every=every)
                spent[every].append(time.perf_counter() - start)
            recalls.append(sum(hit.score >= found[True][-1].score for hit in found[False]) / len(found[True]))
        return Check(
            problems,
            len(rows),
            self._store.snapshot().graph,
            float(np.mean(recalls)),
            proportion_interval(recalls),
            1000 * float(np.median(spent[False])),
            1000 * float(np.median(spent[True])),
        )

    # Parts

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
                if (left := self._settled(prepared)) is not None:
                    batch.append(left)
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

    def _settled(self, prepared: _Prepared) -> _Prepared | None:
        """Deal with a file that needs no model; gives back one that must be embedded."""
        found, digest = prepared.found, prepared.digest
        key = self.index._key(found.path)
        if prepared.missing:  # it went away between the walk and now
            if key in self.known:
                self.vanished[self.known[key].hash].append(key)
            return None
        if digest is None:
            self._unreadable(found, key, prepared.reason or "cannot be read")
            return None
        item = Item(key, digest, found.size, self._time(found), None, "ok")
        mine = self.known.get(key)
        if mine is not None and mine.hash == digest:  # only its date is new
            self.put.append((mine._replace(size=item.size, mtime_ns=item.mtime_ns), None))
            self.change.unchanged += 1
            return None
        if prepared.reason is not None:
            self._note(key, item._replace(status="bad", reason=prepared.reason), None)
            return None
        same = self.by_hash.get(digest)
        if same is None:
            return prepared
        if mine is None and self.vanished.get(digest):
            old = self.vanished[digest].popleft()
            self.remove.append(old)
            # Another path may already have taken the vector over: then `old` still names its own row.
            self.put.append((self.known[old]._replace(path=key, size=item.size, mtime_ns=item.mtime_ns), None))
            self.change.moved.append((self.index._absolute(old), self.index._absolute(key)))
            return None
        vector = None
        if same.status == "ok":
            (vector,) = self.store.stored([same])
            if vector is None:  # this run has meanwhile replaced the only picture that had these bytes
                del self.by_hash[digest]
                return self._settled(self._prepare(found))
        self._note(key, item._replace(status=same.status, reason=same.reason, extra=self._extra(found)), vector)
        return None

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


def _under(path: str, folders: set[str]) -> bool:
    return path in folders or any(top.as_posix() in folders for top in Path(path).parents)


def _linked(owner: Array, pairs: Iterable[tuple[Array, Array]]) -> list[list[int]]:
    """Connected groups of two or more positions: those with one owner, and whose owners some pair connects."""
    parent = list(range(int(owner.max()) + 1))

    def top(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for first, second in pairs:
        for i, j in zip(first.tolist(), second.tolist(), strict=True):
            parent[top(j)] = top(i)
    groups: dict[int, list[int]] = defaultdict(list)
    for position, i in enumerate(owner.tolist()):
        groups[top(i)].append(position)
    return [group for group in groups.values() if len(group) > 1]
