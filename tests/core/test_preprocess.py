"""Pixel parity with the processors of transformers, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from ecliptic.core.preprocess import ImagePreprocess


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


CONFIGS = {
    "clip": CLIPImageProcessorPil(),
    "clip at 336": CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
    "crop larger than the picture": CLIPImageProcessorPil(
        size={"shortest_edge": 60}, crop_size={"height": 97, "width": 64}
    ),
    "siglip": SiglipImageProcessorPil(),
    "bilinear, tall": SiglipImageProcessorPil(size={"height": 96, "width": 64}, resample=2),
    "not normalised": CLIPImageProcessorPil(do_normalize=False),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(640, 480), (481, 641), (224, 224), (17, 500), (333, 32), (1, 1), (225, 224)])
def test_pixels_equal_transformers(name, size):
    processor = CONFIGS[name]
    image = picture(*size)
    expected = processor(images=[image], return_tensors="pt")["pixel_values"]
    found = ImagePreprocess.from_processor(processor.to_dict())([image])
    assert found.shape == expected.shape
    assert torch.equal(found, expected.float())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(16, 64))
def test_any_size(width, height, side):
    if max(width, height) > 40 * min(width, height):
        return  # a strip this thin resizes to millions of pixels in both
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    image = picture(width, height)
    expected = processor(images=[image], return_tensors="pt")["pixel_values"]
    assert torch.equal(ImagePreprocess.from_processor(processor.to_dict())([image]), expected)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "RGBA"])
def test_other_modes_become_rgb(mode):
    image = picture(50, 40, mode=mode)
    expected = CLIPImageProcessorPil()(images=[image.convert("RGB")], return_tensors="pt")["pixel_values"]
    assert torch.equal(ImagePreprocess()([image]), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_survive_a_round_trip(name):
    transform = ImagePreprocess.from_processor(CONFIGS[name].to_dict())
    again = ImagePreprocess.from_processor(transform.to_processor())
    image = picture(77, 130)
    assert torch.equal(transform([image]), again([image]))


def test_what_transformers_reads_back_gives_the_same_pixels():
    transform = ImagePreprocess(shortest=None, size=(64, 48), crop=None, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    image = picture(99, 101)
    theirs = CLIPImageProcessorPil(**transform.to_processor())(images=[image], return_tensors="pt")["pixel_values"]
    assert torch.equal(transform([image]), theirs)


def test_old_configs_with_a_bare_number():
    transform = ImagePreprocess.from_processor(
        {"size": 224, "crop_size": 224, "feature_extractor_type": "CLIPFeatureExtractor"}
    )
    assert (transform.shortest, transform.size, transform.crop) == (224, None, (224, 224))


def test_no_pictures_give_an_empty_batch():
    assert ImagePreprocess()([]).shape == (0, 3, 224, 224)


def test_settings_we_cannot_honour_are_refused():
    with pytest.raises(ValueError, match="do_resize"):
        ImagePreprocess.from_processor({"do_resize": False})
    with pytest.raises(ValueError, match="longest_edge"):
        ImagePreprocess.from_processor({"size": {"shortest_edge": 3, "longest_edge": 9}})
    with pytest.raises(ValueError, match="either"):
        ImagePreprocess(shortest=224, size=(224, 224))


def test_zoomed_multiplies_every_size():
    squeezed = ImagePreprocess(shortest=None, size=(20, 30), crop=None).zoomed(3)
    assert (squeezed.shortest, squeezed.size, squeezed.crop) == (None, (60, 90), None)
    cropped = ImagePreprocess(shortest=10, crop=(10, 8)).zoomed(2)
    assert (cropped.shortest, cropped.size, cropped.crop) == (20, None, (20, 16))
    assert squeezed.zoomed(1) == squeezed
    with pytest.raises(ValueError, match="zoom of 0"):
        squeezed.zoomed(0)
