"""Two-pass softmax inside towers; the operator itself is tested in tests/ops/test_softmax.py."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from ecliptic.core.encoder import load
from ecliptic.core.zeroshot import zero_shot_head
from ecliptic.data.scenes import SHAPES, scenes
from ecliptic.methods.attend.two_pass_softmax import FORMS, TwoPassSoftmax
from tests.towers import FAMILIES


@pytest.mark.parametrize("form", FORMS)
def test_a_trained_model_gives_the_same_logits_and_the_same_names(form):
    encoder = load("tiny")
    changed = TwoPassSoftmax(form=form).apply(encoder)
    pictures = [record["image"] for record in scenes("test", n=60, seed=0, size=encoder.image_size)]
    names = list(SHAPES)
    before, after = (
        model.logits(model.encode_images(pictures), zero_shot_head(model, names, ("a {}",)))
        for model in (encoder, changed)
    )
    assert_close(after, before, rtol=1e-5, atol=2e-4)  # logits of up to 100: 1e-5 of their scale and below
    assert torch.equal(after.argmax(-1), before.argmax(-1))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_scale_of_the_scores_becomes_nan(family):
    encoder = FAMILIES[family]()
    with torch.no_grad():
        for tower in (encoder.anatomy.image, encoder.anatomy.text):
            for name, weight in tower.module.named_parameters():
                if "q_proj.weight" in name or "query.weight" in name:
                    weight *= 1e4
    changed = TwoPassSoftmax().apply(encoder)
    pixels = torch.randn(2, 3, encoder.image_size, encoder.image_size, generator=torch.Generator().manual_seed(0))
    tokens = encoder.tokenize(["one", "a rather longer caption"])
    assert changed.images(pixels).pooled.isfinite().all()
    assert changed.texts(tokens).pooled.isfinite().all()
    assert_close(changed.images(pixels).pooled, encoder.images(pixels).pooled, rtol=1e-3, atol=1e-3)


def test_one_tower_only():
    encoder = FAMILIES["clip"]()
    changed = TwoPassSoftmax(towers=("text",)).apply(encoder)
    assert changed.anatomy.text.module.config._attn_implementation.startswith("ecliptic-")
    assert changed.anatomy.image.module.config._attn_implementation == "sdpa"
    assert encoder.anatomy.text.module.config._attn_implementation == "sdpa"


def test_a_saved_model_keeps_its_attention(tmp_path):
    changed = TwoPassSoftmax(form="reload").apply(FAMILIES["siglip"]())
    changed.save_pretrained(tmp_path / "model")
    opened = load(tmp_path / "model")
    assert opened.anatomy.image.module.config._attn_implementation == "ecliptic-softmax-reload"
    assert opened.history == changed.history


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"form": "one_pass"}, "choose two_pass, recompute, reload"), ({"towers": "text"}, "choose from image, text")],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TwoPassSoftmax(**settings)
