"""Nearest neighbours by loops: which k, and which mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from ecliptic.baselines.neighbour_ranker import NeighbourRanker


def test_it_is_the_mean_of_the_nearest_with_the_k_that_leaving_one_out_finds():
    random = np.random.default_rng(0)
    x = normalize(torch.from_numpy(random.normal(size=(30, 3))), dim=-1).float()
    y = 4 * x[:, 0] + torch.from_numpy(random.normal(size=30)).float()
    judge = NeighbourRanker(neighbours=(1, 2, 4, 8)).fit_features(x, y)

    def mean_of(f, rows, k):
        near = sorted(rows, key=lambda i: -float(f @ x[i]))[:k]
        return float(np.mean([y[i] for i in near]))

    errors = {
        k: sum((mean_of(x[i], [j for j in range(30) if j != i], k) - y[i].item()) ** 2 for i in range(30))
        for k in (1, 2, 4, 8)
    }
    assert judge.k_ == min(errors, key=errors.get) > 1
    f = normalize(torch.from_numpy(random.normal(size=(5, 3))), dim=-1).float()
    for i, said in enumerate(judge.predict_features(f).scores[:, 0].tolist()):
        assert said == pytest.approx(mean_of(f[i], range(30), judge.k_), abs=1e-5)


def test_what_it_refuses():
    with pytest.raises(ValueError, match="neighbours"):
        NeighbourRanker(neighbours=(0,)).fit(None, [])
    with pytest.raises(ValueError, match="no neighbours"):
        NeighbourRanker().fit_features(torch.ones(1, 3), torch.ones(1))
