"""WiSE-FT: the line between frozen and tuned, and the place on it that is chosen."""

from __future__ import annotations

import pytest
from torch.testing import assert_close

from ecliptic.baselines.full_tuning import FullTuning
from ecliptic.baselines.wise_ft_tuning import WiseFtTuning
from ecliptic.data.shots import tiny_records
from tests.towers import FAMILIES, clip_encoder

SHORT = {"steps": 3, "batch_size": 6, "lr": 2e-3, "seed": 4}


@pytest.mark.parametrize("family", FAMILIES)
def test_its_weights_lie_on_the_line(family):
    encoder = FAMILIES[family]()
    tuned = FullTuning(**SHORT).fit(encoder, tiny_records())
    frozen = encoder.state_dict()
    judge = WiseFtTuning(**SHORT, alpha=0.3).fit(encoder, tiny_records())
    assert judge.alpha_ == 0.3
    assert judge.trained_parameters_ == tuned.trained_parameters_
    for name, value in judge.state_.items():
        assert_close(value, 0.7 * frozen[name] + 0.3 * tuned.state_[name], rtol=1e-5, atol=1e-6)
    assert WiseFtTuning(**SHORT, alpha=0.0).fit(encoder, tiny_records()).state_ == {}
    whole = WiseFtTuning(**SHORT, alpha=1.0).fit(encoder, tiny_records()).state_
    assert whole.keys() == tuned.state_.keys()
    assert all(value.equal(tuned.state_[name]) for name, value in whole.items())


def test_alpha_is_chosen_on_pictures_it_did_not_train_on():
    encoder, records = clip_encoder(), tiny_records()
    asked = {"steps": 40, "batch_size": 6, "lr": 2e-3, "crop": None, "grid": (0.0, 0.5, 1.0), "folds": 4}
    judge = WiseFtTuning(**asked, alpha=None).fit(encoder, records)
    assert set(judge.held_out_accuracy_) == {0.0, 0.5, 1.0}
    best = max(judge.held_out_accuracy_.values())
    assert judge.held_out_accuracy_[judge.alpha_] == best
    assert best > judge.held_out_accuracy_[0.0]
    assert WiseFtTuning(**asked).fit(encoder, records).held_out_accuracy_ == {}


def test_of_equally_good_places_the_middle_is_taken():
    judge = WiseFtTuning(steps=1, lr=0.0, alpha=None).fit(clip_encoder(), tiny_records())
    assert len(set(judge.held_out_accuracy_.values())) == 1
    assert judge.alpha_ == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"alpha": None, "grid": (0.0, 2.0)}, "alpha=2"),
        ({"alpha": None, "grid": ()}, "grid"),
        ({"alpha": None, "folds": 1}, "folds"),
        ({"towers": ("vision",)}, "towers="),
    ],
)
def test_what_is_wrong_is_said_before_any_picture_is_opened(settings, message):
    records = [{**record, "image": "there is no such file.png"} for record in tiny_records()]
    with pytest.raises(ValueError, match=message):
        WiseFtTuning(**settings).fit(clip_encoder(), records)


def test_one_picture_of_each_class_leaves_none_to_choose_on():
    with pytest.raises(ValueError, match="one of each class"):
        WiseFtTuning(alpha=None).fit(clip_encoder(), tiny_records()[:3])
