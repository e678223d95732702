"""Softmax in two sweeps against both three-sweep forms and torch: python -m benchmarks.softmax [--rounds N]

Float32 rows from the first-level cache to a gigabyte, on one thread and on two, all forms through the same compiled kernel and
into outputs that exist already (making them would cost more than the softmax). Wall time; GB/s counts one read of the input and
one write of the output, the least there is, beside what copying the same array reaches. "Outputs within" is the largest
relative error of ours against float64.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from benchmarks.measure import Row, compare, save
from ecliptic.ops.softmax import backends, native_softmax

SHAPES = [(1, 1 << n) for n in (11, 14, 17, 20, 23, 25, 28)] + [(1 << 13, 512), (1 << 16, 4096)]
PEERS = {"recompute": "three passes, recomputing", "reload": "three passes, reloading", "torch": "torch.softmax"}
WORTH = 1 << 21  # floats that a timed call goes over, at least


def forms(x: Tensor, y: Tensor, threads: int) -> dict[str, object]:
    calls = max(1, WORTH // x.numel())

    def kernel(algorithm: str) -> object:
        def call() -> None:
            for _ in range(calls):
                native_softmax(x, algorithm, out=y, threads=threads)

        return call

    def torch_softmax() -> None:
        for _ in range(calls):
            torch.ops.aten._softmax.out(x, -1, False, out=y)

    return {**{name: kernel(name) for name in ("two_pass", "recompute", "reload")}, "torch": torch_softmax}


def copy_rate(x: Tensor, y: Tensor) -> float:
    """GB/s of copying x to y, read and write counted: the median of five."""
    calls = max(1, WORTH // x.numel())
    spent = []
    for _ in range(6):
        start = time.perf_counter()
        for _ in range(calls):
            y.copy_(x)
        spent.append((time.perf_counter() - start) / calls)
    return 8 * x.numel() / sorted(spent[1:])[2] / 1e9


def log_sum_exp(x: Tensor) -> Tensor:
    """(rows,) in float64, a piece at a time."""
    parts = [torch.logsumexp(part.double(), -1) for part in x.split(1 << 22, -1)]
    return torch.logsumexp(torch.stack(parts, -1), -1)


def measure(rows: int, columns: int, threads: int, rounds: int) -> list[Row]:
    torch.set_num_threads(threads)
    x = torch.empty(rows, columns).normal_(std=3, generator=torch.Generator().manual_seed(0))
    y = torch.zeros_like(x)
    calls, rate = forms(x, y, threads), copy_rate(x, y)
    seen = x[:2, :: max(1, columns // 4096)].double()
    truth = (seen - log_sum_exp(x[:2])[:, None]).exp()
    off = {}
    for name, call in calls.items():
        call()  # type: ignore[operator]
        off[name] = float(((y[:2, :: max(1, columns // 4096)].double() - truth).abs() / truth).max())
    job = (
        f"softmax of {rows:,} x {columns:,}, {4 * rows * columns / 2**20:g} MiB, {threads} thread{'s' * (threads > 1)}"
    )
    assert off["two_pass"] < 2e-6, f"{job}: off by {off['two_pass']}"
    assert max(off.values()) < 0.05, f"{job}: {off}"  # torch's own sum of 2^28 floats loses that much
    result = []
    for peer, said in PEERS.items():
        row = compare(
            job,
            said,
            calls["two_pass"],
            calls[peer],
            rounds=rounds,
            difference=off["two_pass"],
            clock=time.perf_counter,
        )  # type: ignore[arg-type]
        reached = 8 * x.numel() * max(1, WORTH // x.numel()) / row.ours_seconds / 1e9
        note = f"{reached:.1f} GB/s, copying {rate:.1f}; the other is off by {off[peer]:.0e}"
        result.append(Row(**{**vars(row), "note": note}))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    rows = [row for threads in (1, 2) for shape in SHAPES for row in measure(*shape, threads, rounds)]
    save("softmax", rows, {"rounds": rounds, "kernel": backends()[-1], "clock": "wall"}, ("torch",))


if __name__ == "__main__":
    main()
