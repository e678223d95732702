"""Searching without torch, and decoding large JPEGs fast: what the index remembers, what is refused, what is equal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ecliptic.apps import exported
from ecliptic.apps.index import Index, Signature
from ecliptic.apps.index.towers import TowerEmbedder, decoded_fast, signature
from ecliptic.core import export as core_export
from ecliptic.core.encoder import load
from ecliptic.core.exported import ExportedModel, ExportError
from tests.core.test_inputs import large_jpeg
from tests.towers import FAMILIES

ROOT = Path(__file__).resolve().parents[2]


def hits(done) -> list[tuple[str, float]]:
    assert done.exit_code == 0, done.stderr
    return [(hit["path"], hit["score"]) for hit in json.loads(done.stdout)["hits"]]


def same(ours: list[tuple[str, float]], theirs: list[tuple[str, float]]) -> None:
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    assert [score for _, score in ours] == pytest.approx([score for _, score in theirs], abs=1e-5)


def test_a_search_in_words_imports_no_torch(cli, model, pictures):
    value = json.loads(cli("index", pictures, "--model", model, "--json").stdout)
    assert value["exported"] == str(exported.place(load(model).id))
    query = ["search", "a cat on a mat", "--minus", "a dog", "--index", str(pictures), "--json"]
    code = (
        "import sys\nfrom ecliptic.apps.cli import main\n"
        f"try: main({query!r})\nexcept SystemExit as end: assert not end.code\n"
        "heavy = ('torch', 'transformers', 'sklearn', 'scipy', 'onnx', 'accelerate', 'faiss')\n"
        "sys.stderr.write(repr([name for name in heavy if name in sys.modules]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "[]")
    found = [(hit["path"], hit["score"]) for hit in json.loads(done.stdout)["hits"]]
    assert len(found) == 10
    same(found, hits(cli(*query, "--model", model)))  # the one that is named is loaded with torch


def test_search_prefers_the_twin_and_does_without(cli, model, pictures, monkeypatch):
    from ecliptic.apps.cli import search

    cli("index", pictures, "--model", model)
    query = ["search", "a cat", "--image", next(pictures.rglob("*.png")), "--index", pictures, "--json"]
    asked = []
    monkeypatch.setattr(search, "load_model", lambda name: asked.append(name) or load(name))
    with_twin = hits(cli(*query))
    assert not asked
    monkeypatch.setattr(exported, "find_spec", lambda name: None)  # as if onnxruntime were not installed
    same(with_twin, hits(cli(*query)))
    assert asked == [str(Path(model).resolve())]


@pytest.mark.parametrize("damage", ["missing", "another model's", "torn"])
def test_a_twin_that_is_not_one_is_passed_over(cli, model, pictures, damage, monkeypatch, tmp_path):
    cli("index", pictures, "--model", model)
    wanted = hits(cli("search", "a cat", "--index", pictures, "--json"))
    monkeypatch.setenv("ECLIPTIC_CACHE", str(tmp_path / "cache"))
    place = exported.place(load(model).id)
    if damage != "missing":
        core_export.export(FAMILIES["siglip"](), place)
    if damage == "torn":
        (place / "export.json").write_text("{")
    assert exported.twin(load(model).id) is None
    same(hits(cli("search", "a cat", "--index", pictures, "--json")), wanted)
    cli("index", pictures)  # and it is made again
    found = exported.twin(load(model).id)
    assert found is not None
    assert found.id == load(model).id


def test_the_model_need_not_be_there_any_more(cli, model, pictures, tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    load(model).save_pretrained(mine)
    cli("index", pictures, "--model", mine)
    mine.rename(tmp_path / "gone")
    assert len(hits(cli("search", "a cat", "--index", pictures, "--json"))) == 10
    monkeypatch.setenv("ECLIPTIC_CACHE", str(tmp_path / "cache"))
    done = cli("search", "a cat", "--index", pictures)
    assert done.exit_code == 2
    assert f"{mine}: no such file or folder" in done.stderr


def test_indexing_goes_on_where_exporting_cannot(cli, model, pictures, monkeypatch, tmp_path):
    monkeypatch.setenv("ECLIPTIC_CACHE", str(tmp_path / "cache"))
    assert json.loads(cli("index", pictures, "--model", model, "--no-export", "--json").stdout)["exported"] is None
    assert not (tmp_path / "cache" / "exported").exists()

    def refuse(encoder, folder, **_):
        raise ExportError("it has no form")

    monkeypatch.setattr(core_export, "export", refuse)
    done = cli("index", pictures, "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["exported"] is None
    assert "was not exported: it has no form" in done.stderr
    assert len(hits(cli("search", "a cat", "--index", pictures, "--json"))) == 10


def test_export_gives_a_model_that_the_verbs_take(cli, model, pictures, tmp_path):
    out = tmp_path / "onnx"
    value = json.loads(cli("export", model, "--out", out, "--json").stdout)
    assert value["model"] == load(model).id
    assert value["bytes"] == sum(file.stat().st_size for file in out.iterdir())
    assert max(value["difference"].values()) < 1e-5
    assert "other files" in cli("export", model, "--out", pictures).stderr

    # An index of either kind answers to the other.
    cli("index", pictures, "--model", out)
    by_export = hits(cli("search", "a cat", "--index", pictures, "--json", "--model", out))
    same(by_export, hits(cli("search", "a cat", "--index", pictures, "--json", "--model", model)))
    again = json.loads(cli("index", pictures, "--model", model, "--json").stdout)
    assert (again["unchanged"], again["embedded"]) == (12, 0)
    other = tmp_path / "other"
    FAMILIES["siglip"]().save_pretrained(other)
    refused = cli("search", "a cat", "--index", pictures, "--model", other)
    assert refused.exit_code == 2
    assert "was built with model" in refused.stderr

    rows = []
    for name, source in (("torch", model), ("onnx", out)):
        cli("embed", pictures, "--out", tmp_path / f"{name}-rows", "--model", source, "--dtype", "float32")
        rows.append(np.load(tmp_path / f"{name}-rows" / "img_emb" / "img_emb_0.npy"))
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-5)


def test_verbs_that_do_more_than_embed_take_an_export_too(cli, model, pictures, tmp_path):
    out = tmp_path / "onnx"
    cli("export", model, "--out", out)

    def both(*words):
        found = []
        for name, source in (("torch", model), ("onnx", out)):
            done = cli(*[str(word).replace("MODEL", str(source)).replace("NAME", name) for word in words], "--json")
            assert done.exit_code == 0, done.stderr
            found.append(json.loads(done.stdout))
        return found

    one = pictures / "cat" / "0.png"
    by_torch, by_onnx = both("highlight", "a cat", one, "--out", tmp_path / "NAME.png", "--model", "MODEL")
    assert by_onnx["strongest"]["value"] == pytest.approx(by_torch["strongest"]["value"], abs=1e-4)
    named = both("classify", pictures, "--labels", "a cat, a dog", "--model", "MODEL")
    for a, b in zip(*(found["pictures"] for found in named), strict=True):
        assert a["probabilities"] == pytest.approx(b["probabilities"], abs=1e-3)
    a, b = both("evaluate", "MODEL", pictures)
    assert a.keys() == b.keys()
    for key in a:
        assert b[key]["value"] == pytest.approx(a[key]["value"], abs=1e-6), key
    both("adapt", pictures, "--method", "gda", "--shots", 2, "--model", "MODEL", "--out", tmp_path / "NAME-predictor")
    named = both("classify", pictures, "--predictor", tmp_path / "NAME-predictor", "--model", "MODEL")
    assert [p["label"] for p in named[0]["pictures"]] == [p["label"] for p in named[1]["pictures"]]

    table = tmp_path / "pairs.csv"
    table.write_text("image,caption\n" + "".join(f"{path},a cat {i}\n" for i, path in enumerate([one] * 4)))
    for words in (
        ("export", out, "--out", tmp_path / "again"),
        ("train", table, "--batch-size", 2, "--model", out, "--out", tmp_path / "trained"),
    ):
        refused = cli(*words)
        assert refused.exit_code == 2
        assert "no layers to train" in refused.stderr


def test_signatures_are_those_of_the_model(tmp_path):
    for name, family in FAMILIES.items():
        encoder = family()
        core_export.export(encoder, tmp_path / name)
        assert signature(ExportedModel.open(tmp_path / name)) == signature(encoder)
        assert signature(encoder, fast=True) != signature(encoder)
        assert decoded_fast(signature(encoder, fast=True))
        assert not decoded_fast(signature(encoder))
    assert exported.place("some/hub name-0a1b").name == "some_hub_name-0a1b"


def test_where_selects_by_fields(cli, model, pictures):
    embedder = TowerEmbedder(load(model))
    with Index.create(pictures / ".ecliptic", embedder.signature, root=pictures, source=model) as target:
        target.add(pictures, embedder, describe=lambda path: {"kind": path.parent.name, "room": 12, "code": "12"})
    search = ["search", "a cat", "--index", pictures, "--json", "--where"]
    found = hits(cli(*search, "kind=dog"))
    assert sorted(Path(path).parent.name for path, _ in found) == ["dog"] * 4
    assert len(hits(cli(*search, "kind=fish", "--where", "room=12", "--where", 'code="12"'))) == 4
    assert json.loads(cli(*search, "kind=dog").stdout)["hits"][0]["kind"] == "dog"
    for none in ("code=12", 'room="12"', "kind=cow", "shelf=1"):
        done = cli(*search, none)
        assert done.exit_code == 1
        assert f"no indexed picture has {none}" in done.stderr
    for wrong in ("kind", "=dog", "kind=", 'ki"nd=dog'):
        assert "--where" in cli(*search, wrong).stderr


def test_an_index_remembers_how_its_pictures_were_decoded(cli, model, tmp_path):
    folder = tmp_path / "large"
    folder.mkdir()
    for seed in range(3):
        large_jpeg(folder / f"{seed}.jpg", seed)
    encoder = load(model)
    value = json.loads(cli("index", folder, "--model", model, "--fast", "--json").stdout)
    assert value["fast"] is True
    again = json.loads(cli("index", folder, "--json").stdout)  # without being told
    assert (again["fast"], again["unchanged"]) == (True, 3)
    refused = cli("index", folder, "--exact")
    assert refused.exit_code == 2
    assert "was made with fast decoding" in refused.stderr
    assert "leave --exact out" in refused.stderr

    files = sorted(folder.glob("*.jpg"))
    with Index.open(folder / ".ecliptic") as index:
        assert index.signature == signature(encoder, fast=True)
        stored = np.stack([index.vector(file) for file in files])
    fast, exact = encoder.encode_images(files, decode="fast").numpy(), encoder.encode_images(files).numpy()
    np.testing.assert_allclose(stored, fast, atol=1e-3)  # fp16
    assert np.abs(fast - exact).max() > 1e-6
    assert (fast * exact).sum(1).min() > 0.99
    best = json.loads(cli("search", "--image", files[1], "--index", folder, "--json").stdout)["hits"][0]
    assert best["path"] == str(files[1])
    assert best["score"] > 0.99

    cli("index", folder, "--model", model, "--index", tmp_path / "exact")
    refused = cli("index", folder, "--index", tmp_path / "exact", "--fast")
    assert "was made with exact decoding" in refused.stderr


def test_embeddings_remember_how_their_pictures_were_decoded(cli, model, tmp_path):
    folder = tmp_path / "large"
    folder.mkdir()
    for seed in range(2):
        large_jpeg(folder / f"{seed}.jpg", seed)
    out = tmp_path / "fast"
    command = ["embed", folder, "--out", out, "--model", model, "--dtype", "float32"]
    assert cli(*command, "--fast").exit_code == 0
    rows = np.load(out / "img_emb" / "img_emb_0.npy")
    wanted = load(model).encode_images(sorted(folder.glob("*.jpg")), decode="fast").numpy()
    np.testing.assert_allclose(rows, wanted, atol=1e-6)
    refused = cli(*command)
    assert refused.exit_code == 2
    assert "decode 'fast', not None" in refused.stderr


def test_a_signature_that_another_model_made_is_never_fast_by_accident():
    assert not decoded_fast(Signature("m-fast", "0a1b", 4))
