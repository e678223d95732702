"""An exported model's linear layers in 8 bits: smaller, and faster where the CPU multiplies integers.

Weights take a symmetric grid for each output channel, activations one asymmetric grid for each tensor (arXiv 2306.12929, section
5): with ranges from a few batches (static), or from every batch as it comes (dynamic). Only products of an activation with a
weight are changed; attention scores, norms, softmax and convolutions stay in float32. Large token tables are stored in 8 bits,
with a scale for each row.

Graphs use standard ONNX operators (QuantizeLinear and DequantizeLinear, or DynamicQuantizeLinear and MatMulInteger), which ONNX
Runtime and OpenVINO turn into integer kernels. Layers that cost too much of the embeddings' direction are left as they were.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ecliptic.core.export import write_graphs
from ecliptic.core.exported import EXPORT_CARD, PATCHES, ExportError
from ecliptic.core.files import atomic_folder
from ecliptic.ops.quantize import Grid, RunningRange, quantize, symmetric

Activations = Literal["static", "dynamic"]
Feeds = Sequence[Mapping[str, NDArray[Any]]]
"""Batches, by the names of a graph's inputs."""

FLOOR = 0.99  # mean cosine to the float model that a tower must keep; ours
TABLE = 1 << 16  # values from which a token table is worth 8 bits; ours
SIEVE = 2  # batches on which one layer after the other is judged; ours


@dataclass(frozen=True)
class Linear:
    """A product with a weight in a graph: names of its node, of the activation, and of the weight (in, out)."""

    name: str
    source: str
    weight: str


@dataclass
class Quantised:
    """What became of a tower. cosine: mean over the samples of the cosine between its rows and the float tower's; kept: names
    of the layers left in float32, the most harmful first; layers: how many there are; patches: as cosine, of the patches."""

    cosine: float
    layers: int
    kept: list[str] = field(default_factory=list)
    patches: float | None = None


def quantise_export(
    source: Path,
    target: Path,
    pixels: Sequence[NDArray[np.float32]],
    ids: Feeds,
    *,
    activations: Activations = "static",
    floor: float = FLOOR,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Quantised]:
    """Write the exported folder `source` with its towers in 8 bits to `target`, which `ecliptic.load` opens as well.

    pixels: batches (B, 3, H, W), and ids: batches of captions as `text.onnx` takes them; static ranges are measured on them, and
    so is the cosine that must stay at `floor` or above. progress: told what is being done. Returns what became of "image" and
    "text". Raises ValueError for settings or samples that do not make sense, ExportError for a folder that is no export.
    """
    if activations not in ("static", "dynamic"):
        raise ValueError(f"activations={activations!r}: choose static or dynamic")
    if not 0 < floor < 1:
        raise ValueError(f"floor={floor}: a cosine between 0 and 1, such as {FLOOR}")
    if not pixels or not ids:
        raise ValueError("there are no samples: 8 bits need pictures and captions to be compared on")
    if not (source / EXPORT_CARD).is_file():
        raise ExportError(f"{source}: no {EXPORT_CARD} in it, so this is not an exported model")
    card = json.loads((source / EXPORT_CARD).read_text(encoding="utf-8"))
    if "quantised" in card:
        raise ExportError(f"{source} is in 8 bits already")
    graph = PATCHES if (source / PATCHES).is_file() else "image.onnx"
    jobs: dict[str, tuple[str, Feeds]] = {
        "image": (graph, [{"pixels": batch} for batch in pixels]),
        "text": ("text.onnx", ids),
    }
    found = {}
    with atomic_folder(target, replace=True) as draft:
        digest = hashlib.blake2b(digest_size=8)
        for tower, (file, feeds) in jobs.items():
            model, found[tower] = _tower(fold(source / file), feeds, tower, activations, floor, progress)
            path = draft / f"{tower}.onnx"
            write_graphs(model, path)
            for written in (path, draft / f"{path.name}.data"):
                digest.update(written.read_bytes())
        for name in ("tokenizer.json", "preprocessor_config.json"):
            shutil.copy(source / name, draft / name)
        told = {"activations": activations, "floor": floor}
        towers = {name: {"cosine": t.cosine, "layers": t.layers, "float32": t.kept} for name, t in found.items()}
        card |= {"id": f"{card['id']}-int8-{digest.hexdigest()}", "quantised": {**told, **towers}}
        (draft / EXPORT_CARD).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return found


def _tower(
    model: Any, feeds: Feeds, tower: str, activations: str, floor: float, progress: Callable[[str], None]
) -> tuple[Any, Quantised]:
    """As many layers in 8 bits as keep the cosine at the floor: all of them, or all but the most harmful."""
    layers = linear_layers(model)
    progress(f"{tower}: {len(layers)} layers")
    wanted = run(model, feeds)
    grids = calibrate(model, feeds, {layer.source for layer in layers}) if activations == "static" else None

    stored = quantise_tables(model)

    def judged(chosen: Sequence[Linear], batches: int | None = None) -> tuple[Any, list[float]]:
        changed = quantise_linear(stored, chosen, grids)
        rows = run(changed, feeds[:batches])
        return changed, [mean_cosine(a, b[: len(a)]) for a, b in zip(rows, wanted, strict=True)]

    changed, cosines = judged(layers)
    kept: list[Linear] = []
    if min(cosines) < floor:
        harm = {}
        for number, layer in enumerate(layers, 1):
            progress(f"{tower}: cosine {min(cosines):.3f} is below {floor}; harm of layer {number} of {len(layers)}")
            harm[layer] = 1 - min(judged([layer], SIEVE)[1])
        worst = sorted(layers, key=harm.__getitem__, reverse=True)
        few, many = 0, len(worst)  # so many left in float are not enough; are enough
        while many - few > 1:
            middle = (few + many) // 2
            progress(f"{tower}: {middle} layers left in float32")
            good = min(judged(worst[middle:])[1]) >= floor
            few, many = (few, middle) if good else (middle, many)
        kept = worst[:many]
        changed, cosines = judged(worst[many:])
    return changed, Quantised(
        cosines[0], len(layers), [layer.name for layer in kept], cosines[1] if len(cosines) > 1 else None
    )


# Graphs


def fold(path: Path) -> Any:
    """An ONNX file -> its model in memory, with everything constant computed, so that weights are initialisers."""
    import onnx
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(Path(folder, "folded.onnx"))
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        model = onnx.load(options.optimized_model_filepath, load_external_data=False)
        onnx.load_external_data_for_model(model, str(path.parent))  # weights that were not folded still lie there
        return model


def linear_layers(model: Any) -> list[Linear]:
    """Every product of an activation with a two-dimensional weight, in the order of the graph."""
    weights = {value.name for value in model.graph.initializer if len(value.dims) == 2}
    return [
        Linear(node.name, node.input[0], node.input[1])
        for node in model.graph.node
        if node.op_type == "MatMul" and node.input[1] in weights and node.input[0] not in weights
    ]


def run(model: Any, feeds: Feeds, outputs: Sequence[str] | None = None) -> list[NDArray[np.float32]]:
    """What a model puts out for all batches: one array per output."""
    session = _session(model)
    parts = [session.run(outputs, dict(batch)) for batch in feeds]
    return [np.concatenate(found) for found in zip(*parts, strict=True)]


def mean_cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """(..., D) twice -> the mean cosine of their rows, in [-1, 1]."""
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(np.mean((a * b).sum(-1) / np.maximum(lengths, 1e-12)))


def calibrate(model: Any, feeds: Feeds, names: set[str]) -> dict[str, Grid]:
    """Grids for the activations `names`, from the running range over the batches."""
    import onnx

    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    given = {value.name for value in watched.graph.output}
    order = sorted(names)
    watched.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in order if name not in given)
    running = {name: RunningRange() for name in order}
    session = _session(watched)
    for batch in feeds:
        for name, value in zip(order, session.run(order, dict(batch)), strict=True):
            running[name].update(torch.from_numpy(value))
    return {name: found.grid() for name, found in running.items()}


def quantise_linear(model: Any, layers: Sequence[Linear], grids: Mapping[str, Grid] | None) -> Any:
    """A copy of the model with these layers in 8 bits; grids: of their activations, or None for dynamic ones."""
    import onnx
    from onnx.helper import make_node

    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    values = {value.name: value for value in changed.graph.initializer}
    chosen = {layer.name: layer for layer in layers}
    nodes: list[Any] = []
    done: set[str] = set()

    def constant(name: str, value: NDArray[Any]) -> str:
        if name not in done:
            changed.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
            done.add(name)
        return name

    for node in changed.graph.node:
        layer = chosen.get(node.name)
        if layer is None:
            nodes.append(node)
            continue
        x, w = layer.source, layer.weight
        weight = torch.from_numpy(onnx.numpy_helper.to_array(values[w]).copy())
        grid = symmetric(weight.abs().amax(0, keepdim=True))
        codes = constant(f"{w}.int8", quantize(weight, grid).to(torch.int8).numpy())
        scale = constant(f"{w}.scale", grid.scale.flatten().float().numpy())
        if grids is None:
            if f"{x}.codes" not in done:
                done.add(f"{x}.codes")
                nodes.append(make_node("DynamicQuantizeLinear", [x], [f"{x}.codes", f"{x}.scale", f"{x}.zero"]))
            own = layer.name
            nodes += [
                make_node("MatMulInteger", [f"{x}.codes", codes, f"{x}.zero"], [f"{own}.sums"], name=f"{own}.integer"),
                make_node("Cast", [f"{own}.sums"], [f"{own}.real"], to=onnx.TensorProto.FLOAT),
                make_node("Mul", [f"{x}.scale", scale], [f"{own}.step"]),
                make_node("Mul", [f"{own}.real", f"{own}.step"], list(node.output), name=own),
            ]
            continue
        if f"{x}.codes" not in done:
            done.add(f"{x}.codes")
            step = constant(f"{x}.scale", grids[x].scale.float().numpy())
            zero = constant(f"{x}.zero", grids[x].zero.to(torch.uint8).numpy())
            nodes.append(make_node("QuantizeLinear", [x, step, zero], [f"{x}.codes"]))
            nodes.append(make_node("DequantizeLinear", [f"{x}.codes", step, zero], [f"{x}.rounded"]))
        if f"{w}.rounded" not in done:
            done.add(f"{w}.rounded")
            none = constant(f"{w}.zero", np.zeros(weight.shape[1], np.int8))
            nodes.append(make_node("DequantizeLinear", [codes, scale, none], [f"{w}.rounded"], axis=1))
        nodes.append(make_node("MatMul", [f"{x}.rounded", f"{w}.rounded"], list(node.output), name=layer.name))
    _replace(changed, nodes)
    return changed


def quantise_tables(model: Any) -> Any:
    """A copy of the model whose large token tables are stored in 8 bits, with one scale for each row."""
    import onnx
    from onnx.helper import make_node

    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    values = {value.name: value for value in changed.graph.initializer}
    nodes = []
    for node in changed.graph.node:
        table = values.get(node.input[0]) if node.op_type == "Gather" else None
        axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 0)
        if table is None or len(table.dims) != 2 or axis != 0 or np.prod(table.dims) < TABLE:
            nodes.append(node)
            continue
        rows = torch.from_numpy(onnx.numpy_helper.to_array(table).copy())
        grid = symmetric(rows.abs().amax(1, keepdim=True))
        name, own = table.name, node.output[0]
        for part, value in (("int8", quantize(rows, grid).to(torch.int8)), ("scale", grid.scale.float())):
            changed.graph.initializer.append(onnx.numpy_helper.from_array(value.numpy(), f"{name}.{part}"))
        nodes += [
            make_node("Gather", [f"{name}.int8", node.input[1]], [f"{own}.codes"], axis=0),
            make_node("Cast", [f"{own}.codes"], [f"{own}.real"], to=onnx.TensorProto.FLOAT),
            make_node("Gather", [f"{name}.scale", node.input[1]], [f"{own}.scale"], axis=0),
            make_node("Mul", [f"{own}.real", f"{own}.scale"], [own], name=node.name),
        ]
    _replace(changed, nodes)
    return changed


def _replace(model: Any, nodes: Sequence[Any]) -> None:
    """Put the nodes in place of the graph's, and drop initialisers that nothing reads any more."""
    kept = list(nodes)  # they may live in the very list that is emptied
    copies = [type(node)() for node in kept]
    for copy, node in zip(copies, kept):
        copy.CopyFrom(node)
    del model.graph.node[:]
    model.graph.node.extend(copies)
    read = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    weights = model.graph.initializer
    for i in reversed(range(len(weights))):
        if weights[i].name not in read:
            del weights[i]


def _session(model: Any) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
