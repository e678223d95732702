"""TIP-X as a predictor: its equation, its relation to Tip-Adapter, where its ranges come from."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from ecliptic.baselines.sus_x import SusX
from ecliptic.baselines.tip_adapter import TipAdapter
from ecliptic.data.shots import encode_views, tiny_records
from ecliptic.ops.support_cache import GRIDS, LABEL_FREE
from tests.baselines.clouds import clouds, rows
from tests.towers import FAMILIES


def test_scores_by_loops_with_ranges_of_the_validation_pictures():
    features, labels, text = clouds(3, 4)
    held, truth, _ = clouds(3, 6, seed=1)
    settings = {"alpha": 1.7, "beta": 2.5, "gamma": 0.8, "temp": 0.4}
    judge = SusX(**settings).fit_features(features, labels, text, validation=(held, truth), scale=20.0)

    def distribution(f):
        values = [math.exp(float(f @ t) / 0.4) for t in text.double()]
        return [v / sum(values) for v in values]

    def kl(f, g):
        return sum(p * math.log(p / q) for p, q in zip(distribution(f), distribution(g)))

    keys, held, test = features.double(), held.double(), rows(5, 12, seed=8).double()
    m, a = [[kl(f, g) for g in keys] for f in held], held @ keys.T
    low, high, least, most = min(map(min, m)), max(map(max, m)), float(a.min()), float(a.max())
    for i, f in enumerate(test):
        logits = [20 * float(f @ t) for t in text.double()]
        for j, g in enumerate(keys):
            psi = -((kl(f, g) - low) / (high - low) * (most - least) + least)
            logits[labels[j]] += 1.7 * math.exp(-2.5 * (1 - float(f @ g))) + 0.8 * psi
        said = judge.predict_features(test.float()).scores[i].double()
        assert_close(said, torch.tensor(logits).double(), rtol=1e-4, atol=1e-4)
    assert judge.trained_parameters_ == 0


def test_without_divergence_it_is_tip_adapter():
    shots, test = clouds(4, 3), rows(9, 12, seed=3)
    for validation in (None, clouds(4, 9, seed=2)[:2]):
        one = SusX(alpha=2.0, beta=7.0, gamma=0.0).fit_features(*shots, validation=validation)
        two = TipAdapter(alpha=2.0, beta=7.0).fit_features(*shots, validation=validation)
        assert torch.equal(one.predict_features(test).scores, two.predict_features(test).scores)


def test_weights_are_those_of_the_grid_and_no_caption_is_mixed_in():
    judge = SusX().fit_features(*clouds(4, 6, noise=0.6), scale=10.0)
    grid = GRIDS["coarse"]
    assert judge.beta_ in grid.betas
    assert judge.alpha_ in grid.alphas
    assert judge.gamma_ in grid.gammas
    assert (judge.delta_, judge.caption_keys_) == (0.0, None)
    one = SusX().fit_features(*clouds(4, 1))
    assert (one.alpha_, one.beta_, one.gamma_, one.delta_) == (*LABEL_FREE[:3], 0.0)


def test_the_divergence_helps_where_pictures_hold_what_the_texts_measure():
    """Keys whose places are random, but whose answers to the texts are not: only the divergence can tell the classes."""
    _, _, text = clouds(3, 1)
    text = torch.linalg.qr(text.T)[0].T  # orthonormal
    labels = torch.arange(3).repeat_interleave(8)

    def around(seed):
        noise = rows(24, 12, seed=seed)
        noise = torch.nn.functional.normalize(noise - noise @ text.T @ text, dim=-1)
        return torch.nn.functional.normalize(
            0.5 * text.roll(1, 0)[labels] + noise, dim=-1
        )  # each class says the next one's text

    f, held, test = around(0), around(1), around(2)
    accuracy = {}
    for gamma in (0.0, None):
        judge = SusX(beta=300.0, gamma=gamma).fit_features(f, labels, text, validation=(held, labels), scale=1.0)
        accuracy[gamma] = float((judge.predict_features(test).scores.argmax(-1) == labels).double().mean())
    assert accuracy[None] > 0.9
    assert accuracy[None] > accuracy[0.0] + 0.2


@pytest.mark.parametrize("family", FAMILIES)
def test_from_pictures(family):
    encoder, records = FAMILIES[family](), tiny_records()
    judge = SusX(views=2).fit(encoder, records)
    plain, views = encode_views(encoder, records, 2)
    labels = torch.tensor([("blue", "green", "red").index(r["label"]) for r in records])
    bias = encoder.bias
    again = SusX(views=2).fit_features(plain, labels, judge.text_, views=views, scale=encoder.scale, logit_bias=bias)
    assert torch.equal(judge.predict_features(plain).scores, again.predict_features(plain).scores)
    assert judge.predict(encoder.preprocess([r["image"] for r in records])).classes == ("blue", "green", "red")


def test_what_is_wrong_is_said_before_any_picture_is_opened():
    records = [{"image": "nowhere.png", "label": name} for name in "xy"]
    for judge, message in [
        (SusX(gamma=-1.0), "gamma=-1.0"),
        (SusX(grid="fine"), "grid='fine'"),
        (SusX(temp=0.0), "temp=0.0"),
        (SusX(templates=()), "no templates"),
    ]:
        with pytest.raises(ValueError, match=message):
            judge.fit(None, records)
