"""What all support caches have in common: scoring, and where their weights come from."""

import pytest
import torch
from torch import tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from ecliptic.core.support_predictor import SupportPredictor, check_weights, grid_named, number
from ecliptic.ops.support_cache import GRIDS, LABEL_FREE, Grid, Reference, Support, Weights, compare, m_adapter_logits


class Cache(SupportPredictor):
    """The least there can be."""

    def fit(self, encoder, pairs):
        raise NotImplementedError


def rows(*shape, seed=0):
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def cache(captions=True, bias=None):
    judge = Cache()
    keys = rows(12, 6, seed=1)
    support = Support(keys, torch.arange(12) % 3, rows(12, 6, seed=2) if captions else None)
    judge._keep(("a", "b", "c"), support, rows(3, 6, seed=3), 20.0, bias)
    return judge


def test_scores_are_the_methods_logits_with_the_frozen_statistics():
    judge, f = cache(), rows(8, 6)
    validation = rows(30, 6, seed=4), torch.arange(30) % 3
    judge._choose(Grid((5.0,), (2.0,), (3.0,), (0.4,)), LABEL_FREE, validation)
    found = compare(validation[0], judge.text_, judge.support_, scale=20.0)
    mixed = 0.6 * found.images + 0.4 * found.captions
    assert judge.reference_[0] == (float(mixed.min()), float(mixed.max()))
    wanted = m_adapter_logits(
        f, judge.text_, judge.support_, 2.0, 5.0, 3.0, 0.4, scale=20.0, reference=Reference(*judge.reference_)
    )
    assert torch.equal(judge.predict_features(f).scores, wanted)
    assert 0 <= judge.validation_accuracy_ <= 1


def test_the_models_bias_is_added():
    one, two = cache(), cache(bias=tensor(-10.0, requires_grad=True))
    for judge in (one, two):
        judge._choose(GRIDS["coarse"], LABEL_FREE, None)
    f = rows(4, 6)
    assert_close(two.predict_features(f).scores, one.predict_features(f).scores - 10.0)
    assert number(tensor(2.0, requires_grad=True)) == 2.0


def test_with_nothing_to_validate_on_the_default_stands_and_the_support_is_its_own_reference():
    judge = cache()
    fold = torch.full((12,), -1)
    judge._choose(GRIDS["coarse"], Weights(1.0, 2.0, 3.0, 0.5), None, judge.image_keys_, fold)
    assert (judge.alpha_, judge.beta_, judge.gamma_, judge.delta_) == (1.0, 2.0, 3.0, 0.5)
    assert judge.validation_accuracy_ is None
    mixed = judge.image_keys_ @ (0.5 * judge.image_keys_ + 0.5 * judge.caption_keys_).T
    others = mixed[~torch.eye(12, dtype=torch.bool)]
    assert judge.reference_[0] == pytest.approx((float(others.min()), float(others.max())), abs=1e-6)
    assert judge.reference_[1][0] > 0  # no item is compared with itself


def test_held_out_items_have_no_say_in_their_own_case():
    judge = cache(captions=False)
    random = torch.arange(12) // 3 % 3  # labels that say nothing: a shot recognises itself only
    judge.labels_ = random
    judge._choose(Grid((300.0,), (30.0,)), LABEL_FREE, None, judge.image_keys_, torch.arange(12) % 4)
    assert judge.validation_accuracy_ < 0.7
    judge._choose(Grid((300.0,), (30.0,)), LABEL_FREE, (judge.image_keys_, random))
    assert judge.validation_accuracy_ == 1.0


def test_settings_are_checked():
    assert grid_named("paper") is GRIDS["paper"]
    with pytest.raises(ValueError, match="grid='fine': choose from coarse, paper"):
        grid_named("fine")
    check_weights(None, 0.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="alpha=-1: it must not be negative, or be None"):
        check_weights(-1, None)
    with pytest.raises(ValueError, match=r"delta=1.5: it must lie in \[0, 1\]"):
        check_weights(None, None, delta=1.5)
    judge = cache()
    judge._choose(GRIDS["coarse"], LABEL_FREE, None)
    with pytest.raises(ValueError, match=r"features must be \(B, 6\), got \(2, 5\)"):
        judge.predict_features(rows(2, 5))
