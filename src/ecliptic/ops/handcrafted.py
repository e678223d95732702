"""Features of pictures that were designed, not learnt: oriented gradients and colours, counted over places and scales.

What a histogram of oriented gradients (Dalal and Triggs, CVPR 2005) sees does not depend on colour or brightness, its
pyramid (PHOG, Bosch et al., CIVR 2007) keeps rough places, and gradients of the maps of one orientation tell textures from
outlines, the second layer of a scattering transform (Bruna and Mallat, arXiv 1203.1513) with the coarsest of filters. All
are pure functions of tensors, differentiable almost everywhere, and need no weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, normalize

BINS, GRIDS, SCALES, LEVELS = 8, (1, 2, 4), (1, 2, 4), 4  # ours, as are all choices that follow
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def handcrafted(
    pixels: Tensor,
    bins: int = BINS,
    grids: Sequence[int] = GRIDS,
    scales: Sequence[int] = SCALES,
    levels: int = LEVELS,
) -> Tensor:
    """Pixels (B, 3, H, W) in [0, 1] -> (B, len(scales) * (bins * sum(g^2 over grids) + bins^2 + bins) + levels^3).

    Per scale: gradients of the grey picture by orientation, averaged over each grid; gradients of each orientation's map by
    orientation; how unevenly each orientation is spread (standard deviation over places). Each of these groups is a unit row,
    so contrast does not count. Then the square roots of the colour histogram, a unit row too. 784 numbers by default.
    ValueError for pixels of another shape, or too small for the coarsest scale.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels must be (B, 3, H, W), got {tuple(pixels.shape)}")
    if (least := min(pixels.shape[-2:])) // max(scales) < 6:
        raise ValueError(
            f"pictures of {least} pixels are too small for scale {max(scales)}: at least {6 * max(scales)}"
        )
    grey = (pixels * pixels.new_tensor(LUMA)[:, None, None]).sum(1)
    groups = []
    for scale in scales:
        first = oriented(avg_pool2d(grey[:, None], scale)[:, 0], bins)
        groups += [adaptive_avg_pool2d(first, grid).flatten(1) for grid in grids]
        second = oriented(avg_pool2d(first, 2).flatten(0, 1), bins).mean((-2, -1))
        groups += [second.reshape(len(pixels), -1), first.flatten(2).std(-1)]
    groups.append(colour_histogram(pixels, levels).sqrt())
    return torch.cat([normalize(group, dim=-1) for group in groups], -1)


def oriented(grey: Tensor, bins: int = BINS) -> Tensor:
    """(B, H, W) -> (B, bins, H - 2, W - 2): the length of each pixel's gradient, shared between the two directions nearest.

    Central differences; direction k is the angle 2 pi k / bins from x to y (y down), so dark-to-light and light-to-dark differ.
    Over the bins it adds up to the length of the gradient.
    """
    dx = (grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2]) / 2
    dy = (grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1]) / 2
    length = (dx.square() + dy.square()).sqrt()
    angle = torch.atan2(dy, dx) / (2 * torch.pi) * bins
    lower = angle.floor()
    share = angle - lower
    found = grey.new_zeros(len(grey), bins, *length.shape[1:])
    for offset, weight in ((0, 1 - share), (1, share)):
        found.scatter_add_(1, ((lower.long() + offset) % bins)[:, None], (length * weight)[:, None])
    return found


def colour_histogram(pixels: Tensor, levels: int = LEVELS) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, levels^3): the share of pixels in each cell of the cube of red, green, blue (in that order
    of significance)."""
    red, green, blue = (pixels * levels).long().clamp(0, levels - 1).unbind(1)
    cell = ((red * levels + green) * levels + blue).flatten(1)
    ones = torch.ones_like(cell, dtype=pixels.dtype)
    return pixels.new_zeros(len(pixels), levels**3).scatter_add_(1, cell, ones) / cell.shape[1]
