"""Order by words alone: values give the unit and never the order."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from ecliptic.baselines.word_ranker import WordRanker, poles
from ecliptic.data.shots import encode_views
from tests.towers import clip_encoder


@pytest.mark.parametrize("instruction", ["light", "light | dark"])
def test_the_order_is_that_of_the_words_and_the_unit_that_of_the_values(instruction):
    encoder, (judge, records) = clip_encoder(), WordRanker.tiny()
    judge.set_params(instruction=instruction).fit(encoder, records)
    features = encode_views(encoder, records)[0]
    texts = encoder.encode_texts(list(poles(instruction)))
    expected = features @ texts[0] - (features @ texts[1] if len(texts) == 2 else 0)
    said = judge.predict_features(features).scores[:, 0]
    assert torch.equal(said.argsort(), expected.argsort())
    values = torch.tensor([float(record["value"]) for record in records])
    assert_close(said.mean(), values.mean(), rtol=1e-3, atol=1e-3)
    assert_close(said.std(), values.std(), rtol=1e-3, atol=1e-3)
    backwards = judge.clone().fit(encoder, [{**r, "value": -r["value"]} for r in records])
    assert torch.equal(backwards.predict_features(features).scores[:, 0].argsort(), expected.argsort())


def test_words_are_one_or_two():
    assert poles(" many cats|few cats ") == ("many cats", "few cats")
    for wrong in ("", "a | b | c", "many |"):
        with pytest.raises(ValueError, match="both ends as in"):
            poles(wrong)
