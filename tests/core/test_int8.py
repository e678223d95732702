"""8 bits: what the integer kernels of both runtimes compute is what the grids say, and the floor on the cosine is kept."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from ecliptic.core import int8
from ecliptic.core.encoder import load
from ecliptic.core.export import export
from ecliptic.core.exported import EXPORT_CARD, ExportedModel, ExportError
from ecliptic.core.int8 import (
    calibrate,
    fold,
    linear_layers,
    mean_cosine,
    quantise_export,
    quantise_linear,
    quantise_tables,
    run,
)
from ecliptic.ops.quantize import IntegerLinear, asymmetric, quantize, symmetric
from tests.towers import FAMILIES

RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(24, 10)).astype(np.float32) * np.linspace(0.1, 3, 10, dtype=np.float32)
TEXTS = ["a cat", "a photo of a small dog and a red ball", "the moon", "a drawing of a blue circle", "two cups"]


def product(weight=WEIGHT, table=None):
    """y = x @ weight, and with a table, x = its rows at `ids`."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["rows"], name="product")]
    given = [numpy_helper.from_array(weight, "w")]
    source = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 24])
    if table is not None:
        nodes.insert(0, helper.make_node("Gather", ["t", "ids"], ["x"], name="look"))
        given.append(numpy_helper.from_array(table, "t"))
        source = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])
    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["n", weight.shape[1]])
    graph = helper.make_graph(nodes, "g", [source], [rows], given)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def pictures(encoder, n=6, seed=0):
    size = encoder.image_size
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(2, 3, size, size)).astype(np.float32) for _ in range(n // 2)]


def captions(folder):
    model = ExportedModel.open(folder)
    return [model.text_feeds([row]) for row in model.token_ids(TEXTS)]


@pytest.fixture(scope="module", params=FAMILIES)
def plain(request, tmp_path_factory):
    encoder = FAMILIES[request.param]()
    folder = tmp_path_factory.mktemp("plain") / request.param
    export(encoder, folder)
    return encoder, folder


def test_static_products_are_those_of_integers():
    feeds = [{"x": RNG.normal(1, 2, (50, 24)).astype(np.float32)} for _ in range(3)]
    model = product()
    (layer,) = linear_layers(model)
    grids = calibrate(model, feeds, {"x"})
    low = high = None
    for batch in feeds:  # the running range, by hand
        a, b = float(batch["x"].min()), float(batch["x"].max())
        low, high = (a, b) if low is None else (0.9 * low + 0.1 * a, 0.9 * high + 0.1 * b)
    wanted = asymmetric(torch.tensor(low), torch.tensor(high))
    assert grids["x"].scale.item() == pytest.approx(wanted.scale.item(), rel=1e-6)
    assert grids["x"].zero.item() == wanted.zero.item()

    x = RNG.normal(1, 4, (200, 24)).astype(np.float32)  # beyond the range too
    (found,) = run(quantise_linear(model, [layer], grids), [{"x": x}])
    step, zero = float(grids["x"].scale), int(grids["x"].zero)
    largest = np.abs(WEIGHT).max(0)
    for j in range(10):
        scale = np.float32(largest[j] / np.float32(127))
        for i in range(0, 200, 7):
            total = 0
            for k in range(24):
                code = min(255, max(0, round(float(np.float32(x[i, k]) / np.float32(step))) + zero))
                total += (code - zero) * round(float(WEIGHT[k, j] / scale))
            assert found[i, j] == pytest.approx(total * step * float(scale), rel=1e-5, abs=1e-6)

    weight = torch.from_numpy(WEIGHT.T.copy())
    grid = symmetric(weight.abs().amax(1, keepdim=True))
    simulated = IntegerLinear(quantize(weight, grid), grid, None, grids["x"])
    np.testing.assert_array_equal(simulated(torch.from_numpy(x)).numpy(), found)  # to the bit
    assert np.abs(found - x @ WEIGHT).max() > 1e-3


def test_dynamic_ranges_are_those_of_the_batch():
    x = RNG.normal(size=(30, 24)).astype(np.float32)
    model = product()
    changed = quantise_linear(model, linear_layers(model), None)
    assert {"DynamicQuantizeLinear", "MatMulInteger"} <= {node.op_type for node in changed.graph.node}
    for factor in (1, 1000):  # a fixed range could not follow
        (found,) = run(changed, [{"x": factor * x}])
        grid = asymmetric(torch.tensor(factor * x.min()), torch.tensor(factor * x.max()))
        weight = torch.from_numpy(WEIGHT.T.copy())
        own = symmetric(weight.abs().amax(1, keepdim=True))
        simulated = IntegerLinear(quantize(weight, own), own, None, grid)(torch.from_numpy(factor * x))
        np.testing.assert_allclose(found, simulated.numpy(), rtol=1e-5, atol=1e-5 * factor)


def test_activations_are_rounded_once_and_weights_stored_once():
    model = product()
    model.graph.node.append(helper.make_node("MatMul", ["x", "w"], ["more"], name="again"))
    model.graph.output.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, ["n", 10]))
    layers = linear_layers(model)
    changed = quantise_linear(model, layers, calibrate(model, [{"x": np.ones((1, 24), np.float32)}], {"x"}))
    kinds = [node.op_type for node in changed.graph.node]
    assert kinds.count("QuantizeLinear") == 1
    assert kinds.count("DequantizeLinear") == 2
    names = [value.name for value in changed.graph.initializer]
    assert sorted(names) == ["w.int8", "w.scale", "w.zero", "x.scale", "x.zero"]
    onnx.checker.check_model(changed)


def test_large_tables_are_stored_by_rows():
    table = (RNG.normal(size=(3000, 24)) * np.geomspace(0.01, 10, 3000)[:, None]).astype(np.float32)
    table[7] = 0
    model = product(np.eye(24, dtype=np.float32), table)
    changed = quantise_tables(model)
    ids = np.array([0, 7, 1500, 2999])
    (found,) = run(changed, [{"ids": ids}])
    for row, wanted in zip(found, table[ids]):
        assert np.abs(row - wanted).max() <= np.abs(wanted).max() / 127 / 2 * 1.001
    assert not found[1].any()
    assert changed.ByteSize() < model.ByteSize() / 3
    small = product(np.eye(24, dtype=np.float32), table[:100])
    assert [node.op_type for node in quantise_tables(small).graph.node] == ["Gather", "MatMul"]


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_a_whole_model_in_8_bits(plain, tmp_path, activations):
    encoder, folder = plain
    out = tmp_path / "int8"
    found = quantise_export(folder, out, pictures(encoder), captions(folder), activations=activations)
    assert set(found) == {"image", "text"}
    model = load(out)
    fresh = pictures(encoder, 8, seed=1)
    for tower in found.values():
        assert not tower.kept
        assert tower.cosine > 0.995
        assert tower.layers >= 18  # three blocks of six
    with torch.no_grad():
        wanted = [encoder.images(torch.from_numpy(batch), patches=True) for batch in fresh]
    given = [model.images(torch.from_numpy(batch), patches=True) for batch in fresh]
    for ours, theirs in zip(given, wanted):
        assert mean_cosine(ours.pooled.numpy(), theirs.pooled.numpy()) > 0.995
        assert mean_cosine(ours.tokens.numpy(), theirs.tokens.numpy()) > 0.99
        assert not torch.equal(ours.pooled, theirs.pooled)
    assert mean_cosine(model.encode_texts(TEXTS).numpy(), encoder.encode_texts(TEXTS).numpy()) > 0.995
    kinds = {node.op_type for node in onnx.load(out / "image.onnx", load_external_data=False).graph.node}
    assert ("QuantizeLinear" if activations == "static" else "MatMulInteger") in kinds
    assert model.id.startswith(f"{encoder.id}-int8-")
    assert (out / "image.onnx.data").stat().st_size < (folder / "image.onnx.data").stat().st_size / 2
    card = json.loads((out / EXPORT_CARD).read_text())
    assert card["quantised"]["activations"] == activations
    with pytest.raises(ExportError, match="8 bits already"):
        quantise_export(out, tmp_path / "again", pictures(encoder), captions(folder))


def test_openvino_computes_the_same_in_8_bits(plain, tmp_path):
    pytest.importorskip("openvino")
    encoder, folder = plain
    quantise_export(folder, tmp_path / "int8", pictures(encoder), captions(folder))
    ours = ExportedModel.open(tmp_path / "int8", runtime="onnxruntime")
    theirs = ExportedModel.open(tmp_path / "int8", runtime="openvino")
    for batch in pictures(encoder, seed=2):
        assert mean_cosine(ours.encode_pixels(batch), theirs.encode_pixels(batch)) > 0.999
    assert mean_cosine(ours.encode_texts(TEXTS), theirs.encode_texts(TEXTS)) > 0.999


def test_layers_that_cost_too_much_stay_in_float(plain, tmp_path, monkeypatch):
    """One layer made harmful: its activations get one huge outlier, so that a single grid leaves the others no codes."""
    encoder, folder = plain
    spoilt = shutil.copytree(folder, tmp_path / "spoilt")
    true_grids = calibrate
    model = fold(spoilt / "text.onnx")
    bad = linear_layers(model)[-1]  # the projection: all goes through it

    def wide(model, feeds, names):
        grids = true_grids(model, feeds, names)
        if bad.source in grids:
            grids[bad.source] = asymmetric(torch.tensor(-3000.0), torch.tensor(3000.0))
        return grids

    monkeypatch.setattr(int8, "calibrate", wide)
    said: list[str] = []
    found = quantise_export(spoilt, tmp_path / "int8", pictures(encoder), captions(spoilt), progress=said.append)
    sharing = [layer.name for layer in linear_layers(model) if layer.source == bad.source]
    assert found["text"].kept
    assert set(found["text"].kept) <= set(sharing)
    assert found["text"].cosine >= int8.FLOOR
    assert not found["image"].kept
    assert any("harm of layer" in line for line in said)


def test_bad_settings_are_refused(plain, tmp_path):
    encoder, folder = plain
    shots, words = pictures(encoder), captions(folder)
    with pytest.raises(ValueError, match="static or dynamic"):
        quantise_export(folder, tmp_path / "x", shots, words, activations="mixed")
    with pytest.raises(ValueError, match="floor"):
        quantise_export(folder, tmp_path / "x", shots, words, floor=1)
    with pytest.raises(ValueError, match="no samples"):
        quantise_export(folder, tmp_path / "x", [], words)
    with pytest.raises(ExportError, match="not an exported model"):
        quantise_export(tmp_path, tmp_path / "x", shots, words)
    assert not (tmp_path / "x").exists()
