"""Oracles are slow loops written from the definitions, values by hand, or scikit-learn."""

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, roc_auc_score
from sklearn.metrics import confusion_matrix as sk_confusion

from ecliptic.eval import metrics as m


def slow_recall(similarity, query_group, gallery_group, k):
    """Mean over every order of the gallery that sorts by similarity, ties in each possible order."""
    hits = []
    for row, group in zip(similarity, query_group, strict=True):
        orders = [
            o
            for o in itertools.permutations(range(len(row)))
            if all(row[a] >= row[b] for a, b in itertools.pairwise(o))
        ]
        hits.append(np.mean([any(gallery_group[i] == group for i in o[:k]) for o in orders]))
    return np.array(hits)


def slow_rank(similarity, query_group, gallery_group):
    out = []
    for row, group in zip(similarity, query_group, strict=True):
        orders = [
            o
            for o in itertools.permutations(range(len(row)))
            if all(row[a] >= row[b] for a, b in itertools.pairwise(o))
        ]
        out.append(np.mean([1 + min(p for p, i in enumerate(o) if gallery_group[i] == group) for o in orders]))
    return np.array(out)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("seed", range(4))
def test_recall_with_ties_and_several_captions_is_the_mean_over_all_orders(seed, k):
    rng = np.random.default_rng(seed)
    owner = np.array([0, 0, 1, 2, 2, 2])
    s = rng.integers(0, 3, (3, 6)).astype(float)  # few values: many ties
    pictures = np.arange(3)
    np.testing.assert_allclose(m.recall_hits(m.ranks(s, pictures, owner), k), slow_recall(s, pictures, owner, k))
    np.testing.assert_allclose(m.recall_hits(m.ranks(s.T, owner, pictures), k), slow_recall(s.T, owner, pictures, k))
    np.testing.assert_allclose(m.expected_rank(m.ranks(s, pictures, owner)), slow_rank(s, pictures, owner))


def test_recall_both_ways_by_hand():
    # two pictures, three captions: caption 0 and 1 belong to picture 0, caption 2 to picture 1
    s = np.array([[0.9, 0.1, 0.8], [0.2, 0.3, 0.7]])
    got = m.recall_at_k(s, [0, 0, 1], ks=(1, 2))
    assert got == {
        "text_to_image.recall@1": pytest.approx(1 / 3),  # caption 0 finds it; caption 1 and 2 rank the other first
        "text_to_image.recall@2": 1.0,
        "image_to_text.recall@1": 1.0,
        "image_to_text.recall@2": 1.0,
    }


def test_a_model_that_scores_everything_alike_gets_chance():
    got = m.recall_at_k(np.zeros((20, 20)), ks=(1, 5))
    assert got["text_to_image.recall@1"] == pytest.approx(1 / 20)
    assert got["image_to_text.recall@5"] == pytest.approx(5 / 20)
    assert m.accuracy(np.zeros((7, 4)), [0, 1, 2, 3, 0, 1, 2]) == pytest.approx(1 / 4)


def test_queries_without_a_right_item_and_bad_shapes_are_errors():
    with pytest.raises(ValueError, match="query 1 has no right item"):
        m.ranks(np.eye(2), [0, 1], [0, 0])
    with pytest.raises(ValueError, match="groups"):
        m.ranks(np.eye(2), [0, 1, 2], [0, 1])
    with pytest.raises(ValueError, match="NaN"):
        m.ranks(np.array([[np.nan]]))
    with pytest.raises(ValueError, match="k must be"):
        m.recall_hits(m.ranks(np.eye(2)), 0)
    with pytest.raises(ValueError, match=r"0\.\.1"):
        m.accuracy(np.eye(2), [0, 2])


def test_top_k_and_per_class_by_hand():
    scores = np.array([[3.0, 2, 1], [1, 2, 3], [2, 3, 1], [1, 1, 0]])
    truth = [0, 0, 0, 1]
    np.testing.assert_allclose(m.top_k_hits(scores, truth, 1), [1, 0, 0, 0.5])
    np.testing.assert_allclose(m.top_k_hits(scores, truth, 2), [1, 0, 1, 1])
    np.testing.assert_allclose(m.top_k_hits(scores, truth, 5), [1, 1, 1, 1])
    np.testing.assert_allclose(m.per_class_accuracy([1, 0, 0, 0.5], truth, 3), [1 / 3, 0.5, np.nan])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40))
def test_confusion_is_sklearns(pairs):
    truth, answer = map(list, zip(*pairs, strict=True))
    np.testing.assert_array_equal(m.confusion_matrix(truth, answer, 5), sk_confusion(truth, answer, labels=range(5)))


def test_confusion_refuses_indices_outside():
    with pytest.raises(ValueError, match=r"0\.\.2"):
        m.confusion_matrix([0, 3], [0, 0], 3)


def slow_ece(confidence, correct, bins):
    total = 0.0
    for b in range(bins):
        low, high = b / bins, (b + 1) / bins
        inside = [
            i for i, c in enumerate(confidence) if (low < c or (b == 0 and c == 0)) and (c <= high or b == bins - 1)
        ]
        if inside:
            acc = sum(correct[i] for i in inside) / len(inside)
            conf = sum(confidence[i] for i in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(acc - conf)
    return total


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_is_the_loop_of_the_paper(bins):
    rng = np.random.default_rng(1)
    confidence, correct = rng.random(300), rng.random(300) < 0.6
    assert m.calibration_error(confidence, correct, bins) == pytest.approx(slow_ece(confidence, correct, bins))


def test_calibration_error_by_hand():
    # bin (0.533, 0.6]: two pictures at 0.6, one right: gap 0.1. bin (0.933, 1]: two at 1.0, one right: gap 0.5
    assert m.calibration_error([0.6, 0.6, 1.0, 1.0], [1, 0, 1, 0]) == pytest.approx(0.3)
    assert m.reliability([0.5], [1], bins=2).pictures.tolist() == [1, 0]  # the upper edge belongs to the bin below it
    with pytest.raises(ValueError, match="not logits"):
        m.calibration_error([3.0], [1])
    with pytest.raises(ValueError, match="at least one"):
        m.calibration_error([], [])


def test_brier_is_twice_sklearns_for_two_classes_and_two_when_surely_wrong():
    rng = np.random.default_rng(2)
    p, y = rng.random(50), rng.integers(0, 2, 50)
    assert m.brier_score(np.stack([1 - p, p], 1), y) == pytest.approx(2 * brier_score_loss(y, p))
    assert m.brier_score([[1.0, 0, 0]], [2]) == 2.0
    assert m.brier_score([[1.0, 0, 0]], [0]) == 0.0


def test_softmax_survives_large_logits():
    np.testing.assert_allclose(m.softmax([[1000.0, 1000.0 + math.log(3)]]), [[0.25, 0.75]])


@pytest.mark.parametrize("levels", [3, 1000])
def test_auroc_is_sklearns_with_and_without_ties(levels):
    rng = np.random.default_rng(levels)
    scores, positive = rng.integers(0, levels, 200) / levels, rng.random(200) < 0.3
    assert m.auroc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))
    wins = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    assert m.auroc(scores, positive) == pytest.approx(np.mean(wins))
    with pytest.raises(ValueError, match="both kinds"):
        m.auroc(scores, np.ones(200))


def slow_fpr(scores, positive, tpr):
    """Walk down the thresholds, and cross the level on a straight line between two points."""
    last = (0.0, 0.0)
    for threshold in sorted(set(scores), reverse=True):
        point = (np.mean(scores[~positive] >= threshold), np.mean(scores[positive] >= threshold))
        if point[1] >= tpr:
            return last[0] + (point[0] - last[0]) * (tpr - last[1]) / (point[1] - last[1])
        last = point
    raise AssertionError


@pytest.mark.parametrize("levels", [4, 1000])
@pytest.mark.parametrize("tpr", [0.95, 0.5, 1.0])
def test_fpr_is_the_walk_down_the_thresholds(levels, tpr):
    rng = np.random.default_rng(levels)
    scores, positive = rng.integers(0, levels, 203) / levels, rng.random(203) < 0.4
    scores = scores + positive * 2 / levels
    assert m.fpr_at_tpr(scores, positive, tpr) == pytest.approx(slow_fpr(scores, positive, tpr))


def test_fpr_by_hand():
    # Thresholds 3, 2, 1: (fpr, tpr) is (0, 0.5), (0.5, 0.5), (0.5, 1); the last stretch is vertical.
    assert m.fpr_at_tpr([3, 2, 1, 0], [1, 0, 1, 0]) == 0.5
    # One level for all: the diagonal from (0, 0) to (1, 1).
    assert m.fpr_at_tpr([1, 1, 1, 1], [1, 0, 1, 0]) == pytest.approx(0.95)
    # 19 of 20 positives stand above all negatives: reached exactly there, not at the next point.
    assert m.fpr_at_tpr([2] * 19 + [0] + [1] * 5, [1] * 20 + [0] * 5) == 0.0
    with pytest.raises(ValueError, match=r"tpr=0\.0"):
        m.fpr_at_tpr([1, 0], [1, 0], 0.0)
    with pytest.raises(ValueError, match="both kinds"):
        m.fpr_at_tpr([1, 0], [1, 1])


def test_roc_intervals_are_the_loop_over_the_same_draws():
    rng = np.random.default_rng(3)
    positive = np.array([True] * 12 + [False] * 9)
    scores = rng.integers(0, 8, 21) + 2.0 * positive
    draws = np.random.default_rng(7)
    areas, rates = [], []
    mine, other = np.sort(scores[:12])[::-1], np.sort(scores[12:])[::-1]  # the order in which the counts lie
    first, second = draws.integers(0, 12, (50, 12)), draws.integers(0, 9, (50, 9))
    for a, b in zip(first, second, strict=True):
        drawn = np.concatenate([mine[a], other[b]])
        areas.append(roc_auc_score(positive, drawn))
        rates.append(slow_fpr(drawn, positive, 0.95))
    found = m.roc(scores, positive).intervals(resamples=50, seed=7)
    for interval, values in zip(found, (areas, rates), strict=True):
        assert interval == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))
    assert found[0][0] < m.auroc(scores, positive) < found[0][1]


def test_balanced_accuracy_by_hand():
    assert m.balanced_accuracy([1, 1, 0, 0, 0], [1, 1, 1, 0, 0]) == pytest.approx((2 / 3 + 1) / 2)
    assert m.balanced_accuracy([1] * 100, [1] * 99 + [0]) == 0.5  # yes to everything is chance, however many there are
    with pytest.raises(ValueError, match="both kinds"):
        m.balanced_accuracy([1, 0], [1, 1])
    with pytest.raises(ValueError, match="said has 2"):
        m.balanced_accuracy([1, 0], [1, 0, 1])


def test_bootstrap_mean_is_the_loop_over_the_same_draws():
    values = np.random.default_rng(0).random(30)
    rng = np.random.default_rng(5)
    means = [sum(values[i] for i in rng.integers(0, 30, 30)) / 30 for _ in range(200)]
    expected = (np.quantile(means, 0.025), np.quantile(means, 0.975))
    assert m.bootstrap_mean(values, resamples=200, seed=5) == pytest.approx(expected)
    assert m.bootstrap(np.mean, values, resamples=200, seed=5) == pytest.approx(expected)


def test_bootstrap_draws_whole_pictures():
    """Captions of one picture stand and fall together: copying each value ten times must not narrow the interval."""
    values = (np.random.default_rng(0).random(40) < 0.4).astype(float)
    ten, groups = np.repeat(values, 10), np.repeat(np.arange(40), 10)
    assert m.bootstrap_mean(ten, groups) == pytest.approx(m.bootstrap_mean(values))
    low, high = m.bootstrap_mean(ten)
    wide = m.bootstrap_mean(values)
    assert high - low < 0.5 * (wide[1] - wide[0])


def test_bootstrap_over_pictures_with_unequal_captions_is_the_loop():
    values, groups = np.random.default_rng(0).random(20), np.random.default_rng(1).integers(0, 6, 20)
    pictures = [values[groups == g] for g in np.unique(groups)]
    rng = np.random.default_rng(5)
    means = []
    for _ in range(300):
        drawn = [pictures[i] for i in rng.integers(0, len(pictures), len(pictures))]
        means.append(sum(map(sum, drawn)) / sum(map(len, drawn)))
    expected = (np.quantile(means, 0.025), np.quantile(means, 0.975))
    assert m.bootstrap_mean(values, groups, resamples=300, seed=5) == pytest.approx(expected)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        low, high = m.proportion_interval((rng.random(100) < 0.7).astype(float), resamples=300)
        covered += low <= 0.7 <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_interval_is_close_to_the_normal_one_and_depends_on_the_seed_only():
    hits = (np.arange(1000) < 300).astype(float)
    low, high = m.proportion_interval(hits, seed=1)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert (low, high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.004)
    assert (low, high) == m.proportion_interval(hits, seed=1) != m.proportion_interval(hits, seed=0)


def test_ten_of_ten_is_not_certainty():
    low, high = m.proportion_interval(np.ones(10))
    assert (low, high) == (pytest.approx(0.025**0.1), 1.0)  # Clopper and Pearson: 0.692
    assert m.proportion_interval(np.zeros(10)) == (0.0, pytest.approx(1 - 0.025**0.1))
    assert m.proportion_interval(np.ones(20), np.repeat(np.arange(10), 2))[0] == pytest.approx(0.025**0.1)


def test_paired_difference_cancels_what_is_hard_for_both():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=400)
    a, b = hard + 0.05 + 0.01 * rng.normal(size=400), hard
    difference, low, high = m.paired_difference(a, b)
    assert difference == pytest.approx(0.05, abs=0.003)
    assert 0.04 < low < difference < high < 0.06
    assert m.paired_difference(a, a) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="same pictures"):
        m.paired_difference(a, b[:-1])


def test_a_thousand_resamples_of_ten_thousand_pictures_take_less_than_a_second():
    values = np.random.default_rng(0).random(10_000)
    best = math.inf
    for _ in range(3):
        start = time.process_time()
        m.bootstrap_mean(values)
        best = min(best, time.process_time() - start)
    assert best < 1.0, f"{best:.2f} s"
