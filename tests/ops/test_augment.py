"""Random crops, colours, perspectives and strong views: what they are, how much they may do, reproducibility."""

import numpy as np
import pytest
import torch
from PIL import Image

from ecliptic.ops.augment import (
    colour_jitter,
    perspective_coefficients,
    random_perspective,
    random_view,
    resized_crop_box,
    strong_view,
    turned_hue,
)


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


# Strong views


def plain(*colour, size=(8, 6)):
    return Image.new("RGB", size, colour)


@pytest.mark.parametrize(
    ("strength", "low", "high"),
    [  # of one plain colour (200, 100, 50), whose grey is 124 (ITU-R BT.601), by factors of 0.6 to 1.4
        ({"brightness": 0.4}, (120, 60, 30), (255, 140, 70)),
        ({"saturation": 0.4}, (169, 110, 80), (230, 90, 20)),
    ],
)
def test_light_and_saturation_stay_in_their_range(strength, low, high):
    off = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}
    g = generator()
    found = np.array([colour_jitter(plain(200, 100, 50), g, **(off | strength)).getpixel((0, 0)) for _ in range(500)])
    for channel, (a, b) in enumerate(zip(low, high)):
        least, most = min(a, b), max(a, b)
        assert least - 1 <= found[:, channel].min() <= least + 3
        assert most - 3 <= found[:, channel].max() <= most + 1


def test_contrast_is_about_the_mean_grey():
    halves = np.full((4, 4, 3), 50, np.uint8)
    halves[:, 2:] = 150  # mean 100
    g, seen = generator(), []
    for _ in range(50):
        view = np.asarray(colour_jitter(Image.fromarray(halves), g, 0, 0.5, 0, 0)).astype(int)
        assert abs((view[0, 0, 0] + view[0, -1, 0]) / 2 - 100) <= 1
        seen.append(view[0, -1, 0] - view[0, 0, 0])
    assert 48 <= min(seen) <= 60
    assert 140 <= max(seen) <= 152


def test_hue_turns_colours_and_leaves_greys():
    assert turned_hue(plain(255, 0, 0), 1 / 3).getpixel((0, 0))[1] >= 250
    assert turned_hue(plain(255, 0, 0), -1 / 3).getpixel((0, 0))[2] >= 250
    assert turned_hue(plain(90, 90, 90), 0.4).getpixel((0, 0)) == (90, 90, 90)
    assert turned_hue(plain(10, 200, 30), 0.0).getpixel((0, 0)) == (10, 200, 30)
    g = generator()
    turned = [colour_jitter(plain(255, 0, 0), g, 0, 0, 0, 0.1).getpixel((0, 0)) for _ in range(200)]
    assert max(green for _, green, _ in turned) > 120  # 0.1 of the circle: 36 of 60 degrees towards yellow
    assert max(blue for _, _, blue in turned) > 120
    assert all(red == 255 for red, _, _ in turned)


def test_no_jitter_is_no_change_and_too_much_is_refused():
    assert np.array_equal(colour_jitter(ramp(), generator(), 0, 0, 0, 0), ramp())
    for wrong in ({"brightness": -0.1}, {"hue": 0.6}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            colour_jitter(ramp(), generator(), **wrong)


def test_the_order_of_changes_varies():
    g = generator()
    image = plain(200, 100, 50)
    dark = {colour_jitter(image, g, 0.4, 0.4, 0.4, 0.1).getpixel((0, 0)) for _ in range(50)}
    assert len(dark) == 50


def test_perspective_takes_corners_where_it_says():
    output, source = [(3, 2), (50, 1), (57, 38), (4, 33)], [(0, 0), (60, 0), (60, 40), (0, 40)]
    a, b, c, d, e, f, g, h = perspective_coefficients(output, source)
    for (u, v), (x, y) in zip(output, source):
        below = g * u + h * v + 1
        assert (a * u + b * v + c) / below == pytest.approx(x, abs=1e-9)
        assert (d * u + e * v + f) / below == pytest.approx(y, abs=1e-9)
    assert perspective_coefficients(source, source) == pytest.approx((1, 0, 0, 0, 1, 0, 0, 0), abs=1e-12)


def test_perspective_moves_corners_inwards_by_at_most_half_of_the_distortion():
    white = plain(255, 255, 255, size=(100, 80))
    assert np.array_equal(random_perspective(white, generator(), 0.0), white)
    g = generator()
    views = np.stack([np.asarray(random_perspective(white, g, 0.2))[..., 0] / 255 for _ in range(60)])
    assert views[:, 8:-8, 10:-10].min() == 1.0  # a tenth of the side at most
    assert views[:, 6, 50].min() == 0  # and nearly that has been seen
    for corner in (views[:, 0, 0], views[:, 0, -1], views[:, -1, 0], views[:, -1, -1]):
        assert corner.mean() < 0.1
    with pytest.raises(ValueError, match="distortion=1"):
        random_perspective(white, generator(), 1.0)


def test_strong_views_differ_more_than_weak_ones_and_repeat():
    image = ramp(64, 64)
    before = image.tobytes()
    one, two, other = (strong_view(image, 32, generator(s)).tobytes() for s in (5, 5, 6))
    assert one == two != other
    assert image.tobytes() == before
    view = strong_view(image.convert("L"), 32, generator())
    assert (view.mode, view.size) == ("RGB", (32, 32))


def test_a_strong_view_with_nothing_strong_is_the_crop():
    image, off = ramp(), {"jitter": (0, 0, 0, 0), "distortion": 0, "sigma": (0, 0)}
    assert np.array_equal(strong_view(image, 32, generator(3), **off), random_view(image, 32, generator(3), (0.2, 1.0)))


def test_shares_of_strong_views():
    """Each change, alone, happens as often as it should."""
    off = {"jitter": (0, 0, 0, 0), "distortion": 0, "sigma": (0, 0)}

    def changed(image, **on):
        g = generator()
        views = [np.asarray(strong_view(image, 16, g, **(off | on))).astype(int) for _ in range(500)]
        return np.mean([np.abs(view - np.array(image.getpixel((0, 0)))).max() > 2 for view in views])

    assert 0.44 < changed(plain(255, 255, 255, size=(32, 32)), distortion=0.9) < 0.56
    assert 0.93 < changed(plain(200, 100, 50, size=(32, 32)), jitter=(0, 0, 1.0, 0)) < 0.985  # 1 - 0.2^2: there are two


def test_blur_is_in_proportion_to_the_view():
    edge = np.zeros((224, 224, 3), np.uint8)
    edge[:, 112:] = 255
    off = {"scale": (1, 1), "jitter": (0, 0, 0, 0), "distortion": 0}

    def width(size, sigma):
        row = np.asarray(strong_view(Image.fromarray(edge), size, generator(), sigma=(sigma, sigma), **off))[
            size // 2, :, 0
        ]
        return np.abs(np.diff(row.astype(float))).max()

    sharp, wide = width(224, 0.0), width(224, 8.0)
    assert wide < sharp / 10
    assert width(56, 8.0) == pytest.approx(4 * wide, rel=0.3)  # a quarter of the pixels, a quarter of the blur
