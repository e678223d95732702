"""Files appear whole or not at all, and one process at a time fetches."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ecliptic.core import files
from ecliptic.data import cache


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECLIPTIC_CACHE", "/some/where")
    assert cache.cache_dir() == Path("/some/where")
    monkeypatch.setenv("ECLIPTIC_CACHE", "")
    assert cache.cache_dir() == Path.home() / ".cache" / "ecliptic"


def test_importing_it_is_light() -> None:
    code = "import sys, ecliptic.data.cache as c; print([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert done.stdout.strip() == "[]", done.stderr


def half_written(target: Path) -> None:
    with contextlib.suppress(RuntimeError), files.atomic_file(target) as handle:
        handle.write(b"half")
        raise RuntimeError


def test_atomic_file_replaces_or_leaves(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.txt"
    with files.atomic_file(target, "w") as handle:
        handle.write("old ü")
        assert not target.exists()
    assert target.read_text(encoding="utf-8") == "old ü"
    half_written(target)
    assert target.read_text(encoding="utf-8") == "old ü"
    assert names(target.parent) == ["a.txt"]
    assert target.stat().st_mode & 0o077 == 0o066 & ~files._UMASK & 0o077


def test_atomic_folder(tmp_path: Path) -> None:
    target = tmp_path / "set"
    with files.atomic_folder(target) as folder:
        (folder / "a").touch()
        assert not target.exists()
    assert names(target) == ["a"]
    with files.atomic_folder(target) as folder:  # somebody was faster: theirs stays
        (folder / "b").touch()
    assert names(target) == ["a"]
    with pytest.raises(RuntimeError), files.atomic_folder(tmp_path / "other"):
        raise RuntimeError
    assert names(tmp_path) == ["set"]


def test_remember_makes_once_per_key_and_survives_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECLIPTIC_CACHE", str(tmp_path))
    calls: list[int] = []

    def make() -> list[int]:
        calls.append(1)
        return [len(calls)]

    assert cache.remember("x", ["k", 1], make) == cache.remember("x", ["k", 1], make) == [1]
    assert cache.remember("x", ["k", 2], make) == [2]
    path = tmp_path / "parsed" / "x.json"
    path.write_text(path.read_text()[:-3])
    assert cache.remember("x", ["k", 2], make) == [3]
    monkeypatch.setenv("ECLIPTIC_CACHE", str(path / "not" / "a" / "folder"))
    assert cache.remember("x", ["k", 2], make) == [4]  # cannot be kept, still made


def test_nan_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        cache.write_json(tmp_path / "a.json", float("nan"))
    assert list(tmp_path.iterdir()) == []


def test_lock_excludes_and_times_out(tmp_path: Path) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        with cache.lock(tmp_path / "thing"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]
    with (
        cache.lock(tmp_path / "thing"),
        pytest.raises(TimeoutError, match=r"thing\.lock"),
        cache.lock(tmp_path / "thing", timeout=0.1),
    ):
        pass
