import numpy as np
import pytest
from PIL import Image

from ecliptic.eval.overlay import COLOURS, colour, overlay, stretch


def lightness(rgb):
    """OKLab L of an sRGB triple, from the definition (Ottosson 2020)."""
    c = np.asarray(rgb, dtype=float) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    lms = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    return float(np.array([0.2104542553, 0.7936177850, -0.0040720468]) @ np.cbrt(lms @ linear))


def test_lightness_of_the_ramp_rises_in_even_steps():
    steps = np.diff([lightness(rgb) for rgb in COLOURS])
    np.testing.assert_allclose(steps, 0.72 / 16, atol=0.006)


def test_colour_meets_its_anchors_and_interpolates():
    np.testing.assert_array_equal(colour(np.linspace(0, 1, len(COLOURS))), COLOURS)
    np.testing.assert_array_equal(colour([-1.0, 2.0]), [COLOURS[0], COLOURS[-1]])
    middle = (np.array(COLOURS[0]) + np.array(COLOURS[1])) / 2
    np.testing.assert_allclose(colour(0.5 / 16), middle, atol=0.51)


def test_stretch():
    np.testing.assert_allclose(stretch([[2.0, 4.0, 3.0]]), [[0, 1, 0.5]])
    np.testing.assert_allclose(stretch([[2.0, 4.0]], low=0, high=3), [[2 / 3, 1]])
    np.testing.assert_array_equal(stretch(np.full((2, 2), 7.0)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="NaN"):
        stretch([[np.nan]])
    with pytest.raises(ValueError, match=r"\(H, W\)"):
        stretch([1.0])


def test_strong_places_take_the_colour_weak_places_keep_the_picture():
    image = Image.new("RGB", (40, 20), (100, 100, 100))
    heat = np.zeros((2, 4))
    heat[:, 3] = 1.0
    out = np.asarray(overlay(image, heat, opacity=1.0))
    assert out.shape == (20, 40, 3)
    np.testing.assert_array_equal(out[:, :10], np.full((20, 10, 3), 100))
    np.testing.assert_array_equal(out[:, -3:], np.broadcast_to(COLOURS[-1], (20, 3, 3)))
    half = np.asarray(overlay(image, heat, opacity=0.5))
    np.testing.assert_allclose(half[0, -1], (100 + np.array(COLOURS[-1])) / 2, atol=1)
    np.testing.assert_array_equal(np.asarray(image), np.full((20, 40, 3), 100))  # the given picture is left alone


def test_same_ends_make_maps_comparable():
    image = Image.new("RGB", (8, 8), "white")
    weak, strong = np.full((2, 2), 0.1), np.full((2, 2), 0.9)
    assert (
        np.asarray(overlay(image, weak, low=0, high=1)).mean()
        > np.asarray(overlay(image, strong, low=0, high=1)).mean()
    )


@pytest.mark.parametrize("legend", ["more", ("less", "more"), ("", "")])
def test_legend_stands_below_the_picture(legend):
    image = Image.new("RGB", (200, 50), (10, 20, 30))
    out = overlay(image, np.eye(4), legend=legend)
    assert out.width == 200
    assert out.height > 50
    strip = np.asarray(out)[50:]
    assert (strip == np.array(COLOURS[-1])).all(-1).any()
    assert (strip == 255).all(-1).any()
    assert overlay(Image.new("L", (6, 6)), np.eye(2), legend="a very long word").size[0] == 6
    with pytest.raises(ValueError, match="opacity"):
        overlay(image, np.eye(2), opacity=2)
