"""Decoding: fast where asked, upright always, and near enough to the exact embedding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ecliptic
from ecliptic.core.inputs import open_picture, shrink_on_load
from ecliptic.data.scenes import scenes
from tests.towers import FAMILIES


def large_jpeg(path: Path, seed: int, size: tuple[int, int] = (1200, 900), orientation: int = 1) -> Path:
    """A rendered scene enlarged, with detail at several scales and the noise of a sensor."""
    rng = np.random.default_rng(seed)
    drawn = scenes("test", n=seed + 1, size=300, kind="multi", seed=0)[seed]["image"]
    pixels = np.asarray(drawn.resize(size, Image.Resampling.BICUBIC), np.float32)
    for cell in (2, 8):
        grain = rng.normal(0, 6, (size[1] // cell, size[0] // cell)).astype(np.float32)
        pixels = pixels + np.asarray(Image.fromarray(grain).resize(size, Image.Resampling.BICUBIC))[..., None]
    pixels += rng.normal(0, 3, pixels.shape)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, quality=90, exif=exif)
    return path


@pytest.mark.parametrize(
    ("size", "side", "wanted"),
    [
        ((1200, 900), 96, (150, 113)),  # an eighth
        ((1200, 900), 114, (300, 225)),  # an eighth would be 113 high
        ((900, 1200), 225, (225, 300)),
        ((1200, 900), 226, (600, 450)),
        ((1200, 900), 451, (1200, 900)),
        ((1200, 900), 5000, (1200, 900)),
    ],
)
def test_no_side_gets_smaller_than_asked(tmp_path, size, side, wanted):
    with Image.open(large_jpeg(tmp_path / "a.jpg", 0, size)) as image:
        shrink_on_load(image, side)
        assert image.size == wanted


def test_other_formats_are_read_in_full(tmp_path):
    picture = Image.open(large_jpeg(tmp_path / "a.jpg", 0))
    picture.save(tmp_path / "a.png")
    assert open_picture(tmp_path / "a.png", fast_side=96).size == (1200, 900)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_fast_decoding_turns_pictures_upright(tmp_path, orientation):
    path = large_jpeg(tmp_path / "a.jpg", 0, orientation=orientation)
    fast, exact = open_picture(path, fast_side=96), open_picture(path)
    assert fast.size == ((150, 113) if orientation < 5 else (113, 150))
    small = exact.resize(fast.size, Image.Resampling.BOX)
    assert np.abs(np.asarray(fast, np.float32) - np.asarray(small, np.float32)).mean() < 4


@pytest.mark.parametrize("family", FAMILIES)
def test_fast_is_near_the_exact_embedding(family, tmp_path):
    encoder = FAMILIES[family]()
    files = [large_jpeg(tmp_path / f"{seed}.jpg", seed, orientation=1 + 5 * (seed % 2)) for seed in range(4)]
    exact, fast = encoder.encode_images(files), encoder.encode_images(files, decode="fast")
    assert (exact - fast).abs().max() > 1e-6  # or nothing was measured
    assert (exact * fast).sum(1).min() > 0.99


def test_fast_keeps_what_the_tiny_model_sees(tmp_path):
    encoder = ecliptic.load("tiny")
    files = [large_jpeg(tmp_path / f"{seed}.jpg", seed) for seed in range(6)]
    exact, fast = encoder.encode_images(files), encoder.encode_images(files, decode="fast")
    assert (exact * fast).sum(1).min() > 0.99
    assert (exact @ exact.T).min() < 0.9  # different pictures are further apart than that


def test_decoding_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match='"fast", a function, or None'):
        FAMILIES["clip"]().encode_images([], decode="quick")
