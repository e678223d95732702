"""Scores of being known, against loops over their definitions, by hand, and by the relations between them."""

import math

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from ecliptic.ops.ood_scores import energy, max_logit, mcm, msp


def logits(rows=5, classes=4):
    return 3 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def slow(row, temperature):
    """(largest softmax probability, T log sum exp) of one row, by loops."""
    parts = [math.exp(x / temperature) for x in row]
    return max(parts) / sum(parts), temperature * math.log(sum(parts))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_against_loops(temperature):
    x = logits()
    expected = tensor([slow(row, temperature) for row in x.tolist()], dtype=torch.float64)
    assert_close(mcm(x, temperature), expected[:, 0])
    assert_close(energy(x, temperature), expected[:, 1])
    assert_close(max_logit(x), tensor([max(row) for row in x.tolist()], dtype=torch.float64))
    if temperature == 1.0:
        assert_close(msp(x), expected[:, 0])


def test_by_hand():
    x = tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    assert_close(msp(x), tensor([0.75, 0.5]))
    assert_close(energy(x), tensor([math.log(4), math.log(2)]))
    assert_close(max_logit(x), tensor([math.log(3), 0.0]))


def test_mcm_at_one_over_scale_is_msp_of_the_logits():
    cosines = logits().tanh()
    assert_close(mcm(cosines, 1 / 50), msp(50 * cosines))


def test_energy_lies_above_the_largest_logit_by_log_k_at_most():
    x = logits(200, 7)
    gap = energy(x) - max_logit(x)
    assert (gap >= 0).all()
    assert (gap <= math.log(7)).all()
    assert_close(energy(x, 1e-3), max_logit(x), atol=0.01, rtol=0)


def test_what_a_shift_of_all_logits_changes():
    x = logits()
    assert_close(msp(x + 5), msp(x))
    assert_close(mcm(x + 5), mcm(x))
    assert_close(energy(x + 5, 2.0), energy(x, 2.0) + 5)
    assert_close(max_logit(x + 5), max_logit(x) + 5)


def test_large_logits_stay_finite():
    x = tensor([[1e4, -1e4], [1e4, 1e4]])
    for score in (msp, max_logit, energy, mcm):
        assert score(x).isfinite().all()


@pytest.mark.parametrize("score", [energy, mcm])
def test_a_temperature_must_be_positive(score):
    with pytest.raises(ValueError, match=r"temperature=0\.0: must be positive"):
        score(logits(), 0.0)
