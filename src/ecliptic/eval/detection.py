"""How good scored boxes are: average precision as COCO counts it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ecliptic.ops.boxes import box_iou

COCO_IOU = tuple(0.5 + 0.05 * i for i in range(10))
RECALLS = 101  # points of the interpolation: 0, 0.01 ... 1


class Boxes(NamedTuple):
    """What was found in one picture: boxes (N, 4) x0 y0 x1 y1, scores (N,), higher means surer."""

    boxes: Tensor
    scores: Tensor


def average_precision(
    found: Sequence[Boxes], truth: Sequence[Tensor], iou: Sequence[float] = COCO_IOU, max_boxes: int = 100
) -> Tensor:
    """Found boxes and true boxes (M, 4) per picture, all of one class -> AP in [0, 1] at each `iou`, shape (len(iou),).

    COCO's protocol: the `max_boxes` surest of each picture, in the order of their scores, each take the free true box that they
    overlap most, if by at least `iou`; precision is made non-increasing from the right and averaged over 101 recalls. The mean
    over the default `iou` is AP@[.5:.95]. Of equal scores the earlier picture and box comes first. Raises ValueError where
    no picture holds a true box: there is nothing to find.
    """
    if len(found) != len(truth):
        raise ValueError(f"{len(found)} pictures with found boxes, {len(truth)} with true ones")
    total = sum(len(boxes) for boxes in truth)
    if not total:
        raise ValueError("no picture holds a true box, so precision and recall are undefined")
    levels = torch.tensor(iou, dtype=torch.float64)
    scores, hits = [], []
    for (boxes, score), true in zip(found, truth):
        order = torch.sort(score, descending=True, stable=True).indices[:max_boxes]
        scores.append(score[order].double())
        hits.append(_matched(box_iou(boxes[order].double(), true.double()), levels))
    order = torch.sort(torch.cat(scores), descending=True, stable=True).indices
    right = torch.cat(hits, 1)[:, order].double().cumsum(1)
    precision = right / torch.arange(1, right.shape[1] + 1)
    precision = precision.flip(1).cummax(1).values.flip(1)
    recall = right / total
    points = torch.linspace(0, 1, RECALLS, dtype=torch.float64).expand(len(levels), -1)
    at = torch.searchsorted(recall.contiguous(), points.contiguous())  # the first place where that much is found
    reached = at < recall.shape[1]
    if not recall.shape[1]:
        return torch.zeros(len(levels), dtype=torch.float64)
    return torch.where(reached, precision.gather(1, at.clamp(max=recall.shape[1] - 1)), 0.0).mean(1)


def _matched(overlap: Tensor, levels: Tensor) -> Tensor:
    """(N, M) overlaps of boxes in order of score -> (levels, N) bool, whether each found a true box of its own."""
    hits = torch.zeros(len(levels), len(overlap), dtype=torch.bool)
    if not overlap.shape[1]:
        return hits
    free = torch.ones(len(levels), overlap.shape[1], dtype=torch.bool)
    for row, shared in enumerate(overlap):
        best, at = shared.where(free, -1.0).max(1)
        hits[:, row] = best >= levels - 1e-12
        free[hits[:, row], at[hits[:, row]]] = False
    return hits
