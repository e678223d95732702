"""Plain LoRA: what is trained, what is kept, and what it learns."""

from __future__ import annotations

import pytest
from torch.testing import assert_close

from ecliptic.baselines.lora_tuning import LoraTuning
from ecliptic.core.encoder import load
from ecliptic.core.lora import Lora, merge
from ecliptic.core.prompt_classifier import PromptClassifier
from ecliptic.core.train import Train
from ecliptic.data.shots import tiny_records
from tests.core.lessons import moved, weights
from tests.towers import FAMILIES, clip_encoder

NAMES = ("blue", "green", "red")


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_trainers_lora_under_cross_entropy_over_prompts(family):
    encoder, records = FAMILIES[family](), tiny_records()
    before = weights(encoder)
    judge = LoraTuning(steps=4, batch_size=6, lr=2e-2, rank=3, alpha=6.0, crop=None, seed=5).fit(encoder, records)
    by_hand = Train(
        PromptClassifier(NAMES), steps=4, batch_size=6, lr=2e-2, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8,
        grad_clip=None, warmup=0, seed=5, lora=Lora(3, 6.0, parts=("q", "k", "v"), dropout=0.25, seed=5),
    ).run(encoder, records)  # fmt: skip
    for name, value in merge(by_hand.adapters).state_dict().items():
        assert_close(judge.tuned_encoder().state_dict()[name], value, rtol=0, atol=1e-6)
    assert judge.trained_parameters_ == sum(v.numel() for v in judge.state_.values())
    assert len(judge.state_) == 2 * 3 * 3 * 2  # A, B; q, k, v; blocks; towers
    assert all(float(v.abs().sum()) > 0 for v in judge.state_.values())
    assert not moved(before, encoder)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_learns_the_pictures_it_is_shown(family):
    encoder, records = FAMILIES[family](), tiny_records()
    pixels, labels = encoder.preprocess([r["image"] for r in records]), [r["label"] for r in records]
    judge = LoraTuning(steps=60, batch_size=12, lr=2e-2, crop=None).fit(encoder, records)
    assert judge.predict(pixels).labels == labels
    assert judge.for_classes(("yellow", "red")).predict(pixels).classes == ("yellow", "red")


def test_rate_zero_changes_no_answer():
    encoder = clip_encoder()
    pixels = encoder.preprocess([r["image"] for r in tiny_records()])
    judge = LoraTuning(steps=2, lr=0.0).fit(encoder, tiny_records())
    tuned = judge.tuned_encoder()
    assert tuned.images(pixels).pooled.equal(encoder.images(pixels).pooled)


def test_a_tower_whose_blocks_are_not_pooled_is_adapted_at_its_projection():
    encoder = load("offline")
    judge = LoraTuning(steps=1, batch_size=2, lr=1e-2).fit(encoder, tiny_records()[:6])
    image = [name for name in judge.state_ if "vision" in name or "visual" in name]
    assert sorted(image) == ["model.visual_projection.weight.lora_A", "model.visual_projection.weight.lora_B"]
    text = LoraTuning(steps=1, batch_size=2, towers=("text",)).fit(encoder, tiny_records()[:6])
    assert not any("vis" in name for name in text.state_)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"parts": ("query",)}, "parts="),
        ({"towers": ()}, "towers="),
        ({"dropout": 1.0}, "dropout=1"),
        ({"steps": 0}, "steps=0"),
        ({"lr": -1.0}, "lr=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"crop": (0.0, 1.0)}, "crop="),
        ({"templates": "no place"}, "no template set"),
        ({"tau": 0.0}, "tau=0"),
        ({"classes": ("red", "green")}, "'blue'"),
    ],
)
def test_what_is_wrong_is_said_before_any_picture_is_opened(settings, message):
    records = [{**record, "image": "there is no such file.png"} for record in tiny_records()]
    with pytest.raises(ValueError, match=message):
        LoraTuning(**settings).fit(clip_encoder(), records)


def test_records_without_labels_are_named():
    with pytest.raises(ValueError, match="'tiny-3' has no label"):
        LoraTuning().fit(clip_encoder(), [{**r, "label": None if r["id"] == "tiny-3" else "a"} for r in tiny_records()])
