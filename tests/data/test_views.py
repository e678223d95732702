"""Weak and strong views: the first are the encoder's own, the second depend on seed, epoch and place alone."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from ecliptic.core.batches import Order
from ecliptic.data.shots import tiny_records
from ecliptic.data.views import StrongBatches, encoded_strong_batches, weak_views
from tests.towers import FAMILIES, SIZE, clip_encoder

LABELS = torch.arange(12) % 5


def test_weak_views_are_what_the_encoder_sees():
    records = tiny_records() * 3  # more than are encoded at a time
    for make in FAMILIES.values():
        encoder = make()
        found = list(weak_views(encoder, records))
        assert [len(pictures) for pictures, _ in found] == [32, 4]
        assert torch.equal(torch.cat([p for _, p in found]), encoder.preprocess([r["image"] for r in records]))
        pictures = [picture for group, _ in found for picture in group]
        assert {p.size for p in pictures} == {(SIZE, SIZE)}
        assert torch.equal(encoder.preprocess(pictures[:2]), found[0][1][:2])


def test_strong_batches_depend_on_seed_and_number_alone():
    encoder = clip_encoder()
    one, two, other = (StrongBatches(encoder, tiny_records(), LABELS, 4, seed) for seed in (0, 0, 1))
    for i in (4, 1):
        assert torch.equal(one(i)["pixels"], two(i)["pixels"])
    assert not torch.equal(one(0)["pixels"], other(0)["pixels"])
    assert one(0)["pixels"].shape == (4, 3, SIZE, SIZE)


def test_labels_stay_with_their_pictures():
    """Pictures of one plain colour each, and a label that says which."""
    records = [{"image": Image.new("RGB", (40, 40), (20 * i, 20 * i, 20 * i)), "label": "not this"} for i in range(12)]
    encoder = clip_encoder()
    batches = StrongBatches(encoder, records, torch.arange(12), 6, seed=3)
    for i in range(4):
        batch = batches(i)
        assert torch.equal(batch["label"], torch.from_numpy(Order(12, 6, 3)(i)))
        black = batch["label"] == 0
        assert (batch["pixels"][black].amax((1, 2, 3)) < -1.4).all()  # whatever is done to black, it stays black
        assert (batch["pixels"][batch["label"] > 6].amax((1, 2, 3)) > -1.0).all()
    assert sorted(torch.cat([batches(i)["label"] for i in (0, 1)]).tolist()) == list(range(12))


def test_every_epoch_has_other_views():
    encoder, record = clip_encoder(), tiny_records()[:1]
    batches = StrongBatches(encoder, record, LABELS[:1], 1)
    assert not torch.equal(batches(0)["pixels"], batches(1)["pixels"])


@pytest.mark.parametrize("family", FAMILIES)
def test_encoded_views_are_strong_views_encoded_once(family):
    encoder = FAMILIES[family]()
    batch = encoded_strong_batches(encoder, tiny_records(), LABELS, 4, views=2, seed=7)
    order = Order(12, 4, 7)
    first = {int(i): z for n in range(3) for i, z in zip(order(n), batch(n)["z"])}
    second = {int(i): z for n in range(3, 6) for i, z in zip(order(n), batch(n)["z"])}
    third = {int(i): z for n in range(6, 9) for i, z in zip(order(n), batch(n)["z"])}
    assert all(torch.equal(first[i], third[i]) for i in range(12))
    assert not any(torch.equal(first[i], second[i]) for i in range(12))
    for n in range(6):
        assert torch.equal(batch(n)["label"], LABELS[torch.from_numpy(order(n))])
    from ecliptic.ops.augment import strong_view

    seed = int(np.random.default_rng([7, 1, 5]).integers(2**62))  # second view of the sixth record
    view = strong_view(tiny_records()[5]["image"], SIZE, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected = encoder.images(encoder.preprocess([view]), normalize=False).pooled[0]
    assert_close(second[5], expected, atol=1e-5, rtol=1e-4)


def test_records_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="3 labels for 12 records"):
        StrongBatches(clip_encoder(), tiny_records(), LABELS[:3], 4)
    with pytest.raises(ValueError, match="record 'x' has no 'image'"):
        next(weak_views(clip_encoder(), [{"id": "x", "caption": "nothing"}]))
