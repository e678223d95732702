"""Directions in use, on clouds whose covariance is known."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from ecliptic.ops.spectrum import directions_holding, participation_ratio, spectrum


def cloud(*deviations: float) -> torch.Tensor:
    """Points whose covariance is exactly diagonal, around a mean that is not zero."""
    axes = torch.diag(torch.tensor(deviations, dtype=torch.float64))
    points = torch.cat([axes, -axes])
    return points * ((len(points) - 1) / 2) ** 0.5 + torch.arange(len(deviations))


def test_eigenvalues_largest_first():
    assert_close(spectrum(cloud(1.0, 3.0, 2.0)), torch.tensor([9.0, 4.0, 1.0], dtype=torch.float64))


def test_directions_that_vary_alike_all_count_and_others_do_not():
    assert participation_ratio(cloud(2.0, 2.0, 2.0, 0.0)) == pytest.approx(3)
    assert participation_ratio(cloud(5.0, 0.0, 0.0)) == pytest.approx(1)
    assert participation_ratio(cloud(2.0, 1.0)) == pytest.approx(25 / 17)  # (4 + 1)^2 / (16 + 1)


def test_how_many_hold_a_share():
    points = cloud(3.0, 1.0, 0.1)  # of the variance 0.891, 0.099, 0.001
    assert [directions_holding(points, share) for share in (0.5, 0.95, 0.9995, 1.0)] == [1, 2, 3, 3]
    assert directions_holding(cloud(1.0, 1.0), 0.5) == 1
    with pytest.raises(ValueError, match="share=0"):
        directions_holding(points, 0)


def test_one_point_has_no_spread():
    with pytest.raises(ValueError, match="N >= 2"):
        spectrum(torch.ones(1, 3))
