"""Files and folders that appear whole or not at all: written beside their place, flushed, then renamed.

Standard library only: the command line imports this at start-up.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def atomic_file(target: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary sibling of `target`; on success flush it to disk and rename it, on error remove it.

    Whatever happens, `target` holds either its old content or all of the new. Missing parent folders are made.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        temporary.chmod(0o666 & ~_UMASK)  # mkstemp says 0600; a shared cache wants the usual permissions
        temporary.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(target.parent)


@contextlib.contextmanager
def atomic_folder(target: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Give a temporary sibling folder to fill; on success it becomes `target`, on error it is removed.

    If `target` is there by then (another process was faster), the new folder is dropped and the old one kept; with
    `replace` the new one takes its place, and nothing of the old is left.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield folder
        folder.chmod(0o777 & ~_UMASK)
        if replace and target.exists():
            shutil.rmtree(target)
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():
                raise
        sync_folder(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def require_own(folder: Path, card: str) -> None:
    """FileExistsError if the folder holds anything, and no `card`, the file that says it is one that may be replaced."""
    if folder.exists() and not (folder / card).exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds other files: choose an empty folder")


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system allows it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _read_umask() -> int:
    """The process's umask. It can only be read by setting it, so this is done once, at import."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


_UMASK = _read_umask()
