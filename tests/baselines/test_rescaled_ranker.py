"""An instructed ranker in any unit: an affine change of the values changes the answers alike, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ecliptic.baselines.rescaled_ranker import SPREAD, RescaledRanker, encode_pooled, pooled
from ecliptic.core.predictor_io import load_predictor
from ecliptic.data.records import Records
from ecliptic.methods.adapt.ranking_adapter import RankingAdapter
from tests.towers import clip_encoder


@pytest.fixture(scope="module")
def encoder():
    return clip_encoder()


def pixels_of(encoder, records):
    return encoder.preprocess([record["image"] for record in records])


def test_units_pass_through(encoder):
    judge, records = RescaledRanker.tiny()
    said = judge.fit(encoder, records).predict(pixels_of(encoder, records)).scores
    other = [{**record, "value": 7 + 0.003 * record["value"]} for record in records]
    again = judge.clone().fit(encoder, other).predict(pixels_of(encoder, records)).scores
    assert said.shape == (12, 1)
    assert_close(again, 7 + 0.003 * said, rtol=1e-3, atol=1e-4)


def test_it_is_the_adapter_on_standard_scores(encoder):
    judge, records = RescaledRanker.tiny()
    values = np.array([record["value"] for record in records], dtype=float)
    scores = SPREAD * (values - values.mean()) / values.std()
    judge.set_params(pool=1).fit(encoder, Records.from_list(records))
    plain = RankingAdapter(instructions=("the light",), flip=False, **judge.settings)
    plain.fit(encoder, [{**r, "quantities": {"the light": v}} for r, v in zip(records, scores)])
    pixels = pixels_of(encoder, records)
    expected = values.mean() + values.std() / SPREAD * plain.predict(pixels).scores
    assert_close(judge.predict(pixels).scores, expected.float(), rtol=1e-3, atol=1e-3)
    assert judge.trained_parameters_ == sum(value.numel() for value in plain.weights_.values())


def test_from_patches_and_from_a_folder_it_answers_the_same(encoder, tmp_path):
    judge, records = RescaledRanker.tiny()
    values = np.array([record["value"] for record in records], dtype=float)
    patches = encode_pooled(encoder, records, 2)
    judge.fit_patches(encoder, patches, values)
    pixels = pixels_of(encoder, records)
    whole = judge.clone().fit(encoder, records)
    assert_close(whole.predict(pixels).scores, judge.predict(pixels).scores, rtol=1e-4, atol=1e-3)
    assert_close(judge.predict_patches(patches).scores, judge.predict(pixels).scores)
    again = load_predictor(judge.save(tmp_path / "judge"), encoder)
    assert torch.equal(again.predict(pixels).scores, judge.predict(pixels).scores)


def test_patches_are_averaged_in_squares(encoder):
    _, records = RescaledRanker.tiny()
    pixels = pixels_of(encoder, records[:2])
    seen = encoder.images(pixels, patches=True)
    rows, columns = seen.grid
    grid = seen.tokens.detach().reshape(2, rows, columns, -1)
    for pool in (1, 2, 3):
        said = pooled(seen, pool)
        squares = [
            grid[:, y : y + pool, x : x + pool].mean((1, 2))
            for y in range(0, rows, pool)
            for x in range(0, columns, pool)
        ]
        assert_close(said, torch.stack(squares, 1))
    assert_close(encode_pooled(encoder, records, 2, batch=5)[:2], pooled(seen, 2), rtol=1e-4, atol=1e-5)


def test_what_it_refuses(encoder):
    _, records = RescaledRanker.tiny()
    with pytest.raises(ValueError, match="did you mean ranking_adapter"):
        RescaledRanker(method="ranking_adaptor").fit(encoder, records)
    with pytest.raises(ValueError, match="does not order pictures"):
        RescaledRanker(method="cloob").fit(encoder, records)
    with pytest.raises(ValueError, match="pool=0"):
        RescaledRanker(pool=0).fit(encoder, records)
    with pytest.raises(ValueError, match="no two different values"):
        RescaledRanker().fit(encoder, [{**record, "value": 3} for record in records])
