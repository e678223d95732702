"""Random resized crops: shares, shapes, places, reproducibility."""

import numpy as np
import pytest
import torch
from PIL import Image

from ecliptic.ops.augment import random_view, resized_crop_box


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def ramp(width=60, height=40):
    """Red grows with x, green with y: a view tells where it came from."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 255 // (width - 1), y * 255 // (height - 1), 0 * x], -1).astype(np.uint8))


def test_boxes_keep_to_their_share_shape_and_picture():
    g = generator()
    boxes = np.array([resized_crop_box((640, 480), g, (0.5, 1.0)) for _ in range(2000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0
    assert boxes[:, 2].max() <= 640
    assert boxes[:, 3].max() <= 480
    share, ratio = w * h / (640 * 480), w / h
    assert share.min() > 0.49
    assert share.max() <= 1.0
    assert 0.74 < ratio.min() < 0.8
    assert 1.2 < ratio.max() < 1.35
    assert boxes[:, 0].min() == 0  # both edges are reached
    assert (boxes[:, 2] == 640).any()


def test_places_are_uniform():
    g = generator()
    boxes = [resized_crop_box((100, 100), g, (0.25, 0.25), (1.0, 1.0)) for _ in range(4000)]  # 50 x 50 in 51 places
    left = np.array([box[0] for box in boxes])
    assert set(left) == set(range(51))
    assert abs(left.mean() - 25) < 1


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000), (1, 1), (1, 500)])
def test_extreme_pictures_fall_back_to_the_centre(size):
    left, top, right, bottom = resized_crop_box(size, generator(), (0.5, 1.0))
    assert 0 <= left < right <= size[0]
    assert 0 <= top < bottom <= size[1]
    assert abs(left + right - size[0]) <= 1  # centred
    assert abs(top + bottom - size[1]) <= 1


def test_a_view_is_the_crop_it_says():
    image = ramp()
    view = np.asarray(random_view(image, 32, generator(3), (0.5, 0.5), flip=0.0), float)
    box = resized_crop_box(image.size, generator(3), (0.5, 0.5))
    expected = [box[0] / 59 * 255, box[1] / 39 * 255, (box[2] - 1) / 59 * 255, (box[3] - 1) / 39 * 255]
    found = [view[:, 0, 0].mean(), view[0, :, 1].mean(), view[:, -1, 0].mean(), view[-1, :, 1].mean()]
    assert np.abs(np.array(found) - expected).max() < 8
    assert view.shape == (32, 32, 3)


def test_flip_mirrors_and_happens_half_of_the_time():
    image = ramp()
    straight, mirrored = (np.asarray(random_view(image, 16, generator(1), flip=f)) for f in (0.0, 1.0))
    assert np.array_equal(mirrored, straight[:, ::-1])
    g = generator()
    views = [np.asarray(random_view(image, 8, g)).astype(int) for _ in range(400)]
    share = np.mean([v[0, 0, 0] > v[0, -1, 0] for v in views])
    assert 0.42 < share < 0.58


def test_same_seed_same_view_and_the_picture_stays():
    image = ramp()
    before = image.tobytes()
    one, two, other = (random_view(image, 24, generator(s)).tobytes() for s in (5, 5, 6))
    assert one == two != other
    assert image.tobytes() == before
    assert random_view(image.convert("L"), 24, generator()).mode == "RGB"
