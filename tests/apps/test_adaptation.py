"""Which pictures are learnt from and which judge: disjoint, by seed, and a fair sample."""

from __future__ import annotations

from collections import Counter

import pytest
from PIL import Image

from ecliptic.apps.adaptation import AdaptationError, parse_settings, split
from ecliptic.data.records import Records


def labelled(**counts: int) -> Records:
    image = Image.new("RGB", (4, 4))
    return Records.from_list(
        [{"id": f"{name}/{i}", "image": image, "label": name} for name, n in counts.items() for i in range(n)]
    )


def test_the_two_parts_are_disjoint_and_depend_on_the_seed_alone():
    records = labelled(a=30, b=12, c=3)
    train, test, bad = split(records, 4, 1000, seed=0)
    assert Counter(train.column("label")) == {"a": 4, "b": 4, "c": 2}  # a class keeps one to be judged on
    assert sorted([*train.ids, *test.ids]) == sorted(records.ids)
    assert bad == []
    shuffled = records.shuffle(7)
    assert set(split(shuffled, 4, 1000, seed=0)[0].ids) == set(train.ids)
    assert set(split(records, 4, 1000, seed=1)[0].ids) != set(train.ids)


def test_a_limited_held_out_part_is_a_fair_sample():
    """What is left of each class has the same chance, however large its class; over seeds the shares come out right."""
    records = labelled(large=200, small=20)
    counts = Counter(label for seed in range(20) for label in split(records, 8, 50, seed)[1].column("label"))
    share = counts["small"] / counts.total()
    assert share == pytest.approx(12 / 204, abs=0.02)


def test_settings_are_literals_or_text():
    assert parse_settings(["alpha=1.5", "classes=('a', 'b')", "shrinkage=ks", "text=False"]) == {
        "alpha": 1.5,
        "classes": ("a", "b"),
        "shrinkage": "ks",
        "text": False,
    }
    with pytest.raises(AdaptationError, match="write name=value"):
        parse_settings(["alpha"])
