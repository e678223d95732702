"""How many directions a cloud of features uses, from the eigenvalues of its covariance."""

from __future__ import annotations

import torch
from torch import Tensor


def spectrum(features: Tensor) -> Tensor:
    """(N, d) -> the d eigenvalues of the covariance around the mean, largest first, float64, >= 0. N must be at least 2."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must be (N, d) with N >= 2, not {tuple(features.shape)}")
    centred = features.double() - features.double().mean(0)
    return torch.linalg.eigvalsh(centred.T @ centred / (len(features) - 1)).flip(0).clamp(min=0)


def participation_ratio(features: Tensor) -> float:
    """(sum of eigenvalues)^2 / (sum of their squares): k where k directions vary alike and no other does; from 1 to d."""
    values = spectrum(features)
    return float(values.sum().square() / values.square().sum())


def directions_holding(features: Tensor, share: float = 0.99) -> int:
    """The fewest directions that together hold `share` of the variance."""
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: must be above 0 and at most 1")
    values = spectrum(features)
    return int((values.cumsum(0) < share * values.sum() * (1 - 1e-12)).sum()) + 1
