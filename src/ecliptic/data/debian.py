"""Debian packages as data: found installed or in the cache, else downloaded and unpacked there without root.

Nothing is installed: `apt-get download` fetches the archive and `dpkg -x` unpacks it into `<cache>/debian/<package>`.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import tempfile
from pathlib import Path

from ecliptic.core.files import atomic_folder
from ecliptic.data.cache import cache_dir, lock

_log = logging.getLogger(__name__)


class SourceUnavailable(RuntimeError):
    """A built-in source is not on this machine and cannot be fetched; the message says what to install."""


def package_folder(package: str, inside: str, fetch: bool = True, system: Path = Path("/")) -> Path:
    """The folder `inside` ("usr/share/...") of a Debian package: from the cache, from `system`, or fetched now.

    Raises `SourceUnavailable` with what to do where that is impossible. Safe to call from several processes at once.
    """
    home = cache_dir() / "debian" / package
    for root in (home, system):
        if (root / inside).is_dir():
            return root / inside
    if not fetch:
        raise SourceUnavailable(_advice(package, home, "fetching was not asked for"))
    try:
        with lock(home):
            if not (home / inside).is_dir():
                _fetch(package, home)
    except OSError as error:
        raise SourceUnavailable(_advice(package, home, str(error))) from error
    if not (home / inside).is_dir():
        raise SourceUnavailable(_advice(package, home, f"the package has no {inside}: another version?"))
    return home / inside


def _fetch(package: str, home: Path) -> None:
    missing = [tool for tool in ("apt-get", "dpkg") if shutil.which(tool) is None]
    if missing:
        raise SourceUnavailable(_advice(package, home, f"this system has no {' and no '.join(missing)}"))
    _log.warning("fetching the Debian package %s into %s (once)", package, home)
    with atomic_folder(home) as folder, tempfile.TemporaryDirectory(prefix=".deb.", dir=home.parent) as download:
        Path(download).chmod(0o755)  # apt drops its privileges; where it cannot write it says so and goes on as root
        _run(["apt-get", "download", "--quiet", package], Path(download), package, home)
        archives = list(Path(download).glob("*.deb"))
        if len(archives) != 1:
            raise SourceUnavailable(_advice(package, home, "apt-get downloaded nothing"))
        _run(["dpkg", "-x", str(archives[0]), str(folder)], Path(download), package, home)


def _run(command: list[str], folder: Path, package: str, home: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=1800)
    except subprocess.TimeoutExpired as error:
        raise SourceUnavailable(_advice(package, home, f"`{' '.join(command[:2])}` took over half an hour")) from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise SourceUnavailable(_advice(package, home, f"`{' '.join(command[:2])}` failed: {said[-1] if said else ''}"))


def _advice(package: str, home: Path, why: str) -> str:
    return (
        f"the Debian package {package} is not on this machine and could not be fetched ({why}). "
        f"On Debian or Ubuntu run `sudo apt-get update && sudo apt-get install {package}`; elsewhere download "
        f"https://packages.debian.org/stable/{package} and unpack it into {home} (`dpkg -x FILE.deb {home}`)."
    )
