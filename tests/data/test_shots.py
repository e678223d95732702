"""Records to shots: views that depend on nothing but themselves, folds that leak nothing, labels that are checked."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import tensor

from ecliptic.core.preprocess import ImagePreprocess
from ecliptic.data.records import Records
from ecliptic.data.scenes import SHAPES, scenes
from ecliptic.data.shots import (
    RandomView,
    check_classes,
    encode_shots,
    encode_views,
    folds_of,
    label_map,
    labels_of,
    partial_labels,
    split_classes,
    take_shots,
    tiny_records,
)
from tests.towers import FAMILIES, clip_encoder


@pytest.mark.parametrize("family", FAMILIES)
def test_views_are_of_the_right_pictures_in_the_right_order(family):
    encoder, records = FAMILIES[family](), tiny_records()
    plain, views = encode_views(encoder, records, 3, seed=1)
    assert torch.equal(plain, encoder.encode_images([r["image"] for r in records]))
    assert views.shape == (3, 12, encoder.dim)
    for i in (0, 7):  # alone, a picture has the same views as in company
        alone, own = encode_views(encoder, [records[i]], 3, seed=1)
        torch.testing.assert_close(own[:, 0], views[:, i])
        torch.testing.assert_close(alone[0], plain[i])
    assert (views[0] - views[1]).abs().max() > 1e-3
    other = encode_views(encoder, records, 3, seed=2)[1]
    assert (views - other).abs().max() > 1e-3
    assert encode_views(encoder, records)[1] is None


def test_views_go_past_the_encoders_own_crop():
    encoder = clip_encoder()
    wide = clip_encoder()
    wide.transform = ImagePreprocess(shortest=40, crop=(32, 32))  # resizes to 40, keeps the middle 32
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 50, 3), dtype=np.uint8))
    records = [{"id": "a", "image": picture}]
    torch.testing.assert_close(encode_views(wide, records, 2)[1], encode_views(encoder, records, 2)[1])
    assert (encode_views(wide, records)[0] - encode_views(encoder, records)[0]).abs().max() > 1e-4


def test_pictures_are_decoded_once_for_all_views(tmp_path):
    asked = []

    def get(i):
        asked.append(i)
        return {"id": str(i), "image": Image.new("RGB", (40, 40), (i * 40, 0, 0)), "label": "ab"[i % 2]}

    shots = encode_shots(clip_encoder(), Records(4, get, name="counted"), views=5)
    assert shots.views.shape == (5, 4, 24)
    assert len(asked) <= 8  # the labels, then the pictures
    tiny_records()[0]["image"].save(tmp_path / "a.png")
    from_file = encode_views(clip_encoder(), [{"id": "tiny-0", "image": tmp_path / "a.png"}], 2)
    in_memory = encode_views(clip_encoder(), tiny_records()[:1], 2)
    assert torch.equal(from_file[1], in_memory[1])


def test_labels_by_name():
    names, labels = labels_of(tiny_records()[:4])
    assert (names, labels.tolist()) == (("blue", "green", "red"), [2, 1, 0, 2])
    names, labels = labels_of(tiny_records()[:4], ("red", "green", "blue", "pink"))
    assert (names, labels.tolist()) == (("red", "green", "blue", "pink"), [0, 1, 2, 0])
    assert labels_of([{"label": 3}, {"label": 10}])[0] == ("10", "3")


def test_validation_uses_the_same_numbers():
    shots = encode_shots(clip_encoder(), tiny_records()[:6], tiny_records()[6:8], views=0)
    assert shots.classes == ("blue", "green", "red")
    assert shots.validation[1].tolist() == [2, 1]
    assert shots.validation[0].shape == (2, 24)
    assert shots.views is None


def test_folds_are_stratified_and_never_hold_out_a_lone_sample():
    labels = tensor([0] * 7 + [1] * 4 + [2] * 2 + [3])
    fold = folds_of(labels, 4)
    assert fold[-1] == -1
    for k in range(4):
        train = labels[fold != k]
        assert set(train.tolist()) == {0, 1, 2, 3}  # every class can still be learnt
    assert torch.bincount(fold[:7], minlength=4).tolist() == [2, 2, 2, 1]
    assert sorted(fold[7:11].tolist()) == [0, 1, 2, 3]
    assert sorted(fold[11:13].tolist()) == [0, 1]
    assert torch.equal(fold, folds_of(labels, 4))
    assert not torch.equal(fold, folds_of(labels, 4, seed=1))
    assert (folds_of(labels, 1) == -1).all()


def test_label_map_selects_and_orders():
    chosen = label_map(("a", "b", "c"), ("c", "a"))
    assert chosen.tolist() == [[0, 1], [0, 0], [1, 0]]
    assert (tensor([[1.0, 2.0, 3.0]]) @ chosen).tolist() == [[3.0, 1.0]]


def test_class_names():
    with pytest.raises(ValueError, match="list of names, not the one string 'cat'"):
        check_classes("cat")
    with pytest.raises(ValueError, match=r"one class only \(none\)"):
        check_classes([])


def test_shots_depend_on_the_seed_and_the_ids_alone():
    records = [{"id": str(i), "image": None, "label": "abc"[i % 3]} for i in range(30)]
    few = take_shots(records, 2, seed=1)
    assert sorted(r["label"] for r in few) == ["a", "a", "b", "b", "c", "c"]
    assert [int(r["id"]) for r in few] == sorted(int(r["id"]) for r in few)
    turned = take_shots(records[::-1], 2, seed=1)
    assert {r["id"] for r in turned} == {r["id"] for r in few}
    assert {r["id"] for r in take_shots(records, 2, seed=2)} != {r["id"] for r in few}
    assert {r["id"] for r in take_shots(records, 1, seed=1)} < {
        r["id"] for r in few
    }  # fewer shots are some of the more
    with pytest.raises(ValueError, match="'a' has only 10 pictures, 11 are asked for"):
        take_shots(records, 11)
    with pytest.raises(ValueError, match="shots=0"):
        take_shots(records, 0)


def test_only_the_shots_taken_are_opened():
    opened = []

    def load(record):
        opened.append(record["id"])
        return record

    many = Records(40, lambda i: {"id": str(i), "image": "x.png", "label": "ab"[i % 2]}, load=load)
    assert len(take_shots(many, 3)) == 6
    assert len(opened) == 6


def test_halves_of_classes():
    assert split_classes(("a", "b", "c", "d")) == (("a", "b"), ("c", "d"))
    assert split_classes(("b", "a", "c")) == (("b", "a"), ("c",))  # in the order given, the odd one to the base
    with pytest.raises(ValueError, match="one class only"):
        split_classes(("a",))


def test_random_views_for_the_trainer():
    encoder = clip_encoder()
    wide = clip_encoder()
    wide.transform = ImagePreprocess(shortest=40, crop=(32, 32))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 50, 3), dtype=np.uint8))
    record = {"id": "a", "image": picture, "label": "x"}
    view = RandomView.for_encoder(encoder)
    one, again, other = (view(record, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert one["image"].size == (32, 32)
    assert one["label"] == "x"
    assert record["image"] is picture
    assert one["image"].tobytes() == again["image"].tobytes() != other["image"].tobytes()
    framed = RandomView.for_encoder(wide)(record, np.random.default_rng(0))
    assert torch.equal(wide.preprocess([framed["image"]]), encoder.preprocess([one["image"]]))  # the margin goes again
    whole = RandomView(32, 32, (1.0, 1.0))(record, np.random.default_rng(0))
    assert np.asarray(whole["image"]).mean() == pytest.approx(np.asarray(picture).mean(), abs=3)


def test_some_labels():
    records = [{"id": 0, "label": "b"}, {"id": 1}, {"id": 2, "label": None}, {"id": 3, "label": "a"}]
    assert partial_labels(records)[0] == ("a", "b")
    assert partial_labels(records)[1].tolist() == [1, -1, -1, 0]
    assert partial_labels(records, ("b", "c", "a"))[1].tolist() == [0, -1, -1, 2]
    assert partial_labels(records, ("x", "y"), ignore=True)[1].tolist() == [-1] * 4
    drawn = scenes("train", 5, 0)  # nothing is rendered
    assert torch.equal(partial_labels(drawn, SHAPES)[1], labels_of(drawn, SHAPES)[1])
    with pytest.raises(ValueError, match="none of the classes: 'b'"):
        partial_labels(records, ("a", "c"))
    with pytest.raises(ValueError, match="no records"):
        partial_labels([], ("a", "c"))
    with pytest.raises(ValueError, match="one class only"):
        partial_labels(records[:2])
