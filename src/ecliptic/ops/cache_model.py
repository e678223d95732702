"""Key-value caches over few-shot features: Tip-Adapter (arXiv 2111.03930), the baseline of training-free adaptation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

ALPHAS = tuple(0.1 + 2.495 * i for i in range(21))  # 0.1 to 50, the official search
# 0.1 to 1000. The official search ends at 50; weak encoders crowd their features, and Tip-Adapter then needs sharper votes.
BETAS = tuple(0.1 * 10 ** (i / 10) for i in range(41))


def cache_keys(views: Tensor) -> Tensor:
    """(V, M, d) unit rows, V augmented views of M shots -> (M, d) unit rows: Tip-Adapter averages the views."""
    return normalize(views.mean(0), dim=-1)


def tip_adapter_logits(
    zero_shot: Tensor, features: Tensor, keys: Tensor, labels: Tensor, alpha: float = 1.17, beta: float = 1.0
) -> Tensor:
    """Zero-shot logits (B, K) plus alpha * sum over shots of exp(-beta (1 - f . key)) for the shot's class.

    features (B, d) and keys (M, d) unit rows, labels (M,) int64. alpha = 0 gives `zero_shot` back. Defaults:
    where the official ImageNet configuration starts its search.
    """
    return zero_shot + alpha * _votes(features @ keys.T, labels, zero_shot.shape[1], beta)


class TipChoice(NamedTuple):
    """What the search found: the weights, and their accuracy on the validation set."""

    alpha: float
    beta: float
    accuracy: float


def search_tip_adapter(
    zero_shot: Tensor,
    features: Tensor,
    truth: Tensor,
    keys: Tensor,
    labels: Tensor,
    alphas: Sequence[float] = ALPHAS,
    betas: Sequence[float] = BETAS,
) -> TipChoice:
    """The (alpha, beta) of the highest accuracy on validation logits (B, K), features (B, d) and truth (B,).

    The first best wins, smallest beta first, then smallest alpha.
    """
    best = TipChoice(0.0, 0.0, -1.0)
    affinity = features @ keys.T
    for beta in betas:
        votes = _votes(affinity, labels, zero_shot.shape[1], beta)
        for alpha in alphas:
            accuracy = float(((zero_shot + alpha * votes).argmax(-1) == truth).double().mean())
            if accuracy > best.accuracy:
                best = TipChoice(alpha, beta, accuracy)
    return best


def _votes(affinity: Tensor, labels: Tensor, n_classes: int, beta: float) -> Tensor:
    return torch.exp(-beta * (1 - affinity)) @ one_hot(labels, n_classes).to(affinity)
