"""Saving predictors: whole folders, the same answers, and clear words where that cannot be."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from ecliptic.core.contracts import Prediction, Predictor
from ecliptic.core.predictor_io import learnt_by, load_predictor, settings_of
from ecliptic.data.shots import tiny_records
from ecliptic.methods.adapt.gda import Gda, GdaUnlabelled
from tests.towers import clip_encoder


@dataclass(eq=False)
class Toy(Predictor):
    """Learns whatever it is told."""

    told: Any = None
    names: tuple[str, ...] = ("a", "b")

    def fit(self, encoder, pairs):
        self.encoder_ = encoder
        self.value_ = self.told
        self._private_ = "not kept"
        return self

    def predict(self, pixels):
        return Prediction()


def test_settings_and_what_is_learnt():
    toy = Toy(told=3).fit(None, [])
    assert settings_of(toy) == {"told": 3, "names": ("a", "b")}
    assert learnt_by(toy) == {"value_": 3}
    assert learnt_by(Toy()) == {}


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        0.1,
        float("inf"),
        "text",
        [1, (2, "x"), None],
        {"a": 1, 0.5: [2]},
        {1: {"deep": ("t",)}},
        (),
        {},
    ],
)
def test_plain_values_come_back_as_they_were(value, tmp_path):
    Toy(told=value).fit(None, []).save(tmp_path / "toy")
    again = Toy.load(tmp_path / "toy")
    assert again.value_ == value
    assert type(again.value_) is type(value)
    assert again.told == value
    assert again.names == ("a", "b")
    assert again.encoder_ is None


def test_tensors_come_back_bit_for_bit_wherever_they_are(tmp_path):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value = {"a": x, "b": [x.half(), {"c": x.T}], "scalar": torch.tensor(2.0), "whole": torch.arange(3)}
    toy = Toy().fit(None, [])
    toy.value_ = value
    toy.save(tmp_path / "toy")
    again = Toy.load(tmp_path / "toy").value_
    assert torch.equal(again["a"], x)
    assert torch.equal(again["b"][0], x.half())
    assert torch.equal(again["b"][1]["c"], x.T)
    assert again["scalar"].shape == ()
    assert again["whole"].dtype == torch.int64


def test_what_cannot_be_written_down_is_named(tmp_path):
    toy = Toy().fit(None, [])
    toy.value_ = {"deep": [object()]}
    with pytest.raises(TypeError, match=r"learnt.value_.deep.0 is a object: keep tensors"):
        toy.save(tmp_path / "toy")
    assert not (tmp_path / "toy").exists()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"learnt nothing yet: call fit\(\)"):
        Toy().save(tmp_path / "toy")
    with pytest.raises(ValueError, match="no encoder to save"):
        Toy(told=1).fit(None, []).save(tmp_path / "toy", with_encoder=True)


def test_saving_replaces_a_predictor_and_nothing_else(tmp_path):
    Toy(told=1).fit(None, []).save(tmp_path / "toy")
    Toy(told=2).fit(None, []).save(tmp_path / "toy")
    assert Toy.load(tmp_path / "toy").value_ == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="holds other files"):
        Toy(told=1).fit(None, []).save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "toy"]


def test_opening_something_else(tmp_path):
    with pytest.raises(ValueError, match="is no saved predictor"):
        Gda.load(tmp_path)
    judge = Gda(views=0).fit(clip_encoder(), tiny_records())
    judge.save(tmp_path / "judge")
    with pytest.raises(ValueError, match="holds gda:Gda, not gda:GdaUnlabelled"):
        GdaUnlabelled.load(tmp_path / "judge", clip_encoder())


def test_the_encoder_must_be_the_one_it_was_fitted_on(tmp_path):
    judge = Gda(views=0).fit(clip_encoder(), tiny_records())
    judge.save(tmp_path / "judge")
    with pytest.raises(ValueError, match=r"was fitted on tiny-clip-\w+: pass that model as encoder="):
        Gda.load(tmp_path / "judge")
    with pytest.raises(ValueError, match=r"tiny-clip-\w+ sees pictures differently: fit it again"):
        Gda.load(tmp_path / "judge", clip_encoder(seed=1))
    assert Gda.load(tmp_path / "judge", clip_encoder()).alpha_ == judge.alpha_


def test_with_its_encoder_a_folder_needs_nothing_else(tmp_path):
    encoder, records = clip_encoder(), tiny_records()
    judge = Gda(views=1).fit(encoder, records)
    judge.save(tmp_path / "judge", with_encoder=True)
    again = load_predictor(tmp_path / "judge")
    pixels = encoder.preprocess([r["image"] for r in records])
    torch.testing.assert_close(again.predict(pixels).scores, judge.predict(pixels).scores)
    assert json.loads((tmp_path / "judge" / "predictor.json").read_text())["predictor"] == "gda:Gda"


def test_params_as_scikit_learn_has_them():
    toy = Toy()
    assert toy.get_params() == {"told": None, "names": ("a", "b")}
    assert toy.set_params(told=5) is toy
    assert toy.told == 5
    with pytest.raises(ValueError, match="has no setting colour"):
        toy.set_params(colour=1)
    fitted = Toy(told=[1]).fit(None, [])
    copy = fitted.clone()
    assert (copy.told, learnt_by(copy)) == ([1], {})


def nested(encoder, **settings):
    """A predictor that holds another one deep inside what it has learnt."""
    outer = Gda(views=0, **settings).fit(encoder, tiny_records())
    outer.held_ = {"inner": [Gda(views=1, alpha=0.5).fit(encoder, tiny_records())]}
    return outer


def test_a_fitted_predictor_may_hold_another(tmp_path):
    encoder = clip_encoder()
    judge = nested(encoder)
    judge.save(tmp_path / "judge", with_encoder=True)
    for given in (encoder, None):
        again = Gda.load(tmp_path / "judge", given)
        (inner,) = again.held_["inner"]
        assert type(inner) is Gda
        assert inner.get_params() == judge.held_["inner"][0].get_params()
        assert inner.encoder_ is again.encoder_
        pixels = encoder.preprocess([r["image"] for r in tiny_records()])
        expected = judge.held_["inner"][0].predict(pixels)
        assert torch.equal(inner.predict(pixels).scores, expected.scores)
        assert inner.predict(pixels).labels == expected.labels
        assert not torch.equal(inner.predict(pixels).scores, again.predict(pixels).scores)


def test_a_predictor_inside_must_be_one_that_can_be_found_again(tmp_path):
    encoder = clip_encoder()
    judge = nested(encoder)
    for wrong, why in (
        (Toy(told=1).fit(encoder, []), "could not be found again"),
        (Gda(), "through another encoder"),
        (Gda(views=0).fit(clip_encoder(), tiny_records()), "through another encoder"),
    ):
        judge.held_ = [wrong]
        with pytest.raises(TypeError, match=rf"learnt.held_.0 .*{why}"):
            judge.save(tmp_path / "judge")
    empty = Gda()
    empty.encoder_ = encoder
    judge.held_ = empty
    with pytest.raises(TypeError, match=r"learnt.held_ is a Gda that has learnt nothing"):
        judge.save(tmp_path / "judge")
    assert not (tmp_path / "judge").exists()
