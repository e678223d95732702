"""How every benchmark measures: interleaved rounds, CPU time, the median of per-round ratios, and a result file.

Absolute times depend on the machine and on what else it does; the ratio of two systems that took turns in the same minute does
much less. So a row is peer / ours per round, its median and its range, and nothing in the tests ever looks at a clock.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "numpy", "pillow", "typer")


@dataclass(frozen=True)
class Row:
    """One comparison. ratio: how many times as long the peer takes (above 1: we are faster), median over rounds with its range.
    seconds: median CPU seconds of each side per call. difference: largest difference between the two outputs, asserted."""

    job: str
    peer: str
    ratio: float
    low: float
    high: float
    ours_seconds: float
    peer_seconds: float
    difference: float | None = None
    note: str = ""


def compare(
    job: str,
    peer: str,
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    *,
    rounds: int = 7,
    difference: float | None = None,
    clock: Callable[[], float] = time.process_time,
    note: str = "",
) -> Row:
    """Take turns, first one and then the other in every second round, after one unmeasured call of each."""
    ours(), theirs()
    spent: dict[str, list[float]] = {"ours": [], "theirs": []}
    for turn in range(rounds):
        pair = [("ours", ours), ("theirs", theirs)]
        for name, call in pair if turn % 2 == 0 else reversed(pair):
            start = clock()
            call()
            spent[name].append(clock() - start)
    ratios = [b / a for a, b in zip(spent["ours"], spent["theirs"])]
    row = Row(
        job, peer, statistics.median(ratios), min(ratios), max(ratios),
        statistics.median(spent["ours"]), statistics.median(spent["theirs"]), difference, note,
    )  # fmt: skip
    print(line(row), file=sys.stderr, flush=True)
    return row


def line(row: Row) -> str:
    told = f"{row.ratio:6.2f}x  ({row.low:.2f} to {row.high:.2f})  {row.job}, against {row.peer}"
    return told if row.difference is None else f"{told}; outputs within {row.difference:.0e}"


def save(name: str, rows: Sequence[Row], settings: Mapping[str, Any], packages: Sequence[str] = PACKAGES) -> Path:
    """Write benchmarks/results/<name>.json with what it takes to doubt or repeat the figures; packages: those that count."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {
        "command": f"python -m benchmarks.{name}",
        "machine": machine(),
        "versions": {p: version(p) for p in packages},
        "commit": commit(),
        "settings": dict(settings),
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def machine() -> dict[str, Any]:
    import os

    flags = set()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        flags = set(next((x for x in lines if x.startswith("flags")), "").split())
    seen = [f for f in ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8") if f in flags]
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "flags": seen,
        "python": platform.python_version(),
    }


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return done.stdout.strip()
