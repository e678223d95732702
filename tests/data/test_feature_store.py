"""Features kept by model, picture and view: the same rows, computed once, after a kill too."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from ecliptic.data.feature_store import FeatureStore, keeping, open_store, picture_key
from ecliptic.data.folder import folder
from ecliptic.data.shots import encode_views, tiny_records
from tests.towers import FAMILIES


@pytest.fixture
def encoder(monkeypatch):
    """A small encoder that counts the pictures it is asked for."""
    found = FAMILIES["clip"]()
    plain, found.seen = found.encode_images, 0

    def counting(items, *args, **options):
        items = list(items)
        found.seen += len(items)
        return plain(items, *args, **options)

    monkeypatch.setattr(found, "encode_images", counting)
    return found


def test_the_same_rows_computed_once(encoder):
    records = tiny_records()
    plain, views = encode_views(encoder, records, views=2, seed=3)
    assert encoder.seen == 36
    with keeping(FeatureStore()) as store:
        for _ in range(2):
            kept, kept_views = encode_views(encoder, records, views=2, seed=3)
            assert torch.equal(kept, plain)
            assert torch.equal(kept_views, views)
        assert encoder.seen == 72
        assert len(store) == 36
        some, _ = encode_views(encoder, records[3:5])
        assert torch.equal(some, plain[3:5])
        assert encoder.seen == 72
        encode_views(encoder, records, views=3, seed=3)  # one view more is all that is computed
        assert encoder.seen == 84
        encode_views(encoder, records, views=1, seed=4)  # another seed, other views
        assert encoder.seen == 96
        encode_views(encoder, records, views=1, seed=4, crop=(0.9, 1.0))
        assert encoder.seen == 108
    assert open_store() is None
    encode_views(encoder, records)
    assert encoder.seen == 120


def test_files_are_opened_only_for_what_is_missing(encoder, tmp_path):
    for i, name in enumerate("abc"):
        Image.new("RGB", (40, 40), (80 * i, 0, 0)).save(tmp_path / f"{name}.png")
    records = folder(tmp_path)
    with keeping(FeatureStore(tmp_path / "kept")):
        rows, views = encode_views(encoder, records, views=1)
    with keeping(FeatureStore(tmp_path / "kept")) as store:  # another process
        assert len(store) == 6
        again, again_views = encode_views(encoder, records[[2, 0]], views=1)
        assert encoder.seen == 6
        assert torch.equal(again, rows[[2, 0]])
        assert torch.equal(again_views, views[:, [2, 0]])
        Image.new("RGB", (41, 40), (0, 255, 0)).save(tmp_path / "b.png")  # the file is another one now
        changed, _ = encode_views(encoder, records)
        assert encoder.seen == 7
        assert torch.equal(changed[[0, 2]], rows[[0, 2]])
        assert not torch.equal(changed[1], rows[1])


def test_another_model_has_features_of_its_own(encoder):
    records = tiny_records()
    with keeping(FeatureStore()) as store:
        before, _ = encode_views(encoder, records)
        with torch.no_grad():
            next(iter(encoder.model.vision_model.parameters())).add_(1)  # written to in place
        after, _ = encode_views(encoder, records)
        assert len(store) == 24
        assert not torch.equal(before, after)


def test_rows_that_are_not_finite_are_not_kept(encoder, tmp_path):
    store = FeatureStore(tmp_path)
    asked = []

    def encode(positions):
        asked.append(positions)
        return torch.tensor([[1.0, 2.0], [float("nan"), 0.0]])[positions]

    for _ in range(2):
        rows = store.rows(encoder, ["good", "bad"], encode)
        assert rows[0].tolist() == [1, 2]
        assert rows[1].isnan().any()
    assert asked == [[0, 1], [1]]
    assert len(FeatureStore(tmp_path)) == 1


def test_pictures_are_told_apart_by_content():
    red, green = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "green")
    keys = [picture_key({"image": image}) for image in (red, red.copy(), green, green.convert("L"), b"ab", b"ac")]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 5
