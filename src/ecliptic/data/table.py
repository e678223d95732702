"""A table of pictures: CSV, TSV or Parquet with a column `image` and a column `caption`, `label` or `value`."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ecliptic.data.records import Records, decode_image
from ecliptic.data.text import read_text

if TYPE_CHECKING:
    from ecliptic.core.contracts import Record


class TableError(ValueError):
    """The table cannot be used; the message names file, column, row and the fix."""


def table(
    path: str | Path,
    *,
    image: str = "image",
    caption: str = "caption",
    label: str = "label",
    missing: Literal["error", "skip", "later"] = "error",
    empty_labels: bool = False,
) -> Records:
    """The rows as records, in order.

    image, caption, label: names of the columns (matched without regard to case); `image` and one of the others must be
        there, or a column `value`, a number to order pictures by. Other columns are kept under their own names. Relative
        image paths start at the table's own folder; in Parquet the images may also be stored inside, as bytes or as
        {bytes, path}.
    missing: what to do about image files that do not exist: refuse the table, leave the rows out, or let each raise
        `ImageError` when it is opened.
    empty_labels: of a CSV, whether a label may be empty (it is then None) or refuses the table.
    `id` is the column of that name (its values must differ), else the image path as written, with #2, #3 ... for
    further rows of the same image. CSV: the delimiter (comma, semicolon, tab, bar) is found from the header.
    """
    path = Path(path)
    if not path.is_file():
        raise TableError(f"no such table: {path}")
    names = {"image": image, "caption": caption, "label": label}
    if path.suffix.lower() in (".parquet", ".pq"):
        return _parquet(path, names, missing)
    columns, rows = read_csv(path, image)
    where = _locate(path, columns, names)
    records = []
    for line, row in rows:
        record: Record = {}
        for name, value in zip(columns, row, strict=True):
            record[where.get(name, name)] = value
        for field in ("image", "caption", "label"):
            if field == "label" and empty_labels and field in record:
                record[field] = record[field].strip() or None
            elif field in record and not record[field].strip():
                raise TableError(
                    f"{path}, line {line}: the column {names[field]!r} is empty; fill it or remove the row"
                )
        records.append((f"line {line}", record))
    return _resolved(path, records, missing)


def read_csv(path: Path, wanted: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header and (line number, fields) of each row that is not blank. Raises TableError for ragged rows."""
    text = read_text(path)
    if not text.strip():
        raise TableError(f"{path} is empty: the first line must name the columns (image, and caption or label)")
    delimiters = ["\t"] if path.suffix.lower() == ".tsv" else [",", ";", "\t", "|"]
    try:
        headers = [(next(csv.reader(io.StringIO(text), delimiter=mark)), mark) for mark in delimiters]
        fitting = [pair for pair in headers if wanted.lower() in [name.strip().lower() for name in pair[0]]]
        header, delimiter = fitting[0] if fitting else max(headers, key=lambda pair: len(pair[0]))
        columns = [name.strip() for name in header]
        repeated = [name for name, count in Counter(columns).items() if count > 1]
        if repeated:
            raise TableError(f"{path}: the column {repeated[0]!r} appears twice; rename one")
        reader = csv.reader(io.StringIO(text), delimiter=delimiter)
        next(reader)
        rows = []
        for row in reader:
            if not any(field.strip() for field in row):
                continue
            if len(row) != len(columns):
                raise TableError(
                    f"{path}, line {reader.line_num}: {len(row)} fields, but the header names {len(columns)} columns "
                    f"(a caption with {delimiter!r} or a line break in it must stand in double quotes)"
                )
            rows.append((reader.line_num, row))
    except csv.Error as error:
        raise TableError(f"{path}: not readable as a table: {error}") from error
    return columns, rows


def _locate(path: Path, columns: list[str], names: dict[str, str]) -> dict[str, str]:
    """Column of the table -> field of the record, for those that have a meaning."""
    lower = {name.lower(): name for name in columns}
    found = {lower[name.lower()]: field for field, name in names.items() if name.lower() in lower}
    for field in ("id", "value"):
        if field in lower:
            found.setdefault(lower[field], field)
    listed = ", ".join(map(repr, columns)) or "none"
    if "image" not in found.values():
        raise TableError(f"{path} has no column {names['image']!r} (it has: {listed}); rename the one with image paths")
    if not {"caption", "label", "value"} & set(found.values()):
        wanted = f"{names['caption']!r} nor {names['label']!r} nor 'value'"
        raise TableError(
            f"{path} has neither a column {wanted} (it has: {listed}); rename the one with the text, class or number"
        )
    return found


def _resolved(path: Path, rows: list[tuple[str, Record]], missing: str) -> Records:
    """Give the rows ids and absolute image paths; look for missing files."""
    if missing not in ("error", "skip", "later"):
        raise ValueError(f"missing is 'error', 'skip' or 'later', got {missing!r}")
    if not rows:
        raise TableError(f"{path} has a header but no rows")
    seen: Counter[str] = Counter()
    absent: list[str] = []
    kept: list[Record] = []
    for where, record in rows:
        written = record["image"]
        if isinstance(written, str):
            written = written.strip()
            if "://" in written[:12]:
                raise TableError(
                    f"{path}, {where}: {written} is a web address: download the images and give their paths"
                )
            full = path.parent / written
            if missing != "later" and not full.is_file():
                absent.append(f"{where}: {written}")
                continue
            record["image"] = str(full)
        key = str(record["id"]) if record.get("id") not in (None, "") else str(written)
        seen[key] += 1
        if seen[key] > 1 and record.get("id") not in (None, ""):
            raise TableError(f"{path}, {where}: the id {key!r} was used before; ids must differ")
        kept.append({**record, "id": key if seen[key] == 1 else f"{key}#{seen[key]}"})
    if absent and (missing == "error" or not kept):
        shown = "; ".join(absent[:3])
        raise TableError(
            f"{path}: {len(absent)} of {len(rows)} image files do not exist ({shown}{' ...' if len(absent) > 3 else ''}). "
            f"Relative paths start at {path.parent}. Correct them, or skip such rows with missing='skip'"
        )
    return Records(len(kept), kept.__getitem__, load=decode_image, name=str(path))


def _parquet(path: Path, names: dict[str, str], missing: str) -> Records:
    parquet = _pyarrow_parquet()
    try:
        file = parquet.ParquetFile(path)
    except Exception as error:
        raise TableError(f"{path} is not a readable Parquet file: {error}") from error
    with file:
        schema = file.schema_arrow
        where = _locate(path, list(schema.names), names)
        picture = next(name for name, field in where.items() if field == "image")
        inside = str(schema.field(picture).type) not in ("string", "large_string", "string_view")
        kept = file.read(columns=[name for name in schema.names if name != picture or not inside])
        counts = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    classes = _class_names(schema.metadata or {}, next((name for name, field in where.items() if field == "label"), ""))
    records: list[tuple[str, Record]] = []
    starts = [(group, row) for group, count in enumerate(counts) for row in range(count)]
    for number, row in enumerate(kept.to_pylist()):
        record: Record = {where.get(name, name): value for name, value in row.items()}
        for field in ("caption", "label"):
            if field in record and (record[field] is None or not str(record[field]).strip()):
                raise TableError(
                    f"{path}, row {number}: the column {names[field]!r} is empty; fill it or remove the row"
                )
        if "label" in record:
            value = record["label"]
            record["label"] = classes[value] if classes and isinstance(value, int) else str(value)
        if inside:
            record["image"] = _Stored(str(path), picture, *starts[number])
            record.setdefault("id", f"{path.stem}/{number}")
        elif not record["image"]:
            raise TableError(f"{path}, row {number}: the column {names['image']!r} is empty; fill it or remove the row")
        records.append((f"row {number}", record))
    return _resolved(path, records, missing)


class _Stored:
    """A picture inside a Parquet file, as `open_image` wants it: something with a name that can be read."""

    def __init__(self, path: str, column: str, group: int, row: int):
        self.path, self.column, self.group, self.row = path, column, group, row

    @property
    def name(self) -> str:
        return f"{self.path}[row group {self.group}, row {self.row}]"

    def read(self) -> bytes:
        value = _row_group(self.path, self.column, self.group)[self.row].as_py()
        if isinstance(value, dict):  # as HF datasets store images
            value = value.get("bytes") or (Path(value["path"]).read_bytes() if value.get("path") else b"")
        return value or b""

    def __repr__(self) -> str:
        return self.name


@lru_cache(maxsize=2)
def _row_group(path: str, column: str, group: int) -> Any:
    with _pyarrow_parquet().ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column]).column(0)


def _class_names(metadata: dict[bytes, bytes], column: str) -> list[str] | None:
    """The class names that HF datasets leave in the metadata of their Parquet files."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names]


def _pyarrow_parquet() -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError("Parquet files need pyarrow: pip install 'ecliptic[scale]'") from error
    return parquet
