"""WebDataset shards: tar files in which neighbouring members with the same key are one sample.

Read here with random access, and written atomically, both over the standard library; the `webdataset` package reads what
we write and the other way round. Why not that package: measured on 2 shards of 5,000 JPEG + txt + json samples (14 kB
each, 2 busy cores), it streams 4,100 to 7,800 raw samples/s and `tarfile` 6,400 to 8,800, so decoding (1,100/s) is the
limit with either; but its import takes 2.6 s and it only streams, while an index of the members gives length, slicing and
splits at once.
"""

from __future__ import annotations

import copy
import glob as globbing
import hashlib
import io
import json
import logging
import mmap
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from PIL import Image

from ecliptic.core.files import atomic_file
from ecliptic.data.cache import remember
from ecliptic.data.images import EXTENSIONS, ImageError, open_image
from ecliptic.data.records import Records, SkipLog, unit_hash

if TYPE_CHECKING:
    from ecliptic.core.contracts import Pairs, Record

_log = logging.getLogger(__name__)

Sample = tuple[str, dict[str, tuple[int, int]]]
"""Key, and for each extension where its bytes lie in the tar: (offset, size)."""


class ShardError(ValueError):
    """A shard or a pattern cannot be used; the message names it."""


class Member:
    """The bytes of one member of a tar, read when asked for. `open_image` takes it for a file."""

    __slots__ = ("member", "offset", "shard", "size")

    def __init__(self, shard: str, member: str, offset: int, size: int):
        self.shard, self.member, self.offset, self.size = shard, member, offset, size

    @property
    def name(self) -> str:
        return f"{self.shard}::{self.member}"

    def read(self) -> bytes:
        with Path(self.shard).open("rb") as handle:
            handle.seek(self.offset)
            return handle.read(self.size)

    def __repr__(self) -> str:
        return self.name


def webdataset(pattern: str | Path | Sequence[str | Path], labels: Sequence[str] | None = None) -> Records:
    """The samples of all shards as records, in order; images stay in the tar until a record is read.

    pattern: one tar or several; understands `{00000..00003}`, `{a,b}`, `*` and `a.tar::b.tar`.
    labels: names for the numbers in `.cls` members.
    A sample becomes: `image` (its first picture member); `caption` from `.txt` or `.caption`; `label` from `.cls`; all
    keys of `.json`; a compound picture such as `mask.png` the greyscale field `mask`; other members their bytes.
    `id` is the `id` in the `.json`, else the key, preceded by the shard's name if keys repeat over shards.
    A tar that ends early gives the samples before the cut, with a warning. ShardError: no such shard, or not a tar.
    """
    shards = expand(pattern)
    samples = [(shard, *sample) for shard in shards for sample in index(shard)]
    if not samples:
        raise ShardError(f"no samples in {pattern}")
    unique = len({key for _, key, _ in samples}) == len(samples)

    def get(i: int) -> Record:
        shard, key, members = samples[i]
        default = key if unique else f"{Path(shard).stem}/{key}"
        return assemble(default, {ext: Member(shard, f"{key}.{ext}", *place) for ext, place in members.items()}, labels)

    return Records(len(samples), get, load=load, name=str(pattern))


def assemble(id: str, members: dict[str, Member], labels: Sequence[str] | None = None) -> Record:
    """The cheap record of one sample: text and JSON read, pictures not."""
    record: Record = {"id": id}
    for ext, member in members.items():
        last = "." + ext.rsplit(".", 1)[-1]
        if last in EXTENSIONS:
            record.setdefault("image" if "." not in ext else ext.rsplit(".", 1)[0], member)
        elif ext in ("txt", "caption"):
            record["caption"] = member.read().decode("utf-8", "replace").strip()
        elif ext == "cls":
            text = member.read().decode("utf-8", "replace").strip()
            record["label"] = labels[int(text)] if labels is not None and text.isdigit() else text
        elif ext == "json":
            try:
                fields = json.loads(member.read())
            except ValueError as error:
                raise ShardError(f"{member.name}: not JSON: {error}") from error
            for name, value in (fields if isinstance(fields, dict) else {"json": fields}).items():
                record.setdefault(name, value) if name != "id" else record.update(id=str(value))
        else:
            record[ext] = member.read()
    return record


def load(record: Record) -> Record:
    """Decode what is still in the tar: `image` as RGB, further pictures as greyscale."""
    return {
        name: (open_image(value) if name == "image" else open_image(value).convert("L"))
        if isinstance(value, Member)
        else value
        for name, value in record.items()
    }


def expand(pattern: str | Path | Sequence[str | Path]) -> list[str]:
    """The paths that a pattern stands for, in order, each of them an existing file."""
    if not isinstance(pattern, str | Path):
        paths = [path for part in pattern for path in expand(part)]
    else:
        paths = [path for part in str(pattern).split("::") for path in _braces(part)]
        paths = [found for path in paths for found in _matches(path)]
    if not paths:
        raise ShardError(f"the pattern {pattern} names no shards")
    for path in paths:
        if path.startswith("pipe:") or "://" in path[:12]:
            raise ShardError(f"{path}: only local files can be indexed; download the shards first")
        if not Path(path).is_file():
            raise ShardError(f"no such shard: {path} (from the pattern {pattern})")
    return paths


def _matches(path: str) -> list[str]:
    return (sorted(globbing.glob(path)) if globbing.has_magic(path) else []) or [path]  # noqa: PTH207 (may be absolute)


def _braces(pattern: str) -> list[str]:
    """Shell braces: `{08..11}` counts (keeping leading zeros, up or down), `{a,b}` lists."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    inner = match[1]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inner)
    if span:
        first, last = int(span[1]), int(span[2])
        width = max(map(len, span.groups())) if "0" in (span[1][0], span[2][0]) else 0
        choices = [
            f"{i:0{width}d}" for i in range(first, last + (1 if last >= first else -1), 1 if last >= first else -1)
        ]
    elif "," in inner:
        choices = inner.split(",")
    else:
        raise ShardError(f"cannot understand {match[0]} in {pattern}: write {{00000..00012}} or {{a,b}}")
    return [full for choice in choices for full in _braces(pattern[: match.start()] + choice + pattern[match.end() :])]


_WORTH_KEEPING = 32 << 20  # bytes: smaller shards are indexed again faster than the cache file is read and checked


def index(shard: str | Path) -> list[Sample]:
    """The samples of one tar. The indices of large ones are kept in the cache, by path, size and time of change."""
    path = Path(shard)
    status = path.stat()
    if status.st_size < _WORTH_KEEPING:
        return _group(path, _members(path))
    where = str(path.resolve())
    name = f"shard-{hashlib.blake2b(where.encode('utf-8', 'surrogateescape'), digest_size=12).hexdigest()}"
    kept = remember(name, [2, where, status.st_size, status.st_mtime_ns], lambda: _group(path, _members(path)))
    return [(key, {ext: (place[0], place[1]) for ext, place in members.items()}) for key, members in kept]


def _group(path: Path, members: Iterable[tuple[str, int, int]]) -> list[Sample]:
    """Neighbours with the same key become a sample. As in webdataset the extension begins at the first dot."""
    samples: list[Sample] = []
    for name, offset, size in members:
        match = re.fullmatch(r"((?:.*/|)[^./]+)\.([^/]+)", name)
        if not match or name.rsplit("/", 1)[-1].startswith("__"):
            continue
        key, ext = match[1].removeprefix("./"), match[2].lower()
        if not samples or samples[-1][0] != key:
            samples.append((key, {}))
        if ext in samples[-1][1]:
            raise ShardError(f"{path}: two members named {name} in a row")
        samples[-1][1][ext] = (offset, size)
    return samples


def _members(path: Path) -> list[tuple[str, int, int]]:
    """(name, offset, size) of the regular files in a tar."""
    size = path.stat().st_size
    try:
        found = _plain_members(path) if size else None
        if found is None:
            found = []
            with tarfile.open(path, "r:") as tar:
                try:
                    found += [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]
                except tarfile.ReadError as error:
                    if not found:
                        raise
                    _log.warning("%s: damaged after %d members (%s)", path, len(found), error)
    except tarfile.CompressionError as error:
        raise ShardError(f"{path}: {error}") from error
    except tarfile.ReadError as error:
        with path.open("rb") as handle:
            packed = handle.read(2) == b"\x1f\x8b"
        advice = (
            "compressed; unpack it (gunzip), pictures do not shrink anyway" if packed else f"not a tar file: {error}"
        )
        raise ShardError(f"{path}: {advice}") from error
    except OSError as error:
        raise ShardError(f"{path}: cannot be read: {error.strerror or error}") from error
    whole = [member for member in found if member[1] + member[2] <= size]
    if len(whole) < len(found):
        _log.warning("%s ends early: its last member %s is cut off and left out", path, found[-1][0])
    return whole


def _plain_members(path: Path) -> list[tuple[str, int, int]] | None:
    """The fast way through a tar whose headers are all of the simple kind, five times as fast as `tarfile`; else None."""
    found: list[tuple[str, int, int]] = []
    with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if len(data) < 512:
            return None
        offset = 0
        while offset + 512 <= len(data):
            header = data[offset : offset + 512]
            if header[257:262] != b"ustar" or header[156:157] not in b"0\x005" or header[124] & 0x80:
                return None if header.count(0) != 512 else found
            if int(header[148:156].strip(b" \0") or b"0", 8) != sum(header) - sum(header[148:156]) + 256:
                return None
            name, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
            size = int(header[124:136].strip(b" \0") or b"0", 8)
            if header[156:157] != b"5":
                full = prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name
                found.append((full.decode("utf-8", "surrogateescape"), offset + 512, size))
            offset += 512 + (size + 511) // 512 * 512
    return found


class Stream:
    """Shards read from beginning to end, for sets too large to index: records can be walked over again and again.

    rank, world: this process reads every `world`-th shard, beginning at `rank` (of the order of this pass).
    shuffle: records held back and drawn at random; 0 keeps the order. Shards are then shuffled too.
    Each pass shuffles anew, but the same seed gives the same passes. `on_error="skip"` notes unreadable pictures in `log`.
    """

    def __init__(
        self,
        pattern: str | Path | Sequence[str | Path],
        *,
        shuffle: int = 0,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        on_error: str = "raise",
        log: SkipLog | None = None,
    ):
        if not 0 <= rank < world:
            raise ValueError(f"rank must lie in 0..{world - 1}, got {rank}")
        self.shards = expand(pattern)
        self.shuffle, self.seed, self.rank, self.world = shuffle, seed, rank, world
        self.on_error, self.log, self.passes = on_error, log, 0
        self._keep: Callable[[Record], bool] | None = None
        self._change: Callable[[Record], Record] | None = None

    def __iter__(self) -> Iterator[Record]:
        turn, self.passes = self.passes, self.passes + 1
        shards = self.shards
        if self.shuffle:
            shards = sorted(shards, key=lambda shard: unit_hash(self.seed, f"{turn}\0{shard}"))
        records = (record for shard in shards[self.rank :: self.world] for record in self._shard(shard))
        return self._mixed(records, turn) if self.shuffle else records

    def undecoded(self) -> Iterator[Record]:
        """Every record of all shards (of whichever `rank`) once, in order, pictures left in the tar."""
        return (record for shard in self.shards for record in self._chosen(shard).undecoded())

    def select(self, keep: Callable[[Record], bool], change: Callable[[Record], Record] | None = None) -> Stream:
        """This stream with only the records that `keep` accepts, as `change` returns them; both see undecoded records."""
        chosen = copy.copy(self)
        if self._keep is None:
            chosen._keep, chosen._change = keep, change
            return chosen
        first, edit = self._keep, self._change or (lambda record: record)
        chosen._keep = lambda record: first(record) and keep(edit(record))
        chosen._change = edit if change is None else lambda record: change(edit(record))
        return chosen

    def _shard(self, shard: str) -> Iterator[Record]:
        return self._chosen(shard).iterate(on_error="skip" if self.on_error == "skip" else "raise", log=self.log)

    def _chosen(self, shard: str) -> Records:
        records = webdataset(shard)
        if self._keep is not None:
            records = records[[i for i, record in enumerate(records.undecoded()) if self._keep(record)]]
        return records if self._change is None else records.map(self._change, images=False)

    def _mixed(self, records: Iterator[Record], turn: int) -> Iterator[Record]:
        import random

        draw = random.Random(f"{self.seed}/{turn}/{self.rank}")
        held: list[Record] = []
        for record in records:
            held.append(record)
            if len(held) > self.shuffle:
                at = draw.randrange(len(held))
                held[at], held[-1] = held[-1], held[at]
                yield held.pop()
        draw.shuffle(held)
        yield from held


class ShardWriter:
    """Write records as numbered shards `<folder>/<prefix>00000.tar`, each of which appears whole or not at all.

    max_count, max_bytes: a shard is closed before a record would exceed either (one record larger than `max_bytes` gets
        a shard of its own).
    encode: "png" (exact) or "jpg" (quality 92) for pictures in memory; stored JPEG, PNG and WebP files are copied as
        they are.
    A record gives `.jpg`/`.png`/`.webp`, `.txt` (caption), `<field>.png` for every further picture, and `.json` with the
    rest, `id` included; keys are numbers. Values that JSON cannot hold are a ShardError naming the field.
    Use it as a context manager: leaving it on an error drops the shard begun and keeps those that are finished.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        prefix: str = "",
        max_count: int = 10_000,
        max_bytes: int = 1 << 30,
        encode: str = "png",
    ):
        if max_count < 1 or max_bytes < 1:
            raise ValueError("max_count and max_bytes must be at least 1")
        if encode not in ("png", "jpg"):
            raise ValueError(f"encode is 'png' or 'jpg', got {encode!r}")
        self.folder, self.prefix = Path(folder), prefix
        self.max_count, self.max_bytes, self.encode = max_count, max_bytes, encode
        self.shards: list[Path] = []
        self.count = 0
        self._stack = ExitStack()
        self._tar: tarfile.TarFile | None = None
        self._in_shard = self._bytes = 0
        if any(self.folder.glob(f"{globbing.escape(prefix)}[0-9][0-9][0-9][0-9][0-9].tar")):
            raise ShardError(f"{self.folder} already holds shards {prefix}NNNNN.tar: choose another folder or prefix")

    def write(self, record: Record) -> None:
        """Add one record. Its image may be a picture in memory, a path, bytes or a member of another shard."""
        members = self._encoded(record)
        size = sum(512 + (len(data) + 511) // 512 * 512 for _, data in members)
        if self._tar is not None and (self._in_shard >= self.max_count or self._bytes + size > self.max_bytes):
            self._close_shard()
        if self._tar is None:
            self._open_shard()
        assert self._tar is not None
        for ext, data in members:
            info = tarfile.TarInfo(f"{self.count:09d}.{ext}")
            info.size, info.mode = len(data), 0o644
            self._tar.addfile(info, io.BytesIO(data))
        self.count += 1
        self._in_shard += 1
        self._bytes += size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._close_shard()
        else:
            self._tar = None
            self._stack.__exit__(kind, error, trace)

    def _open_shard(self) -> None:
        path = self.folder / f"{self.prefix}{len(self.shards):05d}.tar"
        handle: IO[bytes] = self._stack.enter_context(atomic_file(path))
        self._tar = tarfile.open(fileobj=handle, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 (closed below)
        self._in_shard, self._bytes = 0, 0
        self._path = path

    def _close_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        self._tar = None
        self._stack.close()
        self.shards.append(self._path)

    def _encoded(self, record: Record) -> list[tuple[str, bytes]]:
        if "id" not in record or "image" not in record:
            raise ShardError(f"a record needs 'id' and 'image' to be written; this one has: {', '.join(record)}")
        members = [self._picture(record["image"])]
        rest = {}
        for name, value in record.items():
            if name == "image":
                continue
            if isinstance(value, Image.Image | Member):
                if not re.fullmatch("[a-z0-9_]+", name):
                    raise ShardError(f"the picture field {name!r} needs a name of lower-case letters, digits and _")
                picture = value if isinstance(value, Image.Image) else open_image(value).convert("L")
                members.append((f"{name}.png", _bytes_of(picture, "PNG")))
            elif name == "caption" and isinstance(value, str):
                members.append(("txt", value.encode("utf-8", "replace")))
            else:
                rest[name] = value
        try:
            text = json.dumps(rest, ensure_ascii=False, allow_nan=False, default=_plain)
        except (TypeError, ValueError) as error:
            raise ShardError(f"record {record['id']!r} cannot be stored as JSON: {error}") from error
        return [*members, ("json", text.encode("utf-8", "backslashreplace"))]

    def _picture(self, image: Any) -> tuple[str, bytes]:
        if not isinstance(image, Image.Image):
            data = image if isinstance(image, bytes) else image.read() if hasattr(image, "read") else None
            if data is None:
                try:
                    data = Path(image).read_bytes()
                except OSError as error:
                    raise ImageError(image, error.strerror or str(error)) from error
            ext = _stored_kind(data)
            if ext:
                return ext, data
            image = open_image(data)
        return (self.encode, _bytes_of(image.convert("RGB"), "PNG" if self.encode == "png" else "JPEG"))


def write_shards(
    records: Pairs,
    folder: str | Path,
    *,
    check: bool = True,
    log: SkipLog | None = None,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> list[Path]:
    """Write all records with a `ShardWriter` (its options pass through); returns the shards.

    check: decode every picture first and leave out those that cannot be, noted in `log`. The stored file is what is
        copied, so nothing is encoded twice.
    progress: called with the number of records written so far.
    """
    with ShardWriter(folder, **options) as writer:
        for record in _stored_form(records, check, log):
            writer.write(record)
            if progress is not None:
                progress(writer.count)
    return writer.shards


def _stored_form(records: Pairs, check: bool, log: SkipLog | None) -> Iterator[Record]:
    """Decoded records, but with the picture as it is stored where it is stored."""
    if not isinstance(records, Records):
        yield from records
        return
    for i in range(len(records)):
        cheap = records.peek(i)
        try:
            full = records[i] if check or not _is_stored(cheap.get("image")) else cheap
        except (ImageError, OSError) as error:
            if log is not None:
                log.add(str(cheap.get("id")), error)
            continue
        yield {**full, "image": cheap["image"]} if _is_stored(cheap.get("image")) else full


def _is_stored(image: Any) -> bool:
    return isinstance(image, str | Path | bytes | Member)


def _stored_kind(data: bytes) -> str | None:
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if data.startswith(b"RIFF") and data[8:12] == b"WEBP" else None


def _bytes_of(image: Image.Image, format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **({"quality": 92} if format == "JPEG" else {"compress_level": 1}))
    return buffer.getvalue()


def _plain(value: Any) -> Any:
    """Arrays, tensors and numpy numbers as JSON."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a value of type {type(value).__name__}")
