"""Features of pictures, computed once: what makes trying twenty adapters on the same pictures a matter of seconds.

    with keeping(FeatureStore(folder)):
        Gda().fit(encoder, shots)          # encodes
        LinearProbe().fit(encoder, shots)  # reads what is there already

While a store is open, `data.shots.encode_views` asks it first. A feature belongs to a model (by the digest of its weights), a
picture (a file by path, size and time; anything else by its content) and a view; nothing else is assumed, so a store may be kept
for as long as one likes.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor

from ecliptic.core.contracts import Record
from ecliptic.core.encoder import Encoder
from ecliptic.core.files import atomic_file
from ecliptic.data.images import open_image


class FeatureStore:
    """Rows by key, in memory, and in `folder` if one is given, where a killed process leaves all that was added before.

    Several processes may share a folder: each adds files of its own, and sees those of others when it opens the store.
    """

    def __init__(self, folder: str | Path | None = None):
        self.folder = None if folder is None else Path(folder)
        self._rows: dict[str, Tensor] = {}
        self._ids: WeakKeyDictionary[Any, tuple[int, str]] = WeakKeyDictionary()
        for file in sorted(self.folder.glob("*.features")) if self.folder is not None else ():
            self._rows |= load(file.read_bytes())

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, encoder: Encoder, keys: Sequence[str], encode: Callable[[list[int]], Tensor]) -> Tensor:
        """Keys (N) -> (N, D): what is kept, and `encode(positions)` for the positions that are not.

        Rows that are not finite (a picture that cannot be read) are given back and not kept.
        """
        names = [_digest(self._id(encoder), key) for key in keys]
        missing = [i for i, name in enumerate(names) if name not in self._rows]
        fresh: dict[str, Tensor] = {}
        if missing:
            fresh = {names[i]: row.clone() for i, row in zip(missing, encode(missing), strict=True)}
            self._add({name: row for name, row in fresh.items() if bool(row.isfinite().all())})
        return torch.stack([self._rows[name] if name in self._rows else fresh[name] for name in names])

    def _add(self, rows: dict[str, Tensor]) -> None:
        self._rows |= rows
        if rows and self.folder is not None:
            with atomic_file(self.folder / f"{uuid.uuid4().hex}.features") as file:
                file.write(save(rows))

    def _id(self, encoder: Any) -> str:
        """The encoder's id, which reads every weight, computed again only after a weight was written to."""
        version = sum(value._version for value in encoder.parameters())
        if encoder not in self._ids or self._ids[encoder][0] != version:
            self._ids[encoder] = (version, str(encoder.id))
        return self._ids[encoder][1]


_OPEN: ContextVar[FeatureStore | None] = ContextVar("feature store", default=None)


@contextmanager
def keeping(store: FeatureStore) -> Iterator[FeatureStore]:
    """While open, features that are asked for are looked up in `store` first and kept there afterwards."""
    token = _OPEN.set(store)
    try:
        yield store
    finally:
        _OPEN.reset(token)


def open_store() -> FeatureStore | None:
    """The store that `keeping` has opened, if any."""
    return _OPEN.get()


def picture_key(record: Record) -> str:
    """What tells a record's picture from any other: of a file path, size and time, of anything else the content."""
    image = record["image"]
    if isinstance(image, str | Path):
        path = Path(image).absolute()
        found = path.stat()
        return f"file {path} {found.st_size} {found.st_mtime_ns}"
    if isinstance(image, bytes):
        return f"bytes {hashlib.blake2b(image, digest_size=16).hexdigest()}"
    if not isinstance(image, Image.Image):
        image = open_image(image)
    return f"{image.mode} {image.size} {hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest()}"


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()
