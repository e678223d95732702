"""The protocol for unknown pictures, against loops, by hand, and over towers and predictors that say what they are told."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from torch import tensor

from ecliptic.core.contracts import Prediction, Predictor
from ecliptic.data.records import Records
from ecliptic.eval import ood, ood_report
from ecliptic.eval.ood import RefusesTheUnknown, ScoresTheUnknown, _ask, training_free_scores
from tests.towers import FAMILIES, clip_encoder


def greys(values, label=None, name="greys"):
    rows = [{"id": str(v), "image": Image.new("RGB", (4, 4), (v, v, v)), "label": label} for v in values]
    return Records.from_list(rows, name=name)


class Grey:
    """Pixels are the grey value, whatever else."""

    bias, scale, name = None, tensor(7.0), "grey"

    def preprocess(self, images):
        return tensor([[[[i.getpixel((0, 0))[0] / 255]]] * 3 for i in images])


class Plain(Predictor):
    """Scores (4 g, 0) for grey g in [0, 1]: the lighter, the surer."""

    def __init__(self, probabilities=False):
        self.probabilities = probabilities

    def fit(self, encoder, pairs):
        self.encoder_ = encoder
        return self

    def predict(self, pixels):
        grey = pixels[:, 0, 0, 0]
        scores = torch.stack([4 * grey, torch.zeros_like(grey)], -1)
        scores = scores.softmax(-1) if self.probabilities else scores
        return Prediction(scores, ["light"] * len(grey), ("light", "dark"))


class Own(Plain):
    """Looks known where dark; keeps what is darker than a half."""

    def ood_scores(self, pixels):
        return {"darkness": 1 - pixels[:, 0, 0, 0], "msp": torch.zeros(len(pixels))}

    def is_known(self, pixels):
        return pixels[:, 0, 0, 0] < 0.5


LIGHT, DARK = [200, 180, 160, 90], [100, 60, 20]


def test_the_numbers_against_sklearn():
    rng = np.random.default_rng(0)
    inside, outside = rng.random(40) + 0.2, rng.random(25)
    report = ood_report({"s": (inside, outside)}, (inside > 0.5, outside > 0.5), resamples=200)
    truth, scores = np.arange(65) < 40, np.concatenate([inside, outside])
    number = report["ood.s.auroc"]
    assert number.value == pytest.approx(roc_auc_score(truth, scores))
    assert number.low < number.value < number.high
    assert number.n == 65
    found = report["ood.decision.balanced_accuracy"]
    assert found.value == pytest.approx(balanced_accuracy_score(truth, scores > 0.5))
    assert found.low < found.value < found.high
    kept, refused = report["ood.decision.known_kept"].value, report["ood.decision.unknown_refused"].value
    assert (kept, refused) == (np.mean(inside > 0.5), np.mean(outside <= 0.5))
    assert json.loads(json.dumps(report.to_json()))["ood.s.fpr95"]["n"] == 65


def test_a_perfect_decision_is_not_a_certain_one():
    report = ood_report({"s": ([2.0] * 8, [1.0] * 8)}, ([True] * 8, [False] * 8))
    number = report["ood.decision.balanced_accuracy"]
    assert number.value == number.high == 1.0
    assert 0.7 < number.low < 0.95
    assert ood_report({}, ([True] * 8, [True] * 8))["ood.decision.balanced_accuracy"].value == 0.5


def test_a_predictor_by_hand():
    predictor = Plain().fit(Grey(), [])
    report = ood(predictor, greys(LIGHT, "light"), greys(DARK, "other"), resamples=50)
    # 90 lies below 100 alone: 11 of 12 pairs are in order, for every score of two logits of which one is constant.
    for name in ("msp", "max_logit", "energy", "mcm"):
        assert report[f"ood.{name}.auroc"].value == pytest.approx(11 / 12)
    assert report["ood.known.accuracy"].value == 1.0
    assert not [key for key in report.numbers if "decision" in key]
    assert "4 known pictures of 2 classes, 3 unknown" in report.subtitle


def test_a_predictor_with_scores_and_a_decision_of_its_own():
    predictor = Own().fit(Grey(), [])
    assert isinstance(predictor, ScoresTheUnknown)
    assert isinstance(predictor, RefusesTheUnknown)
    assert not isinstance(Plain(), ScoresTheUnknown | RefusesTheUnknown)
    report = ood(predictor, greys(LIGHT, "dark"), greys(DARK), resamples=50, batch_size=2)
    assert report["ood.darkness.auroc"].value == pytest.approx(1 / 12)
    assert report["ood.msp.auroc"].value == 0.5  # its own takes precedence
    assert report["ood.decision.known_kept"].value == 0.25
    assert report["ood.decision.unknown_refused"].value == 0.0
    assert report["ood.decision.balanced_accuracy"].value == pytest.approx(0.125)
    assert report["ood.known.accuracy"].value == 0.0
    surest = report.sections[1].content[0].pictures[0]  # the unknown picture with the highest score of its own
    assert surest.score == pytest.approx(1 - 20 / 255)
    assert "darkness" in report.sections[1].text


def test_probabilities_have_no_logits():
    predictor = Plain(probabilities=True).fit(Grey(), [])
    report = ood(predictor, greys(LIGHT), greys(DARK), resamples=50)
    assert list(report.numbers) == ["ood.msp.auroc", "ood.msp.fpr95"]
    assert report["ood.msp.auroc"].value == pytest.approx(11 / 12)


def test_mcm_is_asked_on_cosines():
    cosines = tensor([[0.3, 0.1], [0.2, 0.25]])
    found = training_free_scores(50 * cosines, 50.0)
    assert torch.allclose(found["mcm"], cosines.softmax(-1).amax(-1))
    assert torch.allclose(found["msp"], (50 * cosines).softmax(-1).amax(-1))


def test_the_scale_is_the_predictors_then_the_models():
    class Scaled(Plain):
        scale_ = 2.0

    class Siglip(Grey):
        bias = tensor(-10.0)

    def first(predictor, scale=None):  # MCM of the one known picture
        return float(_ask(predictor, greys([250]), None, scale, 8, None).scores["mcm"][0])

    def expected(scale):
        return float(tensor([4 * 250 / 255 / scale, 0.0]).softmax(-1)[0])

    assert first(Plain().fit(Grey(), [])) == pytest.approx(expected(100), abs=1e-6)
    assert first(Plain().fit(Siglip(), [])) == pytest.approx(expected(7), abs=1e-6)
    assert first(Scaled().fit(Grey(), [])) == pytest.approx(expected(2), abs=1e-6)
    assert first(Scaled().fit(Grey(), []), scale=5.0) == pytest.approx(expected(5), abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_is_its_class_prompts(family):
    encoder = FAMILIES[family]()
    known, unknown = greys([250, 128, 30, 200], "cat"), greys([90, 160, 10], "cup")
    report = ood(encoder, known, unknown, ["cat", "dog"], resamples=50)
    head = encoder.encode_texts(["a photo of a cat.", "a photo of a dog."])
    both = encoder.encode_images([r["image"] for records in (known, unknown) for r in records])
    cosines, truth = both @ head.T, np.arange(7) < 4
    scale = encoder.scale.item()
    for name, scores in {
        "msp": (scale * cosines).softmax(-1).amax(-1),
        "max_logit": cosines.amax(-1),
        "energy": (scale * cosines).logsumexp(-1),
        "mcm": cosines.softmax(-1).amax(-1),
    }.items():
        assert report[f"ood.{name}.auroc"].value == pytest.approx(roc_auc_score(truth, scores.numpy())), name
    assert report["ood.known.accuracy"].n == 4
    assert "Out of distribution" in report.to_html()


def test_broken_pictures_are_left_out_and_told(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    unknown = Records.from_list([*greys(DARK), {"id": "bad", "image": tmp_path / "broken.png"}], name="mixed")
    for subject in (Own().fit(Grey(), []), clip_encoder()):
        report = ood(subject, greys(LIGHT, "light"), unknown, ["light", "dark"], resamples=10)
        assert report["ood.msp.auroc"].n == 7
        assert any("1 of 4 pictures" in note and "bad" in note for note in report.notes)


def test_bad_input_says_what_is_missing():
    predictor = Plain().fit(Grey(), [])
    with pytest.raises(ValueError, match="no unknown records"):
        ood(predictor, greys(LIGHT), greys([]))
    with pytest.raises(ValueError, match="name the classes"):
        ood(clip_encoder(), greys(LIGHT), greys(DARK))
    with pytest.raises(TypeError, match="pass encoder="):
        ood(Plain(), greys(LIGHT), greys(DARK))

    class Mute(Plain):
        def predict(self, pixels):
            return Prediction(text=[""] * len(pixels))

    class Short(Own):
        def ood_scores(self, pixels):
            return {"one": torch.zeros(1)}

    with pytest.raises(TypeError, match="no class scores"):
        ood(Mute().fit(Grey(), []), greys(LIGHT), greys(DARK))
    with pytest.raises(TypeError, match=r"'one' is \(1,\), not \(4,\)"):
        ood(Short().fit(Grey(), []), greys(LIGHT), greys(DARK))
