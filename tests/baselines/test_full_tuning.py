"""Full fine-tuning: which weights move, and what is learnt."""

from __future__ import annotations

import pytest

from ecliptic.baselines.full_tuning import FullTuning
from ecliptic.data.shots import tiny_records
from tests.core.lessons import moved, weights
from tests.towers import FAMILIES, clip_encoder


def is_image(name: str) -> bool:
    return "vision" in name or "visual" in name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_towers_asked_for_move_and_no_others(family):
    encoder = FAMILIES[family]()
    before = weights(encoder)
    both, image, text = (
        set(FullTuning(steps=2, batch_size=6, lr=1e-3, towers=towers).fit(encoder, tiny_records()).state_)
        for towers in (("image", "text"), ("image",), ("text",))
    )
    assert image
    assert text
    assert all(map(is_image, image))
    assert not any(map(is_image, text))
    assert both == image | text
    assert not any(name.split(".")[-1].startswith("logit_") for name in both)
    assert not moved(before, encoder)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_learns_the_pictures_it_is_shown(family):
    encoder, records = FAMILIES[family](), tiny_records()
    pixels = encoder.preprocess([r["image"] for r in records])
    judge = FullTuning(steps=60, batch_size=12, lr=1e-3, crop=None, towers=("image",)).fit(encoder, records)
    assert judge.predict(pixels).labels == [r["label"] for r in records]
    assert judge.trained_parameters_ == sum(value.numel() for value in judge.state_.values())
    assert judge.for_classes(("yellow", "red")).predict(pixels).classes == ("yellow", "red")


def test_rate_zero_changes_nothing():
    judge = FullTuning(steps=2, lr=0.0).fit(clip_encoder(), tiny_records())
    assert judge.state_ == {}
    assert judge.trained_parameters_ == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"towers": ("vision",)}, "towers="),
        ({"towers": "image"}, "towers='image'"),
        ({"steps": 0}, "steps=0"),
        ({"crop": (0.9, 0.5)}, "crop="),
        ({"classes": ("red",)}, "'blue'"),
    ],
)
def test_what_is_wrong_is_said_before_any_picture_is_opened(settings, message):
    records = [{**record, "image": "there is no such file.png"} for record in tiny_records()]
    with pytest.raises(ValueError, match=message):
        FullTuning(**settings).fit(clip_encoder(), records)
