"""Axis-aligned boxes as rows x0, y0, x1, y1 in pixels, and how much two of them share."""

from __future__ import annotations

import torch
from torch import Tensor


def box_area(boxes: Tensor, offset: float = 0.0) -> Tensor:
    """(..., 4) -> (...), square pixels. offset: added to each side; 1 is the old convention of inclusive corners."""
    return (boxes[..., 2] - boxes[..., 0] + offset) * (boxes[..., 3] - boxes[..., 1] + offset)


def box_iou(a: Tensor, b: Tensor, offset: float = 0.0) -> Tensor:
    """(..., N, 4) and (..., M, 4) -> (..., N, M), intersection over union in [0, 1]; 0 where both boxes are empty."""
    top_left = torch.maximum(a[..., :, None, :2], b[..., None, :, :2])
    bottom_right = torch.minimum(a[..., :, None, 2:], b[..., None, :, 2:])
    shared = (bottom_right - top_left + offset).clamp(min=0).prod(-1)
    union = box_area(a, offset)[..., :, None] + box_area(b, offset)[..., None, :] - shared
    return torch.where(union > 0, shared / union.clamp(min=torch.finfo(union.dtype).tiny), 0.0)


def check_boxes(boxes: Tensor) -> None:
    """Raise ValueError unless the boxes are (N, 4), finite, and have their corners in order."""
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must be (N, 4), x0 y0 x1 y1, not of shape {tuple(boxes.shape)}")
    if not boxes.is_floating_point():
        raise TypeError(f"boxes must be floating point, not {boxes.dtype}: call .float()")
    if not bool(boxes.isfinite().all()):
        raise ValueError("boxes hold values that are not finite")
    turned = (boxes[:, 2:] < boxes[:, :2]).any(1)
    if bool(turned.any()):
        row = int(turned.nonzero()[0, 0])
        raise ValueError(f"box {row} has its corners the wrong way round: {boxes[row].tolist()}; x0 <= x1 and y0 <= y1")
