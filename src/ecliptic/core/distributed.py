"""Several processes, one batch: who am I, and features gathered so that each process sees the whole batch with its gradient.

The convention, for everything here: every process computes the loss of the *whole* batch, and the gradient that reaches its own
rows is the sum over processes of their gradients, which for W equal losses is W times that of one process. Averaging the
parameters' gradients over processes, as DistributedDataParallel does, takes the W out again. So the update is the one that a
single process would make on the whole batch; parameters that the loss uses directly (the temperature) have its gradient in
every process, and averaging leaves it alone. Where the losses differ, say by dropout, it is the gradient of their mean.

Without an initialised `torch.distributed` there is one process, and nothing is copied.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ecliptic.core.contracts import Features, Views


def rank() -> int:
    """The number of this process, 0 where there is only one."""
    return dist.get_rank() if _several() else 0


def world_size() -> int:
    """How many processes take part, at least 1."""
    return dist.get_world_size() if _several() else 1


def gather(rows: Tensor) -> Tensor:
    """(b, ...) of each process -> (B, ...) of all, in the order of ranks, the same in every process; b may differ.

    Differentiable, by the convention above. Every process must call it, with the same trailing shape and dtype.
    """
    return rows if world_size() == 1 else _gather(rows, [shape[0] for shape in _shapes([rows])[0]])


def gather_views(views: Views) -> Views:
    """The views of one process's part of the batch -> those of the whole batch, the same in every process.

    Gathers `pooled`, `tokens`, `layers`, `mask` and `groups`, in the order of ranks. Captions may be padded to another length
    in each process: the shorter ones get zero tokens, which their mask marks as no words. Groups are numbers of the caption
    alone (`ecliptic.core.batches.collate`), so they need no renumbering. The scale, the bias, and whatever else an objective
    hung on its views stay this process's own.
    """
    if world_size() == 1:
        return views
    whole = copy.copy(views)  # of its own class, with its own attributes
    whole.update({name: _gather_features(name, features) for name, features in views.items()})
    whole.groups = None if views.groups is None else gather(views.groups)
    return whole


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()


def _gather_features(name: str, features: Features) -> Features:
    found = {"pooled": features.pooled, "tokens": features.tokens, "mask": features.mask}
    parts = {key: part for key, part in found.items() if part is not None} | dict(features.layers)
    shapes = _shapes(list(parts.values()))
    if features.mask is None and any(len({length for _, length in shape}) > 1 for shape in shapes):
        raise ValueError(
            f"the {name!r} views of the processes differ in length and have no mask, so they cannot be gathered: "
            "pad them to one length, or give Features a mask"
        )
    whole = {key: _gather_padded(part, shape) for (key, part), shape in zip(parts.items(), shapes, strict=True)}
    layers = {depth: whole[depth] for depth in features.layers}
    return replace(features, pooled=whole["pooled"], tokens=whole.get("tokens"), mask=whole.get("mask"), layers=layers)


def _shapes(parts: Sequence[Tensor]) -> list[list[tuple[int, int]]]:
    """For each tensor its (rows, length) in every process. Only sequences (B, N, D) and masks (B, N) have a length."""
    own = [number for part in parts for number in (len(part), part.shape[1] if _is_sequence(part) else 0)]
    sent = torch.tensor(own, dtype=torch.int64, device=parts[0].device)
    received = [torch.empty_like(sent) for _ in range(world_size())]
    dist.all_gather(received, sent)
    by_rank = [list(zip(numbers[::2], numbers[1::2], strict=True)) for numbers in (r.tolist() for r in received)]
    return [list(column) for column in zip(*by_rank, strict=True)]


def _is_sequence(part: Tensor) -> bool:
    return part.ndim > 2 or (part.ndim == 2 and part.dtype == torch.bool)


def _gather_padded(part: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
    if missing := max(length for _, length in shapes) - shapes[rank()][1]:
        part = F.pad(part, (0,) * 2 * (part.ndim - 2) + (0, missing))
    return _gather(part, [rows for rows, _ in shapes])


def _gather(part: Tensor, rows: list[int]) -> Tensor:
    if part.dtype == torch.bool:  # not every backend sends it
        return _gather(part.to(torch.uint8), rows).bool()
    gathered: Tensor = _Gather.apply(part, rows)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, rows: list[int]) -> Tensor:
        ctx.rows = rows
        most = max(rows)
        sent = own.new_zeros(most, *own.shape[1:])
        sent[: len(own)] = own
        received = [torch.empty_like(sent) for _ in rows]
        dist.all_gather(received, sent)
        return torch.cat([part[:n] for part, n in zip(received, rows, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        total = torch.empty(grad.shape, dtype=wide, device=grad.device).copy_(grad)
        dist.all_reduce(total)
        return total.split(ctx.rows)[rank()].to(grad.dtype), None
