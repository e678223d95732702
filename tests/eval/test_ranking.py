"""Measures of order, against scipy, loops and values by hand."""

import numpy as np
import pytest
from scipy import stats

from ecliptic.eval import ranking as r


def example(seed, n=30, values=5):
    rng = np.random.default_rng(seed)
    v = rng.integers(0, values, n).astype(float)  # ties
    return np.round(v + rng.normal(size=n), 1), v  # some ties among scores, too


@pytest.mark.parametrize("seed", range(5))
def test_correlations_are_scipys(seed):
    s, v = example(seed)
    assert r.pearson(s, v) == pytest.approx(stats.pearsonr(s, v).statistic)
    assert r.spearman(s, v) == pytest.approx(stats.spearmanr(s, v).statistic)


@pytest.mark.parametrize("seed", range(5))
def test_pairs_are_those_of_a_loop(seed):
    s, v = example(seed)
    right = total = 0.0
    for i in range(len(s)):
        for j in range(len(s)):
            if v[i] > v[j]:
                total += 1
                right += 1.0 if s[i] > s[j] else 0.5 if s[i] == s[j] else 0.0
    assert r.pairwise_accuracy(s, v) == pytest.approx(right / total)


def test_by_hand():
    # 1 3 2 against 1 2 3: of the three pairs two are right; ranks differ by 0, 1, 1: 1 - 6 * 2 / (3 * 8) = 0.5
    assert r.pairwise_accuracy([1, 3, 2], [1, 2, 3]) == pytest.approx(2 / 3)
    assert r.spearman([1, 3, 2], [1, 2, 3]) == pytest.approx(0.5)
    assert r.mean_absolute_error([1, 3, 2], [1, 2, 3]) == pytest.approx(2 / 3)


def test_order_alone_counts_but_for_the_error():
    s, v = example(7)
    bent = np.exp(s)
    assert r.spearman(bent, v) == pytest.approx(r.spearman(s, v))
    assert r.pairwise_accuracy(bent, v) == pytest.approx(r.pairwise_accuracy(s, v))
    assert r.pearson(3 * s - 5, v) == pytest.approx(r.pearson(s, v))
    assert r.spearman(-s, v) == pytest.approx(-r.spearman(s, v))
    assert r.pairwise_accuracy(-s, v) == pytest.approx(1 - r.pairwise_accuracy(s, v))
    assert (r.spearman(v, v), r.pairwise_accuracy(v, v), r.mean_absolute_error(v, v)) == (pytest.approx(1), 1, 0)


def test_constant_scores_say_nothing():
    _, v = example(0)
    same = np.full(len(v), 3.0)
    assert (r.pearson(same, v), r.spearman(same, v), r.pairwise_accuracy(same, v)) == (0, 0, 0.5)
    with pytest.raises(ValueError, match="no order"):
        r.pairwise_accuracy(v, same)


def test_report():
    s, v = example(3, n=60)
    report = r.ranking_report(s, v, resamples=200)
    assert report["ranking.srcc"].value == pytest.approx(r.spearman(s, v))
    assert report["ranking.plcc"].value == pytest.approx(r.pearson(s, v))
    assert report["ranking.pairwise_accuracy"].value == pytest.approx(r.pairwise_accuracy(s, v))
    assert report["ranking.mae"].value == pytest.approx(r.mean_absolute_error(s, v))
    assert all(number.low <= number.value <= number.high for number in report.numbers.values())


@pytest.mark.parametrize("pair", [([], []), ([1.0], [1.0, 2.0]), ([[1.0]], [[1.0]])])
def test_shapes_must_agree(pair):
    with pytest.raises(ValueError, match=r"must be \(N,\)"):
        r.spearman(*pair)


def test_what_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="finite"):
        r.pearson([1.0, np.nan], [1.0, 2.0])
