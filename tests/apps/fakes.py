"""An embedder without a model: vectors drawn from the bytes, so that what an index must hold can be computed by hand."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ecliptic.apps.index import Index, Signature
from ecliptic.apps.index.index import Refused

DIM = 16


def vector_of(data: bytes, dim: int = DIM) -> np.ndarray:
    """(dim,) unit row that depends on the bytes alone."""
    seed = int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
    vector = np.random.default_rng(seed).standard_normal(dim)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


class FakeEmbedder:
    """Bytes that begin with `bad` are refused. Counts what it was asked to embed; `delay` seconds per batch."""

    def __init__(self, model: str = "fake", dim: int = DIM, delay: float = 0.0):
        self.signature = Signature(model, "bytes", dim)
        self.delay = delay
        self.embedded = 0

    def prepare(self, data: bytes) -> bytes:
        if data.startswith(b"bad"):
            raise Refused("corrupt: " + data.decode())
        return data

    def embed(self, prepared: Sequence[bytes]) -> np.ndarray:
        time.sleep(self.delay)
        self.embedded += len(prepared)
        return np.stack([vector_of(data, self.signature.dim) for data in prepared])


def write(path: Path, content: str, age: float = 100.0) -> Path:
    """A file whose clock says it was written `age` seconds ago, so that its time can be trusted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    then = time.time() - age
    os.utime(path, (then, then))
    return path


def content(index: Index) -> dict[str, object]:
    """Everything an index says, by path: the vector of a good picture, the reason of a bad one."""
    held: dict[str, object] = {}
    for path in index.paths():
        vector = index.vector(path)
        assert vector is not None
        held[path] = vector.tobytes()
    return held | dict(index.bad())


def expected(folder: Path, dim: int = DIM) -> dict[str, object]:
    """What an index of the folder must say, from the files alone."""
    held: dict[str, object] = {}
    for path in sorted(folder.rglob("*.png")):
        data = path.read_bytes()
        if data.startswith(b"bad"):
            held[path.as_posix()] = "corrupt: " + data.decode()
        else:
            held[path.as_posix()] = vector_of(data, dim).astype(np.float16).astype(np.float32).tobytes()
    return held
