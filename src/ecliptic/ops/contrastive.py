"""The plain contrastive losses, and which pairs of a batch are not truly negatives.

All take the (B, B) matrix of logits, images down and texts across, whose diagonal holds the matching pairs. All are in
nats, averaged over the batch, and lower means better matched.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(logits: Tensor, same: Tensor | None = None) -> Tensor:
    """Symmetric cross-entropy over rows and columns: CLIP, arXiv 2103.00020, figure 3.

    logits: (B, B), scale * image @ text.T; a constant added to all of them changes nothing.
    same: (B, B) bool from `duplicates`, or None. True off the diagonal takes the pair out of the denominator: equal captions
        neither attract nor repel each other's pictures. With no duplicates (the identity) it is the plain loss.
    Returns a scalar in nats, >= 0; log B at equal logits. Computed in at least float32.
    """
    logits = _masked(_square(logits), same, -torch.inf)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def sigmoid_loss(logits: Tensor, same: Tensor | None = None) -> Tensor:
    """Each pair its own yes-or-no question: SigLIP, arXiv 2303.15343, equation 1 and algorithm 1.

    logits: (B, B), scale * image @ text.T + bias. same: as in `info_nce`; the pairs it marks off the diagonal are left out of
    the sum, while the divisor stays B, so that without duplicates it is the plain loss.
    Returns a scalar in nats, >= 0: the sum over all pairs divided by B. Computed in at least float32.
    """
    logits = _square(logits)
    sign = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1  # 1 on the diagonal, -1 off it
    return -F.logsigmoid(_masked(sign * logits, same, torch.inf)).sum() / len(logits)


def info_loob(logits: Tensor, same: Tensor | None = None) -> Tensor:
    """One way only, rows to columns, with the positive left out of the denominator: InfoLOOB, arXiv 2110.11316.

    logits: (B, B), B >= 2; rows are anchors. same: as in `info_nce`; a row that it leaves without any negative is left
    out of the sum, while the divisor stays B. Negatives are summed, as in the official code, not averaged.
    Returns a scalar in nats, unbounded below: negative is normal. Its pull on a positive logit is always 1/B. Computed in
    at least float32.
    """
    return leave_one_out(logits, same).sum() / len(logits)


def leave_one_out(logits: Tensor, same: Tensor | None = None) -> Tensor:
    """log sum exp of a row's negatives minus its positive, (n,), for the rows that have any negative, in their order.

    Its mean is InfoLOOB; the softplus of it is InfoNCE of the row: log(e^p + sum e^n) - p = log(1 + e^(log sum e^n - p)).
    """
    logits = _square(logits)
    if len(logits) < 2:
        raise ValueError("leaving one out needs at least two pairs")
    diagonal = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    negatives = _masked(logits, same, -torch.inf).masked_fill(diagonal, -torch.inf)
    rows = ~negatives.isneginf().all(-1)
    return negatives[rows].logsumexp(-1) - logits.diagonal()[rows]


def duplicates(groups: Tensor | Sequence[Hashable]) -> Tensor:
    """(B,) integers, or any B hashable things such as captions -> (B, B) bool, true where two are equal.

    Symmetric, with a true diagonal.
    """
    if not isinstance(groups, Tensor):
        numbers: dict[Hashable, int] = {}
        groups = torch.tensor([numbers.setdefault(group, len(numbers)) for group in groups], dtype=torch.int64)
    if groups.ndim != 1:
        raise ValueError(f"groups must be one-dimensional, not of shape {tuple(groups.shape)}")
    return groups[:, None] == groups[None, :]


def _square(logits: Tensor) -> Tensor:
    if logits.ndim != 2 or logits.shape[0] != logits.shape[1] or not len(logits):
        raise ValueError(f"logits must be a non-empty square matrix (B, B), not of shape {tuple(logits.shape)}")
    return logits if logits.dtype == torch.float64 else logits.float()


def _masked(logits: Tensor, same: Tensor | None, value: float) -> Tensor:
    """Put `value` where `same` is true off the diagonal; the diagonal always stays."""
    if same is None:
        return logits
    if same.shape != logits.shape or same.dtype != torch.bool:
        raise ValueError(f"same must be bool of shape {tuple(logits.shape)}, not {same.dtype} {tuple(same.shape)}")
    diagonal = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    return logits.masked_fill(same & ~diagonal, value)
