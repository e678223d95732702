"""Refusing: the classifier's own answers, except for what looks like none of its classes; and one folder that holds both."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from ecliptic.baselines.linear_probe import LinearProbe
from ecliptic.baselines.refusing import Refusing
from ecliptic.core.known import DISTANCES, UNKNOWN, keeping_threshold
from ecliptic.core.predictor_io import load_predictor
from ecliptic.data.records import Records
from ecliptic.data.shots import encode_views, folds_of
from ecliptic.eval.ood import TRAINING_FREE, RefusesTheUnknown, ScoresTheUnknown, ood, training_free_scores
from tests.towers import clip_encoder

COLOURS = {"red": (230, 20, 20), "green": (20, 230, 20), "blue": (20, 20, 230)}
OTHERS = {"grey": (128, 128, 128), "yellow": (230, 230, 20)}


def painted(colours, n=8, seed=0) -> Records:
    found = []
    for name, colour in colours.items():
        for i in range(n):
            noise = np.random.default_rng([seed, i, *colour]).integers(-15, 16, (32, 32, 3))
            image = Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))
            found.append({"id": f"{name}/{i}", "image": image, "label": name})
    return Records.from_list(found)


def pixels_of(encoder, records):
    return encoder.preprocess([record["image"] for record in records])


@pytest.fixture(scope="module")
def encoder():
    return clip_encoder()


@pytest.mark.parametrize("score", ["msp", "energy", "mahalanobis", "knn"])
def test_it_answers_as_its_classifier_or_refuses(encoder, score):
    known = painted(COLOURS)
    judge = Refusing("linear_probe", {"strength": 100.0}, score=score).fit(encoder, known)
    alone = LinearProbe(strength=100.0).fit(encoder, known)
    pixels = pixels_of(encoder, [*painted(COLOURS, 4, seed=1), *painted(OTHERS, 4)])
    said, plain, kept = judge.predict(pixels), alone.predict(pixels), judge.is_known(pixels)
    assert_close(said.scores, plain.scores)
    assert said.classes == plain.classes == judge.classes_ == ("blue", "green", "red")
    assert said.labels == [a if k else UNKNOWN for a, k in zip(plain.labels, kept.tolist())]
    assert torch.equal(kept, judge.ood_scores(pixels)[score] >= judge.threshold_)
    assert isinstance(judge, ScoresTheUnknown)
    assert isinstance(judge, RefusesTheUnknown)


def test_distance_tells_colours_that_were_never_seen(encoder):
    judge = Refusing("linear_probe", {"strength": 100.0}, score="mahalanobis", keep=0.9).fit(encoder, painted(COLOURS))
    report = ood(judge, painted(COLOURS, 8, seed=1), painted(OTHERS, 8))
    assert report["ood.mahalanobis.auroc"].value == 1.0
    assert report["ood.decision.unknown_refused"].value == 1.0
    assert report["ood.decision.known_kept"].value >= 0.7


@pytest.mark.parametrize("settings", [{"strength": 100.0}, {"strengths": (0.1, 10.0, 1000.0)}])
def test_the_threshold_is_set_on_pictures_that_were_not_learnt(encoder, settings):
    """With the penalty of the whole fit, also where each part by itself would choose another."""
    known = painted(COLOURS)
    labels = torch.tensor([sorted(COLOURS).index(label) for label in known.column("label")])
    judge = Refusing("linear_probe", settings, score="energy", keep=0.8, folds=3, seed=2).fit(encoder, known)
    fold, held = folds_of(labels, 3, 2), []
    for k in range(3):
        part = LinearProbe(strength=judge.inner_.strength_).fit(encoder, known[(fold != k)])
        logits = part.predict(pixels_of(encoder, known[(fold == k)])).scores
        held.append(training_free_scores(logits, 100.0)["energy"])
    assert judge.threshold_ == pytest.approx(keeping_threshold(torch.cat(held), 0.8), rel=1e-4)


def test_a_distance_is_held_out_in_many_parts(encoder):
    known = painted(COLOURS)
    features = encode_views(encoder, known)[0]
    labels = torch.tensor([sorted(COLOURS).index(label) for label in known.column("label")])
    judge = Refusing("zero_shot", score="knn", keep=0.8, seed=2).fit(encoder, known)
    fold, held = folds_of(labels, 10, 2), []
    assert int(fold.max()) == 7, "eight pictures of each class: one of each at a time"
    for k in range(8):
        near = torch.cdist(features[fold == k].double(), features[fold != k].double()).sort(-1).values
        held.append(-near[:, 4])
    assert judge.threshold_ == pytest.approx(keeping_threshold(torch.cat(held), 0.8), rel=1e-4)


@pytest.mark.parametrize("score", [*TRAINING_FREE, *DISTANCES])
def test_one_folder_holds_everything(encoder, score, tmp_path):
    judge = Refusing("zero_shot", {"templates": "plain"}, score=score).fit(encoder, painted(COLOURS, 4))
    judge.save(tmp_path / "judge")
    again = load_predictor(tmp_path / "judge", encoder)
    pixels = pixels_of(encoder, [*painted(COLOURS, 2), *painted(OTHERS, 2)])
    assert torch.equal(again.ood_scores(pixels)[score], judge.ood_scores(pixels)[score])
    assert again.predict(pixels).labels == judge.predict(pixels).labels
    assert again.threshold_ == judge.threshold_


def test_a_classifier_of_pictures_not_of_features(encoder):
    pytest.importorskip("ecliptic.methods.adapt.clipn")
    judge = Refusing("clipn", {"steps": 2, "prompts": 2, "batch_size": 6}, score="ctw", folds=2)
    judge.fit(encoder, painted(COLOURS, 2))
    pixels = pixels_of(encoder, painted(COLOURS, 2))
    assert_close(judge.ood_scores(pixels)["ctw"], judge.inner_.ood_scores(pixels)["ctw"].double())


def test_what_it_refuses_to_do(encoder):
    known = painted(COLOURS, 2)
    for judge, why in (
        (Refusing(keep=1.0), "keep=1.0: the share"),
        (Refusing("zero_shoot"), "did you mean zero_shot"),
        (Refusing("cloob"), "does not name pictures"),
        (Refusing(score="ctw"), "zero_shot has no scores of its own; there are msp"),
    ):
        with pytest.raises(ValueError, match=why):
            judge.fit(encoder, known)
    with pytest.raises(ValueError, match="no class has two pictures"):
        Refusing().fit(encoder, painted(COLOURS, 1))
    with pytest.raises(ValueError, match="learnt nothing yet"):
        Refusing().is_known(torch.zeros(1, 3, 32, 32))
