"""Known or not: statistics against their definitions, and a threshold that keeps what it promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf
from torch.testing import assert_close

from ecliptic.core.known import DISTANCES, distance_statistics, distances, keeping_threshold


def test_statistics_are_those_of_their_definitions():
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 6)
    x = random.normal(size=(18, 4)) + 3 * np.eye(3, 4)[labels]
    known = distance_statistics(torch.from_numpy(x), torch.from_numpy(labels))
    assert set(known) == set(DISTANCES)
    means = np.stack([x[labels == k].mean(0) for k in range(3)])
    within = np.linalg.inv(ledoit_wolf(x - means[labels], assume_centered=True)[0])
    whole = np.linalg.inv(ledoit_wolf(x - x.mean(0), assume_centered=True)[0])
    f = random.normal(size=(5, 4))
    own = np.array([min((g - m) @ within @ (g - m) for m in means) for g in f])
    all_of = np.array([(g - x.mean(0)) @ whole @ (g - x.mean(0)) for g in f])
    fifth = np.array([sorted(np.linalg.norm(x - g, axis=1))[4] for g in f])
    said = {score: distances(score, torch.from_numpy(f), known[score]) for score in DISTANCES}
    assert_close(said["mahalanobis"], torch.from_numpy(-own))
    assert_close(said["relative_mahalanobis"], torch.from_numpy(all_of - own))
    assert_close(said["knn"], torch.from_numpy(-fifth))
    nearest = np.array([min(((g - m) ** 2).sum() for m in means) for g in f])
    assert_close(said["nearest_mean"], torch.from_numpy(-nearest))
    with pytest.raises(ValueError, match="none of nearest_mean"):
        distances("far", torch.from_numpy(f), {})


def test_one_picture_a_class_has_no_covariance():
    known = distance_statistics(torch.eye(3), torch.arange(3))
    f = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    near = distances("nearest_mean", f, known["nearest_mean"])
    assert_close(distances("mahalanobis", f, known["mahalanobis"]), near)
    assert distances("knn", f, known["knn"]).isfinite().all()  # there are fewer than k


def test_the_threshold_by_hand():
    scores = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0])
    assert keeping_threshold(scores, 0.5) == 3.0  # the third smallest: floor(6 * 0.5)
    assert keeping_threshold(scores, 0.8) == 1.0
    assert keeping_threshold(scores, 0.95) == 1.0  # too few for that: nothing seen is refused
    assert keeping_threshold(torch.arange(19.0), 0.95) == 0.0
    assert keeping_threshold(torch.arange(39.0), 0.95) == 1.0
    with pytest.raises(ValueError, match="finite"):
        keeping_threshold(torch.tensor([torch.nan]), 0.9)
    with pytest.raises(ValueError, match="needs known pictures"):
        keeping_threshold(torch.tensor([]), 0.9)


@pytest.mark.parametrize(("n", "keep"), [(39, 0.9), (60, 0.95)])
def test_it_keeps_the_share_it_promises_of_pictures_still_to_come(n, keep):
    random = np.random.default_rng(0)
    kept = []
    for _ in range(600):
        scores = torch.from_numpy(random.normal(size=n + 50))
        kept.append((scores[n:] >= keeping_threshold(scores[:n], keep)).double().mean().item())
    spread = np.std(kept) / len(kept) ** 0.5
    assert keep - 3 * spread <= np.mean(kept) <= keep + 1 / (n + 1) + 3 * spread
