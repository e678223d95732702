"""Regions of a picture as boxes: windows over it, connected parts of a map of it, and how a map fills a box.

A map is (H, W), one value per cell of a grid over the picture; a box is x0, y0, x1, y1 in units of cells, as in `ops.boxes`, so
that cell (row, column) is the square from (column, row) to (column + 1, row + 1). Corners may lie inside cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


def windows(
    width: float,
    height: float,
    *,
    scales: Sequence[float],
    aspects: Sequence[float] = (1.0,),
    step: float = 0.33,
    least: float = 0.0,
) -> Tensor:
    """Windows of several sizes and shapes, evenly spread over width x height -> (N, 4) float32, none of them twice.

    scales: sides as shares of the picture's shorter side; aspects: width / height, the area kept; a side that would be longer
    than the picture's is cut to it. step: distance of neighbours as a share of their side, at most; the outer ones touch the
    picture's borders. least: no side is shorter than this, unless the picture is. Scale by scale, then aspect by aspect,
    then from left to right and down.
    """
    if not (math.isfinite(width) and math.isfinite(height) and width > 0 and height > 0):
        raise ValueError(f"a picture of {width} x {height} has no windows")
    if not step > 0 or any(not value > 0 for value in (*scales, *aspects)):
        raise ValueError(f"step={step}, scales={tuple(scales)}, aspects={tuple(aspects)}: all must be positive")
    found: dict[tuple[float, ...], None] = {}
    for scale in scales:
        for aspect in aspects:
            side = scale * min(width, height)
            wide, tall = min(width, max(least, side * aspect**0.5)), min(height, max(least, side / aspect**0.5))
            for x in _starts(width - wide, wide * step):
                for y in _starts(height - tall, tall * step):
                    found[x, y, x + wide, y + tall] = None
    return torch.tensor(list(found), dtype=torch.float32).reshape(-1, 4)


def connected_components(mask: Tensor) -> Tensor:
    """mask (..., H, W) bool -> (..., H, W) int64: 0 outside, and inside the number of the part that the cell belongs to.

    Cells that share a side are connected; corners do not count. Parts of each map are numbered from 1 in reading order of
    their first cells. Every cell takes over the smallest label around it and then that cell's own label, until nothing
    changes: some log2(H * W) rounds for blobs, a few more for spirals.
    """
    if mask.dtype != torch.bool or mask.ndim < 2:
        raise ValueError(f"mask must be bool (..., H, W), not {mask.dtype} {tuple(mask.shape)}")
    rows, columns = mask.shape[-2:]
    flat = mask.reshape(-1, rows, columns)
    if not flat.numel():
        return torch.zeros(mask.shape, dtype=torch.int64, device=mask.device)
    none = rows * columns  # a label above all others
    cells = torch.arange(none, device=mask.device).view(rows, columns)
    label = torch.where(flat, cells, none)
    while True:
        around = pad(label, (1, 1, 1, 1), value=none)
        lowest = label
        for y, x in ((0, 1), (2, 1), (1, 0), (1, 2)):
            lowest = torch.minimum(lowest, around[:, y : y + rows, x : x + columns])
        lowest = torch.where(flat, lowest, none).flatten(1)
        chained = pad(lowest, (0, 1), value=none)  # the label of "outside" is itself
        lowest = chained.gather(1, lowest).view_as(label)
        if bool((lowest == label).all()):
            break
        label = lowest
    first = label == cells
    number = first.flatten(1).cumsum(1)
    found = number.gather(1, label.clamp(max=none - 1).flatten(1)).view_as(label)
    return torch.where(flat, found, 0).view(mask.shape)


def component_boxes(mask: Tensor) -> Tensor:
    """mask (H, W) bool -> (N, 4) float32, the tight box of every connected part, in the order of `connected_components`."""
    if mask.ndim != 2:
        raise ValueError(f"mask must be (H, W), not {tuple(mask.shape)}")
    label = connected_components(mask)
    y, x = mask.nonzero(as_tuple=True)
    part = label[y, x] - 1
    count = int(label.max()) if label.numel() else 0
    corners = torch.stack([x, y, -x - 1, -y - 1], 1)
    boxes = torch.full((count, 4), torch.iinfo(torch.int64).max, device=mask.device)
    boxes = boxes.scatter_reduce(0, part[:, None].expand(-1, 4), corners, "amin")
    return torch.cat([boxes[:, :2], -boxes[:, 2:]], 1).float()


def level_boxes(heat: Tensor, levels: Sequence[float], *, smallest: float = 0.0) -> Tensor:
    """heat (H, W) -> (N, 4) float32: the connected parts above each level, 0 being the map's lowest value and 1 its highest.

    smallest: leave out boxes with less than this share of the map's area. A map without contrast has no parts.
    """
    if heat.ndim != 2 or not heat.is_floating_point() or not bool(heat.isfinite().all()):
        raise ValueError(f"heat must be a finite floating point map (H, W), not {heat.dtype} {tuple(heat.shape)}")
    if not heat.numel() or heat.min() == heat.max():
        return torch.zeros(0, 4, device=heat.device)
    low, high = heat.min(), heat.max()
    boxes = torch.cat([component_boxes(heat > low + level * (high - low)) for level in levels])
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return boxes[area >= smallest * heat.numel()].unique(dim=0)


def box_sums(heat: Tensor, boxes: Tensor) -> Tensor:
    """heat (H, W) and boxes (N, 4) -> (N,) float64: the map's integral over each box; outside the map it is 0.

    By the integral image (Crow 1984), read between cells by bilinear interpolation: exact for a map constant on its cells.
    """
    rows, columns = heat.shape
    total = pad(heat.double().cumsum(0).cumsum(1), (1, 0, 1, 0))
    x, y = boxes[:, 0::2].double().clamp(0, columns), boxes[:, 1::2].double().clamp(0, rows)
    left, top = x.floor().clamp(max=columns - 1).long(), y.floor().clamp(max=rows - 1).long()

    def upto(i: int, j: int) -> Tensor:
        """The integral from the origin to corner (x_i, y_j)."""
        c, r, u, v = left[:, i], top[:, j], x[:, i] - left[:, i], y[:, j] - top[:, j]
        above = total[r, c] * (1 - u) + total[r, c + 1] * u
        below = total[r + 1, c] * (1 - u) + total[r + 1, c + 1] * u
        return above * (1 - v) + below * v

    return upto(1, 1) - upto(0, 1) - upto(1, 0) + upto(0, 0)


def soft_iou(heat: Tensor, boxes: Tensor) -> Tensor:
    """heat (H, W) in [0, 1] and boxes (N, 4) -> (N,) float64 in [0, 1]: sum of minima over sum of maxima of map and box.

    For a map of zeros and ones that is intersection over union with what it marks (the weighted Jaccard index).
    """
    inside = box_sums(heat, boxes)
    area = (boxes[:, 2] - boxes[:, 0]).double() * (boxes[:, 3] - boxes[:, 1])
    return inside / (heat.double().sum() + area - inside).clamp(min=1e-12)


def ring_contrast(heat: Tensor, boxes: Tensor, margin: float = 0.25) -> Tensor:
    """heat (H, W) and boxes (N, 4) -> (N,) float64: mean inside the box minus mean in the ring around it.

    margin: width of the ring as a share of the box's side. What of box and ring lies outside the map does not count; a ring
    that does not lie on the map at all has the mean 0.
    """
    across, down = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    outer = boxes + margin * torch.stack([-across, -down, across, down], 1)
    ones = torch.ones_like(heat)
    inner_sum, outer_sum = box_sums(heat, boxes), box_sums(heat, outer)
    inner_area, outer_area = box_sums(ones, boxes), box_sums(ones, outer)
    ring = outer_area - inner_area
    around = torch.where(ring > 1e-9, (outer_sum - inner_sum) / ring.clamp(min=1e-9), 0.0)
    return inner_sum / inner_area.clamp(min=1e-9) - around


def _starts(room: float, stride: float) -> list[float]:
    """Evenly spaced from 0 to `room`, at most `stride` apart."""
    if room <= 0:
        return [0.0]
    parts = math.ceil(room / stride - 1e-9)
    return [room * i / parts for i in range(parts + 1)]
