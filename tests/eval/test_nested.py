"""Nested cross-validation against the textbook's loops, and against a choice among nothing but noise."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from ecliptic.eval.nested import deal, fits, judge


def test_folds_leave_every_class_something_to_learn():
    labels = [0] * 9 + [1] * 3 + [2] * 2 + [3] + [4] * 8
    for folds in (2, 3, 4, 5):
        for seed in range(20):
            fold = deal(labels, folds, seed)
            for left_out in fits(fold):
                kept = Counter(k for k, f in zip(labels, fold) if f not in left_out)
                assert set(kept) == {0, 1, 2, 3, 4}, (folds, seed, left_out)
    fold = deal(labels, 4)
    assert Counter(f for k, f in zip(labels, fold) if k == 3) == {-1: 1}
    assert Counter(f < 0 for k, f in zip(labels, fold) if k == 2) == {True: 1, False: 1}
    sizes = Counter(int(f) for f in fold if f >= 0)
    assert max(sizes.values()) - min(sizes.values()) <= 1
    assert not np.array_equal(fold, deal(labels, 4, seed=1))
    assert np.array_equal(fold, deal(labels, 4))


def test_what_has_to_be_fitted():
    assert fits([0, 1, 2, -1]) == [frozenset(x) for x in ({0}, {1}, {2}, {0, 1}, {0, 2}, {1, 2})]
    assert len(fits(range(4))) == 4 * 5 // 2
    with pytest.raises(ValueError, match="at least two"):
        deal([0, 1], 1)


def learner(noise: float, seed: int):
    """A method whose answers depend on what it has learnt from: (rows learnt) -> probabilities (N, 3)."""

    def answer(truth: np.ndarray, learnt: np.ndarray) -> np.ndarray:
        random = np.random.default_rng([seed, *np.flatnonzero(learnt)])
        return np.eye(3)[truth] + noise * random.random((len(truth), 3))

    return answer


def all_answers(methods, truth, fold):
    return {
        name: {left: method(truth, ~np.isin(fold, list(left))) for left in fits(fold)}
        for name, method in methods.items()
    }


def test_it_is_the_textbooks_two_loops():
    random = np.random.default_rng(0)
    truth = random.integers(0, 3, 60)
    fold = deal(truth, 5)
    methods = {f"m{i}": learner(2.0 + i / 10, i) for i in range(4)}
    found = judge(all_answers(methods, truth, fold), truth, fold)
    for k in range(5):
        scores = {}
        for name, method in methods.items():
            right = 0
            for j in range(5):
                if j == k:
                    continue
                said = method(truth, (fold != k) & (fold != j))
                for i in range(60):
                    right += fold[i] == j and said[i].argmax() == truth[i]
            scores[name] = right
        best = max(scores, key=scores.get)
        assert found.chosen[k] == best
        outer = methods[best](truth, fold != k)
        for i in range(60):
            if fold[i] == k:
                assert np.array_equal(found.probabilities[i], outer[i])
    plain = {
        name: sum(method(truth, fold != fold[i])[i].argmax() == truth[i] for i in range(60))
        for name, method in methods.items()
    }
    assert found.winner == max(plain, key=plain.get)
    assert {name: hits.sum() for name, hits in found.hits.items()} == plain


def test_among_guesses_the_best_looks_good_and_the_honest_figure_does_not():
    """Forty methods that guess one of two classes: the highest of them is far above one half, the procedure is not."""
    best, honest = [], []
    for seed in range(30):
        random = np.random.default_rng(seed)
        truth = random.integers(0, 2, 40)
        fold = deal(truth, 4, seed)
        said = {f"m{i}": random.random((40, 2)) for i in range(40)}
        found = judge({n: dict.fromkeys(fits(fold), p) for n, p in said.items()}, truth, fold)
        best.append(max(hits.mean() for hits in found.hits.values()))
        honest.append((found.probabilities.argmax(1) == truth).mean())
    assert np.mean(best) > 0.62
    assert abs(np.mean(honest) - 0.5) < 0.04


def test_pictures_never_held_out_are_not_judged():
    truth = np.array([0, 0, 0, 1, 1, 1, 2])
    fold = deal(truth, 3)
    found = judge({"a": dict.fromkeys(fits(fold), np.eye(3)[truth])}, truth, fold)
    assert found.judged.tolist() == [0, 1, 2, 3, 4, 5]
    assert np.isnan(found.hits["a"][6])
    assert found.winner == "a"


def test_among_equals_the_first_wins():
    truth = np.array([0, 1] * 4)
    fold = deal(truth, 4)
    right = dict.fromkeys(fits(fold), np.eye(2)[truth])
    assert judge({"cheap": right, "dear": right}, truth, fold).winner == "cheap"
    assert set(judge({"dear": right, "cheap": right}, truth, fold).chosen) == {"dear"}


def test_what_is_wrong_is_said():
    truth = np.array([0, 1] * 4)
    fold = deal(truth, 4)
    with pytest.raises(ValueError, match="no method"):
        judge({}, truth, fold)
    with pytest.raises(ValueError, match="m has not been fitted"):
        judge({"m": {frozenset({0}): np.eye(2)[truth]}}, truth, fold)
    with pytest.raises(ValueError, match="ever held out"):
        judge({"m": {}}, truth, np.full(8, -1))
