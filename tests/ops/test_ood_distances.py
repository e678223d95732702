"""Distances to what is known: by loops, by hand, and the identities between them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ecliptic.ops.ood_distances import kth_neighbour, mahalanobis, nearest_mean, relative_mahalanobis


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_by_hand():
    x, means = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 1.0], [3.0, 0.0]])
    assert_close(nearest_mean(x, means), torch.tensor([-1.0, -16.0], dtype=torch.float64))
    assert_close(kth_neighbour(x, means, 2), torch.tensor([-3.0, -(18**0.5)], dtype=torch.float64))
    stretched = mahalanobis(x, means, torch.diag(torch.tensor([1.0, 0.25])))
    assert_close(stretched, torch.tensor([-0.25, -4.0], dtype=torch.float64))


def test_against_loops():
    x, means, factor, other = drawn(7, 5), drawn(3, 5, seed=1), drawn(5, 5, seed=2), drawn(5, 5, seed=3)
    precision, whole, centre = factor @ factor.T, other @ other.T, drawn(5, seed=4)
    for i, f in enumerate(x.numpy()):
        own = min((f - m) @ precision.numpy() @ (f - m) for m in means.numpy())
        all_of = (f - centre.numpy()) @ whole.numpy() @ (f - centre.numpy())
        assert mahalanobis(x, means, precision)[i].item() == pytest.approx(-own)
        assert relative_mahalanobis(x, means, precision, centre, whole)[i].item() == pytest.approx(-own + all_of)
        near = sorted(float(np.sqrt(((f - m) ** 2).sum())) for m in means.numpy())
        for k in (1, 2, 3):
            assert kth_neighbour(x, means, k)[i].item() == pytest.approx(-near[k - 1])


def test_identities():
    x, means = drawn(6, 4), drawn(5, 4, seed=1)
    assert_close(mahalanobis(x, means, torch.eye(4)), nearest_mean(x, means))
    assert_close(kth_neighbour(x, means, 1).square(), -nearest_mean(x, means))
    assert_close(nearest_mean(means, means), torch.zeros(5, dtype=torch.float64))
    assert_close(mahalanobis(x.float(), means, 4 * torch.eye(4)), 4 * nearest_mean(x.float(), means))


def test_what_cannot_be():
    with pytest.raises(ValueError, match=r"k lies in 1\.\.3"):
        kth_neighbour(drawn(2, 4), drawn(3, 4), 4)
    with pytest.raises(ValueError, match="of one width"):
        nearest_mean(drawn(2, 4), drawn(3, 5))
