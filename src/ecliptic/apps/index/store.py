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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ecliptic.apps.index.errors import DamagedIndexError, DiskFullError, IndexProblem, NoIndexError
from ecliptic.core.files import sync_folder

Array = NDArray[Any]

FORMAT = 1
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


class Store:
    """Reads by snapshot; writes only through `commit` and `compact`, by whoever holds the writer lock."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._database = self._connect()
        self._mapped: tuple[int, int, Array] | None = None
        self._live: tuple[tuple[int, int], Array] | None = None

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
    def create(cls, folder: Path, signature: Signature, root: Path, source: str) -> Store:
        """Lay out an empty index; killed half-way, it counts as no index and can be created again."""
        with explained(folder):
            database = sqlite3.connect(folder / CATALOGUE, isolation_level=None)
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=FULL")
            inside = root == folder or root in folder.parents
            meta = {
                "format": FORMAT,
                "model": signature.model,
                "preprocess": signature.preprocess,
                "dim": signature.dim,
                "source": source,
                "root": Path(os.path.relpath(root, folder)).as_posix() if inside else root.as_posix(),
                "generation": 0,
                "rows": 0,
            }
            with transaction(database):
                for statement in SCHEMA:
                    database.execute(statement)
                database.executemany("INSERT INTO meta VALUES (?, ?)", [(k, str(v)) for k, v in meta.items()])
            database.close()
        return cls(folder)

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
        self._mapped = None
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
        return Snapshot(signature, meta["source"], root, int(meta["generation"]), int(meta["rows"]))

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

    def items(self, where: str = "", values: Sequence[Any] = ()) -> list[Item]:
        return [Item(*row) for row in self.select(", ".join(Item._fields), where, values)]

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

    # Writing; the caller holds the lock

    def recover(self) -> int:
        """Undo what a killed writer left behind; returns how many files lost their vectors (0 but for damage)."""
        with explained(self.folder):
            state = self.snapshot()
            current = self.vector_file(state.generation)
            for path in self.folder.glob("vectors-*.f16"):
                if path != current:
                    path.unlink()
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
            return lost

    def commit(self, remove: Iterable[str], put: Sequence[tuple[Item, Array | None]]) -> list[Item]:
        """Forget the paths in `remove`, then store each item; one that comes with a vector gets a new row for it."""
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
        """Drop the rows that no file owns; returns how many. Readers of the old file keep it until they let go."""
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
                    self._set("rows", len(live))
            except BaseException:
                if self.snapshot().generation == state.generation:
                    new.unlink(missing_ok=True)
                raise
            old.unlink(missing_ok=True)
        return dropped

    def _set(self, key: str, value: int) -> None:
        self._database.execute("UPDATE meta SET value = ? WHERE key = ?", (str(value), key))


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
def explained(folder: Path) -> Iterator[None]:
    """Turn a full disk into a sentence; everything else passes through."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DiskFullError(_full(folder)) from error
    except sqlite3.OperationalError as error:
        if "readonly" in str(error):
            raise IndexProblem(f"the index in {folder} cannot be written: the disk is read-only or full") from error
        if "full" not in str(error) and "disk I/O" not in str(error):
            raise
        raise DiskFullError(_full(folder)) from error


def _full(folder: Path) -> str:
    return f"no space left for the index in {folder}; what it held is intact: free some space and run the same again"


def write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def to_json(fields: Mapping[str, Any] | None) -> str | None:
    return json.dumps(dict(fields), ensure_ascii=False, default=str) if fields else None
