"""A step as a classifier: what it says is what the stepped encoder says."""

from __future__ import annotations

import pytest
import torch

from ecliptic.baselines.step_classifier import StepClassifier
from ecliptic.core.zeroshot import zero_shot_head
from ecliptic.data.shots import tiny_records
from ecliptic.methods.adapt.clip_svd import ClipSvd
from tests.towers import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_it_answers_as_the_stepped_encoder_does(family):
    encoder, records = FAMILIES[family](), tiny_records()
    settings = {"steps": 3, "batch_size": 6, "lr": 5e-3}
    judge = StepClassifier("clip_svd", settings).fit(encoder, records)
    stepped = ClipSvd(classes=("blue", "green", "red"), **settings).apply(encoder, records)
    pixels = encoder.preprocess([record["image"] for record in records])
    with torch.no_grad():
        cosines = stepped.images(pixels).pooled @ zero_shot_head(stepped, ("blue", "green", "red")).T
    torch.testing.assert_close(judge.predict(pixels).scores, judge.scale_ * cosines, rtol=1e-4, atol=1e-4)
    other = judge.for_classes(["cup", "boat", "hat"]).predict(pixels)
    assert other.classes == ("cup", "boat", "hat")


def test_what_is_wrong_is_said():
    encoder, records = FAMILIES["clip"](), tiny_records()
    with pytest.raises(ValueError, match="no step that changes"):
        StepClassifier("gda").fit(encoder, records)
    with pytest.raises(ValueError, match="did you mean clip_svd"):
        StepClassifier("clip_svt").fit(encoder, records)
    with pytest.raises(ValueError, match="settings has 'stepz'"):
        StepClassifier(settings={"stepz": 3}).fit(encoder, records)
