"""Features around class centres, for tests of what learns from features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def rows(*shape: int, seed: int = 0) -> Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def clouds(classes: int, each: int, noise: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, 12), labels (N,), class by class, and texts (K, 12) somewhat beside the centres; unit rows."""
    centres, aside = rows(classes, 12, seed=70), rows(classes, 12, seed=71)
    labels = torch.arange(classes).repeat_interleave(each)
    generator = torch.Generator().manual_seed(seed)
    features = centres[labels] + noise * torch.randn(len(labels), 12, generator=generator)
    return normalize(features, dim=-1), labels, normalize(centres + aside, dim=-1)
