"""`ecliptic compress`: a folder that every verb takes, and a report that tells what it cost."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from ecliptic.apps import compress as module
from ecliptic.apps.compress import compress
from ecliptic.core.encoder import load
from ecliptic.core.exported_encoder import ExportedEncoder
from ecliptic.data.folder import folder as folder_records
from tests.apps.conftest import picture
from tests.towers import FAMILIES


@pytest.fixture
def classes(tmp_path):
    """Fifteen pictures of one class and nine of another: half right by chance would hide what is counted."""
    for kind, count, seed in (("cat", 15, 0), ("dog", 9, 100)):
        for number in range(count):
            picture(tmp_path / "pictures" / kind / f"{number}.png", seed=seed + number)
    return tmp_path / "pictures"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compressed_encoder_answers_nearly_the_same(family, classes, tmp_path):
    encoder = FAMILIES[family]()
    out = tmp_path / "int8"
    done = compress(encoder, out, calibrate=folder_records(classes), runtime="onnxruntime")
    model = load(out)
    assert isinstance(model, ExportedEncoder)
    assert model.id == done.model != encoder.id
    assert done.source == encoder.id
    files = sorted(classes.rglob("*.png"))
    ours, theirs = model.encode_images(files), encoder.encode_images(files)
    assert 0.99 < float((ours * theirs).sum(-1).mean()) < 0.9999999
    assert (done.pictures, done.unseen, done.own, done.classes) == (12, True, True, 2)
    assert done.cosine_images[1] <= done.cosine_images[0] <= 1 + 1e-6
    assert done.activations == "static"
    assert json.loads((out / "parity.json").read_text())["cosine_images"] == list(done.cosine_images)
    told = (out / "parity.md").read_text()
    assert told == str(done)
    assert "zero-shot accuracy, 2 classes" in told
    assert done.bytes[1] == sum(f.stat().st_size for f in out.iterdir() if f.name not in module.REPORT)


def test_the_report_is_of_the_pictures_that_set_no_range(classes, tmp_path, monkeypatch):
    seen: dict[str, list[bytes]] = {"set": [], "judge": []}
    quantise, measure = module.quantise_export, module._measure

    def spy(source, target, pixels, ids, **rest):
        seen["set"] += [row.tobytes() for batch in pixels for row in batch]
        return quantise(source, target, pixels, ids, **rest)

    def judged(encoder, folder, judges, captions, names):
        seen["judge"] += [row.tobytes() for batch in module._pixels(encoder, judges) for row in batch]
        return measure(encoder, folder, judges, captions, names)

    monkeypatch.setattr(module, "quantise_export", spy)
    monkeypatch.setattr(module, "_measure", judged)
    compress(FAMILIES["clip"](), tmp_path / "a", calibrate=folder_records(classes), runtime="onnxruntime")
    assert len(seen["set"]) == len(seen["judge"]) == 12
    assert not set(seen["set"]) & set(seen["judge"])


def test_accuracy_and_agreement_are_counted(classes, tmp_path, monkeypatch):
    """A compressed model that always says the second class: half right, and in agreement where the first said so too."""
    encoder = FAMILIES["clip"]()

    def stuck(self, pixels):
        head = encoder.encode_texts(["a photo of a cat.", "a photo of a dog."]).numpy()
        return np.repeat(head[1:] - 0.5 * head[:1], len(pixels), 0)

    monkeypatch.setattr(ExportedEncoder, "encode_pixels", stuck)
    done = compress(encoder, tmp_path / "a", int8=False, calibrate=folder_records(classes), runtime="onnxruntime")
    _, judges, *_ = module._pictures(encoder, folder_records(classes), 0)
    pixels = np.concatenate(module._pixels(encoder, judges))
    with torch.no_grad():
        rows = encoder.images(torch.from_numpy(pixels)).pooled
    head = encoder.encode_texts(["a photo of a cat.", "a photo of a dog."])
    first = (rows @ head.T).argmax(-1)
    truth = torch.tensor([record["label"] == "dog" for record in judges]).long()
    assert done.accuracy == pytest.approx([float((first == truth).float().mean()), float(truth.float().mean())])
    assert 0.5 not in done.accuracy
    assert done.agreement == pytest.approx(float((first == 1).float().mean()))
    assert done.activations is None


def test_without_pictures_ranges_are_dynamic_and_the_report_says_so(tmp_path):
    done = compress(FAMILIES["clip"](), tmp_path / "out", runtime="onnxruntime")
    assert (done.activations, done.own, done.accuracy) == ("dynamic", False, None)
    assert "a few built-in" in str(done)


def test_float32_is_exact_and_the_runtime_is_kept(tmp_path):
    pytest.importorskip("openvino")
    encoder = FAMILIES["siglip"]()
    done = compress(encoder, tmp_path / "out", int8=False, runtime="openvino")
    assert done.cosine_images[1] > 1 - 1e-5
    assert done.model == encoder.id
    assert load(tmp_path / "out").exported.runtime == done.runtime == "openvino"


def test_few_or_unreadable_pictures(classes, tmp_path):
    for path in sorted(classes.rglob("*.png"))[:20]:
        path.write_bytes(b"no picture")
    done = compress(FAMILIES["clip"](), tmp_path / "out", calibrate=folder_records(classes), runtime="onnxruntime")
    assert (done.pictures, done.unseen, len(done.unreadable)) == (4, False, 20)
    assert "which also set the ranges" in str(done)
    for path in classes.rglob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="none of the pictures"):
        compress(FAMILIES["clip"](), tmp_path / "none", calibrate=folder_records(classes), runtime="onnxruntime")
    assert not (tmp_path / "none").exists()


def test_what_cannot_be_done_is_refused(tmp_path, monkeypatch):
    encoder = FAMILIES["clip"]()
    with pytest.raises(ValueError, match="onnxruntime or openvino"):
        compress(encoder, tmp_path / "out", runtime="tvm")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"ecliptic\[openvino\]"):
        compress(encoder, tmp_path / "out", runtime="openvino")
    with pytest.raises(ImportError, match=r"ecliptic\[search\]"):
        compress(encoder, tmp_path / "out")
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="other files"):
        compress(encoder, tmp_path)


def test_every_verb_takes_the_folder(cli, model, pictures, tmp_path):
    out = tmp_path / "int8"
    done = cli("compress", model, "--int8", "--calibrate", pictures, "--out", out, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["model"] == load(out).id
    one = next(pictures.rglob("*.png"))
    for words in (
        ("index", pictures, "--model", out),
        ("search", "a cat", "--index", pictures),
        ("search", "a cat", "--index", pictures, "--model", out),
        ("embed", pictures, "--out", tmp_path / "rows", "--model", out),
        ("classify", pictures, "--labels", "a cat, a dog", "--model", out),
        ("evaluate", out, pictures),
        ("highlight", "a cat", one, "--out", tmp_path / "map.png", "--model", out),
        ("find", "a cat", one, "--out", tmp_path / "found.png", "--model", out),
        ("adapt", pictures, "--method", "gda", "--shots", 2, "--out", tmp_path / "predictor", "--model", out),
        ("classify", pictures, "--predictor", tmp_path / "predictor", "--model", out),
    ):
        answer = cli(*words)
        nothing = words[0] == "find" and "nothing here looks like" in answer.stderr  # a random model may say so
        assert answer.exit_code == int(nothing), (words, answer.stderr)
    refused = cli("search", "a cat", "--index", pictures, "--model", model)
    assert refused.exit_code == 2
    assert "was built with model" in refused.stderr
    again = cli("compress", out, "--out", tmp_path / "again")
    assert again.exit_code == 2
    assert "exported model" in again.stderr
