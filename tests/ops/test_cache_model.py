"""Tip-Adapter against loops."""

import math

import torch
from torch import tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from ecliptic.ops.cache_model import cache_keys, search_tip_adapter, tip_adapter_logits


def unit(*shape, seed=0):
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def test_logits_by_loops():
    f, keys, labels = unit(5, 8), unit(6, 8, seed=1), tensor([0, 1, 2, 0, 1, 2])
    zero_shot = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    slow = zero_shot.clone()
    for i in range(5):
        for j in range(6):
            slow[i, labels[j]] += 1.7 * math.exp(-2.5 * (1 - float(f[i] @ keys[j])))
    assert_close(tip_adapter_logits(zero_shot, f, keys, labels, alpha=1.7, beta=2.5), slow)


def test_alpha_zero_is_zero_shot():
    zero_shot = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    f = unit(4, 3).float()
    assert torch.equal(tip_adapter_logits(zero_shot, f, f, tensor([0, 1, 0, 1]), alpha=0.0), zero_shot)


def test_a_shot_votes_for_itself_with_full_weight():
    key = unit(1, 4)
    assert_close(
        tip_adapter_logits(torch.zeros(1, 2).double(), key, key, tensor([1]), alpha=3.0, beta=9.0),
        tensor([[0.0, 3.0]], dtype=torch.float64),
    )


def test_keys_are_the_unit_mean_of_the_views():
    views = unit(3, 2, 4)
    for m in range(2):
        mean = sum(views[v, m] for v in range(3)) / 3
        assert_close(cache_keys(views)[m], mean / mean.norm())


def test_search_is_exhaustive_and_prefers_the_first_best():
    f, keys = unit(40, 6), unit(9, 6, seed=1)
    labels, truth = torch.arange(9) % 3, torch.arange(40) % 3
    zero_shot = 3 * torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    alphas, betas = (0.1, 1.0, 10.0), (0.5, 2.0, 8.0)
    found = search_tip_adapter(zero_shot, f, truth, keys, labels, alphas, betas)
    every = {
        (b, a): float((tip_adapter_logits(zero_shot, f, keys, labels, a, b).argmax(-1) == truth).double().mean())
        for b in betas
        for a in alphas
    }
    best = max(every.values())
    assert found.accuracy == best
    assert (found.beta, found.alpha) == next(k for k, v in every.items() if v == best)
    same = search_tip_adapter(torch.zeros(4, 2), torch.eye(4), tensor([0, 0, 0, 0]), torch.eye(4), tensor([0, 0, 1, 1]))
    assert (same.alpha, same.beta) == (0.1, 0.1)
