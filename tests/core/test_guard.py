"""The guard: forgetting is measured, told and mended."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from PIL import Image

from ecliptic.core.averaging import interpolate
from ecliptic.core.contracts import Record
from ecliptic.core.encoder import Encoder
from ecliptic.core.guard import ForgettingWarning, Guarded, accuracy, recall, repaired, scorer
from ecliptic.core.objectives import InfoNCE
from ecliptic.core.train import Train
from tests.core.lessons import COLOURS, assert_same, pictures
from tests.towers import clip_encoder

PLAIN = [{"image": Image.new("RGB", (32, 32), rgb), "label": name} for name, rgb in COLOURS.items()]


def short(**settings: Any) -> Train:
    return Train(InfoNCE(), **{"steps": 3, "batch_size": 8, "lr": 1e-2, **settings})


def falling(encoder: Encoder) -> float:
    """Falls linearly from 0.8 as the temperature moves away from where it was: a guard whose answer is known."""
    return 0.8 - abs(encoder.model.logit_scale.item() - clip_encoder().model.logit_scale.item())


def test_accuracy_and_recall_by_hand():
    encoder = clip_encoder()
    images = encoder.encode_images([record["image"] for record in PLAIN])
    head = encoder.encode_texts([f"a photo of a {name}." for name in sorted(COLOURS)])
    expected = [sorted(COLOURS)[i] == record["label"] for i, record in zip((images @ head.T).argmax(1), PLAIN)]
    assert accuracy(encoder, PLAIN) == scorer(PLAIN)(encoder) == sum(expected) / 4
    records = pictures()[:6]
    captioned: list[Record] = [
        {"image": r["image"], "caption": "the same" if i < 2 else r["caption"]} for i, r in enumerate(records)
    ]
    similarity = (
        encoder.encode_images([r["image"] for r in captioned])
        @ encoder.encode_texts([r["caption"] for r in captioned]).T
    )
    hits = 0
    for i in range(6):
        hits += captioned[int(similarity[i].argmax())]["caption"] == captioned[i]["caption"]
        hits += captioned[int(similarity[:, i].argmax())]["caption"] == captioned[i]["caption"]
    assert recall(encoder, captioned) == scorer(captioned)(encoder) == pytest.approx(hits / 12)


def test_a_guard_that_measures_nothing_is_refused(tmp_path):
    with pytest.raises(TypeError, match="'stamps': must be records or a function"):
        scorer("stamps")
    with pytest.raises(ValueError, match="guard holds no records"):
        scorer([])
    with pytest.raises(ValueError, match="neither 'label' nor 'caption'"):
        scorer([{"image": PLAIN[0]["image"]}])
    with pytest.raises(ValueError, match="one label only"):
        scorer(PLAIN[:1])(clip_encoder())
    (tmp_path / "bad.png").write_bytes(b"no picture")
    bad = [{"image": tmp_path / "bad.png", "label": name} for name in "ab"]
    with pytest.raises(ValueError, match="none of its 2 pictures can be read"):
        scorer(bad)(clip_encoder())
    assert accuracy(clip_encoder(), [*PLAIN, *bad[:1]]) == accuracy(clip_encoder(), PLAIN)
    with pytest.raises(ValueError, match="guard_repair=True needs a guard"):
        short(guard_repair=True)
    with pytest.raises(ValueError, match="guard_tolerance=-1"):
        short(guard_tolerance=-1.0)


def test_the_most_training_that_holds_is_chosen():
    scores = {0.0: 0.8, 0.2: 0.9, 0.4: 0.79, 0.6: 0.7}
    assert Guarded(0.8, 0.5, 0.02, scores).alpha == 0.4
    assert Guarded(0.8, 0.5, 0.2, scores).alpha == 0.6
    assert Guarded(0.8, 0.79, 0.02).alpha == 1.0
    assert Guarded(0.8, 0.5, 0.0, {0.1: 0.6, 0.2: 0.7, 0.3: 0.65}).alpha == 0.2  # nothing holds: the best there is


def test_interpolations_are_tried_only_if_the_score_fell():
    before, after = clip_encoder(), clip_encoder()
    with torch.no_grad():
        after.model.logit_scale += 0.5
    kept, found = repaired(before, after, falling, 0.6, 0.8, falling(after))
    assert kept is after
    assert not found.fell
    mended, found = repaired(before, after, falling, 0.22, 0.8, falling(after))
    assert found.scores == pytest.approx({round(0.1 * i, 1): 0.8 - 0.05 * i for i in range(10)}, abs=1e-5)
    assert found.alpha == 0.4
    assert_same(mended, interpolate(before, after, 0.4))


def test_forgetting_is_told_and_mended(tmp_path):
    common = {"guard": falling, "guard_tolerance": 0.003, "checkpoints": tmp_path / "a"}
    with pytest.warns(
        ForgettingWarning, match=r"fell from 0.800 to 0\.\d+, by more than 0.003; alpha=0\.\d of interpolate"
    ):
        plain = short(**common).run(clip_encoder(), pictures())
    assert plain.guard is not None
    assert plain.guard.fell
    assert not plain.guard.repaired
    assert plain.encoder is plain.last
    assert plain.guard.after == pytest.approx(falling(plain.encoder))
    with pytest.warns(ForgettingWarning, match="given back is the interpolation: alpha="):
        mended = short(**common, guard_repair=True).run(clip_encoder(), pictures())  # resumes what is finished
    assert mended.guard is not None
    assert mended.guard.repaired
    assert 0 < mended.guard.alpha < 1
    assert_same(mended.last, plain.encoder)
    assert_same(mended.encoder, interpolate(clip_encoder(), plain.encoder, mended.guard.alpha))
    assert falling(mended.encoder) >= 0.8 - 0.003
    told = mended.encoder.history[-1]["args"]["guard"]
    assert told == mended.guard.as_dict()
    assert told["repaired"] is True
    row = json.loads((tmp_path / "a" / "log.jsonl").read_text().splitlines()[-1])
    assert row["evaluate"] == {"guard": plain.guard.after, "guard_before": 0.8}


def test_a_guard_that_holds_changes_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guarded = short(guard=PLAIN, guard_tolerance=1.0, guard_repair=True).run(clip_encoder(), pictures())
    assert guarded.guard is not None
    assert guarded.guard.before == accuracy(clip_encoder(), PLAIN)
    assert guarded.guard.after == accuracy(guarded.encoder, PLAIN)
    assert guarded.encoder.history[-1]["args"]["guard"]["fell"] is False
    assert_same(guarded.encoder, short().apply(clip_encoder(), pictures()))


def test_the_average_is_what_is_guarded():
    with pytest.warns(ForgettingWarning):
        done = short(guard=falling, guard_tolerance=0.0, ema=0.5).run(clip_encoder(), pictures())
    assert done.guard is not None
    assert done.guard.after == pytest.approx(falling(done.encoder))
    assert falling(done.last) != falling(done.encoder)
