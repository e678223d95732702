"""Soft-NMS: a box that overlaps a better one loses score instead of being deleted.

Greedy NMS deletes whatever overlaps a selected box by more than a threshold, and with it a second object that stands in front
of the first. Here the greedy order stays, but the overlapped box's score is multiplied by a decreasing function of the overlap:
near-duplicates fall to the end of the ranking, neighbours keep most of their score. No parameters, nothing to train; it works on
boxes alone, whichever towers scored them.

Decayed scores are no probabilities any more: rank by them, and do not cut them at a threshold that was tuned before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ecliptic.core.method import Paper, method
from ecliptic.ops.boxes import box_iou, check_boxes

Decay = Literal["gaussian", "linear", "hard"]


class Kept(NamedTuple):
    """keep (K,) int64: rows of the input, best first. scores (K,): after decay, never increasing, never above the input's."""

    keep: Tensor
    scores: Tensor


@method(
    Paper("Soft-NMS: Improving Object Detection With One Line of Code", arxiv="1704.04503", year=2017),
    purpose="thin out overlapping boxes without losing objects that stand close together",
    claim="where objects overlap, boxes thinned by decay have a far higher AP than by deletion at the same threshold; "
    "where they do not, the two are alike",
)
@torch.no_grad()
def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    *,
    method: Decay = "gaussian",
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    score_threshold: float = 0.001,
    classes: Tensor | None = None,
    images: Tensor | None = None,
    box_offset: float = 0.0,
    max_out: int | None = None,
) -> Kept:
    """Boxes (N, 4) x0 y0 x1 y1 and scores (N,) >= 0 -> which to keep, in what order, with what score.

    Until none is left: the box with the highest current score is selected, and every other one is multiplied by
    gaussian: exp(-iou^2 / sigma); linear: 1 - iou from `iou_threshold` on, 1 below; hard: 0 above `iou_threshold`, 1 up to it
    (section 3, equations 1 to 3). A box whose decayed score is below `score_threshold` is dropped. Of equal scores the first
    wins. The first box to be selected keeps its score, whatever that is.

    classes, images: (N,) whole numbers or None; only boxes that agree in both compete. All of them are worked off side by side,
    and come back as one ranking. box_offset: 1 for the official code's inclusive pixel corners. max_out: at most so many.
    Defaults are the official code's, except that its method is linear: the paper's Gaussian is as good or better.
    Inputs stay as they are. Raises ValueError for shapes, negative or non-finite scores, and boxes turned inside out.
    """
    check_boxes(boxes)
    decay = _decay(method, iou_threshold, sigma, score_threshold)
    scores = _checked(scores, len(boxes))
    if box_offset and len(boxes) and float(boxes.max()) <= 1:
        raise ValueError("box_offset is in pixels, and these boxes lie in [0, 1]: leave it at 0")
    parts = []
    for rows in _groups(len(boxes), classes, images, boxes.device):
        found, values = _select(
            scores[rows].where(rows >= 0, -torch.inf),
            boxes[rows.clamp(min=0)],
            lambda picked, others: box_iou(picked[:, None], others, box_offset)[:, 0],
            decay,
            score_threshold,
        )
        group, place = (found >= 0).nonzero(as_tuple=True)
        parts.append((rows[group, found[group, place]], values[group, place]))
    return _ranked(parts, scores, max_out)


@torch.no_grad()
def soft_nms_mask(
    overlap: Tensor,
    scores: Tensor,
    *,
    method: Decay = "gaussian",
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    score_threshold: float = 0.001,
    max_out: int | None = None,
) -> Kept:
    """`soft_nms` on a given (N, N) overlap in [0, 1]: mask IoU, or the cosine of two regions' embeddings, say."""
    if overlap.ndim != 2 or overlap.shape[0] != overlap.shape[1] or not overlap.is_floating_point():
        raise ValueError(f"overlap must be floating point (N, N), not {overlap.dtype} {tuple(overlap.shape)}")
    if overlap.numel() and not (
        overlap.isfinite().all() and float(overlap.min()) >= 0 and float(overlap.max()) <= 1 + 1e-6
    ):
        raise ValueError("overlap must lie in [0, 1]")
    decay = _decay(method, iou_threshold, sigma, score_threshold)
    scores = _checked(scores, len(overlap))
    if not len(scores):
        return _ranked([], scores, max_out)
    numbers = torch.arange(len(scores), device=scores.device)[None, :, None]
    found, values = _select(
        scores[None], numbers, lambda picked, others: overlap[picked, others[..., 0]], decay, score_threshold
    )
    return _ranked([(found[0][found[0] >= 0], values[0][found[0] >= 0])], scores, max_out)


def tiny() -> dict[str, Any]:
    """Arguments for the contract tests: three boxes, two of them nearly the same."""
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0], [30.0, 30.0, 40.0, 42.0]])
    return {"boxes": boxes, "scores": torch.tensor([0.9, 0.8, 0.7])}


def _select(
    scores: Tensor,
    items: Tensor,
    overlap: Callable[[Tensor, Tensor], Tensor],
    decay: Callable[[Tensor], Tensor],
    score_threshold: float,
) -> tuple[Tensor, Tensor]:
    """G groups side by side: scores (G, n), -inf where there is none; items (G, n, d); overlap of (G, d) with (G, n, d).

    Returns positions (G, steps), -1 once a group has run out, and the scores at selection.
    """
    current, place = scores.clone(), torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
    group = torch.arange(len(scores), device=scores.device)
    found, values = [], []
    while current.numel():
        best, at = current.max(1)
        going = best > -torch.inf
        left = int(going.sum())
        if not left:
            break
        here = torch.full((len(scores),), -1, device=scores.device)
        score = torch.full((len(scores),), -torch.inf, dtype=scores.dtype, device=scores.device)
        here[group[going]], score[group[going]] = place.gather(1, at[:, None])[going, 0], best[going]
        found.append(here)
        values.append(score)

        rows = torch.arange(len(current), device=scores.device)
        factor = decay(overlap(items[rows, at], items))
        current[rows, at] = -torch.inf
        alive = current > -torch.inf
        current = torch.where(alive, current * factor, current)
        current.masked_fill_(alive & ((current < score_threshold) | (factor < 0)), -torch.inf)

        if len(found) % 32 == 0:  # now and then, put aside what is done with
            alive = current > -torch.inf
            rows, most = alive.any(1).nonzero()[:, 0], int(alive.sum(1).max())
            if 2 * len(rows) * most <= current.numel():
                kept = torch.sort((~alive[rows]).byte(), dim=1, stable=True).indices[:, :most]
                current, place = current[rows].gather(1, kept), place[rows].gather(1, kept)
                items = items[rows].gather(1, kept[..., None].expand(-1, -1, items.shape[-1]))
                group = group[rows]
    if not found:
        return torch.empty(len(scores), 0, dtype=torch.int64), torch.empty(len(scores), 0)
    return torch.stack(found, 1), torch.stack(values, 1)


def _decay(method: str, iou_threshold: float, sigma: float, score_threshold: float) -> Callable[[Tensor], Tensor]:
    """Overlap -> factor on the score; -1 stands for deletion, which holds at any score threshold."""
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold={iou_threshold}: must lie in [0, 1]")
    if not sigma > 0:
        raise ValueError(f"sigma={sigma}: must be positive")
    if not score_threshold >= 0:
        raise ValueError(f"score_threshold={score_threshold}: must not be negative")
    if method == "gaussian":
        return lambda o: torch.exp(-o.square() / sigma)
    if method == "linear":
        return lambda o: torch.where(o < iou_threshold, 1.0, 1 - o).clamp(min=0)
    if method == "hard":
        return lambda o: torch.where(o <= iou_threshold, torch.ones_like(o), -torch.ones_like(o))
    raise ValueError(f"method={method!r}: choose gaussian, linear or hard")


def _checked(scores: Tensor, n: int) -> Tensor:
    if scores.shape != (n,) or not scores.is_floating_point():
        raise ValueError(f"scores must be floating point of shape ({n},), not {scores.dtype} {tuple(scores.shape)}")
    if n and not (bool(scores.isfinite().all()) and float(scores.min()) >= 0):
        raise ValueError("scores must be finite and not negative: a factor below 1 would raise a negative one")
    return scores


def _groups(n: int, classes: Tensor | None, images: Tensor | None, device: torch.device) -> list[Tensor]:
    """Rows that compete, padded with -1 to (G, longest), in lots of groups of similar size."""
    keys = []
    for name, key in (("images", images), ("classes", classes)):
        if key is not None:
            if key.shape != (n,) or key.is_floating_point() or key.is_complex():
                raise ValueError(f"{name} must be whole numbers of shape ({n},), not {key.dtype} {tuple(key.shape)}")
            keys.append(key.to(device=device, dtype=torch.int64))
    if not n:
        return []
    if not keys:
        return [torch.arange(n, device=device)[None]]
    _, of = torch.unique(torch.stack(keys, 1), dim=0, return_inverse=True)
    order = torch.sort(of, stable=True).indices
    sizes = torch.bincount(of)
    start = sizes.cumsum(0) - sizes
    lots = []
    magnitude = sizes.double().log2().ceil().long()
    for size in magnitude.unique():  # type: ignore[no-untyped-call]
        chosen = (magnitude == size).nonzero()[:, 0]
        columns = torch.arange(int(sizes[chosen].max()), device=device)
        at = start[chosen, None] + columns
        rows = order[at.clamp(max=n - 1)]
        lots.append(rows.where(columns < sizes[chosen, None], -1))
    return lots


def _ranked(parts: list[tuple[Tensor, Tensor]], scores: Tensor, max_out: int | None) -> Kept:
    """One ranking of what all groups kept; equal scores by position in the input."""
    if max_out is not None and max_out < 0:
        raise ValueError(f"max_out={max_out}: must not be negative")
    if not parts:
        return Kept(torch.empty(0, dtype=torch.int64, device=scores.device), scores[:0].clone())
    keep, values = torch.cat([rows for rows, _ in parts]), torch.cat([value for _, value in parts])
    keep, first = torch.sort(keep)
    values, order = torch.sort(values[first], descending=True, stable=True)
    return Kept(keep[order][:max_out], values[:max_out])
