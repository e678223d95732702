"""Tip-Adapter-F: one step by hand, what training is for, and that it changes keys alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from ecliptic.baselines.tip_adapter import TipAdapter
from ecliptic.baselines.tip_adapter_f import TipAdapterF
from ecliptic.data.shots import folds_of, tiny_records
from tests.baselines.clouds import clouds, rows
from tests.towers import FAMILIES


def test_one_step_by_hand():
    """AdamW's first step: the sign of the gradient (eps aside) and the weight decay, at the full rate of a cosine."""
    features, labels, text = clouds(3, 2)
    judge = TipAdapterF(alpha=1.5, beta=2.0, epochs=1, lr=0.01).fit_features(features, labels, text, scale=5.0)
    keys, d = features.double(), 12
    gradient = torch.zeros(6, d, dtype=torch.float64)
    for i, f in enumerate(features.double()):
        votes = [1.5 * math.exp(-2 * (1 - float(f @ key))) for key in keys]
        logits = tensor(
            [5 * float(f @ text[k].double()) + sum(votes[j] for j in range(6) if labels[j] == k) for k in range(3)]
        )
        p = logits.softmax(0)
        for j in range(6):
            error = float(p[labels[j]]) - float(labels[j] == labels[i])
            gradient[j] += error * votes[j] * 2 * f / 6
    step = keys - 0.01 * 0.01 * keys - 0.01 * gradient / (gradient.abs() + 1e-4)
    assert_close(judge.image_keys_.double(), step, rtol=1e-4, atol=1e-5)
    assert judge.trained_parameters_ == 6 * d


def test_it_starts_from_tip_adapter():
    shots, views = clouds(4, 3), rows(5, 12, 12, seed=3)
    one = TipAdapterF(alpha=2.0, beta=3.0, epochs=1, lr=1e-12).fit_features(*shots, views=views)
    two = TipAdapter(alpha=2.0, beta=3.0).fit_features(*shots, views=views)
    assert_close(one.image_keys_, two.image_keys_, rtol=0, atol=1e-6)
    assert_close(one.predict_features(rows(9, 12)).scores, two.predict_features(rows(9, 12)).scores)


def test_training_fits_the_shots():
    features, labels, text = clouds(4, 8, noise=0.6)
    settings = {"alpha": 5.0, "beta": 2.0, "seed": 1}

    def loss(judge):
        scores = judge.predict_features(features).scores
        return float(torch.nn.functional.cross_entropy(scores, labels))

    before = loss(TipAdapter(**settings).fit_features(features, labels, text, scale=5.0))
    after = [loss(TipAdapterF(**settings, epochs=n).fit_features(features, labels, text, scale=5.0)) for n in (20, 200)]
    assert after[1] < after[0] < before


def test_batches_of_an_epoch_see_every_shot_once_and_views_change():
    features, labels, text = clouds(4, 5)
    views = rows(3, 20, 12, seed=4)
    small = TipAdapterF(batch_size=7, epochs=4).fit_features(features, labels, text, views=views)
    start = TipAdapter().fit_features(features, labels, text, views=views)
    assert bool((small.image_keys_ != start.image_keys_).any(-1).all())
    again = TipAdapterF(batch_size=7, epochs=4).fit_features(features, labels, text, views=views)
    assert torch.equal(small.image_keys_, again.image_keys_)
    other = TipAdapterF(batch_size=7, epochs=4, seed=1).fit_features(features, labels, text, views=views)
    assert not torch.equal(small.image_keys_, other.image_keys_)


def test_weights_are_cross_validated_with_keys_trained_without_the_fold():
    _, labels, text = clouds(4, 8)
    noise = rows(32, 12, seed=5)
    judge = TipAdapterF(alpha=20.0, beta=5.0, epochs=50, lr=0.05).fit_features(noise, labels, text, scale=1.0)
    assert float((judge.predict_features(noise).scores.argmax(-1) == labels).double().mean()) > 0.9  # learnt by heart
    assert judge.validation_accuracy_ < 0.6
    held = clouds(4, 6, seed=9)[:2]
    assert TipAdapterF().fit_features(*clouds(4, 8), validation=held).validation_accuracy_ > 0.8
    one = TipAdapterF().fit_features(*clouds(4, 1))
    assert (one.alpha_, one.beta_, one.validation_accuracy_) == (1.17, 1.0, None)


def test_each_fold_has_keys_trained_on_the_other_shots_alone(monkeypatch):
    trained, seen = TipAdapterF._trained, []

    def spy(self, views, labels, *rest):
        seen.append((views, labels))
        return trained(self, views, labels, *rest)

    monkeypatch.setattr(TipAdapterF, "_trained", spy)
    features, labels, text = clouds(4, 4)
    TipAdapterF(folds=2, epochs=1, seed=3).fit_features(features, labels, text)
    fold = folds_of(labels, 2, 3)
    assert [len(some) for _, some in seen] == [16, 8, 8]
    for k in (0, 1):
        assert torch.equal(seen[1 + k][0][0], features[fold != k])
        assert torch.equal(seen[1 + k][1], labels[fold != k])


def test_inputs_and_global_randomness_are_left_alone():
    features, labels, text = clouds(4, 3)
    before, state = features.clone(), torch.random.get_rng_state()
    with torch.inference_mode():
        made = features * 1  # as an encoder in inference mode gives them
    TipAdapterF(epochs=2).fit_features(made, labels, text)
    assert torch.equal(features, before)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("family", FAMILIES)
def test_from_pictures(family):
    encoder, records = FAMILIES[family](), tiny_records()
    judge = TipAdapterF(views=2, epochs=2).fit(encoder, records[:9], validation=records[9:])
    assert judge.image_keys_.shape == (9, encoder.dim)
    assert judge.validation_accuracy_ is not None


def test_what_is_wrong_is_said_before_any_picture_is_opened():
    records = [{"image": "nowhere.png", "label": name} for name in "xy"]
    for judge, message in [
        (TipAdapterF(epochs=0), "epochs=0"),
        (TipAdapterF(batch_size=0), "batch_size=0"),
        (TipAdapterF(lr=0.0), "lr=0.0"),
        (TipAdapterF(alpha=0.0), "nothing to train: use ZeroShot"),
        (TipAdapterF(beta=-2.0), "beta=-2.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            judge.fit(None, records)
