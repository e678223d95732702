"""The two plain contrastive losses from the features, a tile of logits at a time: exact, in memory that grows with B, not B * B.

`info_nce` and `sigmoid_loss` of `ecliptic.ops.contrastive` hold all (B, B) logits and several copies of them. Here each tile
is computed, summed up and forgotten, and gradients are closed forms. InfoNCE needs the sums over whole rows and columns
before it knows any gradient, so its tiles are computed once more going backward; the sigmoid's gradient is known with the
loss, and going backward only scales it. Both can be differentiated once, not twice.

Tiles and running sums as in Inf-CL (arXiv 2410.17243, section 3.2), both directions of InfoNCE from the same tile. The pieces
(`Block` and the functions on it) also serve logits whose rows and columns lie in different processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import softplus

TILE = 512  # ours, measured on CPUs (benchmarks/contrastive.py): 1 MiB of logits stay in the cache
LARGE_TILE = 4096  # ours, not measured: on accelerators starting kernels costs more than 64 MiB of memory


def tiled_info_nce(
    image: Tensor, text: Tensor, scale: Tensor | float, groups: Tensor | None = None, tile: int | None = None
) -> Tensor:
    """`info_nce(scale * image @ text.T, duplicates(groups))`, arXiv 2103.00020, figure 3, without the (B, B) matrix.

    image, text: (B, D), unit rows for CLIP's loss; row i of one belongs to row i of the other. scale: scalar, 1/temperature.
    groups: (B,) integers, equal where two captions are: such pairs leave the denominator. tile: side of a tile of logits,
    None for a good one; memory beyond inputs and gradients is a few tiles, a few vectors (B,) and one (B, D).
    Returns a scalar in nats, >= 0, differentiable once in image, text and scale. Computed in at least float32.
    """
    groups = _checked(image, text, groups, tile)
    loss: Tensor = _InfoNCE.apply(image, text, _scalar(scale, image), groups, tile or _tile_for(image))
    return loss


def tiled_sigmoid_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    groups: Tensor | None = None,
    tile: int | None = None,
) -> Tensor:
    """`sigmoid_loss(scale * image @ text.T + bias, duplicates(groups))`, arXiv 2303.15343, equation 1, without the matrix.

    As `tiled_info_nce`; differentiable once in bias, too.
    """
    groups = _checked(image, text, groups, tile)
    inputs = image, text, _scalar(scale, image), _scalar(bias, image)
    gradient = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    loss: Tensor = _Sigmoid.apply(*inputs, groups, tile or _tile_for(image), gradient)
    return loss


# -- pieces ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Logits scale * image @ text.T of n pictures (n, D) by m texts (m, D), which come in tiles.

    groups: integers (n,) and (m,): where they are equal the captions are, and the pair is no negative. matching: row i
    belongs to column i (a block on the diagonal of the batch); otherwise no pair of the block does.
    """

    image: Tensor
    text: Tensor
    scale: Tensor
    groups: tuple[Tensor, Tensor] | None
    matching: bool
    tile: int

    @classmethod
    def of_batch(cls, image: Tensor, text: Tensor, scale: Tensor, groups: Tensor | None, tile: int) -> Block:
        """All logits of a batch, in float64 if its features are, else in float32; detached, not copied where it is so."""
        kind = torch.float64 if torch.float64 in (image.dtype, text.dtype) else torch.float32
        image, text, scale = (t.detach().to(kind) for t in (image, text, scale))
        return cls(image, text, scale, None if groups is None else (groups, groups), True, tile)

    def tiles(self) -> Iterator[tuple[slice, slice, Tensor, bool]]:
        """(rows, columns, their logits, whether the tile's diagonal holds the matching pairs); pairs left out are at -inf."""
        scaled = self.image * self.scale
        for rows in _steps(len(self.image), self.tile):
            for columns in _steps(len(self.text), self.tile):
                logits = scaled[rows] @ self.text[columns].T
                diagonal = self.matching and rows == columns
                if self.groups is not None:
                    same = self.groups[0][rows, None] == self.groups[1][None, columns]
                    logits.masked_fill_(same.fill_diagonal_(False) if diagonal else same, -torch.inf)
                yield rows, columns, logits, diagonal

    def carry(self, pull: Tensor, rows: slice, columns: slice, to_image: Tensor | None, to_text: Tensor | None) -> None:
        """Add pull @ text and pull.T @ image to what is collected for these rows and columns."""
        if to_image is not None:
            to_image[rows].addmm_(pull, self.text[columns])
        if to_text is not None:
            to_text[columns].addmm_(pull.T, self.image[rows])


@dataclass(frozen=True)
class LogSumExp:
    """log sum exp of each of n rows that arrive in parts: the largest value `top` (n,), and the `total` (n,) relative to it.

    Kept apart, because top - logit is exact where top + log(total) would round: near 100 float32 steps by 8e-6.
    """

    top: Tensor
    total: Tensor

    @classmethod
    def empty(cls, n: int, like: Tensor) -> LogSumExp:
        return cls(like.new_full((n,), torch.finfo(like.dtype).min), like.new_zeros(n))

    def add(self, where: slice, logits: Tensor, dim: int) -> None:
        """Take in the logits, reduced over `dim`, for the rows `where`. Those at -inf count for nothing."""
        before = self.top[where]
        top = torch.maximum(before, logits.amax(dim))
        total = self.total[where] * (before - top).exp_() + (logits - top.unsqueeze(dim)).exp_().sum(dim)
        self.top[where], self.total[where] = top, total

    def minus(self, chosen: Tensor) -> Tensor:
        """log sum exp - chosen, (n,)."""
        return (self.top - chosen) + self.total.log()

    def softmax(self, where: slice, logits: Tensor, dim: int) -> Tensor:
        """exp(logits - log sum exp) over the rows `where`, a new tensor."""
        return (logits - self.top[where].unsqueeze(dim)).exp_().div_(self.total[where].unsqueeze(dim))


def info_nce_sums(block: Block, by_row: LogSumExp, by_column: LogSumExp, positive: Tensor) -> None:
    """Take the block into the sums of its rows (n,) and of its columns (m,).

    positive: (n,), filled with the logits of the matching pairs where the block has them.
    """
    for rows, columns, logits, diagonal in block.tiles():
        if diagonal:
            positive[rows] = logits.diagonal()
        by_row.add(rows, logits, 1)
        by_column.add(columns, logits, 0)


def info_nce_gradient(
    block: Block, by_row: LogSumExp, by_column: LogSumExp, to_image: Tensor | None, to_text: Tensor | None
) -> None:
    """Add G @ text to `to_image` (n, D) and G.T @ image to `to_text` (m, D).

    G = softmax over rows + softmax over columns - 2 where a pair matches: 2 B times the loss's gradient by the logits.
    """
    for rows, columns, logits, diagonal in block.tiles():
        pull = by_row.softmax(rows, logits, 1).add_(by_column.softmax(columns, logits, 0))
        if diagonal:
            pull.diagonal().sub_(2)
        block.carry(pull, rows, columns, to_image, to_text)


def sigmoid_sums(
    block: Block, bias: Tensor, to_image: Tensor | None, to_text: Tensor | None, gradient: bool = True
) -> tuple[Tensor, Tensor]:
    """The block's losses and, unless `gradient` is false, their derivatives G by the logits, each summed up: two scalars.

    Adds G @ text to `to_image` (n, D) and G.T @ image to `to_text` (m, D).
    """
    exact = torch.float32 if block.image.device.type == "mps" else torch.float64
    loss, slope = torch.zeros(2, dtype=exact, device=block.image.device)
    for rows, columns, logits, diagonal in block.tiles():
        logits += bias
        if diagonal:  # -log sigmoid(z) = softplus(-z) where a pair matches, -log sigmoid(-z) = softplus(z) elsewhere
            logits.diagonal().neg_()
        loss += softplus(logits, threshold=50).sum()  # above it softplus(z) = z, which is off by less than exp(-50)
        if not gradient:
            continue
        pull = logits.sigmoid_()
        if diagonal:
            pull.diagonal().neg_()
        slope += pull.sum()
        block.carry(pull, rows, columns, to_image, to_text)
    return loss, slope


def no_autocast(like: Tensor) -> torch.autocast:
    """Keep products in the type of what is multiplied."""
    return torch.autocast(like.device.type, enabled=False)


def only_once() -> None:
    """Going backward: refuse to be differentiated again, which would silently leave these losses out."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "tiled losses have a first derivative only: with create_graph=True use info_nce or sigmoid_loss of the logits"
        )


def _steps(n: int, tile: int) -> Iterator[slice]:
    return (slice(start, min(start + tile, n)) for start in range(0, n, tile))


def _scalar(value: Tensor | float, like: Tensor) -> Tensor:
    scalar = torch.as_tensor(value, device=like.device)
    if scalar.numel() != 1:
        raise ValueError(f"scale and bias must be scalars, not of shape {tuple(scalar.shape)}")
    return scalar.reshape(())


def _tile_for(image: Tensor) -> int:
    return TILE if image.device.type == "cpu" else LARGE_TILE


def _checked(image: Tensor, text: Tensor, groups: Tensor | None, tile: int | None) -> Tensor | None:
    """The groups, or None where no two are equal. Raises on what does not fit."""
    if image.ndim != 2 or image.shape != text.shape or not len(image):
        raise ValueError(
            f"image and text must both be (B, D), B >= 1, not {tuple(image.shape)} and {tuple(text.shape)}"
        )
    if tile is not None and tile < 1:
        raise ValueError(f"tile={tile}: must be at least 1, or None for a good one")
    if groups is None:
        return None
    if groups.shape != image.shape[:1]:
        raise ValueError(f"groups must be of shape ({len(image)},), not {tuple(groups.shape)}")
    return groups if len(groups.unique()) < len(groups) else None


# -- autograd ----------------------------------------------------------------------------------------------------------


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, groups: Tensor | None, tile: int) -> Tensor:
        block = Block.of_batch(image, text, scale, groups, tile)
        by_row, by_column = (LogSumExp.empty(len(image), block.image) for _ in range(2))
        positive = torch.empty_like(by_row.top)
        with no_autocast(image):
            info_nce_sums(block, by_row, by_column, positive)
        ctx.tile = tile
        sums = by_row.top, by_row.total, by_column.top, by_column.total
        ctx.save_for_backward(image, text, scale, groups, *sums)
        return (by_row.minus(positive).mean() + by_column.minus(positive).mean()) / 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        only_once()
        image, text, scale, groups, *sums = ctx.saved_tensors
        block = Block.of_batch(image, text, scale, groups, ctx.tile)
        to_image, to_text = collectors(block, *ctx.needs_input_grad[:3])
        with no_autocast(image):
            info_nce_gradient(block, LogSumExp(*sums[:2]), LogSumExp(*sums[2:]), to_image, to_text)
        unit = grad / (2 * len(image))
        return *input_gradients(ctx, block, to_image, to_text, unit), None, None


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor,
        groups: Tensor | None,
        tile: int,
        gradient: bool,
    ) -> Tensor:
        block = Block.of_batch(image, text, scale, groups, tile)
        to_image, to_text = collectors(block, *ctx.needs_input_grad[:3]) if gradient else (None, None)
        with no_autocast(image):
            loss, slope = sigmoid_sums(block, bias.detach().to(block.scale.dtype), to_image, to_text, gradient)
        ctx.tile = tile
        ctx.save_for_backward(image, text, scale, bias, to_image, to_text, slope)
        return (loss / len(image)).to(block.image.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        only_once()
        image, text, scale, bias, to_image, to_text, slope = ctx.saved_tensors
        block = Block.of_batch(image, text, scale, None, ctx.tile)
        unit = grad / len(image)
        by_bias = (unit * slope).to(bias.dtype) if ctx.needs_input_grad[3] else None
        return *input_gradients(ctx, block, to_image, to_text, unit), by_bias, None, None, None


def collectors(block: Block, image: bool, text: bool, scale: bool) -> tuple[Tensor | None, Tensor | None]:
    """Zeros to add up G @ text and G.T @ image in, those that are wanted. The scale's gradient is read off either."""
    return (
        torch.zeros_like(block.image) if image or (scale and not text) else None,
        torch.zeros_like(block.text) if text else None,
    )


def input_gradients(
    ctx: Any, block: Block, to_image: Tensor | None, to_text: Tensor | None, unit: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of image, text and scale from what was collected; `unit` is what G = 1 weighs in the final value."""
    image, text, scale = ctx.saved_tensors[:3]
    step = unit * block.scale
    by_scale = None
    if ctx.needs_input_grad[2]:
        inner = block.image * to_image if to_image is not None else block.text * cast(Tensor, to_text)
        by_scale = (unit * inner.sum()).to(scale.dtype)
    return (
        (to_image * step).to(image.dtype) if to_image is not None and ctx.needs_input_grad[0] else None,
        (to_text * step).to(text.dtype) if to_text is not None else None,
        by_scale,
    )
