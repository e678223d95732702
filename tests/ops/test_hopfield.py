"""Hopfield retrieval against loops in float64, values by hand, and its two limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from ecliptic.ops.hopfield import retrieve


def rows(n: int, d: int = 5, seed: int = 0) -> Tensor:
    return normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def slow(states: list[list[float]], memory: list[list[float]], beta: float) -> list[list[float]]:
    out = []
    for s in states:
        weights = [math.exp(beta * sum(a * b for a, b in zip(s, m))) for m in memory]
        mixed = [sum(w * m[k] for w, m in zip(weights, memory)) / sum(weights) for k in range(len(s))]
        length = math.sqrt(sum(v * v for v in mixed))
        out.append([v / length for v in mixed])
    return out


@pytest.mark.parametrize("beta", [0.0, 1.0, 14.3])
def test_equals_the_loops(beta):
    states, memory = rows(4), rows(6, seed=1)
    expected = torch.tensor(slow(states.tolist(), memory.tolist(), beta), dtype=torch.float64)
    assert_close(retrieve(states, memory, beta), expected, rtol=1e-12, atol=1e-12)


def test_by_hand():
    # beta = log 3 weighs e1 three times as much as e2, so the answer points along (3, 1)
    found = retrieve(torch.tensor([[1.0, 0.0]]), torch.eye(2), math.log(3))
    assert_close(found, torch.tensor([[3.0, 1.0]]) / math.sqrt(10))


def test_the_mean_and_the_nearest_pattern():
    states, memory = rows(4), rows(6, seed=1)
    mean = normalize(memory.mean(0), dim=0)
    assert_close(retrieve(states, memory, 0.0), mean.expand(4, -1))
    nearest = memory[(states @ memory.T).argmax(1)]
    assert_close(retrieve(states, memory, 1e4), nearest)
    assert_close(retrieve(memory, memory, 1e4), memory, rtol=0, atol=1e-12)  # itself, for distinct patterns


def test_gradients_reach_both():
    states, memory = rows(3).requires_grad_(), rows(4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, m: retrieve(s, m, 3.0), (states, memory))


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="states and memory"):
        retrieve(torch.ones(2, 3), torch.ones(2, 4), 1.0)
    with pytest.raises(ValueError, match="states and memory"):
        retrieve(torch.ones(2, 3), torch.ones(0, 3), 1.0)
    with pytest.raises(ValueError, match="beta=-1"):
        retrieve(torch.ones(2, 3), torch.ones(2, 3), -1.0)
