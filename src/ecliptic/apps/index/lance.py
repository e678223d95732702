"""The index in a LanceDB table: on object storage, or larger than one machine's disk. Needs lancedb.

One table, one row a picture; a commit is one merge into it, so a killed run leaves whole commits and nothing else. What
vanishes is first marked as gone, in the same merge, and deleted when the table is compacted. Filters are resolved before
the search (prefilter), and whatever LanceDB finds is scored again as the index in a folder does.

LanceDB neither merges the fragments that commits leave nor indexes new rows by itself. Here both happen every so many
fragments, so that each run has little to do and to hold in memory.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ecliptic.apps.index import ann, exact
from ecliptic.apps.index.errors import DiskFullError, IndexProblem, NoIndexError
from ecliptic.apps.index.store import (
    UNIT,
    Item,
    Match,
    Progress,
    Signature,
    Snapshot,
    inside,
    kept_root,
    no_space,
    sole_writer,
)

Array = NDArray[Any]

TABLE = "items"
FRAGMENTS = 64  # a commit adds one or two; beyond so many, and one per FRAGMENT_ROWS rows, they are merged; ours
FRAGMENT_ROWS = 8192
READERS = timedelta(hours=1)  # old versions are kept for whoever still reads them; ours
PROBES, REFINE = (
    20,
    5,
)  # partitions looked into, and candidates per hit scored on the stored row; LanceDB's own lose half
PART = 500  # names in one condition
KEPT = [*Item._fields]


def is_lance(place: str | Path) -> bool:
    """Whether a place is a URL or ends in .lance."""
    text = str(place)
    return _URL.match(text) is not None or text.rstrip("/").endswith(".lance")


def located(place: str | Path) -> str:
    """A URL with both its slashes (a Path keeps one), or an absolute folder."""
    if (found := _URL.match(str(place))) is not None:
        return f"{found[1]}://{found[2]}"
    from ecliptic.apps.index.scan import absolute

    return absolute(place).as_posix()


_URL = re.compile(r"([a-z][a-z0-9+]+):/+(.*)")


class LanceStore:
    """`Backend` in a LanceDB table."""

    def __init__(self, place: str):
        self.place = place
        if not _URL.match(place) and not Path(place).is_dir():
            raise NoIndexError(f"there is no index in {place}")
        try:
            self._table = _connect(place).open_table(TABLE)
        except (ValueError, FileNotFoundError) as error:
            raise NoIndexError(f"there is no index in {place}") from error

    @classmethod
    def create(cls, place: str, signature: Signature, root: Path, source: str) -> None:
        """Lay out an empty table unless there is one."""
        import pyarrow as pa

        kept = root.as_posix() if _URL.match(place) else kept_root(root, Path(place))
        meta = {"model": signature.model, "preprocess": signature.preprocess, "dim": str(signature.dim)}
        schema = pa.schema(_schema(signature.dim), metadata=meta | {"source": source, "root": kept})
        with _explained(place):
            database = _connect(place)
            with contextlib.suppress(ValueError):  # not there yet
                database.open_table(TABLE)
                return
            database.create_table(TABLE, schema=schema)

    def close(self) -> None:
        del self._table

    # Reading

    def snapshot(self) -> Snapshot:
        meta = {key.decode(): value.decode() for key, value in self._table.schema.metadata.items()}
        root = Path(meta["root"])
        if not root.is_absolute():
            root = Path(located(Path(self.place) / root))
        signature = Signature(meta["model"], meta["preprocess"], int(meta["dim"]))
        stats = [self._table.index_stats(index.name) for index in self._vector_indexes()]
        covered = max((stat.num_indexed_rows for stat in stats if stat is not None), default=0)
        return Snapshot(signature, meta["source"], root, self._table.version, self.count(), covered)

    def count(self) -> int:
        return int(self._table.count_rows("status = 'ok'"))

    def items(self, glob: str | None = None) -> list[Item]:
        where = "status != 'gone'"
        if glob is not None:
            where += f" AND {self._glob(glob)}"
        return [Item(**row) for row in self._select(KEPT, where)]

    def find(self, path: str) -> Item | None:
        found = self._select(KEPT, f"status != 'gone' AND path = {_text(path)}")
        return Item(**found[0]) if found else None

    def stored(self, items: Sequence[Item]) -> list[Array | None]:
        return self._vectors("hash", [item.hash for item in items])

    def matrix(self) -> tuple[list[str], Array, Array]:
        rows = self._query(["path", "vector"], "status = 'ok'").to_arrow()
        dim = self._dim
        vectors = _numpy(rows["vector"], dim)
        return rows["path"].to_pylist(), vectors, np.arange(len(vectors))

    def search(
        self, query: Array, k: int, glob: str | None, where: Mapping[str, Any] | None, every: bool
    ) -> list[Match]:
        conditions = ["status = 'ok'"]
        if glob is not None:
            conditions.append(self._glob(glob))
        conditions += [f"array_has(fields, {_text(_field(name, value))})" for name, value in (where or {}).items()]
        query = exact.checked(query, np.empty((0, self._dim)))
        limit = 2 * k + 20  # LanceDB's scores are rounded: some more, to be scored again
        while True:
            asked = self._table.search(query, vector_column_name="vector").distance_type("dot")
            asked = asked.bypass_vector_index() if every else asked.nprobes(PROBES).refine_factor(REFINE)
            asked = asked.where(" AND ".join(conditions), prefilter=True).limit(limit)
            found = asked.select(["path", "extra", "vector", "_distance"]).to_arrow()
            vectors = _numpy(found["vector"], self._dim)
            rows, scores = exact.rank(query, vectors, np.arange(len(vectors)), k)
            if len(vectors) < limit or len(rows) < len(vectors):
                break  # otherwise all of them tie with the k-th, and there may be more
            limit *= 4
        paths, extra = found["path"].to_pylist(), found["extra"].to_pylist()
        return [Match(paths[r], score, extra[r]) for r, score in zip(rows.tolist(), scores.tolist(), strict=True)]

    def problems(self) -> list[str]:
        broken = stretched = 0
        seen: set[str] = set()
        twice = 0
        for batch in self._query(["path", "vector"], "status = 'ok'").to_batches(4096):
            vectors = _numpy(batch["vector"], self._dim).astype(np.float32)
            finite = np.isfinite(vectors).all(axis=1)
            broken += int((~finite).sum())
            stretched += int((np.abs(np.linalg.norm(vectors[finite], axis=1) - 1) > UNIT).sum())
            paths = batch["path"].to_pylist()
            twice += sum(path in seen for path in paths)
            seen.update(paths)
        told = [
            (broken, "vectors are not finite"),
            (stretched, "vectors do not have length 1"),
            (twice, "paths stand twice"),
        ]
        return [f"{count:,} {what}" for count, what in told if count]

    # Writing

    def writing(self) -> AbstractContextManager[None]:
        """A lock beside a table in a folder; object storage has none: there, let one process write at a time."""
        return nullcontext() if _URL.match(self.place) else sole_writer(Path(self.place))

    def recover(self) -> int:
        return 0  # a merge is there or not

    def commit(self, remove: Iterable[str], put: Sequence[tuple[Item, Array | None]]) -> list[Item]:
        import pyarrow as pa

        carried = [item.row for item, vector in put if vector is None and item.status == "ok"]
        moved = dict(zip(carried, self._vectors("row", carried), strict=True))
        rows: dict[str, tuple[Item, Array | None]] = {}
        stored = []
        for path in remove:
            rows[path] = (Item(path, None, 0, -1, None, "gone"), None)
        for item, vector in put:
            if vector is not None:
                item = item._replace(row=secrets.randbits(62))
            elif item.status == "ok":
                vector = moved[item.row]
                if vector is None:
                    raise IndexProblem(f"the vector of {item.path} is not in {self.place} any more: run the same again")
            rows[item.path] = (item, vector)
            stored.append(item)
        if not rows:
            return []
        empty = np.zeros(self._dim, np.float16)
        vectors = np.stack([empty if v is None else np.asarray(v, np.float16) for _, v in rows.values()])
        items = [item for item, _ in rows.values()]
        columns: dict[str, Any] = {name: [getattr(item, name) for item in items] for name in KEPT}
        columns["hash"] = [item.hash and item.hash.hex() for item in items]
        columns["fields"] = [
            [_field(name, value) for name, value in json.loads(item.extra).items()] if item.extra else []
            for item in items
        ]
        columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), self._dim)
        data = pa.table(columns, schema=pa.schema(_schema(self._dim)))
        with _explained(self.place):
            merge = self._table.merge_insert("path").when_matched_update_all().when_not_matched_insert_all()
            merge.execute(data)
            if self._fragments() > max(FRAGMENTS, self._table.count_rows() // FRAGMENT_ROWS):
                self._table.optimize(cleanup_older_than=READERS)
        return stored

    def compact(self) -> int:
        with _explained(self.place):
            gone = int(self._table.count_rows("status = 'gone'"))
            if gone:
                self._table.delete("status = 'gone'")
            self._table.optimize(cleanup_older_than=READERS)
        return gone

    def tidy(self, progress: Progress | None) -> None:
        with _explained(self.place):
            total, indexed = self._table.count_rows(), self._vector_indexes()
            gone = self._table.count_rows("status = 'gone'")
            if gone and gone >= total - gone:
                self._table.delete("status = 'gone'")
            if total - gone >= ann.FROM and not indexed:
                from lancedb.index import Bitmap, BTree, HnswSq

                for column, kind in (("path", BTree()), ("status", Bitmap()), ("vector", HnswSq(distance_type="dot"))):
                    self._table.create_index(column, config=kind)
            elif indexed and total - self.snapshot().graph > max(ann.TAIL, total // ann.TAIL_SHARE):
                self._table.optimize(cleanup_older_than=READERS)

    # Parts

    @property
    def _dim(self) -> int:
        return int(self._table.schema.field("vector").type.list_size)

    def _vector_indexes(self) -> list[Any]:
        return [index for index in self._table.list_indices() if index.columns == ["vector"]]

    def _fragments(self) -> int:
        return int(self._table.stats()["fragment_stats"]["num_fragments"])

    def _query(self, columns: list[str], where: str) -> Any:
        return self._table.search().where(where).select(columns)

    def _select(self, columns: list[str], where: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self._query(columns, where).to_arrow().to_pylist()
        for row in rows:
            if row.get("hash") is not None:
                row["hash"] = bytes.fromhex(row["hash"])
        return rows

    def _vectors(self, column: str, keys: Sequence[Any]) -> list[Array | None]:
        """For each hash or row number the vector of a picture that has it."""
        found: dict[Any, Array] = {}
        distinct = list(dict.fromkeys(key for key in keys if key is not None))
        for start in range(0, len(distinct), PART):
            part = distinct[start : start + PART]
            marks = ", ".join(_text(key.hex()) if isinstance(key, bytes) else str(int(key)) for key in part)
            rows = self._query([column, "vector"], f"status = 'ok' AND {column} IN ({marks})").to_arrow()
            names = [bytes.fromhex(key) if column == "hash" else key for key in rows[column].to_pylist()]
            found.update(zip(names, _numpy(rows["vector"], self._dim), strict=True))
        return [found.get(key) for key in keys]

    def _glob(self, glob: str) -> str:
        glob = inside(glob, self.snapshot().root)
        folders = "" if glob.startswith("/") else "(.*/)?"
        return f"regexp_like(path, {_text(f'(?s)^{folders}{_regex(glob)}$')})"


def _connect(place: str) -> Any:
    try:
        import lancedb
    except ImportError as error:
        raise ImportError(
            f"the index {place} is a LanceDB table and needs the package lancedb: pip install 'ecliptic[lance]'"
        ) from error
    return lancedb.connect(place, read_consistency_interval=timedelta(0))


def _schema(dim: int) -> list[Any]:
    import pyarrow as pa

    kinds = {"size": pa.int64(), "mtime_ns": pa.int64(), "row": pa.int64()}
    columns = [pa.field(name, kinds.get(name, pa.string())) for name in KEPT]
    fields = pa.field("fields", pa.list_(pa.string()))  # `extra` as name=value, for conditions
    return [*columns, fields, pa.field("vector", pa.list_(pa.float16(), dim))]


def _numpy(column: Any, dim: int) -> Array:
    """An Arrow column of vectors -> (n, dim) fp16."""
    column = column.combine_chunks() if hasattr(column, "combine_chunks") else column
    return np.asarray(column.flatten().to_numpy(zero_copy_only=False), np.float16).reshape(-1, dim)


def _field(name: str, value: Any) -> str:
    """A field and its value as one text, equal where SQLite would call them equal."""
    if (isinstance(value, float) and value.is_integer()) or isinstance(value, bool):
        value = int(value)
    return f"{name}={json.dumps(value, ensure_ascii=False, sort_keys=True)}"


def _text(value: str) -> str:
    """A text in SQL."""
    return "'" + value.replace("'", "''") + "'"


def _regex(glob: str) -> str:
    """SQLite's GLOB (`*` crosses folders, `?` is one character, `[^a]` is not a) as a regular expression."""

    def part(found: re.Match[str]) -> str:
        text = found[0]
        if text in ("*", "?"):
            return {"*": ".*", "?": "."}[text]
        if len(text) > 1:
            return text.replace("\\", "\\\\")
        return "\\" + text if text in r".^$+{}[]\|()" else text

    return re.sub(r"\[\^?\]?[^]]*\]|.", part, glob, flags=re.DOTALL)


@contextlib.contextmanager
def _explained(place: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        if "no space left" not in str(error).lower() and "file too large" not in str(error).lower():
            raise
        raise DiskFullError(no_space(place)) from error
