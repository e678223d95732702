"""Start-up time of the command line, in fresh processes, against importing torch: python -m benchmarks.startup

Both sides take turns; wall time, since that is what a user waits for.
"""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks.measure import compare, line, save


def run(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    rows = [
        compare(
            f"ecliptic {verb}",
            "python -c 'import torch'",
            lambda v=verb: run("-m", "ecliptic", v),
            lambda: run("-c", "import torch"),
            clock=time.perf_counter,
            rounds=7,
            note="wall seconds of a fresh process",
        )
        for verb in ("--help", "methods")
    ]
    path = save("startup", rows, {"rounds": 7})
    print("\n".join(f"{line(row)}; {row.ours_seconds:.2f} s" for row in rows), f"\n{path}")


if __name__ == "__main__":
    main()
