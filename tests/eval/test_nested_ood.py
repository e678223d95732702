"""Known against unknown by nested cross-validation: what is held out was never learnt, and noise is not flattered."""

from __future__ import annotations

import numpy as np
import pytest

from ecliptic.eval.metrics import auroc
from ecliptic.eval.nested_ood import (
    Part,
    auroc_difference,
    auroc_interval,
    judge_ood,
    mean_auroc,
    refusals,
    with_classes_left_out,
    with_unknown,
)


@pytest.mark.parametrize("classes", [4, 5, 6, 7, 9, 20])
@pytest.mark.parametrize("shots", [1, 2, 3, 8])
def test_classes_in_turn_are_unknown_and_never_learnt(classes, shots):
    labels = np.repeat(np.arange(classes), [shots if k else 8 for k in range(classes)])
    split = with_classes_left_out(labels, 4, seed=classes)
    seen_unknown, seen_known = set(), set()
    for left_out in split.plan:
        learnt = split.learnt(left_out)
        assert len(set(labels[learnt])) >= 2
        for j in left_out:
            known, unknown = split.held(left_out, j)
            assert not {*known, *unknown} & {*learnt}
            assert not {*labels[unknown]} & {*labels[learnt]}, "a class that was learnt is none that is unknown"
            assert {*labels[known]} <= {*labels[learnt]}, "what counts as known was learnt"
            if len(left_out) == 1:
                seen_unknown |= {*unknown}
                seen_known |= {*known}
    assert seen_unknown == {i for i in range(len(labels)) if split.unknown[i] in split.folds}
    if shots > 2:
        assert seen_unknown == seen_known == set(range(len(labels)))


def test_given_unknown_pictures_are_never_learnt_from():
    labels = np.repeat(np.arange(3), 6)
    split = with_unknown(labels, 10, 4)
    assert len(split.plan) == 10
    for left_out in split.plan:
        learnt = split.learnt(left_out)
        assert learnt.max() < 18
        assert {*labels[learnt]} == {0, 1, 2}
        for j in left_out:
            known, unknown = split.held(left_out, j)
            assert not {*known} & {*learnt}
            assert unknown.min() >= 18
    whole = np.sort(np.concatenate([split.held({k}, k)[1] for k in split.folds]))
    assert np.array_equal(whole, np.arange(18, 28))
    with pytest.raises(ValueError, match="it takes four"):
        with_classes_left_out(labels)


def scores_of(split, signal, noise_seed):
    """Known pictures `signal` above the unknown, one draw of noise a fit and picture, another scale in every fit."""
    answers = {}
    for n, left_out in enumerate(split.plan):
        noise = np.random.default_rng([noise_seed, n]).normal(size=len(split.known))
        learnt = np.isin(split.unknown, list(left_out), invert=True) & split.labelled
        answers[left_out] = (n + 1) * (signal * learnt + noise) + 10 * n
    return answers


def test_auroc_is_that_of_each_fold_by_loops():
    split = with_classes_left_out(np.repeat(np.arange(6), 5), 4)
    answers = {"good": scores_of(split, 2.0, 0), "bad": scores_of(split, 0.0, 1)}
    found = judge_ood(answers, split)
    assert found.winner == "good"
    assert set(found.chosen) == {"good"}
    won = pairs = 0.0
    for k in split.folds:
        scores = answers["good"][frozenset({k})]
        for a in split.held({k}, k)[0]:
            for b in split.held({k}, k)[1]:
                won += (scores[a] > scores[b]) + (scores[a] == scores[b]) / 2
                pairs += 1
    assert mean_auroc(found.honest) == pytest.approx(won / pairs)
    part = found.parts["bad"][0]
    both = np.concatenate([part.known_scores, part.unknown_scores])
    assert mean_auroc([part]) == pytest.approx(auroc(both, np.arange(len(both)) < len(part.known)))


def test_the_choice_without_a_fold_does_not_look_at_it():
    split = with_unknown(np.repeat(np.arange(3), 8), 16, 4)
    answers = {"a": scores_of(split, 1.0, 0), "b": scores_of(split, 1.0, 1)}
    before = judge_ood(answers, split)
    k = split.folds[0]
    held = np.concatenate(split.held({k}, k))
    for said in answers.values():
        for left_out in said:
            said[left_out][held] = np.random.default_rng(5).normal(size=len(held))
    assert judge_ood(answers, split).chosen[0] == before.chosen[0]


def test_the_best_of_much_noise_is_not_flattered():
    honest, flattering = [], []
    for seed in range(30):
        split = with_classes_left_out(np.repeat(np.arange(8), 4), 4, seed)
        found = judge_ood({f"{i}": scores_of(split, 0.0, 100 * seed + i) for i in range(12)}, split)
        honest.append(mean_auroc(found.honest))
        flattering.append(mean_auroc(found.parts[found.winner]))
    assert abs(np.mean(honest) - 0.5) < 0.04
    assert np.mean(flattering) > 0.58


def test_intervals_hold_what_they_say():
    split = with_unknown(np.zeros(40, dtype=int), 40, 4)
    covered = []
    for seed in range(120):
        found = judge_ood({"a": scores_of(split, 1.0, seed)}, split)
        low, high = auroc_interval(found.honest, split, resamples=300, seed=seed)
        assert low <= mean_auroc(found.honest) <= high
        covered.append(low <= 0.760 <= high)  # Phi(1 / sqrt 2)
    assert 0.88 <= np.mean(covered) <= 0.99


def test_whole_classes_are_drawn_where_classes_are_left_out():
    """Twenty pictures of a class all alike are one observation, not twenty."""
    labels = np.repeat(np.arange(6), 20)
    split = with_classes_left_out(labels, 4)
    answers = {}
    for left_out in split.plan:
        level = np.random.default_rng([1, *left_out]).normal(size=120)
        answers[left_out] = np.where(np.isin(split.unknown, list(left_out)), labels - 3.0, level)
    parts = judge_ood({"a": answers}, split).honest
    loose = type(split)(split.known, split.unknown, split.labelled, np.arange(120))
    wide, narrow = (auroc_interval(parts, s) for s in (split, loose))
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])


def test_a_difference_is_paired():
    split = with_unknown(np.repeat(np.arange(3), 8), 16, 4)
    found = judge_ood({"a": scores_of(split, 1.0, 0), "b": scores_of(split, 3.0, 0)}, split)
    difference, low, high = auroc_difference(found.parts["b"], found.parts["a"], split)
    assert difference == pytest.approx(mean_auroc(found.parts["b"]) - mean_auroc(found.parts["a"]))
    assert 0 < low <= difference <= high
    assert auroc_difference(found.parts["a"], found.parts["a"], split) == (0, 0, 0)


def test_refusals_by_hand():
    part = Part(np.array([0, 1, 2, 3]), np.array([7, 8, 9]), np.array([1.0, 2, 3, 4]), np.array([0.5, 1.0, 5.0]))
    rows, hits = refusals([part, part], 0.9)
    assert rows.tolist() == [7, 8, 9, 7, 8, 9]
    assert hits.tolist() == [1, 0, 0] * 2  # the threshold is the lowest known score, which is kept
    assert refusals([part], 0.6)[1].tolist() == [1, 1, 0]


def test_what_cannot_be_judged():
    split = with_unknown(np.repeat(np.arange(3), 4), 4, 2)
    with pytest.raises(ValueError, match="no method"):
        judge_ood({}, split)
    with pytest.raises(ValueError, match="b has not been fitted without every"):
        judge_ood({"b": {frozenset({0}): np.zeros(16)}}, split)
