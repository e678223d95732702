"""Where downloads and parsed metadata live, and how several processes share them.

Standard library only: the command line imports this at start-up.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from ecliptic.core.files import atomic_file


def cache_dir() -> Path:
    """`$ECLIPTIC_CACHE`, or `~/.cache/ecliptic`. Read at each call, not created: writers create what they need."""
    return Path(os.environ.get("ECLIPTIC_CACHE") or "~/.cache/ecliptic").expanduser()


def write_json(target: str | Path, value: Any) -> None:
    """Write `value` as JSON, atomically. NaN is refused: other readers do not know it."""
    with atomic_file(target, "w") as handle:
        json.dump(value, handle, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def read_json(path: str | Path) -> Any:
    """The parsed file, or None where it is absent, unreadable or damaged: a cache entry can always be made again."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def remember(name: str, key: object, make: Callable[[], Any]) -> Any:
    """`make()`, kept as `<cache>/parsed/<name>.json` for as long as `key` (JSON-able) stays the same.

    A cache that cannot be written (read-only home) costs time, never the result.
    """
    path = cache_dir() / "parsed" / f"{name}.json"
    kept = read_json(path)
    wanted = json.loads(json.dumps(key))
    if isinstance(kept, dict) and kept.get("key") == wanted and "value" in kept:
        return kept["value"]
    value = make()
    with contextlib.suppress(OSError):
        write_json(path, {"key": wanted, "value": value})
    return value


@contextlib.contextmanager
def lock(target: str | Path, timeout: float = 600.0) -> Iterator[None]:
    """Hold `<target>.lock` against other processes and threads; the system frees it if the holder dies.

    Raises TimeoutError after `timeout` seconds, naming the file.
    """
    path = Path(f"{target}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as handle:
        deadline = time.monotonic() + timeout
        while not _try_lock(handle):
            if time.monotonic() > deadline:
                raise TimeoutError(f"another process has held {path} for {timeout:.0f} s; wait for it, or end it")
            time.sleep(0.05)
        try:
            yield
        finally:
            _unlock(handle)


try:
    import fcntl

    def _try_lock(handle: IO[bytes]) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(handle: IO[bytes]) -> None:
        fcntl.flock(handle, fcntl.LOCK_UN)

except ImportError:  # Windows
    import msvcrt

    def _try_lock(handle: IO[bytes]) -> bool:
        try:
            handle.seek(0)
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True

    def _unlock(handle: IO[bytes]) -> None:
        handle.seek(0)
        msvcrt.locking(handle.fileno(), msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined]
