"""Several processes, one model: equal weights at the start, gradients averaged before each update, decisions taken together.

The gradients are averaged here, once per update, and not by DistributedDataParallel: that one wants each parameter to be used
exactly once per backward pass, and says so late, while frozen towers, chunked batches (`ecliptic.core.grad_cache`), accumulated
batches and objectives with parameters of their own use them never, or often. With one process nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ecliptic.core.distributed import rank, world_size

BUCKET = 25 << 20  # bytes sent at a time; DistributedDataParallel's default


def part_of(count: int) -> slice:
    """Which of the `count` rows of the whole batch are this process's. ValueError if they cannot be divided evenly."""
    size, left = divmod(count, world_size())
    if left:
        raise ValueError(
            f"batch_size={count} cannot be divided evenly over {world_size()} processes: choose a multiple of {world_size()}"
        )
    return slice(rank() * size, (rank() + 1) * size)


def same_start(module: nn.Module) -> None:
    """Give every process the main one's parameters and buffers."""
    if world_size() > 1:
        with torch.no_grad():
            for value in (*module.parameters(), *module.buffers()):
                sent = value.detach().contiguous()
                dist.broadcast(sent, 0)
                value.copy_(sent)


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes, the same bits in all of them.

    A parameter without a gradient here but with one elsewhere counts as zero here. One that no process used keeps None, so
    that the optimiser passes it over (momentum, decay) as it would with one process.
    """
    if world_size() == 1 or not parameters:
        return
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    dist.all_reduce(used, dist.ReduceOp.MAX)
    wanted = [p for p, use in zip(parameters, used.tolist(), strict=True) if use]
    for bucket in _buckets(wanted):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= world_size()
        for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = part.view_as(parameter).clone()


def average(values: Tensor) -> Tensor:
    """The mean of the tensor over the processes, the same in all of them."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
        values /= world_size()
    return values


def anybody(flag: bool, device: torch.device) -> bool:
    """Whether any process says yes. All must ask."""
    if world_size() == 1:
        return flag
    asked = torch.tensor(int(flag), dtype=torch.int32, device=device)
    dist.all_reduce(asked, dist.ReduceOp.MAX)
    return bool(asked.item())


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Runs of parameters of one dtype, each up to `BUCKET` bytes."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and (size >= BUCKET or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel() * parameter.element_size()
    if bucket:
        yield bucket
