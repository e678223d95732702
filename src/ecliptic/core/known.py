"""Known or not: distance scores with the statistics they need, and the threshold that keeps a share of what is known."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ecliptic.ops.gaussian import centred, class_means, precision
from ecliptic.ops.ood_distances import kth_neighbour, mahalanobis, nearest_mean, relative_mahalanobis

UNKNOWN = "unknown"
"""What a refused picture is called."""

DISTANCES = ("nearest_mean", "mahalanobis", "relative_mahalanobis", "knn")
"""Scores that are told from features, see `ops.ood_distances`; higher is more known."""

NEIGHBOUR = 5  # the k of knn; ours. arXiv 2204.06507 takes 50 of 50,000, of which few shots hold nothing


def distance_statistics(features: Tensor, labels: Tensor) -> dict[str, dict[str, Tensor]]:
    """Known features (N, D), labels (N,) in 0..K-1, each with a picture -> what each of `DISTANCES` has to keep, float64.

    Precisions are of "ledoit_wolf", which a few dozen pictures can bear; where all pictures of every class are the same there
    is no covariance, and the identity stands for it.
    """
    features = features.double()
    count = int(labels.max()) + 1
    means = class_means(features, labels, count)
    mean = features.mean(0)
    within = _precision(centred(features, labels, means))
    shared = {"means": means, "precision": within}
    return {
        "nearest_mean": {"means": means},
        "mahalanobis": shared,
        "relative_mahalanobis": {**shared, "mean": mean, "whole_precision": _precision(features - mean)},
        "knn": {"memory": features},
    }


def distances(score: str, features: Tensor, known: dict[str, Tensor]) -> Tensor:
    """Features (B, D) and what `distance_statistics` has for this score -> (B,) float64, higher is more known."""
    if score == "nearest_mean":
        return nearest_mean(features, known["means"])
    if score == "mahalanobis":
        return mahalanobis(features, known["means"], known["precision"])
    if score == "relative_mahalanobis":
        return relative_mahalanobis(features, **known)
    if score == "knn":
        return kth_neighbour(features, known["memory"], min(NEIGHBOUR, len(known["memory"])))
    raise ValueError(f"score={score!r} is none of {', '.join(DISTANCES)}")


def keeping_threshold(scores: Tensor, keep: float) -> float:
    """Scores (N,) of known pictures that were not learnt from -> where to cut, such that a score at the threshold is kept.

    The floor((N + 1)(1 - keep))-th smallest, the bound of split conformal prediction (arXiv 2107.07511, eq. 1): of
    further known pictures at least `keep` are kept on average. With fewer than 1 / (1 - keep) - 1 pictures there is no such
    bound, and the smallest is taken: nothing of what was seen is refused.
    """
    if not len(scores) or not bool(scores.isfinite().all()):
        raise ValueError("the threshold needs known pictures with finite scores")
    rank = max(1, math.floor((len(scores) + 1) * (1 - keep) + 1e-9))
    return float(torch.sort(scores.double()).values[rank - 1])


def _precision(deviations: Tensor) -> Tensor:
    flat = not deviations.square().sum() > 1e-12 * max(len(deviations), 1)
    return precision(deviations, "identity" if flat else "ledoit_wolf").contiguous()
