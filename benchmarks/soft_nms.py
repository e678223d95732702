"""Soft-NMS and hard NMS against the paper's loop: python -m benchmarks.soft_nms [--rounds N]

Boxes as a detector gives them, 20 around each object and 1 in 5 around nothing, in float64 so that all agree on the order.
The peers are written from the paper's figure 2: `box by box` in plain Python, and `box against the rest`, which compares each
selected box with all that are left in one go, in NumPy, as implementations in circulation do. Both walk over pictures and
classes one after the other; ours takes them side by side. CPU time on one thread. "Outputs within" is the largest difference
of a score after decay; that the same boxes are kept in the same order is asserted.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import Row, compare, save
from ecliptic.methods.detect.soft_nms import Decay, soft_nms

METHODS: tuple[Decay, ...] = ("linear", "gaussian", "hard")
THRESHOLD, SIGMA, LOWEST = 0.3, 0.5, 0.001  # the defaults of `soft_nms`
ONE_PICTURE = (100, 1_000, 5_000, 20_000)
BATCHES = ((16, 10, 100), (64, 80, 4))  # pictures, classes in each, boxes of each class
BY_BOX, BY_REST = "the paper's loop, box by box", "NumPy, box against the rest"
PATIENCE = 5_000  # boxes in one picture up to which the plain loop decays scores; there it takes ten seconds
COPIES, SIDE = 20, 1024

Kept = tuple[list[int], list[float]]
Peer = Callable[[np.ndarray, np.ndarray, str], Kept]


def detections(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(n, 4) boxes in a picture of SIDE pixels and their scores (n,), all different."""
    objects = max(1, n // COPIES)
    size = 16 * 8 ** torch.rand(objects, 2, generator=generator, dtype=torch.float64)  # 16 to 128 pixels
    corner = torch.rand(objects, 2, generator=generator, dtype=torch.float64) * (SIDE - size)
    of = torch.randint(objects, (n,), generator=generator)
    jitter = 0.1 * size[of].repeat(1, 2) * torch.randn(n, 4, generator=generator, dtype=torch.float64)
    boxes = torch.cat([corner, corner + size], 1)[of] + jitter
    alone = torch.rand(n, generator=generator) < 0.2
    away = torch.rand(n, 2, generator=generator, dtype=torch.float64) * (SIDE - size[of])
    boxes[alone] = torch.cat([away, away + size[of]], 1)[alone]
    boxes = torch.cat([torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])], 1)
    return boxes, torch.rand(n, generator=generator, dtype=torch.float64)


def box_by_box(boxes: np.ndarray, scores: np.ndarray, method: str) -> Kept:
    """Figure 2 of arXiv 1704.04503 as it stands there."""
    left = [(*box, score, i) for i, (box, score) in enumerate(zip(boxes.tolist(), scores.tolist()))]
    keep, values = [], []
    while left:
        best = max(range(len(left)), key=lambda i: left[i][4])
        x0, y0, x1, y1, score, at = left.pop(best)
        area = (x1 - x0) * (y1 - y0)
        keep.append(at)
        values.append(score)
        rest = []
        for u0, v0, u1, v1, other, i in left:
            width, height = min(x1, u1) - max(x0, u0), min(y1, v1) - max(y0, v0)
            if width > 0 and height > 0:
                shared = width * height
                overlap = shared / (area + (u1 - u0) * (v1 - v0) - shared)
                if method == "gaussian":
                    other *= math.exp(-overlap * overlap / SIGMA)
                elif method == "linear":
                    other *= 1 - overlap if overlap >= THRESHOLD else 1.0
                elif overlap > THRESHOLD:
                    continue
            if other >= LOWEST:
                rest.append((u0, v0, u1, v1, other, i))
        left = rest
    return keep, values


def box_against_the_rest(boxes: np.ndarray, scores: np.ndarray, method: str) -> Kept:
    """The same with one comparison of the selected box with all others."""
    x0, y0, x1, y1 = boxes.T.copy()
    areas, scores, places = (x1 - x0) * (y1 - y0), scores.copy(), np.arange(len(scores))
    keep, values = [], []
    while len(scores):
        best = int(scores.argmax())
        keep.append(int(places[best]))
        values.append(float(scores[best]))
        width = np.minimum(x1, x1[best]) - np.maximum(x0, x0[best])
        height = np.minimum(y1, y1[best]) - np.maximum(y0, y0[best])
        shared = width.clip(0) * height.clip(0)
        overlap = shared / (areas + areas[best] - shared)
        if method == "gaussian":
            scores = scores * np.exp(-overlap * overlap / SIGMA)
        elif method == "linear":
            scores = scores * np.where(overlap >= THRESHOLD, 1 - overlap, 1.0)
        stay = scores >= LOWEST
        if method == "hard":
            stay &= overlap <= THRESHOLD
        stay[best] = False
        x0, y0, x1, y1, areas, scores, places = (x[stay] for x in (x0, y0, x1, y1, areas, scores, places))
    return keep, values


def group_by_group(peer: Peer, boxes: np.ndarray, scores: np.ndarray, groups: np.ndarray, method: str) -> Kept:
    """A peer on one group (a class in a picture) after the other, and one ranking of all."""
    found = []
    ends = np.flatnonzero(np.diff(groups)) + 1  # groups stand one after the other
    for rows in np.split(np.arange(len(groups)), ends):
        keep, values = peer(boxes[rows], scores[rows], method)
        found += [(-value, int(rows[i])) for i, value in zip(keep, values)]
    found.sort()
    return [i for _, i in found], [-value for value, _ in found]


def against(job: str, peer: str, ours: Callable[[], Any], theirs: Callable[[], Kept], rounds: int, note: str) -> Row:
    """Times, and that the last outputs of both were equal."""
    last: dict[str, Any] = {}
    row = compare(job, peer, lambda: last.update(a=ours()), lambda: last.update(b=theirs()), rounds=rounds, note=note)
    assert last["a"].keep.tolist() == last["b"][0], f"{job}: not the same boxes in the same order as {peer}"
    difference = float((last["a"].scores - torch.tensor(last["b"][1], dtype=torch.float64)).abs().max())
    assert difference < 1e-12, f"{job}: scores off by {difference}"
    return replace(row, difference=difference)


def one_picture(n: int, method: Decay, rounds: int) -> Iterator[Row]:
    boxes, scores = detections(n, torch.Generator().manual_seed(0))
    job = f"{named(method)}, {n:,} boxes in one picture"
    plain = (boxes.numpy(), scores.numpy(), method)

    def ours() -> Any:
        return soft_nms(boxes, scores, method=method)

    short = n <= PATIENCE or method == "hard"
    if short:
        once = n >= PATIENCE
        yield against(job, BY_BOX, ours, lambda: box_by_box(*plain), 1 if once else rounds, "one round" if once else "")
    note = "" if short else "box by box takes over a minute: left out"
    yield against(job, BY_REST, ours, lambda: box_against_the_rest(*plain), rounds, note)


def batch(pictures: int, kinds: int, each: int, method: Decay, rounds: int) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(0)
    made = [detections(each, generator) for _ in range(pictures * kinds)]
    boxes, scores = torch.cat([b for b, _ in made]), torch.cat([s for _, s in made])
    groups = torch.arange(pictures * kinds).repeat_interleave(each)
    job = f"{named(method)}, {pictures} pictures of {kinds} classes, {each} boxes in each"

    def ours() -> Any:
        return soft_nms(boxes, scores, method=method, images=groups // kinds, classes=groups % kinds)

    for name, peer in ((BY_BOX, box_by_box), (BY_REST, box_against_the_rest)):
        given = (peer, boxes.numpy(), scores.numpy(), groups.numpy(), method)
        yield against(job, name, ours, lambda given=given: group_by_group(*given), rounds, "")  # type: ignore[misc]


def named(method: Decay) -> str:
    return "hard NMS" if method == "hard" else f"Soft-NMS, {method}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    rows = [row for n in ONE_PICTURE for method in METHODS for row in one_picture(n, method, rounds)]
    rows += [row for sizes in BATCHES for method in METHODS for row in batch(*sizes, method, rounds)]
    save("soft_nms", rows, {"rounds": rounds, "clock": "CPU"}, ("torch", "numpy"))


if __name__ == "__main__":
    main()
