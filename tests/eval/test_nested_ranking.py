"""Ordering by nested cross-validation: the textbook's loops, and noise that is not flattered."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from ecliptic.eval.nested import fits
from ecliptic.eval.nested_ranking import (
    _share_in_order,
    _srcc,
    deal_values,
    judge_ranking,
    mean_pairwise_accuracy,
    mean_srcc,
    pairwise_interval,
    srcc_difference,
    srcc_interval,
)
from ecliptic.eval.ranking import pairwise_accuracy, spearman


def answers_of(values, fold, signal, seed):
    """Another scale and other noise in every fit."""
    said = {}
    for n, left_out in enumerate(fits(fold)):
        noise = np.random.default_rng([seed, n]).normal(size=len(values))
        said[left_out] = (n + 1) * (signal * (values - values.mean()) / values.std() + noise) - 7 * n
    return said


def test_every_fold_has_small_and_large_values():
    values = np.random.default_rng(0).normal(size=42)
    fold = deal_values(values, 4)
    assert sorted(np.bincount(fold)) == [10, 10, 11, 11]
    assert np.ptp([values[fold == k].mean() for k in range(4)]) < 0.4
    assert np.array_equal(fold, deal_values(values, 4))
    assert not np.array_equal(fold, deal_values(values, 4, seed=1))
    ties = deal_values(np.ones(40), 4)
    assert not np.array_equal(ties, np.sort(ties))
    with pytest.raises(ValueError, match="11 pictures are too few for 4 folds: it takes 12"):
        deal_values(np.arange(11), 4)
    with pytest.raises(ValueError, match="at least three"):
        deal_values(np.arange(11), 2)


def test_it_is_the_textbooks_two_loops():
    values = np.random.default_rng(1).normal(size=60)
    fold = deal_values(values, 4)
    answers = {name: answers_of(values, fold, 0.5, seed) for seed, name in enumerate("abc")}
    found = judge_ranking(answers, values, fold)

    def srcc(said, j):
        return spearmanr(said[fold == j], values[fold == j]).statistic * (fold == j).sum()

    for k in range(4):
        inner = {
            name: sum(srcc(said[frozenset({j, k})], j) for j in range(4) if j != k) for name, said in answers.items()
        }
        assert found.chosen[k] == max(inner, key=inner.get)
        assert np.array_equal(found.honest[fold == k], answers[found.chosen[k]][frozenset({k})][fold == k])
    outer = {name: sum(srcc(said[frozenset({k})], k) for k in range(4)) / 60 for name, said in answers.items()}
    assert found.winner == max(outer, key=outer.get)
    assert mean_srcc(found.scores["a"], values, fold) == pytest.approx(outer["a"])


def test_the_best_of_much_noise_is_not_flattered():
    values, honest, flattering = np.arange(40.0), [], []
    for seed in range(30):
        fold = deal_values(values, 4, seed)
        found = judge_ranking({f"{i}": answers_of(values, fold, 0.0, 50 * seed + i) for i in range(12)}, values, fold)
        honest.append(mean_srcc(found.honest, values, fold))
        flattering.append(mean_srcc(found.scores[found.winner], values, fold))
    assert abs(np.mean(honest)) < 0.08
    assert np.mean(flattering) > 0.15


def test_pairs_by_hand():
    fold = np.array([0, 0, 0, 1, 1, 1])
    values = np.array([1.0, 2, 3, 1, 2, 3])
    scores = np.array([10.0, 30, 20, -3, -2, -1])
    assert mean_pairwise_accuracy(scores, values, fold) == pytest.approx((2 / 3 + 1) / 2)
    assert mean_srcc(scores, values, fold) == pytest.approx((0.5 + 1) / 2)
    assert mean_pairwise_accuracy(scores, np.ones(6), fold) == 0.5


def test_drawing_pictures_often_is_repeating_them():
    random = np.random.default_rng(0)
    scores, values = random.integers(0, 6, 15).astype(float), random.integers(0, 4, 15).astype(float)
    counts = random.multinomial(15, np.full(15, 1 / 15), 20)
    for said, measure in ((_srcc, spearman), (_share_in_order, pairwise_accuracy)):
        found = said(scores, values, counts.astype(float))
        for row, value in zip(counts, found):
            assert value == pytest.approx(measure(np.repeat(scores, row), np.repeat(values, row)))
    assert _srcc(np.ones(3), np.arange(3.0), np.ones((1, 3))) == 0
    assert _share_in_order(np.arange(3.0), np.ones(3), np.ones((1, 3))) == 0.5


def test_intervals_hold_the_value_and_a_difference_is_paired():
    values = np.random.default_rng(2).normal(size=40)
    fold = deal_values(values, 4)
    found = judge_ranking({"a": answers_of(values, fold, 1.0, 0), "b": answers_of(values, fold, 4.0, 1)}, values, fold)
    a, b = found.scores["a"], found.scores["b"]
    low, high = srcc_interval(a, values, fold)
    assert low < mean_srcc(a, values, fold) < high < 1
    low, high = pairwise_interval(a, values, fold)
    assert 0.5 < low < mean_pairwise_accuracy(a, values, fold) < high < 1
    gain, low, high = srcc_difference(b, a, values, fold)
    assert gain == pytest.approx(mean_srcc(b, values, fold) - mean_srcc(a, values, fold))
    assert 0 < low <= gain <= high
    assert srcc_difference(a, a, values, fold) == (0, 0, 0)


def test_what_cannot_be_judged():
    fold = deal_values(np.arange(12.0), 3)
    with pytest.raises(ValueError, match="no method"):
        judge_ranking({}, np.arange(12.0), fold)
    with pytest.raises(ValueError, match="a has not been fitted without every"):
        judge_ranking({"a": {frozenset({0}): np.zeros(12)}}, np.arange(12.0), fold)
