# ruff: noqa: NPY002  the global generator of numpy is drawn from on purpose
"""A training run small enough to be killed and repeated many times, for the tests of the loop."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ecliptic.core.batches import Order
from ecliptic.core.train import Settings, fit


class Dropped(nn.Module):
    """A model with everything that a checkpoint could forget: dropout, running statistics, a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Linear(4, 16)
            self.norm = nn.BatchNorm1d(16)
            self.drop = nn.Dropout(0.5)
            self.frozen = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.5))
            self.last = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.frozen(self.drop(self.norm(self.first(x)).relu())))


X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, :1] * X[:, 1:2]).contiguous()
LEARNT = r"^(first|norm|last)"


def regression(settings: Settings, **more: Any) -> tuple[Dropped, list[dict[str, Any]]]:
    model, order = Dropped(), Order(64, 16, settings.seed)

    def batches(i: int) -> tuple[Tensor, Tensor]:
        chosen = torch.from_numpy(order(i))
        return X[chosen], Y[chosen]

    def loss(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        more.get("during", lambda: None)()
        noise = torch.randn(1)[0] * 0.01 + float(np.random.rand()) * 0.01 + random.random() * 0.01
        return {"squares": (model(batch[0]) - batch[1]).square().mean(), "noise": noise * model.last.weight.sum()}

    others = {name: value for name, value in more.items() if name != "during"}
    log = fit(model, loss, batches, settings, **{"trainable": LEARNT, **others})
    return model, log
