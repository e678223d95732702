"""The durable half of the index: a catalogue in SQLite and rows in a flat file, kept in step.

Order makes it safe against `kill -9` and power loss: rows are appended and synced first, then one SQLite transaction
makes them count. Rows beyond the committed number are leftovers of a killed run and are cut off by the next writer.
Committed rows are never overwritten, so readers go on undisturbed; rows that no file owns any more are dropped by
`compact`, which writes a new file and switches over in one transaction.
"""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ecliptic.apps.index import ann, exact
from ecliptic.apps.index.errors import (
    DamagedGraphWarning,
    DamagedIndexError,
    DiskFullError,
    IndexBusyError,
    IndexProblem,
    NoIndexError,
)
from ecliptic.core.files import sync_folder
from ecliptic.data.cache import lock

Array = NDArray[Any]
Progress = Callable[[int, int], None]

FORMAT = 1
COMPACT_FROM = 1024  # rows nobody owns before a rewrite is worth it; ours
UNIT = 2e-3  # how far from 1 the length of a row may be: fp16 rounds each number by one part in 2048
CATALOGUE = "index.db"
SCHEMA = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    """CREATE TABLE items (
        path TEXT PRIMARY KEY,   -- below the root in posix form, absolute where it lies elsewhere
        hash BLOB,               -- blake2b-128 of the bytes; NULL where they could not be read
        size INTEGER NOT NULL,
        mtime_ns INTEGER NOT NULL, -- -1: do not trust size and time, look at the bytes again
        row INTEGER UNIQUE,      -- place of the vector; NULL where status is not ok
        status TEXT NOT NULL,    -- ok | bad
        reason TEXT,             -- why it is bad
        extra TEXT               -- further fields as JSON
    )""",
    "CREATE INDEX items_hash ON items (hash)",
)


class Signature(NamedTuple):
    """What made the vectors: the model's id, the id of its image transform, the length of a vector."""

    model: str
    preprocess: str
    dim: int


class Item(NamedTuple):
    """One file in the catalogue."""

    path: str
    hash: bytes | None
    size: int
    mtime_ns: int
    row: int | None
    status: str
    reason: str | None = None
    extra: str | None = None


class Snapshot(NamedTuple):
    """The state of one committed moment."""

    signature: Signature
    source: str  # what `load` opens the model with
    root: Path
    generation: int
    rows: int
    graph: int = 0  # how many rows from the first the search graph covers


class Match(NamedTuple):
    """One row that was found: where its picture is, the cosine, its further fields as JSON."""

    path: str
    score: float
    extra: str | None


class Backend(Protocol):
    """What `Index` needs of whatever holds the rows. Writing methods are called inside `writing`."""

    @property
    def place(self) -> Path | str:
        """Its folder or URL."""

    def close(self) -> None: ...

    def snapshot(self) -> Snapshot: ...

    def count(self) -> int:
        """Searchable pictures."""

    def items(self, glob: str | None = None) -> list[Item]:
        """The catalogue, or what matches."""

    def find(self, path: str) -> Item | None: ...

    def stored(self, items: Sequence[Item]) -> list[Array | None]:
        """The vectors of the bytes that items stand for, under whatever path; None where they are held no more."""

    def matrix(self) -> tuple[list[str], Array, Array]:
        """Paths, vectors and which of these vectors belongs to each path."""

    def search(
        self, query: Array, k: int, glob: str | None, where: Mapping[str, Any] | None, every: bool
    ) -> list[Match]:
        """The k nearest and what ties with them; `every`: by looking at all rows."""

    def writing(self) -> AbstractContextManager[None]:
        """Keep other writers out (IndexBusyError)."""

    def recover(self) -> int:
        """Undo what a killed writer left; returns how many vectors are lost."""

    def commit(self, remove: Iterable[str], put: Sequence[tuple[Item, Array | None]]) -> list[Item]:
        """Forget the paths in `remove`, then store each item, with its vector if one comes along."""

    def compact(self) -> int:
        """Give back what nobody owns; returns how many vectors that was."""

    def tidy(self, progress: Progress | None) -> None:
        """After many commits: keep space and speed as they should be."""

    def problems(self) -> list[str]:
        """What is wrong with the stored data, one sentence each."""


class Store:
    """`Backend` in a folder. Reads by snapshot; writes only by whoever holds the writer lock."""

    def __init__(self, folder: Path):
        self.folder = self.place = folder
        self._database = self._connect()
        self._mapped: tuple[int, int, Array] | None = None
        self._live: tuple[tuple[int, int], Array] | None = None
        self._graph: tuple[tuple[int, int], ann.Graph | None] | None = None

    @staticmethod
    def exists(folder: Path) -> bool:
        if not (folder / CATALOGUE).is_file():
            return False
        try:
            Store(folder).close()
        except NoIndexError:
            return False
        return True

    @classmethod
    def create(cls, folder: Path, signature: Signature, root: Path, source: str) -> None:
        """Lay out an empty index unless there is one; killed half-way, it counts as none and can be created again."""
        folder.mkdir(parents=True, exist_ok=True)
        if cls.exists(folder):
            return
        with sole_writer(folder), explained(folder):
            if cls.exists(folder):
                return
            database = sqlite3.connect(folder / CATALOGUE, isolation_level=None)
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=FULL")
            meta = {
                "format": FORMAT,
                "model": signature.model,
                "preprocess": signature.preprocess,
                "dim": signature.dim,
                "source": source,
                "root": kept_root(root, folder),
                "generation": 0,
                "rows": 0,
            }
            with transaction(database):
                for statement in SCHEMA:
                    database.execute(statement)
                database.executemany("INSERT INTO meta VALUES (?, ?)", [(k, str(v)) for k, v in meta.items()])
            database.close()
            sync_folder(folder)

    def _connect(self) -> sqlite3.Connection:
        path = self.folder / CATALOGUE
        if not path.is_file():
            raise NoIndexError(f"there is no index in {self.folder}")
        try:
            database = self._open(path)
            found = database.execute("SELECT value FROM meta WHERE key = 'format'").fetchone()
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                raise NoIndexError(f"there is no index in {self.folder}: its creation was interrupted") from error
            raise DamagedIndexError(f"{path} cannot be opened: {error}") from error
        except sqlite3.DatabaseError as error:
            raise DamagedIndexError(f"{path} is not a readable catalogue: {error}") from error
        if int(found[0]) > FORMAT:
            raise DamagedIndexError(f"the index {self.folder} was written by a newer version (format {found[0]})")
        return database

    def _open(self, path: Path) -> sqlite3.Connection:
        # Used by one thread at a time; a server hands the index from thread to thread.
        options: dict[str, Any] = {"uri": True, "isolation_level": None, "timeout": 30, "check_same_thread": False}
        name = path.resolve().as_uri()
        if os.access(self.folder, os.W_OK):
            try:
                database: sqlite3.Connection = sqlite3.connect(f"{name}?mode=rw", **options)
                database.execute("PRAGMA synchronous=FULL")
                database.execute("SELECT COUNT(*) FROM sqlite_master")
                return database
            except sqlite3.OperationalError:
                if path.with_name(f"{path.name}-wal").exists():
                    raise
        # Read-only media, or a disk so full that SQLite cannot even lay out its lock table: nobody can be writing.
        unchanging: sqlite3.Connection = sqlite3.connect(f"{name}?immutable=1", **options)
        return unchanging

    def close(self) -> None:
        self._mapped = self._graph = None
        self._database.close()

    # Reading

    @contextmanager
    def reading(self) -> Iterator[Snapshot]:
        """One consistent view over several queries, whatever a writer does meanwhile."""
        with transaction(self._database, "BEGIN"):
            yield self.snapshot()

    def snapshot(self) -> Snapshot:
        meta = dict(self._database.execute("SELECT key, value FROM meta"))
        signature = Signature(meta["model"], meta["preprocess"], int(meta["dim"]))
        root = Path(os.path.normpath(self.folder / meta["root"]))
        return Snapshot(
            signature, meta["source"], root, int(meta["generation"]), int(meta["rows"]), int(meta.get("graph", 0))
        )

    def select(self, columns: str, where: str = "", values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Rows of the catalogue. `columns` and `where` are ours; whatever a user typed goes into `values`."""
        return self._database.execute(f"SELECT {columns} FROM items {where}", values).fetchall()

    def live_rows(self) -> Array:
        """Rows that some picture owns, ascending, (n,) int64; kept until anybody commits."""
        version = (self._database.execute("PRAGMA data_version").fetchone()[0], self._database.total_changes)
        if self._live is None or self._live[0] != version:
            found = self._database.execute("SELECT row FROM items WHERE row IS NOT NULL ORDER BY row").fetchall()
            self._live = (version, np.array(found, np.int64).reshape(-1))
        return self._live[1]

    def count(self) -> int:
        return int(self.select("COUNT(*)", "WHERE status = 'ok'")[0][0])

    def items(self, glob: str | None = None) -> list[Item]:
        clause, values = self._filter(glob, None)
        return [Item(*row) for row in self.select(", ".join(Item._fields), clause, values)]

    def find(self, path: str) -> Item | None:
        found = self.select(", ".join(Item._fields), "WHERE path = ?", (path,))
        return Item(*found[0]) if found else None

    def stored(self, items: Sequence[Item]) -> list[Array | None]:
        found: list[Array | None] = []
        with self.view() as (_, vectors):
            for item in items:
                match = self.select(
                    "row", "WHERE hash = ? AND status = 'ok' ORDER BY path != ?", (item.hash, item.path)
                )
                found.append(np.array(vectors[match[0][0]]) if match else None)
        return found

    def matrix(self) -> tuple[list[str], Array, Array]:
        with self.view() as (_, vectors):
            found = self.select("path, row", "WHERE status = 'ok' ORDER BY row")
        return [path for path, _ in found], vectors, np.array([row for _, row in found], np.int64)

    def search(
        self, query: Array, k: int, glob: str | None, where: Mapping[str, Any] | None, every: bool
    ) -> list[Match]:
        with self.view() as (state, vectors):
            if glob is None and not where:
                allowed = self.live_rows()
            else:
                clause, values = self._filter(glob, where, "status = 'ok'")
                found = self.select("row", clause + " ORDER BY row", values)
                allowed = np.array(found, np.int64).reshape(-1)
            graph = None if every else self._opened(state)
            if graph is None:
                rows, scores = exact.topk(query, vectors, k, allowed)
            else:
                rows, scores = graph.topk(query, vectors, k, allowed)
            described = self._describe(rows.tolist())
        return [Match(described[r][0], s, described[r][1]) for r, s in zip(rows.tolist(), scores.tolist(), strict=True)]

    def _filter(self, glob: str | None, where: Mapping[str, Any] | None, *clauses: str) -> tuple[str, list[Any]]:
        """SQL for a filter over `path` and `extra`, and the values it asks for."""
        conditions, values = list(clauses), list[Any]()
        if glob is not None:
            glob = inside(glob, self.snapshot().root)
            conditions.append("(path GLOB ? OR path GLOB ?)")
            values += [glob, glob if glob.startswith("/") else f"*/{glob}"]
        for name, value in (where or {}).items():
            conditions.append("json_extract(extra, ?) = ?")
            values += [f'$."{name}"', value]
        return "WHERE " + " AND ".join(conditions) if conditions else "", values

    def _describe(self, rows: list[int]) -> dict[int, tuple[str, str | None]]:
        described = {}
        for start in range(0, len(rows), 500):
            part = rows[start : start + 500]
            marks = ",".join("?" * len(part))
            for row, path, extra in self.select("row, path, extra", f"WHERE row IN ({marks})", part):
                described[row] = (path, extra)
        return described

    @contextmanager
    def view(self) -> Iterator[tuple[Snapshot, Array]]:
        """One committed moment: its snapshot and vectors, with a read transaction held open."""
        for last in (False, False, True):
            with self.reading() as state:
                try:
                    vectors = self.vectors(state)
                except FileNotFoundError:
                    if last:
                        raise
                    continue  # a compaction switched files between the two looks
                yield state, vectors
                return

    def _opened(self, state: Snapshot) -> ann.Graph | None:
        """The search graph of this moment, if there is one and faiss is here to walk it."""
        key = (state.generation, state.graph)
        if self._graph is None or self._graph[0] != key:
            self._graph = (key, self._open_graph(state))
        return self._graph[1]

    def _open_graph(self, state: Snapshot) -> ann.Graph | None:
        if state.rows < ann.FROM or not ann.available(state.rows) or not 0 < state.graph <= state.rows:
            return None
        folder = ann.place(self.folder, state.generation, state.graph)
        try:
            return ann.Graph(folder, state.graph, state.signature.dim)
        except (RuntimeError, ValueError, OSError) as error:
            if folder.exists():  # otherwise a writer has just put a newer one in its place
                warnings.warn(
                    f"{folder} cannot be read and every row is searched instead: remove it and run "
                    f"`ecliptic index` again ({error})",
                    DamagedGraphWarning,
                    stacklevel=2,
                )
            return None

    def vectors(self, snapshot: Snapshot) -> Array:
        """(rows, dim) fp16, mapped read-only. FileNotFoundError where a compaction has just replaced the file."""
        key = (snapshot.generation, snapshot.rows)
        if self._mapped is None or self._mapped[:2] != key:
            shape = (snapshot.rows, snapshot.signature.dim)
            if snapshot.rows == 0:
                mapped: Array = np.empty(shape, np.float16)
            else:
                path = self.vector_file(snapshot.generation)
                if path.stat().st_size < snapshot.rows * snapshot.signature.dim * 2:
                    raise DamagedIndexError(
                        f"{path} is shorter than its catalogue says; run `ecliptic index` again to repair it"
                    )
                mapped = np.memmap(path, np.float16, "r", shape=shape)
            self._mapped = (*key, mapped)
        return self._mapped[2]

    def vector_file(self, generation: int) -> Path:
        return self.folder / f"vectors-{generation}.f16"

    def problems(self) -> list[str]:
        told = [f"the catalogue: {row[0]}" for row in self._database.execute("PRAGMA integrity_check")]
        told = [line for line in told if line != "the catalogue: ok"]
        with self.reading() as state:
            path = self.vector_file(state.generation)
            size, wanted = path.stat().st_size if path.exists() else 0, state.rows * state.signature.dim * 2
            if size < wanted:
                return [*told, f"{path} has {size:,} bytes, its catalogue counts on {wanted:,}"]
            orphans = self.select(
                "COUNT(*)",
                "WHERE status NOT IN ('ok', 'bad') OR (status = 'ok') != (row IS NOT NULL) "
                "OR (status = 'ok' AND hash IS NULL) OR row < 0 OR row >= ?",
                (state.rows,),
            )[0][0]
            if orphans:
                told.append(f"{orphans:,} entries of the catalogue name no stored vector, or one too many")
            vectors, live = self.vectors(state), self.live_rows()
            live = live[(live >= 0) & (live < state.rows)]
            broken = stretched = 0
            for start in range(0, len(live), 4096):
                part = np.asarray(vectors[live[start : start + 4096]], np.float32)
                finite = np.isfinite(part).all(axis=1)
                broken += int((~finite).sum())
                stretched += int((np.abs(np.linalg.norm(part[finite], axis=1) - 1) > UNIT).sum())
            if broken:
                told.append(f"{broken:,} vectors are not finite")
            if stretched:
                told.append(f"{stretched:,} vectors do not have length 1")
            if state.graph and not ann.place(self.folder, state.generation, state.graph).is_dir():
                told.append("the search graph is missing; `ecliptic index` builds it again")
        return told

    # Writing; the caller holds the lock

    def writing(self) -> AbstractContextManager[None]:
        return sole_writer(self.folder)

    def recover(self) -> int:
        with explained(self.folder):
            state = self.snapshot()
            current = self.vector_file(state.generation)
            for path in self.folder.glob("vectors-*.f16"):
                if path != current:
                    path.unlink()
            graph = ann.place(self.folder, state.generation, state.graph)
            ann.remove(self.folder, keep=graph)
            if state.graph and not graph.is_dir():
                with transaction(self._database):
                    self._set("graph", 0)
            width = state.signature.dim * 2
            with current.open("ab") as file:
                whole = file.seek(0, os.SEEK_END) // width
                if whole >= state.rows:
                    file.truncate(state.rows * width)
                    return 0
                file.truncate(whole * width)
            self._mapped = None
            with transaction(self._database):
                lost = self._database.execute("DELETE FROM items WHERE row >= ?", (whole,)).rowcount
                self._set("rows", whole)
                if state.graph > whole:  # rows that come next will be others than those it knows
                    self._set("graph", 0)
            return lost

    def commit(self, remove: Iterable[str], put: Sequence[tuple[Item, Array | None]]) -> list[Item]:
        """Vectors go to new rows at the end."""
        state = self.snapshot()
        fresh = [vector for _, vector in put if vector is not None]
        width = state.signature.dim * 2
        rows = iter(range(state.rows, state.rows + len(fresh)))
        stored = [item if vector is None else item._replace(row=next(rows)) for item, vector in put]
        with explained(self.folder):
            if fresh:
                path = self.vector_file(state.generation)
                with path.open("r+b", buffering=0) as file:
                    try:
                        file.seek(state.rows * width)
                        write_all(file.fileno(), np.stack(fresh).astype(np.float16).tobytes())
                        os.fsync(file.fileno())
                    except OSError:
                        file.truncate(state.rows * width)
                        raise
            with transaction(self._database):
                self._database.executemany("DELETE FROM items WHERE path = ?", [(path,) for path in remove])
                self._database.executemany(
                    f"INSERT INTO items ({', '.join(Item._fields)}) VALUES (?, ?, ?, ?, ?, ?, ?, ?) "
                    "ON CONFLICT (path) DO UPDATE SET hash = excluded.hash, size = excluded.size, "
                    "mtime_ns = excluded.mtime_ns, row = excluded.row, status = excluded.status, "
                    "reason = excluded.reason, extra = excluded.extra",
                    stored,
                )
                self._set("rows", state.rows + len(fresh))
        return stored

    def compact(self) -> int:
        """Into a new file; readers of the old one keep it until they let go."""
        state = self.snapshot()
        live = np.array([row for (row,) in self.select("row", "WHERE row IS NOT NULL ORDER BY row")], np.int64)
        dropped = state.rows - len(live)
        if dropped == 0:
            return 0
        old, vectors = self.vector_file(state.generation), self.vectors(state)
        new = self.vector_file(state.generation + 1)
        with explained(self.folder):
            try:
                with new.open("wb") as file:
                    for start in range(0, len(live), 4096):
                        file.write(np.ascontiguousarray(vectors[live[start : start + 4096]]).tobytes())
                    file.flush()
                    os.fsync(file.fileno())
                sync_folder(self.folder)
                with transaction(self._database):
                    # Through negative numbers, because `row` is unique at every step.
                    moves = [(-1 - position, row) for position, row in enumerate(live.tolist())]
                    self._database.executemany("UPDATE items SET row = ? WHERE row = ?", moves)
                    self._database.execute("UPDATE items SET row = -1 - row WHERE row < 0")
                    self._set("generation", state.generation + 1)
                    self._set("graph", 0)
                    self._set("rows", len(live))
            except BaseException:
                if self.snapshot().generation == state.generation:
                    new.unlink(missing_ok=True)
                raise
            old.unlink(missing_ok=True)
            ann.remove(self.folder)
        return dropped

    def tidy(self, progress: Progress | None) -> None:
        state, held = self.snapshot(), len(self.live_rows())
        if state.rows - held >= max(COMPACT_FROM, held):
            self.compact()
        state = self.snapshot()
        if not ann.due(state.rows, state.graph) or not ann.available(state.rows):
            return
        target = ann.place(self.folder, state.generation, state.rows)
        old = ann.place(self.folder, state.generation, state.graph) if state.graph else None
        with explained(self.folder):
            ann.build(self.vectors(state), target, old, progress)
            with transaction(self._database):
                self._set("graph", state.rows)
            ann.remove(self.folder, keep=target)

    def _set(self, key: str, value: int) -> None:
        self._database.execute(
            "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value", (key, str(value))
        )


@contextmanager
def transaction(database: sqlite3.Connection, begin: str = "BEGIN IMMEDIATE") -> Iterator[None]:
    database.execute(begin)
    try:
        yield
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """One writer at a time; the system lets go of the lock when its process dies."""
    with ExitStack() as stack:
        try:
            stack.enter_context(lock(folder / "index", timeout=0))
        except TimeoutError as error:
            raise IndexBusyError(f"another process is writing to the index {folder}; wait until it is done") from error
        yield


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn a full disk into a sentence; everything else passes through."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DiskFullError(no_space(folder)) from error
    except sqlite3.OperationalError as error:
        if "readonly" in str(error):
            raise IndexProblem(f"the index in {folder} cannot be written: the disk is read-only or full") from error
        if "full" not in str(error) and "disk I/O" not in str(error):
            raise
        raise DiskFullError(no_space(folder)) from error


def no_space(folder: Path | str) -> str:
    return f"no space left for the index in {folder}; what it held is intact: free some space and run the same again"


def kept_root(root: Path, folder: Path) -> str:
    """How the index remembers its root: relative where the index lies below it, so that both can move together."""
    below = root == folder or root in folder.parents
    return Path(os.path.relpath(root, folder)).as_posix() if below else root.as_posix()


def inside(glob: str, root: Path) -> str:
    """A user's pattern, made comparable with the catalogue's paths."""
    return glob.removeprefix(root.as_posix().rstrip("/") + "/").removeprefix("./")


def write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def to_json(fields: Mapping[str, Any] | None) -> str | None:
    return json.dumps(dict(fields), ensure_ascii=False, default=str) if fields else None
