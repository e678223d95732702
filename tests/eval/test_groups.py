"""Accuracy by group, against loops and values by hand."""

import math

import numpy as np
import pytest

from ecliptic.eval.groups import group_accuracy, group_report


def example(n=400, seed=0):
    rng = np.random.default_rng(seed)
    attribute = rng.choice(["land", "sky", "water"], n, p=[0.5, 0.1, 0.4])
    label = rng.choice(["cow", "duck"], n)
    hits = (rng.random(n) < np.where((attribute == "water") & (label == "cow"), 0.3, 0.8)).astype(float)
    return hits, attribute.tolist(), label.tolist()


def test_by_hand():
    # land cow 2 of 3, water cow 0 of 1, water duck 1 of 1, no land duck
    found = group_accuracy(
        [1, 0, 1, 0, 1], ["land", "land", "land", "water", "water"], ["cow", "cow", "cow", "cow", "duck"]
    )
    assert found.attributes == ("land", "water")
    assert found.classes == ("cow", "duck")
    np.testing.assert_allclose(found.accuracy, [[2 / 3, np.nan], [0, 1]])
    np.testing.assert_array_equal(found.pictures, [[3, 0], [1, 1]])
    assert found.average == pytest.approx(3 / 5)
    assert found.balanced == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert found.worst == 0
    assert found.worst_group == ("water", "cow")
    assert found.gap == pytest.approx(3 / 5)


def test_cells_are_those_of_a_loop():
    hits, attribute, label = example()
    found = group_accuracy(hits, attribute, label)
    slow = {}
    for hit, a, y in zip(hits, attribute, label, strict=True):
        slow.setdefault((a, y), []).append(hit)
    for (a, y), own in slow.items():
        place = found.attributes.index(a), found.classes.index(y)
        assert found.accuracy[place] == pytest.approx(sum(own) / len(own))
        assert found.pictures[place] == len(own)
    worst = min(slow, key=lambda cell: sum(slow[cell]) / len(slow[cell]))
    assert found.worst_group == worst == ("water", "cow")
    assert found.gap == pytest.approx(sum(hits) / len(hits) - sum(slow[worst]) / len(slow[worst]))


def test_neither_order_nor_the_kind_of_names_matters():
    hits, attribute, label = example()
    order = np.random.default_rng(1).permutation(len(hits))
    turned = group_accuracy(hits[order], np.array(attribute)[order], np.array(label)[order])
    np.testing.assert_allclose(turned.accuracy, group_accuracy(hits, attribute, label).accuracy)
    codes = group_accuracy(hits, [("land", "sky", "water").index(a) for a in attribute], label)
    np.testing.assert_allclose(codes.accuracy, turned.accuracy)
    assert codes.worst_group == (2, "cow")


def test_a_perfect_classifier_has_no_gap():
    _, attribute, label = example()
    found = group_accuracy(np.ones(len(label)), attribute, label)
    assert (found.average, found.worst, found.balanced, found.gap) == (1, 1, 1, 0)


def test_the_report_has_every_cell_with_its_interval():
    hits, attribute, label = example()
    report = group_report(hits, attribute, label, resamples=300)
    found = group_accuracy(hits, attribute, label)
    assert set(report.numbers) == {f"groups.{k}" for k in ("average", "balanced", "worst", "gap")}
    for key in ("average", "balanced", "worst", "gap"):
        number = report[f"groups.{key}"]
        assert number.value == pytest.approx(getattr(found, key))
        assert number.low <= number.value <= number.high
    assert report["groups.accuracy[water, cow]"].n == found.pictures[2, 0]
    assert len(report.tables[0].rows) == 6
    assert "cow with water" in report.notes[0]
    # an interval of n independent hits is about 1.96 deviations to each side
    cell = report["groups.accuracy[land, duck]"]
    half = 1.96 * math.sqrt(cell.value * (1 - cell.value) / cell.n)
    assert cell.high - cell.low == pytest.approx(2 * half, rel=0.3)
    assert report.to_json()["groups.worst"]["unit"] == "fraction"
    assert (
        group_report(hits, attribute, label, resamples=50)["groups.gap"]
        == group_report(hits, attribute, label, resamples=50)["groups.gap"]
    )


def test_an_empty_cell_is_a_dash_and_no_number():
    report = group_report([1.0, 0.0], ["land", "water"], ["cow", "duck"], resamples=20)
    assert [row[3] is None for row in report.tables[0].rows] == [False, True, True, False]
    assert "groups.accuracy[land, duck]" not in report.details


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], []), "N above 0"),
        (([1.0, 0.0], ["a"], ["x", "y"]), "1 values of attribute"),
        (([1.0, 0.0], ["a", "b"], ["x"]), "1 values of label"),
        (([1.0, np.nan], ["a", "b"], ["x", "y"]), "NaN"),
    ],
)
def test_wrong_input_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        group_accuracy(*arguments)
