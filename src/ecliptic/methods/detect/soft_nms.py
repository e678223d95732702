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

import numpy as np
import torch
from torch import Tensor

from ecliptic.core.method import Paper, method
from ecliptic.ops.boxes import check_boxes

Decay = Literal["gaussian", "linear", "hard"]
_Decay = Callable[[np.ndarray, np.ndarray], None]


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
    sides, values = _arrays(boxes, scores)
    parts = []
    for rows in _groups(len(boxes), classes, images):
        group, place, value = _select(
            np.where(rows >= 0, values[rows], -np.inf), _Boxes(sides[rows], box_offset), decay, score_threshold
        )
        parts.append((rows[group, place], value))
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
    shared, values = _arrays(overlap, scores)
    _, place, value = _select(values[None], _Given(shared), decay, score_threshold)
    return _ranked([(place, value)], scores, max_out)


def tiny() -> dict[str, Any]:
    """Arguments for the contract tests: three boxes, two of them nearly the same."""
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0], [30.0, 30.0, 40.0, 42.0]])
    return {"boxes": boxes, "scores": torch.tensor([0.9, 0.8, 0.7])}


class _Boxes:
    """Groups of boxes (G, n, 4), with the overlap of one box of each group with the others of its group.

    A large group alone is sorted by left edges: then only a stretch of it can touch a given box.
    """

    LARGE = 2048  # ours: below it, finding the stretch takes longer than going over all

    def __init__(self, boxes: np.ndarray, offset: float):
        self.offset, self.tiny = offset, np.finfo(boxes.dtype).tiny
        sides = np.ascontiguousarray(np.moveaxis(boxes, -1, 0))
        x, y = (sides[2 + i] - sides[i] + offset for i in (0, 1))
        self.of = np.concatenate([sides, (x * y)[None]])  # (5, G, n): x0, y0, x1, y1 and the area
        self.order = np.arange(boxes.shape[1])
        self.sorted = len(boxes) == 1 and boxes.shape[1] >= self.LARGE
        if self.sorted:
            self.order = np.argsort(self.of[0, 0], kind="stable")
            self.of = np.ascontiguousarray(self.of[:, :, self.order])
        self._set_up()

    def _set_up(self) -> None:
        self.rows = np.arange(self.of.shape[1])
        self.room = np.empty_like(self.of[:3])
        if self.sorted:
            self.left, self.reach = self.of[0, 0], np.maximum.accumulate(self.of[2, 0])

    def keep(self, rows: np.ndarray, columns: np.ndarray) -> None:
        """Drop all but `columns` (g, m) of the groups `rows` (g,)."""
        self.of = np.ascontiguousarray(self.of[:, rows[:, None], columns])
        self._set_up()

    def near(self, at: int | np.ndarray) -> slice:
        """The stretch that holds all boxes whose overlap with box `at`, one for each group, is above 0."""
        if not self.sorted:
            return slice(None)
        x0, x1 = self.left[at] - 2 * self.offset, self.of[2, 0, at] + 2 * self.offset  # twice: safe from rounding
        return slice(int(self.reach.searchsorted(x0, "right")), int(self.left.searchsorted(x1, "left")))

    def overlap(self, at: int | np.ndarray, near: slice) -> np.ndarray:
        """(G, k) with box `at`, a whole number for one group and (G,) for several; valid until the next call.

        The same numbers as `ecliptic.ops.boxes.box_iou`.
        """
        x0, y0, x1, y1, area = self.of[..., near]
        width: np.ndarray
        width, height, spare = self.room[..., near]
        left, top, right, bottom, own = self.of[:, 0, at] if isinstance(at, int) else self.of[:, self.rows, at, None]
        for shared, low, high, start, end in ((width, x0, x1, left, right), (height, y0, y1, top, bottom)):
            np.minimum(high, end, out=shared)
            shared -= np.maximum(low, start, out=spare)
            if self.offset:
                shared += self.offset
            np.maximum(shared, 0, out=shared)
        width *= height
        union = np.add(area, own, out=spare)
        union -= width
        width /= np.maximum(union, self.tiny, out=union)  # both empty: 0 / tiny
        return width


class _Given:
    """One group whose overlaps (n, n) are known."""

    def __init__(self, overlap: np.ndarray):
        self.of, self.order, self.sorted = overlap, np.arange(len(overlap)), False
        self.columns = self.order

    def keep(self, rows: np.ndarray, columns: np.ndarray) -> None:
        self.columns = self.columns[columns[0]]

    def near(self, at: int | np.ndarray) -> slice:
        return slice(None)

    def overlap(self, at: int | np.ndarray, near: slice) -> np.ndarray:
        row: np.ndarray = self.of[self.columns[at], self.columns]
        return row[None]


def _select(
    scores: np.ndarray, rivals: _Boxes | _Given, decay: _Decay, score_threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """G groups side by side: scores (G, n), -inf where there is none. In NumPy, because each step is small and waits for the
    one before: what counts is the cost of a call, and that is several times as high in torch, and higher still on a GPU.

    Returns (K,) each: the group, the position in it, and the score at selection.
    """
    current = scores[:, rivals.order]
    place, group = np.broadcast_to(rivals.order, current.shape), np.arange(len(current))
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    with np.errstate(invalid="ignore", under="ignore"):  # -inf * 0, put right below
        rows = np.arange(len(current))
        while current.size:
            at: int | np.ndarray
            if len(rows) > 1:
                at = current.argmax(1)
                best, here = current[rows, at], place[rows, at]
                current[rows, at] = -np.inf
                if (best == -np.inf).all():
                    break
            else:  # plain numbers cost a tenth
                at = int(current.argmax())
                if rivals.sorted:  # then the first of equal scores may not be the first of the input
                    equal = (current[0] == current[0, at]).nonzero()[0]
                    at = int(equal[place[0, equal].argmin()])
                best, here = current[0, at : at + 1].copy(), place[0, at : at + 1]
                current[0, at] = -np.inf
                if best[0] == -np.inf:
                    break
            found.append((group, here, best))

            near = (
                rivals.near(at) if len(found) > 1 else slice(None)
            )  # once over all, for scores too low from the start
            touched = current[:, near]
            decay(touched, rivals.overlap(at, near))
            np.fmax(touched, -np.inf, out=touched)  # what was gone stays so
            np.putmask(touched, touched < score_threshold, -np.inf)

            if len(found) % 32 == 0:  # now and then, put aside what is done with
                alive = current > -np.inf
                going, most = np.flatnonzero(alive.any(1)), int(alive.sum(1).max())
                if not most:
                    break
                if 2 * len(going) * most <= current.size:
                    kept = np.argsort(~alive[going], axis=1, kind="stable")[:, :most]
                    current, place = current[going[:, None], kept], place[going[:, None], kept]
                    rivals.keep(going, kept)
                    group, rows = group[going], rows[: len(going)]
    if not found:
        return (np.empty(0, np.int64),) * 2 + (np.empty(0, scores.dtype),)
    groups, places, values = (np.concatenate(part) for part in zip(*found))
    real = values > -np.inf  # groups run out at different steps
    return groups[real], places[real], values[real]


def _decay(method: str, iou_threshold: float, sigma: float, score_threshold: float) -> _Decay:
    """What changes scores, in place, for their overlaps with the selected box; these may be overwritten."""
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold={iou_threshold}: must lie in [0, 1]")
    if not sigma > 0:
        raise ValueError(f"sigma={sigma}: must be positive")
    if not score_threshold >= 0:
        raise ValueError(f"score_threshold={score_threshold}: must not be negative")

    def gaussian(scores: np.ndarray, overlap: np.ndarray) -> None:
        overlap *= overlap
        overlap /= -sigma
        scores *= np.exp(overlap, out=overlap)

    def linear(scores: np.ndarray, overlap: np.ndarray) -> None:
        below = overlap < iou_threshold
        factor = np.subtract(1, overlap, out=overlap)
        np.putmask(factor, below, 1)
        scores *= np.maximum(factor, 0, out=factor)

    def hard(scores: np.ndarray, overlap: np.ndarray) -> None:
        np.putmask(scores, overlap > iou_threshold, -np.inf)

    found = {"gaussian": gaussian, "linear": linear, "hard": hard}.get(method)
    if found is None:
        raise ValueError(f"method={method!r}: choose gaussian, linear or hard")
    return found


def _arrays(about: Tensor, scores: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Boxes or overlaps and scores for NumPy, which knows no bfloat16 and is slow with half precision."""
    kind = torch.promote_types(torch.promote_types(about.dtype, scores.dtype), torch.float32)
    wide = torch.promote_types(about.dtype, torch.float32)
    return about.detach().cpu().to(wide).numpy(), scores.detach().cpu().to(kind).numpy()


def _checked(scores: Tensor, n: int) -> Tensor:
    if scores.shape != (n,) or not scores.is_floating_point():
        raise ValueError(f"scores must be floating point of shape ({n},), not {scores.dtype} {tuple(scores.shape)}")
    if n and not (bool(scores.isfinite().all()) and float(scores.min()) >= 0):
        raise ValueError("scores must be finite and not negative: a factor below 1 would raise a negative one")
    return scores


def _groups(n: int, classes: Tensor | None, images: Tensor | None) -> list[np.ndarray]:
    """Rows that compete, padded with -1 to (G, longest), in lots of groups of similar size."""
    keys = []
    for name, key in (("images", images), ("classes", classes)):
        if key is not None:
            if key.shape != (n,) or key.is_floating_point() or key.is_complex():
                raise ValueError(f"{name} must be whole numbers of shape ({n},), not {key.dtype} {tuple(key.shape)}")
            keys.append(key.detach().cpu().to(torch.int64).numpy())
    if not n:
        return []
    if not keys:
        return [np.arange(n)[None]]
    _, of = np.unique(np.stack(keys, 1), axis=0, return_inverse=True)
    of = of.reshape(-1)
    order = np.argsort(of, kind="stable")
    sizes = np.bincount(of)
    start = sizes.cumsum() - sizes
    lots = []
    magnitude = np.ceil(np.log2(sizes)).astype(int)
    for size in np.unique(magnitude):
        chosen = (magnitude == size).nonzero()[0]
        columns = np.arange(sizes[chosen].max())
        rows = order[np.minimum(start[chosen, None] + columns, n - 1)]
        lots.append(np.where(columns < sizes[chosen, None], rows, -1))
    return lots


def _ranked(parts: list[tuple[np.ndarray, np.ndarray]], scores: Tensor, max_out: int | None) -> Kept:
    """One ranking of what all groups kept; equal scores by position in the input."""
    if max_out is not None and max_out < 0:
        raise ValueError(f"max_out={max_out}: must not be negative")
    if not parts:
        return Kept(torch.empty(0, dtype=torch.int64, device=scores.device), scores[:0].clone())
    keep, values = (np.concatenate(part) for part in zip(*parts))
    order = np.lexsort((keep, -values))[:max_out]
    return Kept(
        torch.from_numpy(keep[order]).to(scores.device), torch.from_numpy(values[order]).to(scores.device, scores.dtype)
    )
