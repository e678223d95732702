"""Find the picture files under some sources: what is there, what cannot be read, what is no picture."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


class Found(NamedTuple):
    """One picture file as the file system describes it."""

    path: Path
    size: int
    mtime_ns: int


@dataclass
class Scan:
    """What a walk over the sources met. Paths are absolute; links are kept under the name they have.

    files: pictures in sorted order. folders: the folders walked. gone: files that were named but do not exist.
    unreadable: (path, reason) of what could not be looked at; nothing is concluded about what lies there or below.
    refused: (printable name, reason) of files that can never be indexed.
    """

    files: list[Found] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    gone: list[Path] = field(default_factory=list)
    unreadable: list[tuple[Path, str]] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)


def scan(sources: Iterable[str | Path]) -> Scan:
    """Walk folders (as `find_images` does) and take files that are named."""
    from ecliptic.data.images import find_images  # brings Pillow, which searching does without

    result = Scan()
    paths: dict[Path, None] = {}
    for source in sources:
        path = absolute(source)
        if path.is_dir():
            result.folders.append(path)
            found = find_images(path, on_error=lambda where, why: result.unreadable.append((where, why)))
            paths.update(dict.fromkeys(found))
        else:
            paths[path] = None
    for path in paths:
        _take(path, result)
    result.files.sort(key=lambda found: found.path.as_posix())
    return result


def absolute(path: str | Path) -> Path:
    """Absolute and without `..`, but links stay unresolved: a picture keeps the name its owner gave it."""
    return Path(os.path.abspath(path))  # noqa: PTH100 (Path.absolute keeps `..`)


def _take(path: Path, result: Scan) -> None:
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        printable = os.fsencode(path).decode("utf-8", "backslashreplace")
        result.refused.append((printable, "the file name is not valid UTF-8"))
        return
    try:
        status = path.stat()
    except FileNotFoundError:
        result.gone.append(path)
    except OSError as error:
        result.unreadable.append((path, error.strerror or str(error)))
    else:
        if stat.S_ISREG(status.st_mode):  # opening a pipe or a device could block for ever
            result.files.append(Found(path, status.st_size, status.st_mtime_ns))
        else:
            result.refused.append((path.as_posix(), "not a regular file"))
