"""Words alone, as a predictor."""

from __future__ import annotations

import pytest
import torch

from ecliptic.baselines.zero_shot import ZeroShot
from ecliptic.core.zeroshot import TEMPLATES, zero_shot_head
from ecliptic.data.shots import tiny_records
from tests.towers import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_models_own_logits(family):
    encoder = FAMILIES[family]()
    records = tiny_records()
    pixels = encoder.preprocess([record["image"] for record in records])
    judge = ZeroShot(templates="ensemble").fit(encoder, records)
    assert judge.classes_ == ("blue", "green", "red")
    with torch.no_grad():
        rows = encoder.images(pixels).pooled
        wanted = torch.zeros(len(rows), 3)
        for k, name in enumerate(judge.classes_):
            prompts = torch.stack([encoder.encode_texts([t.replace("{}", name)])[0] for t in TEMPLATES["ensemble"]])
            mean = prompts.mean(0) / prompts.mean(0).norm()
            for i, row in enumerate(rows):
                wanted[i, k] = encoder.scale * (row @ mean) + (0 if encoder.bias is None else encoder.bias)
    torch.testing.assert_close(judge.predict(pixels).scores, wanted, rtol=1e-5, atol=1e-5)
    assert judge.trained_parameters_ == 0


def test_other_classes_are_a_matter_of_names():
    encoder = FAMILIES["clip"]()
    judge = ZeroShot().fit(encoder, tiny_records())
    other = judge.for_classes(["cup", "boat"])
    assert other.classes_ == ("cup", "boat")
    assert judge.classes_ == ("blue", "green", "red")
    assert torch.equal(other.text_, zero_shot_head(encoder, ["cup", "boat"]))


def test_an_answer_among_some_of_the_classes():
    encoder = FAMILIES["clip"]()
    records = tiny_records()
    judge = ZeroShot().fit(encoder, records)
    pixels = encoder.preprocess([record["image"] for record in records])
    every, some = judge.predict(pixels), judge.predict(pixels, ["red", "blue"])
    assert torch.equal(some.scores, every.scores[:, [2, 0]])
    assert some.classes == ("red", "blue")
    with pytest.raises(ValueError, match="'cup'"):
        judge.predict(pixels, ["cup", "red"])
    with pytest.raises(ValueError, match="classes is empty"):
        judge.predict(pixels, [])


def test_what_is_wrong_is_said():
    encoder = FAMILIES["clip"]()
    with pytest.raises(ValueError, match="one class only"):
        ZeroShot(classes=("cup",)).fit(encoder, [])
    with pytest.raises(ValueError, match="no records"):
        ZeroShot().fit(encoder, [])
    with pytest.raises(ValueError, match="no template set"):
        ZeroShot(templates="fotos").fit(encoder, tiny_records())
    with pytest.raises(ValueError, match="call fit"):
        ZeroShot().predict_features(torch.zeros(1, 4))
