"""Logistic regression on features: the optimum it claims, the strength it chooses."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from ecliptic.baselines.linear_probe import LinearProbe
from ecliptic.data.shots import tiny_records
from tests.towers import FAMILIES


def clouds(classes: int, each: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = normalize(torch.randn(classes, 12, generator=torch.Generator().manual_seed(7)), dim=-1)
    labels = torch.arange(classes).repeat(each)
    return normalize(centres[labels] + noise * torch.randn(len(labels), 12, generator=generator), dim=-1), labels


def test_the_gradient_is_zero_at_what_it_found():
    """The penalised loss sum(CE) + |W|^2 / (2 C), differentiated by autograd in float64."""
    features, labels = clouds(3, 10, 0.3)
    judge = LinearProbe(strength=2.0).fit_features(features, labels)
    weight, bias = judge.weight_.double().requires_grad_(), judge.bias_.double().requires_grad_()
    loss = cross_entropy(features.double() @ weight.T + bias, labels, reduction="sum") + weight.square().sum() / 4
    loss.backward()
    assert float(weight.grad.abs().max()) < 1e-2
    assert float(bias.grad.abs().max()) < 1e-2
    assert judge.trained_parameters_ == 3 * 12 + 3


def test_two_classes_get_two_rows():
    features, labels = clouds(2, 10, 0.3)
    said = LinearProbe().fit_features(features, labels, classes=("cup", "boat")).predict_features(features)
    assert said.scores.shape == (20, 2)
    assert [("cup", "boat").index(label) for label in said.labels] == said.scores.argmax(-1).tolist()
    assert sum(label == ("cup", "boat")[k] for label, k in zip(said.labels, labels.tolist())) >= 19


def test_the_strength_is_chosen_on_pictures_held_out():
    features, labels = clouds(4, 16, 0.5)
    judge = LinearProbe(strengths=(1e-6, 1.0)).fit_features(features, labels)
    # so strong a penalty leaves the priors, which held-out folds turn against
    assert judge.strength_ == 1.0
    test, truth = clouds(4, 50, 0.5, seed=1)
    assert (judge.predict_features(test).scores.argmax(-1) == truth).double().mean() > 0.5
    one = LinearProbe().fit_features(*clouds(4, 1, 0.1))  # nothing to hold out
    assert one.strength_ == LinearProbe().strengths[3]


def test_views_are_further_samples():
    features, labels = clouds(3, 4, 0.3)
    plain = LinearProbe(strength=1.0).fit_features(features, labels)
    twice = LinearProbe(strength=0.5).fit_features(features, labels, views=features[None])
    torch.testing.assert_close(twice.weight_, plain.weight_, rtol=1e-3, atol=1e-3)


def test_what_is_wrong_is_said():
    encoder = FAMILIES["clip"]()
    with pytest.raises(ValueError, match="C must be positive"):
        LinearProbe(strength=0).fit(encoder, tiny_records())
    with pytest.raises(ValueError, match="strengths is empty"):
        LinearProbe(strengths=()).fit(encoder, tiny_records())
    with pytest.raises(ValueError, match="no pictures of 'cup'"):
        LinearProbe(classes=("red", "green", "blue", "cup")).fit(encoder, tiny_records())
