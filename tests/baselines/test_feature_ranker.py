"""Ridge regression against its closed form, with the penalty that leaving one out finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from ecliptic.baselines.feature_ranker import FeatureRanker
from ecliptic.eval.ranking import spearman
from tests.towers import clip_encoder


def drawn(n=40, d=12, noise=0.1, seed=0):
    random = np.random.default_rng(seed)
    x = normalize(torch.from_numpy(random.normal(size=(n, d))), dim=-1).float()
    y = x.double() @ torch.from_numpy(random.normal(size=d)) + noise * torch.from_numpy(random.normal(size=n))
    return x, 5 + 10 * y


def closed_form(x, y, penalty):
    """Centred normal equations, float64."""
    a, b = x.double().numpy(), y.numpy()
    c = a - a.mean(0)
    w = np.linalg.solve(c.T @ c + penalty * np.eye(a.shape[1]), c.T @ (b - b.mean()))
    return w, b.mean() - a.mean(0) @ w


def test_it_is_ridge_with_the_penalty_that_leaving_one_out_finds():
    x, y = drawn(noise=0.5)
    judge = FeatureRanker(penalties=(0.01, 0.3, 10.0)).fit_features(x, y)
    errors = {}
    for penalty in judge.penalties:
        total = 0.0
        for i in range(len(x)):
            rest = [j for j in range(len(x)) if j != i]
            w, b = closed_form(x[rest], y[rest], penalty)
            total += (x[i].double().numpy() @ w + b - y[i].item()) ** 2
        errors[penalty] = total
    assert judge.penalty_ == min(errors, key=errors.get)
    w, b = closed_form(x, y, judge.penalty_)
    said = judge.predict_features(x)
    assert said.scores.shape == (40, 1)
    assert said.classes == ("value",)
    np.testing.assert_allclose(said.scores[:, 0].numpy(), x.numpy() @ w + b, rtol=1e-4)


def test_it_orders_what_it_has_not_seen():
    x, y = drawn(80)
    judge = FeatureRanker().fit_features(x[:60], y[:60])
    assert spearman(judge.quantity(x[60:]).numpy(), y[60:].numpy()) > 0.9


def test_what_it_refuses():
    encoder, (judge, records) = clip_encoder(), FeatureRanker.tiny()
    for broken, why in (
        ([{**records[0], "value": None}, *records[1:]], r"'tiny-0' has no value"),
        ([{**records[0], "value": "many"}, *records[1:]], r"'tiny-0': the value 'many' is no number"),
        ([{**record, "value": 1} for record in records], "no two different values"),
    ):
        with pytest.raises(ValueError, match=why):
            judge.fit(encoder, broken)
    with pytest.raises(ValueError, match="penalties"):
        FeatureRanker(penalties=()).fit(encoder, records)
    with pytest.raises(ValueError, match="learnt nothing yet"):
        FeatureRanker().predict_features(torch.zeros(1, 24))
    judge.fit(encoder, records)
    with pytest.raises(ValueError, match=r"must be \(B, 24\)"):
        judge.predict_features(torch.zeros(1, 7))
