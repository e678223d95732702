"""What the protocols share: records whose pictures may be broken, fields that may be missing, and embeddings of the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ecliptic.data.images import ImageError, open_image
from ecliptic.data.records import Records
from ecliptic.eval.report import Picture

if TYPE_CHECKING:
    from torch import Tensor

    from ecliptic.core.contracts import Record
    from ecliptic.core.encoder import HFEncoder

BROKEN = (ImageError, OSError)  # a file that cannot be used; anything else is a fault in the program and is raised


def as_records(records: Iterable[Record]) -> Records:
    """`Records` as they are; any other iterable of dicts is walked once and kept."""
    return records if isinstance(records, Records) else Records.from_list(records)


def values(records: Records, key: str) -> list[Any]:
    """`record[key]` of each record, None where it is missing or its picture would have to be read and cannot."""
    try:
        return records.column(key)
    except (KeyError, *BROKEN):
        pass
    found: list[Any] = []
    for i in range(len(records)):
        try:
            found += records[i : i + 1].column(key)
        except (KeyError, *BROKEN):
            found.append(None)
    return found


def has(records: Records, key: str, look: int = 32) -> bool:
    """Whether records have this field, judged by the first few whose picture can be read."""
    return any(value is not None for value in values(records[:look], key))


def picture_groups(records: Records) -> list[Any]:
    """What tells pictures apart: the path if records hold one (several rows may name one file), else the position."""
    if not len(records) or not isinstance(values(records[:1], "image")[0], str | Path):
        return list(range(len(records)))
    return [i if path is None else str(path) for i, path in enumerate(values(records, "image"))]


@dataclass
class Skipped:
    """Records that were left out: (id, reason)."""

    entries: list[tuple[str, str]] = field(default_factory=list)

    def note(self, total: int, why: str = "could not be opened") -> list[str]:
        if not self.entries:
            return []
        shown = "; ".join(f"{name}: {reason}" for name, reason in self.entries[:3])
        more = f" and {len(self.entries) - 3} more" if len(self.entries) > 3 else ""
        return [f"{len(self.entries)} of {total} pictures {why} and were left out ({shown}{more})."]


@dataclass
class Encoded:
    """Embeddings (n, D) of the records that could be read, and their positions (n,)."""

    features: Tensor
    kept: np.ndarray
    skipped: Skipped
    of: int


def encode(
    encoder: HFEncoder, records: Records, batch_size: int = 32, progress: Callable[[int], None] | None = None
) -> Encoded:
    """Embed every picture that can be read; the others are noted, and all of them failing is an error."""
    if not len(records):
        raise ValueError(f"{records.name} holds no records: there is nothing to evaluate")
    errors: dict[int, Exception] = {}
    features = encoder.encode_images(
        range(len(records)),
        batch_size,
        decode=lambda i: _picture_of(records[i]),
        errors=errors,
        progress=progress,
    )
    for error in errors.values():
        if not isinstance(error, BROKEN):
            raise error
    kept = np.array([i for i in range(len(records)) if i not in errors], dtype=np.int64)
    return Encoded(features[kept], kept, readable(records, errors), len(records))


def readable(records: Records, errors: dict[int, Exception]) -> Skipped:
    """The failures by id; raises if nothing is left."""
    names = values(records, "id") if errors else []
    entries = [(str(i if names[i] is None else names[i]), str(error)) for i, error in sorted(errors.items())]
    if len(errors) == len(records):
        raise ValueError(f"none of the {len(records)} pictures of {records.name} can be read; first: {entries[0][1]}")
    return Skipped(entries)


def _picture_of(record: Record) -> Image.Image:
    if record.get("image") is None:
        raise ImageError(str(record.get("id", "?")), "the record has no image")
    image = record["image"]
    return image if isinstance(image, Image.Image) else open_image(image)


def batches(
    records: Records, positions: Sequence[int], size: int, errors: dict[int, Exception]
) -> Iterable[tuple[list[int], list[Image.Image]]]:
    """(positions, pictures) in runs of up to `size`, without those that fail, which are noted in `errors`."""
    found: list[int] = []
    pictures: list[Image.Image] = []
    for i in positions:
        try:
            pictures.append(_picture_of(records[i]))
        except BROKEN as error:
            errors[i] = error
            continue
        found.append(i)
        if len(found) == size:
            yield found, pictures
            found, pictures = [], []
    if found:
        yield found, pictures


class Thumbnails:
    """Small copies of single pictures, each read once; what fails to open a second time becomes a placeholder."""

    def __init__(self, records: Records, side: int = 360):
        self.records, self.side = records, side
        self._seen: dict[int, Image.Image | str] = {}

    def __getitem__(self, i: int) -> Image.Image | str:
        if i not in self._seen:
            try:
                picture = _picture_of(self.records[i]).copy()
                picture.thumbnail((self.side, self.side))
                self._seen[i] = picture
            except BROKEN:
                self._seen[i] = ""
        return self._seen[i]

    def show(self, i: int, caption: str = "", **more: Any) -> Picture:
        return Picture(self[i], caption, **more)
