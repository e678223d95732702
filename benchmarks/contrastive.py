"""Tiled contrastive losses against the plain ones on all logits: python -m benchmarks.contrastive [--sizes 1024 8192]

Forward and backward of both losses on unit rows of 512 dimensions in float32, with gradients of pictures, texts and scale, one
thread. Time: CPU seconds, both sides in turns in one process. Memory: each call by itself in a fresh process, which has made a
small call of the same loss before (so that libraries are loaded); the kernel's peak of resident memory is set back
(/proc/self/clear_refs), and what the peak rises by during the call counts, the gradients included. The largest batch is timed
in these fresh processes only, because its plain loss takes most of a minute. Values and gradients must agree each time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.measure import Row, compare, line, save
from ecliptic.ops.contrastive import info_nce, sigmoid_loss
from ecliptic.ops.tiled_contrastive import TILE, tiled_info_nce, tiled_sigmoid_loss

SIZES = (1024, 2048, 4096, 8192, 16384)
TIMED_APART = 16384  # from this size on, times come from the fresh processes
DIM = 512
CLOSE = 1e-5  # of the largest entry: sums of thousands of float32 numbers in another order
LOSSES = {
    "InfoNCE": {
        "plain": lambda x, y, s: info_nce(s * x @ y.T),
        "tiled": tiled_info_nce,
    },
    "sigmoid": {
        "plain": lambda x, y, s: sigmoid_loss(s * x @ y.T - 10),
        "tiled": lambda x, y, s: tiled_sigmoid_loss(x, y, s, -10.0),
    },
}


def inputs(size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    image = normalize(torch.randn(size, DIM, generator=generator), dim=-1)
    text = normalize(image + 6 * normalize(torch.randn(size, DIM, generator=generator), dim=-1), dim=-1)
    return image.requires_grad_(), text.requires_grad_(), torch.tensor(50.0, requires_grad=True)


def step(loss: str, form: str, given: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The loss and the gradients of pictures, texts and scale."""
    value = LOSSES[loss][form](*given)
    return (value.detach(), *torch.autograd.grad(value, given))


def difference(one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> float:
    """Largest deviation of loss or gradient, as a share of its largest entry."""
    found = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(one, two, strict=True))
    assert found < CLOSE, f"outputs differ by {found}"
    return found


def resident(field: str) -> int:
    """VmRSS, or its peak VmHWM, of this process in KiB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(row for row in status.splitlines() if row.startswith(f"{field}:")).split()[1])


def child(loss: str, form: str, size: int, out: str) -> None:
    """One call in this fresh process: prints what it took, saves what it gave."""
    torch.set_num_threads(1)
    step(loss, form, inputs(64))
    given = inputs(size)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before, start = resident("VmRSS"), time.process_time()
    found = step(loss, form, given)
    took = {"seconds": time.process_time() - start, "mib": (resident("VmHWM") - before) / 1024}
    torch.save(found, out)
    print(json.dumps(took))


def apart(loss: str, size: int, rounds: int) -> tuple[dict[str, list[dict[str, float]]], float]:
    """What each form took in fresh processes of its own, taking turns, and how far their outputs lie apart."""
    took: dict[str, list[dict[str, float]]] = {"plain": [], "tiled": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for form, results in took.items():
                call = ["-m", "benchmarks.contrastive", "--child", loss, form, str(size), f"{folder}/{form}.pt"]
                done = subprocess.run([sys.executable, *call], check=True, capture_output=True, text=True)
                results.append(json.loads(done.stdout))
        outputs = [torch.load(f"{folder}/{form}.pt") for form in ("tiled", "plain")]
    return took, difference(*outputs)


def row_of(job: str, took: dict[str, list[dict[str, float]]], apart_by: float) -> Row:
    seconds = {form: [result["seconds"] for result in results] for form, results in took.items()}
    ratios = [plain / tiled for plain, tiled in zip(seconds["plain"], seconds["tiled"], strict=True)]
    medians = [statistics.median(seconds[form]) for form in ("tiled", "plain")]
    return Row(job, "plain", statistics.median(ratios), min(ratios), max(ratios), *medians, apart_by, "fresh processes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        loss, form, size, out = asked.child
        return child(loss, form, int(size), out)
    torch.set_num_threads(1)
    rows: list[Row] = []
    memory: list[dict[str, Any]] = []
    for size in asked.sizes:
        for loss in LOSSES:
            job = f"{loss}, {size:,} pairs"
            took, apart_by = apart(loss, size, rounds=2 if size >= TIMED_APART else 1)
            mib = {form: max(result["mib"] for result in results) for form, results in took.items()}
            memory.append({"loss": loss, "pairs": size, "share": mib["tiled"] / mib["plain"], **mib})
            print(f"{job}: {mib['plain']:.0f} MiB plain, {mib['tiled']:.0f} MiB tiled", file=sys.stderr, flush=True)
            if size >= TIMED_APART:
                rows.append(row_of(job, took, apart_by))
                continue
            given = inputs(size)
            apart_by = max(apart_by, difference(step(loss, "tiled", given), step(loss, "plain", given)))
            rows.append(
                compare(
                    job,
                    "plain",
                    lambda loss=loss, given=given: step(loss, "tiled", given),
                    lambda loss=loss, given=given: step(loss, "plain", given),
                    rounds=asked.rounds,
                    difference=apart_by,
                )
            )
    settings = {"dimensions": DIM, "tile": TILE, "threads": 1, "rounds": asked.rounds, "memory_mib": memory}
    path = save("contrastive", rows, settings)
    print("\n".join(line(row) for row in rows), f"\n{path}")


if __name__ == "__main__":
    main()
