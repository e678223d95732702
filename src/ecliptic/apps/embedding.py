"""Embeddings as plain files: shards of rows with their metadata, made once and resumed.

The layout is the one other tools know (`img_emb/img_emb_0.npy` beside `metadata/`), with JSON lines for the metadata. Shard
N holds the records N * shard ... in their order. A hidden list of its records is written last, so that a shard is done
exactly if that list names the records that are there now, their files unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ecliptic.core.files import atomic_file
from ecliptic.data.cache import read_json, write_json
from ecliptic.data.images import ImageError, open_image
from ecliptic.data.records import Records

if TYPE_CHECKING:
    from ecliptic.core.encoder import HFEncoder
    from ecliptic.core.exported import ExportedModel

KEPT = (str, int, float, bool, list, tuple, dict, type(None))  # fields that JSON can hold


class EmbeddingsExist(ValueError):
    """The folder holds embeddings made in another way."""


@dataclass
class Embedded:
    """What `embed_records` left in its folder. bad: (id, reason) of records without a row."""

    rows: int = 0
    shards: int = 0
    resumed: int = 0
    captions: bool = False
    bad: list[tuple[str, str]] = field(default_factory=list)


def embed_records(
    encoder: HFEncoder | ExportedModel,
    records: Records,
    out: str | Path,
    *,
    dtype: str = "float16",
    shard: int = 10_000,
    batch_size: int = 32,
    fast: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Embedded:
    """Write unit rows (n, D) of every picture that can be read, and of its caption; progress is (done, total) records.

    fast: decode large JPEG files at a fraction of their size. Raises EmbeddingsExist where the folder was begun with another
    model, dtype, shard size or way of decoding.
    """
    out = Path(out)
    manifest = {"format": 1, "model": encoder.id, "dim": encoder.dim, "dtype": dtype, "shard": shard}
    if fast:
        manifest["decode"] = "fast"
    found = read_json(out / "embed.json")
    if found is not None and found != manifest:
        different = ", ".join(
            f"{key} {found.get(key)!r}, not {manifest.get(key)!r}"
            for key in {**manifest, **found}
            if found.get(key) != manifest.get(key)
        )
        raise EmbeddingsExist(f"{out} was begun with {different}: choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    if found is None:
        if any(out.iterdir()):
            raise EmbeddingsExist(f"{out} holds other files: choose an empty folder")
        write_json(out / "embed.json", manifest)
    result = Embedded()
    for number, start in enumerate(range(0, len(records), shard)):
        part = records[start : start + shard]
        ids = [str(i) for i in part.column("id")]
        stamps = [_stamp(image) for image in _images(part)]
        entries = _finished(out, number)
        if entries is not None and [(e["id"], e["stamp"]) for e in entries] == list(zip(ids, stamps, strict=True)):
            result.resumed += 1
        else:
            count = _Counter(start, len(records), progress)
            entries = _write(encoder, part, ids, stamps, out, number, dtype, batch_size, fast, count)
        result.shards += 1
        result.rows += sum("error" not in entry for entry in entries)
        result.bad += [(entry["id"], entry["error"]) for entry in entries if "error" in entry]
        result.captions |= (out / "text_emb" / f"text_emb_{number}.npy").exists()
        if progress is not None:
            progress(min(start + shard, len(records)), len(records))
    _drop_beyond(out, result.shards)
    with atomic_file(out / "errors.jsonl", "w") as file:
        file.writelines(
            json.dumps({"id": key, "error": reason}, ensure_ascii=False) + "\n" for key, reason in result.bad
        )
    return result


@dataclass
class _Counter:
    """Turns "so many more" into (done, total)."""

    done: int
    total: int
    tell: Callable[[int, int], None] | None

    def __call__(self, more: int) -> None:
        self.done += more
        if self.tell is not None:
            self.tell(self.done, self.total)


def _write(
    encoder: HFEncoder | ExportedModel,
    part: Records,
    ids: list[str],
    stamps: list[list[int] | None],
    out: Path,
    number: int,
    dtype: str,
    batch_size: int,
    fast: bool,
    advance: Callable[[int], None],
) -> list[dict[str, Any]]:
    """One shard: rows first, then the metadata that makes them count. Returns one entry per record."""
    errors: dict[int, Exception] = {}
    fast_side = encoder.transform.fast_side if fast else 0
    embedded = encoder.encode_images(
        range(len(part)), batch_size, decode=lambda i: _picture(part, i, fast_side), errors=errors, progress=advance
    )
    rows = np.asarray(embedded)
    for error in errors.values():
        if not isinstance(error, ImageError | OSError):
            raise error
    good = [i for i in range(len(part)) if i not in errors]
    cheap = [_fields(part, i, ids[i]) for i in range(len(part))]
    _save(out / "img_emb" / f"img_emb_{number}.npy", rows[good].astype(dtype))
    text = out / "text_emb" / f"text_emb_{number}.npy"
    if good and all(isinstance(cheap[i].get("caption"), str) for i in good):
        captions = np.asarray(encoder.encode_texts([cheap[i]["caption"] for i in good]))
        _save(text, captions.astype(dtype))
    else:
        text.unlink(missing_ok=True)
    entries = [{"id": ids[i], "error": _reason(errors[i])} if i in errors else cheap[i] for i in range(len(part))]
    with atomic_file(out / "metadata" / f"metadata_{number}.jsonl", "w") as file:
        file.writelines(json.dumps(cheap[i], ensure_ascii=False) + "\n" for i in good)
    entries = [{**entry, "stamp": stamp} for entry, stamp in zip(entries, stamps, strict=True)]
    write_json(_done(out, number), entries)
    return entries


def _images(part: Records) -> list[Any]:
    try:
        return part.column("image")
    except (KeyError, ImageError, OSError):
        return [None] * len(part)


def _picture(part: Records, i: int, fast_side: int) -> Any:
    """The picture of a record; if `fast_side` is above 0, a JPEG file is decoded no larger than it need be."""
    if fast_side:
        source = _images(part[i : i + 1])[0]
        name = source if isinstance(source, str) else getattr(source, "name", "")
        if str(name).lower().endswith((".jpg", ".jpeg", ".jpe", ".jfif")):
            return open_image(source, fast=True, min_side=fast_side)
    return part[i]["image"]


def _stamp(image: Any) -> list[int] | None:
    """Size and time of a picture's file, so that a changed one is seen."""
    if not isinstance(image, str | Path):
        return None
    try:
        status = Path(image).stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _save(path: Path, rows: np.ndarray) -> None:
    with atomic_file(path) as file:
        np.save(file, rows)


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or str(error)


def _drop_beyond(out: Path, shards: int) -> None:
    """Shards of records that are there no more."""
    for path in [*out.glob("*_emb/*_emb_*.npy"), *out.glob("metadata/*_*.json*")]:
        if int(path.stem.rpartition("_")[2]) >= shards:
            path.unlink()


def _fields(part: Records, i: int, key: str) -> dict[str, Any]:
    """What is known of a record without decoding it."""
    fields: dict[str, Any] = {"id": key}
    for name in ("image", "caption", "label", "category", "split"):
        try:
            value = part[i : i + 1].column(name)[0]
        except (KeyError, ImageError, OSError):
            continue
        if name == "image":
            if isinstance(value, str | Path):
                fields["path"] = str(value)
        elif isinstance(value, KEPT):
            fields[name] = value
    return fields


def _finished(out: Path, number: int) -> list[dict[str, Any]] | None:
    """The entries of a shard that was written to its end, None for any other."""
    found: list[dict[str, Any]] | None = read_json(_done(out, number))
    return found


def _done(out: Path, number: int) -> Path:
    """Written last; one entry per record, those without a row included."""
    return out / "metadata" / f".done_{number}.json"
