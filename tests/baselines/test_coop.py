"""CoOp as a predictor."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from ecliptic.baselines.coop import Coop
from ecliptic.core.prompt_classifier import NOTHING, LearntContext, first_context
from ecliptic.core.train import Train
from ecliptic.core.zeroshot import zero_shot_head
from ecliptic.data.shots import encode_views, labels_of, tiny_records
from tests.towers import FAMILIES, clip_encoder

NAMES = ("blue", "green", "red")
SHORT = {"start": None, "count": 3, "epochs": 5, "batch_size": 6, "lr": 0.05}


@pytest.fixture(params=FAMILIES)
def encoder(request):
    return FAMILIES[request.param]()


def test_it_is_the_learnt_context_of_full_training(encoder):
    """The same context, and the same answers, as the trainer over pictures gives with the same settings."""
    lr = 5.0 if encoder.name == "tiny-dual" else 0.05  # its pictures are nearly all the same, so gradients are small
    judge = Coop(**SHORT | {"lr": lr}).fit(encoder, tiny_records())
    step = Train(
        LearntContext(NAMES, 3, None), trainable=NOTHING, batch_size=6, steps=10, lr=lr, optimizer="sgd", warmup=2,
        weight_decay=5e-4, grad_clip=None,
    )  # fmt: skip
    full = step.run(encoder, tiny_records()).objective
    assert_close(judge.state_["context"], full.context.detach(), rtol=1e-4, atol=1e-5)
    assert (judge.state_["context"] - first_context(encoder, None, 3, 0)).abs().max() > 1e-3
    pixels = encoder.preprocess([record["image"] for record in tiny_records()])
    scale = 100.0 if encoder.bias is None else encoder.scale.item()
    expected = scale * encoder.images(pixels).pooled.detach() @ full.head(encoder, NAMES).T
    assert_close(judge.predict(pixels).scores, expected, rtol=1e-4, atol=1e-3)
    assert judge.trained_parameters_ == judge.state_["context"].numel()


def test_training_lowers_the_loss_and_raises_the_accuracy():
    encoder = clip_encoder()
    records = tiny_records()
    features, labels = encode_views(encoder, records)[0], labels_of(records)[1]

    def accuracy(epochs):
        judge = Coop(**SHORT | {"epochs": epochs, "batch_size": 12}).fit_features(
            encoder, features, labels, classes=NAMES
        )
        scores = judge.predict_features(features).scores
        return float(torch.nn.functional.cross_entropy(scores, labels)), float(
            (scores.argmax(-1) == labels).float().mean()
        )

    (before, few), (after, many) = accuracy(1), accuracy(60)
    assert after < before - 0.1
    assert many >= few


def test_a_rate_of_zero_is_zero_shot_with_the_starting_words(encoder):
    judge = Coop(start="a photo of a", epochs=1, lr=0.0).fit(encoder, tiny_records())
    assert_close(judge.text_, zero_shot_head(encoder, NAMES, "a photo of a {}."), rtol=1e-4, atol=1e-5)
    words = len(judge.state_["context"])
    assert Coop(start="a photo of a", count=words, epochs=1).fit(encoder, tiny_records()).classes_ == NAMES


def test_the_context_serves_names_never_trained_on(encoder):
    judge = Coop(**SHORT).fit(encoder, tiny_records())
    other = judge.for_classes(("cup", "red"))
    assert_close(other.text_[1], judge.text_[2], rtol=1e-4, atol=1e-5)
    assert (other.text_[0] - zero_shot_head(encoder, ["cup"], "{}.")[0]).abs().max() > 1e-4
    assert torch.equal(judge.text_, Coop(**SHORT).fit(encoder, tiny_records()).text_)


def test_views_stand_for_the_pictures():
    encoder = clip_encoder()
    records = tiny_records()
    features, views = encode_views(encoder, records, 3)
    labels = labels_of(records)[1]
    one = Coop(**SHORT).fit_features(encoder, features, labels, classes=NAMES)
    same = Coop(**SHORT).fit_features(encoder, features, labels, views=features.expand(4, -1, -1), classes=NAMES)
    assert torch.equal(one.state_["context"], same.state_["context"])
    other = Coop(**SHORT).fit_features(encoder, features, labels, views=views, classes=NAMES)
    assert not torch.equal(one.state_["context"], other.state_["context"])
    fitted = Coop(**SHORT, views=3).fit(encoder, records)
    assert torch.equal(fitted.state_["context"], other.state_["context"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"count": 0}, "count=0"),
        ({"start": "a photo of a", "count": 2}, "count is 2"),
        ({"count": 31}, "exceed the 32"),
        ({"template": "it"}, "no template set 'it'"),
        ({"classes": ("red",)}, "labels that are none of the classes"),
    ],
)
def test_what_is_wrong_is_said_before_any_picture_is_opened(settings, message, monkeypatch):
    encoder = clip_encoder()
    monkeypatch.setattr(encoder, "encode_images", lambda *args, **named: pytest.fail("pictures were encoded"))
    with pytest.raises(ValueError, match=message):
        Coop(**{"start": None, **settings}).fit(encoder, tiny_records())


def test_tensors_that_do_not_fit_are_refused():
    encoder, labels = clip_encoder(), torch.tensor([0, 1, 2])
    features = torch.nn.functional.normalize(torch.randn(3, 24), dim=-1)
    judge = Coop(**SHORT)
    with pytest.raises(ValueError, match="classes is missing"):
        judge.fit_features(encoder, features, labels)
    with pytest.raises(ValueError, match=r"features must be \(N, 24\)"):
        judge.fit_features(encoder, features[:, :5], labels, classes=NAMES)
    with pytest.raises(ValueError, match=r"views must be \(V, 3, 24\)"):
        judge.fit_features(encoder, features, labels, views=torch.zeros(2, 2, 24), classes=NAMES)
    with pytest.raises(TypeError, match="takes no prompts"):
        judge.fit(torch.nn.Identity(), tiny_records())
