"""Exported models: what ONNX Runtime answers is what torch answers, without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ecliptic.core.dense import text_heatmap
from ecliptic.core.encoder import LoadError, load
from ecliptic.core.export import CAPTIONS, TOLERANCE, export, samples
from ecliptic.core.exported import EXPORT_CARD, ExportedModel, ExportError
from ecliptic.core.exported_encoder import ExportedEncoder
from ecliptic.core.inputs import TextTooLong, TruncationWarning
from tests.towers import FAMILIES, SIZE, clip_encoder

ROOT = Path(__file__).parents[2]
TEXTS = [
    "a cat",
    "a drawing of a blue circle left of a green square",
    "the moon",
    "a cat",
    "",
    "a small dog and a red ball",
]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """An encoder of every family and its export."""
    encoder = FAMILIES[request.param]()
    folder = tmp_path_factory.mktemp("exported") / request.param
    encoder.train()  # the export is of the evaluating model, and leaves the mode alone
    parity = export(encoder, folder)
    assert all(module.training for module in encoder.modules())
    assert (parity.pictures, parity.captions) == (len(samples()), len(CAPTIONS))
    assert 0 <= max(parity.images, parity.texts, parity.patches) < 1e-5 < TOLERANCE
    return encoder.eval(), ExportedModel.open(folder)


def pictures(n: int = 5) -> list[Image.Image]:
    rng = np.random.default_rng(1)
    sizes = [(37, 41), (SIZE, SIZE), (100, 33), (31, 200), (640, 481)]
    return [Image.fromarray(rng.integers(0, 256, (*sizes[i % 5][::-1], 3), dtype=np.uint8)) for i in range(n)]


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_captions_of_any_length_in_any_batches(pair, batch_size):
    encoder, exported = pair
    theirs, ours = encoder.encode_texts(TEXTS).numpy(), exported.encode_texts(TEXTS, batch_size)
    assert ours.dtype == np.float32
    assert ours.shape == (len(TEXTS), encoder.dim)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_array_equal(ours[0], ours[3])
    assert np.abs(theirs[0] - theirs[1]).max() > 1e-3  # or the comparison could not fail


@pytest.mark.parametrize("batch_size", [1, 3])
def test_pictures_of_any_size_in_any_batches(pair, batch_size):
    encoder, exported = pair
    given = pictures()
    theirs = encoder.encode_images(given).numpy()
    np.testing.assert_allclose(exported.encode_images(given, batch_size), theirs, atol=1e-5)
    assert np.abs(theirs[0] - theirs[2]).max() > 1e-3
    quick = ExportedModel.open(exported.folder, quick=True, threads=1)
    np.testing.assert_allclose(quick.encode_images(given), theirs, atol=1e-5)
    np.testing.assert_allclose(quick.encode_texts(TEXTS), encoder.encode_texts(TEXTS).numpy(), atol=1e-5)


def test_pixels_are_the_same_to_the_bit(pair):
    encoder, exported = pair
    assert repr(exported.transform) == repr(encoder.transform)
    for picture in pictures():
        np.testing.assert_array_equal(exported.transform.pixels([picture]), encoder.preprocess([picture]).numpy())


def test_what_it_says_of_itself(pair):
    encoder, exported = pair
    assert (exported.id, exported.name, exported.dim) == (encoder.id, encoder.name, encoder.dim)
    assert exported.max_tokens == encoder.max_tokens
    a, b = encoder.encode_images(pictures()), encoder.encode_texts(TEXTS)
    with torch.no_grad():
        theirs = encoder.logits(a, b).numpy()
    np.testing.assert_allclose(exported.logits(a.numpy(), b.numpy()), theirs, rtol=1e-5, atol=1e-4)


def test_long_captions_follow_the_same_policies(pair):
    encoder, exported = pair
    long = ["a red ball " * 40, "a cat"]
    with pytest.raises(TextTooLong, match="caption 0 has"):
        exported.encode_texts(long, overflow="error")
    with pytest.warns(TruncationWarning, match="1 of 2 captions"):
        cut = exported.encode_texts(long)
    with pytest.warns(TruncationWarning):
        np.testing.assert_allclose(cut, encoder.encode_texts(long).numpy(), atol=1e-5)
    read = exported.encode_texts(long, overflow="windows")
    np.testing.assert_allclose(read, encoder.encode_texts(long, overflow="windows").numpy(), atol=1e-5)
    assert np.abs(read - cut).max() > 1e-4  # ten times what the two lines above allow


def test_nothing_to_embed(pair):
    encoder, exported = pair
    assert exported.encode_texts([]).shape == encoder.encode_texts([]).shape == (0, encoder.dim)
    assert exported.encode_images([]).shape == (0, encoder.dim)
    with pytest.raises(TypeError, match="not one string"):
        exported.encode_texts("a cat")


def test_a_picture_that_fails_is_noted_or_raised(pair, tmp_path):
    _, exported = pair
    given = [*pictures(1), tmp_path / "missing.png"]
    errors: dict[int, Exception] = {}
    rows = exported.encode_images(given, errors=errors)
    assert list(errors) == [1]
    assert not rows[1].any()
    with pytest.raises(FileNotFoundError):
        exported.encode_images(given)


def test_graphs_are_plain_onnx_with_their_weights_beside_them(pair):
    import onnx

    _, exported = pair
    for name in ("image", "patches", "text"):
        path = exported.folder / f"{name}.onnx"
        onnx.checker.check_model(path)
        graph = onnx.load(path, load_external_data=False)
        assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 17)]
        weights = exported.folder / f"{name.replace('patches', 'image')}.onnx.data"
        assert path.stat().st_size < weights.stat().st_size
    assert sorted(path.name for path in exported.folder.iterdir()) == [
        "export.json", "image.onnx", "image.onnx.data", "patches.onnx", "preprocessor_config.json", "text.onnx", "text.onnx.data",
        "tokenizer.json",
    ]  # fmt: skip


def test_runs_without_torch(pair, tmp_path):
    encoder, exported = pair
    picture = tmp_path / "one.png"
    pictures(1)[0].save(picture)
    code = f"""
import sys, numpy as np
from ecliptic.core.exported import ExportedModel
model = ExportedModel.open({str(exported.folder)!r}, quick=True)
rows = [model.encode_texts({TEXTS!r}), model.encode_images([{str(picture)!r}])]
np.save({str(tmp_path / "rows.npy")!r}, np.concatenate(rows))
heavy = ("torch", "transformers", "sklearn", "scipy", "onnx", "ecliptic.core.encoder")
print([name for name in heavy if name in sys.modules])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    wanted = np.concatenate([encoder.encode_texts(TEXTS).numpy(), encoder.encode_images([picture]).numpy()])
    np.testing.assert_allclose(np.load(tmp_path / "rows.npy"), wanted, atol=1e-5)


def test_an_export_that_differs_is_refused(tmp_path, monkeypatch):
    encoder = clip_encoder()
    monkeypatch.setattr(ExportedModel, "encode_texts", lambda self, texts: encoder.encode_texts(texts).numpy() + 2e-4)
    with pytest.raises(ExportError, match=r"captions differ by 2\.0e-04"):
        export(encoder, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(ExportedModel, "token_ids", lambda self, texts, overflow: [[0] for _ in texts])
    with pytest.raises(ExportError, match="own ids"):
        export(encoder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_exported_are_named(tmp_path):
    encoder = clip_encoder()
    with pytest.raises(ExportError, match="not in float32"):
        export(clip_encoder().half(), tmp_path / "out")
    encoder.tokenizer = None
    with pytest.raises(ExportError, match="tiny-clip: its tokenizer"):
        export(encoder, tmp_path / "out")
    encoder = clip_encoder()
    encoder.transform = type(encoder.transform)(shortest=64, crop=(64, 64))
    with pytest.raises(ExportError, match="64 x 64 for a tower of 32 x 32"):
        export(encoder, tmp_path / "out")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "diary.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="other files"):
        export(clip_encoder(), tmp_path / "taken")


def test_folders_that_hold_no_export(pair, tmp_path):
    _, exported = pair
    with pytest.raises(ExportError, match=f"no {EXPORT_CARD}"):
        ExportedModel.open(tmp_path)
    (tmp_path / EXPORT_CARD).write_text("{")
    with pytest.raises(ExportError, match="damaged"):
        ExportedModel.open(tmp_path)
    card = json.loads((exported.folder / EXPORT_CARD).read_text())
    (tmp_path / EXPORT_CARD).write_text(json.dumps({**card, "format": 99}))
    (tmp_path / "preprocessor_config.json").write_bytes((exported.folder / "preprocessor_config.json").read_bytes())
    with pytest.raises(ExportError, match="newer version"):
        ExportedModel.open(tmp_path)
    (tmp_path / EXPORT_CARD).write_text(json.dumps(card))
    (tmp_path / "image.onnx").write_bytes(b"not a graph")
    with pytest.raises(ExportError, match=r"image\.onnx cannot be opened"):
        ExportedModel.open(tmp_path).encode_images(pictures(1))
    (tmp_path / EXPORT_CARD).write_text(json.dumps({**card, "format": 1}))
    with pytest.raises(ExportError, match="older version"):
        ExportedModel.open(tmp_path)
    with pytest.raises(LoadError, match="older version"):
        load(tmp_path)


def test_without_onnx_the_extra_is_named(tmp_path, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"ecliptic\[export\]"):
        export(clip_encoder(), tmp_path / "out")


def test_without_onnxruntime_the_extra_is_named(pair, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"ecliptic\[search\]"):
        ExportedModel.open(pair[1].folder).encode_texts(["a cat"])


# The same, as an encoder


def test_a_loaded_export_is_an_encoder(pair):
    encoder, exported = pair
    twin = load(exported.folder)
    assert isinstance(twin, ExportedEncoder)
    assert (twin.id, twin.name, twin.dim, twin.image_size) == (
        encoder.id,
        encoder.name,
        encoder.dim,
        encoder.image_size,
    )
    torch.testing.assert_close(twin.encode_images(pictures()), encoder.encode_images(pictures()), atol=1e-5, rtol=0)
    torch.testing.assert_close(twin.encode_texts(TEXTS), encoder.encode_texts(TEXTS), atol=1e-5, rtol=0)
    tokens, theirs = twin.tokenize(TEXTS), encoder.tokenize(TEXTS)
    assert torch.equal(tokens.ids, theirs.ids)
    assert torch.equal(tokens.mask, theirs.mask)
    assert not list(twin.parameters())
    with torch.no_grad():
        pixels = encoder.preprocess(pictures())
        ours, wanted = twin.images(pixels, patches=True), encoder.images(pixels, patches=True)
        texts = encoder.texts(theirs).pooled
        maps = text_heatmap(encoder, pixels, texts, background=texts[:2])
        logits = encoder.logits(wanted.pooled, texts)
    torch.testing.assert_close(ours.tokens, wanted.tokens, atol=1e-5, rtol=1e-4)
    assert ours.grid == wanted.grid
    torch.testing.assert_close(twin.images(pixels).pooled, wanted.pooled, atol=1e-5, rtol=0)
    torch.testing.assert_close(twin.texts(tokens).pooled, texts, atol=1e-5, rtol=0)
    torch.testing.assert_close(text_heatmap(twin, pixels, texts, background=texts[:2]), maps, atol=1e-4, rtol=0)
    torch.testing.assert_close(twin.logits(wanted.pooled, texts), logits, atol=1e-4, rtol=1e-5)


def test_what_an_exported_encoder_cannot_do_it_says(pair, tmp_path):
    encoder, exported = pair
    twin = load(exported.folder)
    pixels = encoder.preprocess(pictures(1))
    for call in (
        lambda: twin.images(pixels, layers=[0]),
        lambda: twin.images(pixels, normalize=False),
        lambda: twin.texts(twin.tokenize(TEXTS), words=True),
    ):
        with pytest.raises(ExportError, match="was exported"):
            call()
    with pytest.raises(ExportError, match=rf"\(B, 3, {SIZE}, {SIZE}\)"):
        twin.images(torch.zeros(1, 3, SIZE + 8, SIZE))
    with pytest.raises(ExportError, match="no layers to train"):
        _ = twin.anatomy
    with pytest.raises(TextTooLong):
        twin.texts(type(twin.tokenize(TEXTS))(torch.ones(1, 999).long(), torch.ones(1, 999).bool()))
    twin.save_pretrained(tmp_path / "copy")
    torch.testing.assert_close(load(tmp_path / "copy").encode_texts(TEXTS), twin.encode_texts(TEXTS), atol=0, rtol=0)
    with pytest.raises(FileExistsError):
        twin.save_pretrained(tmp_path / "copy")


def test_patches_can_be_left_out(tmp_path):
    encoder = clip_encoder()
    assert export(encoder, tmp_path / "out", patches=False).patches is None
    assert not (tmp_path / "out" / "patches.onnx").exists()
    with pytest.raises(ExportError, match="without patches"):
        load(tmp_path / "out").images(encoder.preprocess(pictures(1)), patches=True)


# OpenVINO


def test_openvino_answers_the_same(pair):
    pytest.importorskip("openvino")
    encoder, exported = pair
    other = ExportedModel.open(exported.folder, runtime="openvino", threads=1)
    np.testing.assert_allclose(other.encode_images(pictures(), 2), encoder.encode_images(pictures()).numpy(), atol=1e-5)
    np.testing.assert_allclose(other.encode_texts(TEXTS, 2), encoder.encode_texts(TEXTS).numpy(), atol=1e-5)
    pixels = exported.transform.pixels(pictures())
    for ours, theirs in zip(other.encode_patches(pixels), exported.encode_patches(pixels)):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-4)


def test_the_runtime_is_the_one_asked_for(pair, tmp_path, monkeypatch):
    import shutil

    folder = shutil.copytree(pair[1].folder, tmp_path / "made-for-openvino")
    card = json.loads((folder / EXPORT_CARD).read_text())
    (folder / EXPORT_CARD).write_text(json.dumps({**card, "runtime": "openvino"}))
    assert ExportedModel.open(folder).runtime == "openvino"
    assert ExportedModel.open(folder, runtime="onnxruntime").runtime == "onnxruntime"
    with pytest.raises(ExportError, match="no runtime 'tvm'"):
        ExportedModel.open(folder, runtime="tvm")
    monkeypatch.setattr("ecliptic.core.exported.find_spec", lambda name: None)
    with pytest.warns(RuntimeWarning, match=r"ecliptic\[openvino\]"):
        assert ExportedModel.open(folder).runtime == "onnxruntime"
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"ecliptic\[openvino\]"):
        ExportedModel.open(folder, runtime="openvino").encode_texts(["a cat"])
