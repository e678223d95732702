"""Tip-Adapter as a predictor: its equation, its keys, its weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from ecliptic.baselines.tip_adapter import TipAdapter
from ecliptic.baselines.zero_shot import ZeroShot
from ecliptic.data.shots import encode_views, tiny_records
from ecliptic.ops.cache_model import ALPHAS, BETAS, search_tip_adapter, tip_adapter_logits
from tests.baselines.clouds import clouds, rows
from tests.towers import FAMILIES, clip_encoder


def test_scores_by_loops():
    features, labels, text = clouds(4, 3)
    views = torch.stack([features, rows(12, 12, seed=7)])
    judge = TipAdapter(alpha=1.7, beta=2.5).fit_features(features, labels, text, views=views, scale=20.0)
    test = rows(5, 12, seed=8)
    for i, f in enumerate(test.double()):
        logits = [20 * float(f @ t) for t in text.double()]
        for j in range(12):
            key = sum(view[j].double() for view in views) / 2
            logits[labels[j]] += 1.7 * math.exp(-2.5 * (1 - float(f @ key / key.norm())))
        assert_close(
            judge.predict_features(test).scores[i].double(), torch.tensor(logits).double(), rtol=1e-5, atol=1e-5
        )
    assert judge.trained_parameters_ == 0


def test_it_is_the_cache_model_with_the_weights_its_search_finds():
    features, labels, text = clouds(4, 3, noise=0.5)
    held, truth, _ = clouds(4, 15, noise=0.5, seed=1)
    judge = TipAdapter().fit_features(features, labels, text, validation=(held, truth), scale=10.0)
    found = search_tip_adapter(10.0 * held @ text.T, held, truth, features, labels)
    assert judge.validation_accuracy_ == found.accuracy
    assert (judge.alpha_, judge.beta_) == (found.alpha, found.beta)
    wanted = tip_adapter_logits(10.0 * held @ text.T, held, features, labels, found.alpha, found.beta)
    assert torch.equal(judge.predict_features(held).scores, wanted)


def test_cross_validated_weights_trust_shots_as_far_as_they_generalise():
    features, labels, text = clouds(4, 8, noise=0.3)
    wrong = text.roll(1, 0)  # texts that mislead: votes must outweigh them
    judge = TipAdapter().fit_features(features, labels, wrong, scale=10.0)
    assert judge.validation_accuracy_ > 0.8
    noise = TipAdapter().fit_features(rows(32, 12, seed=5), labels, wrong, scale=10.0)
    assert noise.validation_accuracy_ < 0.6  # no shot recognises itself
    assert judge.alpha_ in ALPHAS
    assert judge.beta_ in BETAS


def test_one_shot_has_nothing_to_validate_on():
    judge = TipAdapter().fit_features(*clouds(4, 1))
    assert (judge.alpha_, judge.beta_, judge.validation_accuracy_) == (1.17, 1.0, None)
    assert TipAdapter(beta=7.0).fit_features(*clouds(4, 1)).beta_ == 7.0


@pytest.mark.parametrize("family", FAMILIES)
def test_without_votes_it_is_zero_shot(family):
    encoder, records = FAMILIES[family](), tiny_records()
    pixels = encoder.preprocess([record["image"] for record in records])
    judge = TipAdapter(alpha=0.0, views=0).fit(encoder, records)
    wanted = ZeroShot().fit(encoder, records).predict(pixels)
    assert_close(judge.predict(pixels).scores, wanted.scores)
    assert judge.predict(pixels).labels == wanted.labels


def test_fit_is_fit_features_on_encoded_pictures():
    encoder, records = clip_encoder(), tiny_records()
    judge = TipAdapter(views=3, seed=2).fit(encoder, records[:9], validation=records[9:])
    plain, views = encode_views(encoder, records, 3, seed=2)
    assert_close(judge.image_keys_, torch.nn.functional.normalize(views[:, :9].mean(0), dim=-1))
    assert judge.classes_ == ("blue", "green", "red")
    assert judge.validation_accuracy_ == sum(
        said == r["label"] for said, r in zip(judge.predict_features(plain[9:]).labels, records[9:])
    ) / len(records[9:])


def test_what_is_wrong_is_said_before_any_picture_is_opened():
    records = [{"image": "nowhere.png", "label": name} for name in "xy"]
    for judge, message in [
        (TipAdapter(alpha=-1.0), "alpha=-1.0"),
        (TipAdapter(beta=-1.0), "beta=-1.0"),
        (TipAdapter(templates="fotos"), "no template set"),
        (TipAdapter(classes=("x",)), "one class only"),
        (TipAdapter(views=-1), "views must be 0 or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            judge.fit(None, records)
    features, labels, text = clouds(4, 3)
    with pytest.raises(ValueError, match="no pictures of '3'"):
        TipAdapter().fit_features(features, labels % 3, text)
