"""Frozen encoders without names: what they give, and that only a real second network is taken for one."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from ecliptic.core.frozen_features import BackboneFeatures, HandcraftedFeatures, check_phi, default_phi
from ecliptic.core.preprocess import ImagePreprocess
from ecliptic.ops.handcrafted import handcrafted
from tests.towers import FAMILIES, clip_encoder, dual_encoder


def picture(size=(40, 40), seed=0):
    rows = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3))
    return Image.fromarray(rows.astype(np.uint8))


def joined():
    """A stand-in for "offline": a tower whose pooled vector comes from elsewhere, with a DINOv2 beside it."""
    inner = dual_encoder()
    transform = ImagePreprocess(shortest=None, size=(32, 32), crop=None, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    module = SimpleNamespace(backbone=inner.anatomy.image.module)
    image = SimpleNamespace(joined=True, module=module)
    return SimpleNamespace(
        anatomy=SimpleNamespace(image=image), transform=transform, device=inner.device, name="joined"
    )


def test_handcrafted_features_are_those_of_the_resized_picture():
    image = picture((50, 64))
    found = HandcraftedFeatures(32)([image, image.convert("L")])
    rows = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC), np.float32) / 255
    assert_close(found[0], handcrafted(torch.from_numpy(rows).permute(2, 0, 1)[None])[0])
    assert found.shape == (2, 784)


def test_backbone_features_are_class_token_and_mean_patch():
    encoder = joined()
    image = picture((32, 32))
    found = BackboneFeatures(encoder, size=32)([image])
    pixels = (np.asarray(image).transpose(2, 0, 1) / 255 - np.array([0.4, 0.5, 0.6])[:, None, None]) / np.array(
        [0.2, 0.3, 0.4]
    )[:, None, None]
    with torch.no_grad():
        hidden = encoder.anatomy.image.module.backbone(torch.from_numpy(pixels[None]).float()).last_hidden_state
    assert_close(found, torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], -1), atol=1e-5, rtol=1e-4)
    assert BackboneFeatures(encoder, size=16)([image]).shape == (1, 64)  # positions are interpolated


def test_which_one_is_taken():
    assert isinstance(default_phi(joined()), BackboneFeatures)
    assert isinstance(default_phi(joined(), "backbone"), BackboneFeatures)
    assert isinstance(default_phi(joined(), "handcrafted"), HandcraftedFeatures)
    for make in FAMILIES.values():  # a DINOv2 that names pictures itself is no second one
        assert isinstance(default_phi(make()), HandcraftedFeatures)
    with pytest.raises(ValueError, match="tiny-clip has no second network"):
        default_phi(clip_encoder(), "backbone")
    with pytest.raises(ValueError, match="features='dino': choose one of auto, backbone, handcrafted"):
        default_phi(clip_encoder(), "dino")


def test_what_a_phi_may_give():
    assert check_phi(torch.ones(2, 3, dtype=torch.float64, requires_grad=True), 2).dtype == torch.float32
    assert not check_phi(torch.ones(2, 3, requires_grad=True), 2).requires_grad
    for wrong, message in (
        (torch.ones(3), r"tensor \(2, d\) for 2 pictures, it gave \(3,\)"),
        (torch.ones(3, 4), r"it gave \(3, 4\)"),
        ([1, 2], "it gave list"),
        (torch.tensor([[1.0], [torch.nan]]), "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            check_phi(wrong, 2)
