"""The plain contrastive losses of a batch that lies in several processes, without any of them ever holding all of it.

Each process keeps its pictures; the texts travel round a ring with what belongs to them, and after a full turn are home again:
forward the sums of their columns (InfoNCE) or their gradients (sigmoid), backward their gradients. So a process works on one
block of logits at a time, (b, b) in tiles, and memory grows with b rows and not with the B of all; features cross the network
once or twice. Values and gradients are those of one process on the whole batch, by the convention of
`ecliptic.core.distributed`. After Inf-CL's ring (arXiv 2410.17243, section 3.3), with both directions of InfoNCE in one turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ecliptic.core.distributed import rank, world_size
from ecliptic.ops.tiled_contrastive import (
    LARGE_TILE,
    TILE,
    Block,
    LogSumExp,
    collectors,
    info_nce_gradient,
    info_nce_sums,
    input_gradients,
    no_autocast,
    only_once,
    sigmoid_sums,
)


def ring_info_nce(
    image: Tensor, text: Tensor, scale: Tensor, groups: Tensor | None = None, tile: int | None = None
) -> Tensor:
    """InfoNCE of the batch of all processes from this one's rows: `tiled_info_nce` on everything, in every process.

    image, text: (b, D) in each process, b the same in all. groups: (b,) int64, or None in all of them.
    Returns a scalar in nats, the same in every process. All must call it, and all go backward.
    """
    _check(image, text, groups)
    loss: Tensor = _RingInfoNCE.apply(image, text, scale, groups, tile or _tile_for(image))
    return loss


def ring_sigmoid_loss(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, groups: Tensor | None = None, tile: int | None = None
) -> Tensor:
    """The pairwise sigmoid loss of the batch of all processes from this one's rows; as `ring_info_nce`."""
    _check(image, text, groups)
    gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (image, text, scale, bias))
    loss: Tensor = _RingSigmoid.apply(image, text, scale, bias, groups, tile or _tile_for(image), gradient)
    return loss


def turns(travelling: list[Tensor], homecoming: int) -> Iterator[bool]:
    """Yield once for each process's share of the texts, own ones first, true for them; `travelling` is replaced in between.

    What is added to the last `homecoming` of the travelling tensors on the way is back at its owner afterwards.
    """
    for turn in range(world_size()):
        yield turn == 0
        home = turn == world_size() - 1  # the features themselves need not come home
        moving = travelling[len(travelling) - homecoming :] if home else travelling
        travelling[len(travelling) - len(moving) :] = _shift(moving)


def _shift(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Send to the next process what the previous one sends here."""
    if world_size() == 1 or not tensors:
        return list(tensors)
    after, before = (rank() + 1) % world_size(), (rank() - 1) % world_size()
    sent = [tensor.contiguous() for tensor in tensors]
    received = [torch.empty_like(tensor) for tensor in sent]
    moves = [dist.P2POp(dist.isend, tensor, after) for tensor in sent]
    moves += [dist.P2POp(dist.irecv, tensor, before) for tensor in received]
    for work in dist.batch_isend_irecv(moves):
        work.wait()
    return received


def _sum(value: Tensor) -> Tensor:
    """The sum over processes."""
    value = value.clone()
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def _check(image: Tensor, text: Tensor, groups: Tensor | None) -> None:
    if image.ndim != 2 or image.shape != text.shape or not len(image):
        raise ValueError(
            f"image and text must both be (b, D), b >= 1, not {tuple(image.shape)} and {tuple(text.shape)}"
        )
    if groups is not None and groups.shape != image.shape[:1]:
        raise ValueError(f"groups must be of shape ({len(image)},), not {tuple(groups.shape)}")
    if world_size() > 1:
        own = torch.tensor([*image.shape, groups is not None], device=image.device)
        smallest, largest = own.clone(), own.clone()
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        if not torch.equal(smallest, largest):
            raise ValueError(
                f"(rows, dimensions, groups or not) must be the same in all processes: here {own.tolist()}, "
                f"elsewhere from {smallest.tolist()} to {largest.tolist()}"
            )


def _tile_for(image: Tensor) -> int:
    return TILE if image.device.type == "cpu" else LARGE_TILE


def _block(own: Block, moving: Sequence[Tensor], mine: bool) -> Block:
    """Own pictures by the texts that are here now; `moving` holds them and their groups first."""
    pair = None if own.groups is None else (own.groups[0], moving[1])
    return replace(own, text=moving[0], groups=pair, matching=mine)


def _numbers(own: Block) -> Tensor:
    """The groups to send along, none where there are none."""
    return own.text.new_empty(0, dtype=torch.int64) if own.groups is None else own.groups[1]


def _gradients(
    ctx: Any, own: Block, to_image: Tensor | None, to_text: Tensor | None, unit: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As `input_gradients`; the scale's is a sum over the pictures of all processes."""
    by_image, by_text, by_scale = input_gradients(ctx, own, to_image, to_text, unit)
    return by_image, by_text, None if by_scale is None else _sum(by_scale) / world_size()


class _RingInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, groups: Tensor | None, tile: int) -> Tensor:
        own = Block.of_batch(image, text, scale, groups, tile)
        by_row, by_column = (LogSumExp.empty(len(image), own.image) for _ in range(2))
        positive = torch.empty_like(by_row.top)
        moving = [own.text, _numbers(own), by_column.top, by_column.total]
        with no_autocast(image):
            for mine in turns(moving, homecoming=2):
                info_nce_sums(_block(own, moving, mine), by_row, LogSumExp(*moving[2:]), positive)
        by_column = LogSumExp(*moving[2:])
        ctx.tile, ctx.total = tile, len(image) * world_size()
        ctx.save_for_backward(image, text, scale, groups, by_row.top, by_row.total, *moving[2:])
        return _sum((by_row.minus(positive) + by_column.minus(positive)).sum()) / (2 * ctx.total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        only_once()
        image, text, scale, groups, *sums = ctx.saved_tensors
        own = Block.of_batch(image, text, scale, groups, ctx.tile)
        to_image, to_text = collectors(own, image=True, text=True, scale=True)
        assert to_text is not None
        moving = [own.text, _numbers(own), *sums[2:], to_text]
        with no_autocast(image):
            for mine in turns(moving, homecoming=1):
                block = _block(own, moving, mine)
                info_nce_gradient(block, LogSumExp(*sums[:2]), LogSumExp(*moving[2:4]), to_image, moving[4])
        return *_gradients(ctx, own, to_image, moving[4], _sum(grad) / (2 * ctx.total)), None, None


class _RingSigmoid(torch.autograd.Function):
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
        own = Block.of_batch(image, text, scale, groups, tile)
        to_image, to_text = collectors(own, image=True, text=True, scale=True)
        assert to_text is not None
        moving = [own.text, _numbers(own), to_text]
        parts = []
        with no_autocast(image):
            for mine in turns(moving, homecoming=1):
                block = _block(own, moving, mine)
                parts.append(sigmoid_sums(block, bias.detach().to(own.scale.dtype), to_image, moving[2], gradient))
        loss, slope = (_sum(torch.stack(values).sum()) for values in zip(*parts, strict=True))
        ctx.tile, ctx.total = tile, len(image) * world_size()
        ctx.save_for_backward(image, text, scale, bias, to_image, moving[2], slope)
        return (loss / ctx.total).to(own.image.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        only_once()
        image, text, scale, bias, to_image, to_text, slope = ctx.saved_tensors
        own = Block.of_batch(image, text, scale, None, ctx.tile)
        unit = _sum(grad) / ctx.total
        by_bias = (unit * slope / world_size()).to(bias.dtype) if ctx.needs_input_grad[3] else None
        return *_gradients(ctx, own, to_image, to_text, unit), by_bias, None, None, None
