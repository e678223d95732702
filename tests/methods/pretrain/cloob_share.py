"""One process's part of a batch under CLOOB: by itself, because every process of the test has to import it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ecliptic.core.contracts import Features, Views
from ecliptic.core.data_parallel import average
from ecliptic.core.distributed import gather_views, rank, world_size
from ecliptic.methods.pretrain.cloob import Cloob


def shared() -> dict[str, Tensor]:
    """Loss and gradient of one matrix that makes both kinds of feature, from this process's share of eight pairs."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 8, 5, generator=generator, dtype=torch.float64)
    mine = slice(rank() * 8 // world_size(), (rank() + 1) * 8 // world_size())
    weight = torch.eye(5, dtype=torch.float64).requires_grad_()
    own = Views(
        {name: Features(normalize(part[mine] @ weight, dim=-1)) for name, part in (("image", x), ("text", y))},
        torch.tensor(1.0),
    )
    own.groups = torch.tensor([0, 1, 2, 3, 0, 5, 1, 7])[mine]
    loss = torch.stack(list(Cloob().terms(gather_views(own)).values())).sum()
    loss.backward()
    assert weight.grad is not None
    return {"loss": loss.detach(), "gradient": average(weight.grad)}
