"""`Records`: a list of examples that costs nothing until it is read.

A record is a plain dict with a stable `id`. `records[3]` and iteration decode the image; `column`, slicing, `split` and
`filter` on a caption or label do not.
"""

from __future__ import annotations

import hashlib
import operator
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

from PIL import Image

from ecliptic.data.images import ImageError, open_image

if TYPE_CHECKING:
    from ecliptic.core.contracts import Record


def decode_image(record: Record) -> Record:
    """The record with its `image` (path, bytes or file) opened; a picture already in memory stays what it is."""
    image = record.get("image")
    return record if image is None or isinstance(image, Image.Image) else {**record, "image": open_image(image)}


class MissingField(KeyError):
    """A record lacks a field that somebody needs; the message names the record and what it has instead."""

    def __str__(self) -> str:
        return str(self.args[0])


class Skip(NamedTuple):
    """One record that was left out, why, and the file to look at (empty if none is known)."""

    id: str
    reason: str
    path: str = ""


@dataclass
class SkipLog:
    """What a long job left out. Give one to `Records.iterate` and look at it (or print it) at the end."""

    entries: list[Skip] = field(default_factory=list)

    def add(self, id: str, error: Exception) -> None:
        if isinstance(error, ImageError):
            self.entries.append(Skip(id, error.reason, error.path))
        else:
            self.entries.append(Skip(id, str(error), str(getattr(error, "filename", None) or "")))

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Skip]:
        return iter(self.entries)

    def __str__(self) -> str:
        """One line per kind of reason with a count and an example, the most frequent first."""
        kinds = Counter(entry.reason.split(":")[0] for entry in self.entries)
        example = {entry.reason.split(":")[0]: entry for entry in reversed(self.entries)}
        lines = [f"  {count} x {kind} (for example {example[kind].id})" for kind, count in kinds.most_common()]
        return "\n".join([f"{len(self.entries)} skipped{':' if lines else ''}", *lines])


class Records(Sequence["Record"]):
    """`n` records, made on demand by `get(i)`; iterating twice gives the same twice.

    get: index 0..n-1 -> record with `id`. It should be cheap: leave the image as a path (or bytes, or an open_image
        source) and let `load` do the costly part.
    load: cheap record -> full record; runs on access and iteration, never for `column`. None: `get` does it all.
    name: for messages.
    """

    def __init__(
        self,
        n: int,
        get: Callable[[int], Record],
        *,
        load: Callable[[Record], Record] | None = None,
        name: str = "records",
    ):
        self.name = name
        self._n = n
        self._get = get
        self._load = load

    @classmethod
    def from_list(cls, records: Iterable[Record], name: str = "records") -> Records:
        """Records already in memory. An `image` that is a path or bytes is opened on access; a missing `id` becomes
        the position as a string.
        """
        kept = [record if "id" in record else {"id": str(i), **record} for i, record in enumerate(records)]
        return cls(len(kept), kept.__getitem__, load=decode_image, name=name)

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int] | Sequence[bool] | Any) -> Records: ...
    def __getitem__(self, index: Any) -> Record | Records:
        """An integer gives a decoded record; a slice, indices or a boolean mask (list, array, tensor) `Records`."""
        if isinstance(index, slice):
            return self._pick(range(self._n)[index])
        if isinstance(index, str):
            raise TypeError(f"{self.name}[{index!r}]: for one field of all records use .column({index!r})")
        if not hasattr(index, "__len__") or getattr(index, "ndim", 1) == 0:
            return self._full(self._cheap(self._position(index)))
        chosen = index.tolist() if hasattr(index, "tolist") else list(index)
        if chosen and all(isinstance(value, bool) for value in chosen):
            if len(chosen) != self._n:
                raise IndexError(f"the mask has {len(chosen)} values, {self.name} has {self._n} records")
            return self._pick([i for i, keep in enumerate(chosen) if keep])
        return self._pick([self._position(value) for value in chosen])

    def __iter__(self) -> Iterator[Record]:
        return (self._full(self._cheap(i)) for i in range(self._n))

    def __add__(self, other: Records) -> Records:
        """The records of both, one after the other."""
        return join([self, other])

    def __repr__(self) -> str:
        return f"<{self.name}: {self._n} records>"

    def column(self, key: str) -> list[Any]:
        """`record[key]` of every record without decoding: `image` comes in its cheap form (usually a path).

        `MissingField` (a KeyError) names the first record that lacks the key and what it has instead.
        """
        return [self._value(i, key) for i in range(self._n)]

    def peek(self, i: int) -> Record:
        """The cheap record: a plain dict whose `image` is still a path, bytes or file, without what decoding adds."""
        cheap = self._cheap(self._position(i))
        return cheap.plain_cheap() if isinstance(cheap, _Lazy) else dict(cheap)

    def undecoded(self) -> Iterator[Record]:
        """`peek` of every record, in order."""
        return map(self.peek, range(self._n))

    @property
    def ids(self) -> list[str]:
        return self.column("id")

    @property
    def classes(self) -> tuple[str, ...]:
        """The different labels, sorted."""
        return tuple(sorted(set(self.column("label"))))

    def map(self, fn: Callable[[Record], Record], *, images: bool = True) -> Records:
        """`fn` over every record, lazily. `fn` may change its argument or return a new dict; it must keep `id`.

        images=False: `fn` sees the cheap record (image still a path), so `column` on the result needs no decoding even
        if `fn` copies the record; its result is decoded on access. With images=True an image is decoded when `fn`
        touches it (copying the record, as `{**record}` does, touches it).
        """
        if not images:
            return Records(self._n, lambda i: _mapped_cheaply(fn, self._cheap(i)), load=self._load, name=self.name)
        return Records(self._n, lambda i: fn(_Lazy(self._cheap(i), self._full)), load=decode_image, name=self.name)

    def filter(self, fn: Callable[[Record], Any]) -> Records:
        """The records for which `fn` is true, decided now; images are decoded only if `fn` looks at them."""
        return self._pick([i for i in range(self._n) if fn(_Lazy(self._cheap(i), self._full))])

    def split(self, fractions: float | Sequence[float], seed: int = 0, by: str = "id") -> tuple[Records, ...]:
        """Disjoint parts of about the given fractions (they sum to 1; one number f means f and 1 - f), order kept.

        Where a record goes depends only on (seed, its `by`), so records added later never move old ones, and all
        records with the same `by` stay together (give a field that near-duplicates share to keep a test set honest).
        """
        shares = [fractions, 1 - fractions] if isinstance(fractions, int | float) else list(fractions)
        if not shares or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"fractions must be >= 0 and sum to 1, got {fractions}")
        edges = [sum(shares[: i + 1]) for i in range(len(shares) - 1)]
        parts: list[list[int]] = [[] for _ in shares]
        for i, key in enumerate(self.column(by)):
            place = unit_hash(seed, key)
            parts[sum(place >= edge for edge in edges)].append(i)
        return tuple(self._pick(part) for part in parts)

    def shuffle(self, seed: int = 0) -> Records:
        """The same records in the order of a hash of (seed, id)."""
        keys = [unit_hash(seed, id) for id in self.ids]
        return self._pick(sorted(range(self._n), key=keys.__getitem__))

    def iterate(
        self,
        on_error: Literal["raise", "skip"] = "raise",
        log: SkipLog | None = None,
        workers: int = 0,
    ) -> Iterator[Record]:
        """Walk over the decoded records in order.

        on_error="skip": a record whose files cannot be read (ImageError, OSError) is left out and noted in `log` as
            (id, reason, path); every other exception is a bug and still raised.
        workers: decode in this many threads, a little ahead of the reader; the order stays.
        """
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error is 'raise' or 'skip', got {on_error!r}")
        for i, outcome in self._outcomes(workers):
            try:
                record = outcome()
            except (ImageError, OSError) as error:
                if on_error == "raise":
                    raise
                if log is not None:
                    log.add(self._name_of(i), error)
                continue
            yield record

    def _outcomes(self, workers: int) -> Iterator[tuple[int, Callable[[], Record]]]:
        if workers <= 0:
            for i in range(self._n):
                yield i, lambda i=i: self[i]  # type: ignore[misc]
            return
        pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        waiting: deque[tuple[int, Future[Record]]] = deque()
        try:
            for i in range(self._n):
                waiting.append((i, pool.submit(self.__getitem__, i)))
                if len(waiting) > 2 * workers:
                    first, future = waiting.popleft()
                    yield first, future.result
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _cheap(self, i: int) -> Record:
        return self._get(i)

    def _full(self, record: Record) -> Record:
        if isinstance(record, _Lazy):
            record = record.plain()
        return dict(record) if self._load is None else dict(self._load(record))

    def _value(self, i: int, key: str) -> Any:
        record = self._cheap(i)
        if dict.__contains__(record, key):
            return dict.__getitem__(record, key)
        full = self._full(record)  # what only the decoded record has, such as a mask taken from the image
        if key in full:
            return full[key]
        has = ", ".join(map(repr, full))
        raise MissingField(f"record {i} (id {full.get('id')!r}) of {self.name} has no {key!r}; it has: {has}")

    def _name_of(self, i: int) -> str:
        try:
            return str(self._value(i, "id"))
        except Exception:
            return f"{self.name}[{i}]"

    def _position(self, index: Any) -> int:
        i = operator.index(index)
        if not -self._n <= i < self._n:
            raise IndexError(f"{self.name} has {self._n} records, no index {i}")
        return i % self._n

    def _pick(self, rows: Sequence[int]) -> Records:
        return Records(len(rows), lambda i: self._get(rows[i]), load=self._load, name=self.name)


def join(parts: Sequence[Records], name: str | None = None) -> Records:
    """Several `Records` as one, in order."""
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + len(part))

    def get(i: int) -> Record:
        k = bisect_right(starts, i) - 1
        return _Lazy(parts[k]._cheap(i - starts[k]), parts[k]._full)

    return Records(starts[-1], get, load=decode_image, name=name or " + ".join(part.name for part in parts))


def unit_hash(seed: int, key: object) -> float:
    """A number in [0, 1) that depends only on (seed, key): uniform over keys, the same on every machine and version."""
    digest = hashlib.blake2b(f"{seed}\0{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def _mapped_cheaply(fn: Callable[[Record], Record], cheap: Record) -> Record:
    if isinstance(cheap, _Lazy):
        return _Lazy(fn(cheap.plain_cheap()), cheap._loader)
    return fn(dict(cheap))


class _Lazy(dict[str, Any]):
    """A cheap record that loads itself when somebody looks at the image or at a key that only the full one has.

    Overriding `__iter__` makes `dict(record)` and `{**record}` go through `__getitem__` instead of copying blindly.
    """

    __slots__ = ("_loader",)
    _loader: Callable[[Record], Record] | None

    def __init__(self, cheap: Record, loader: Callable[[Record], Record] | None):
        super().__init__(cheap.plain_cheap() if isinstance(cheap, _Lazy) else cheap)
        if isinstance(cheap, _Lazy) and cheap._loader is not None:
            inner, outer = cheap._loader, loader
            loader = (lambda record: outer(inner(record))) if outer else inner
        self._loader = loader

    def plain_cheap(self) -> Record:
        """What is known without loading."""
        return {key: dict.__getitem__(self, key) for key in dict.keys(self)}

    def plain(self) -> Record:
        """The full record as a plain dict."""
        self._fill()
        return self.plain_cheap()

    def _fill(self) -> None:
        if self._loader is not None:
            dict.update(self, self._loader(self.plain_cheap()))
            self._loader = None

    def __getitem__(self, key: str) -> Any:
        if key == "image" or not dict.__contains__(self, key):
            self._fill()
        return dict.__getitem__(self, key)

    def __contains__(self, key: object) -> bool:
        if not dict.__contains__(self, key):
            self._fill()
        return dict.__contains__(self, key)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401 (this is that method)

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "image":
            self._fill()  # else loading later would overwrite it
        dict.__setitem__(self, key, value)

    def __iter__(self) -> Iterator[str]:
        self._fill()
        return dict.__iter__(self)

    def __len__(self) -> int:
        self._fill()
        return dict.__len__(self)

    def keys(self) -> Any:
        self._fill()
        return dict.keys(self)

    def values(self) -> Any:
        self._fill()
        return dict.values(self)

    def items(self) -> Any:
        self._fill()
        return dict.items(self)

    def pop(self, key: str, *default: Any) -> Any:
        self._fill()
        return dict.pop(self, key, *default)

    def __delitem__(self, key: str) -> None:
        self._fill()
        dict.__delitem__(self, key)

    def copy(self) -> Record:
        return self.plain()

    def __reduce__(self) -> Any:
        return dict, (self.plain(),)

    def __or__(self, other: Any) -> Any:
        return self.plain() | other

    def __eq__(self, other: object) -> bool:
        return self.plain() == other

    __hash__ = None
