"""How much a picture looks known, told from where its feature lies among known ones: no classifier is asked.

Every function takes features (N, D) and gives (N,), a negative distance: higher always means more like what is known. As in
`ood_scores` they order pictures and set no threshold. All is computed in float64 and comes out in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_mean(features: Tensor, means: Tensor) -> Tensor:
    """-min_k |f - mu_k|^2, means (K, D): `mahalanobis` with the identity for a precision."""
    return -_squared(features, means).amin(-1)


def mahalanobis(features: Tensor, means: Tensor, precision: Tensor) -> Tensor:
    """-min_k (f - mu_k)' P (f - mu_k), means (K, D), P (D, D) shared by the classes. arXiv 1807.03888, eq. 2."""
    whitened = torch.cat([means.double(), features.double()]) @ _root(precision)
    return nearest_mean(whitened[len(means) :], whitened[: len(means)])


def relative_mahalanobis(
    features: Tensor, means: Tensor, precision: Tensor, mean: Tensor, whole_precision: Tensor
) -> Tensor:
    """`mahalanobis` less the same to one Gaussian of all known features, mean (D,) and whole_precision (D, D).

    What is far from every class and as far from everything says nothing. arXiv 2106.09022, eq. 2.
    """
    return mahalanobis(features, means, precision) - mahalanobis(features, mean[None], whole_precision)


def kth_neighbour(features: Tensor, memory: Tensor, k: int) -> Tensor:
    """-(Euclidean distance to the k-th nearest row of `memory` (M, D)), k from 1. arXiv 2204.06507, eq. 4, for unit rows."""
    if not 1 <= k <= len(memory):
        raise ValueError(f"k={k}: there are {len(memory)} known features, so k lies in 1..{len(memory)}")
    squared = _squared(features, memory).topk(k, dim=-1, largest=False).values[:, -1]
    return -squared.sqrt()


def _squared(x: Tensor, y: Tensor) -> Tensor:
    """(N, D), (M, D) -> (N, M) squared distances, each pair by its difference: exact where both are close."""
    x, y = x.double(), y.double()
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"features must be (N, D) and (M, D) of one width, got {tuple(x.shape)} and {tuple(y.shape)}")
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()


def _root(precision: Tensor) -> Tensor:
    """(D, D) symmetric, positive semi-definite -> R with R R' the same."""
    values, vectors = torch.linalg.eigh(precision.double())
    return vectors * values.clamp(min=0).sqrt()
