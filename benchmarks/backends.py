"""Encoding pictures and captions on a CPU: PyTorch eager, compiled, in bfloat16; ONNX Runtime and OpenVINO, float32 and 8 bits.

    python -m benchmarks.backends [--rounds N] [--threads 1 2]

Each backend takes turns with PyTorch's float32 eager towers, as this toolkit runs them; a ratio above 1 is faster than those.
Pictures are prepared outside the measured call; captions are tokenised inside it, on both sides. Cosines are to the eager
float32 embeddings, over pictures and captions that set no range; accuracy is zero-shot on 15 subjects of the stamps, of the
offline model.

- ViT-B/32: CLIP's shape. No trained weights of it come in a package, and with random ones no activation has outliers; so the
  image tower holds the trained ViT-S/14 of `offline` twice, side by side, on its 768 channels. The text tower is random.
- offline: its own trained towers, MiniLM for captions. Patches bring its ViT in, which pooled embeddings do without.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

import ecliptic
from benchmarks.encode import build, captions
from benchmarks.measure import Row, compare, save
from ecliptic.core.encoder import HFEncoder
from ecliptic.core.export import export
from ecliptic.core.exported import ExportedModel
from ecliptic.core.int8 import Activations, mean_cosine, quantise_export
from ecliptic.data.stamps import stamps

BATCH, CALIBRATION, JUDGED = 8, 32, 96


def with_trained_statistics(encoder: HFEncoder, trained: Any) -> None:
    """Fill a ViT-B/32's image tower with a DINOv2 ViT-S twice, side by side: block-diagonal weights, norms over both halves."""

    def diagonal(weight: Tensor) -> Tensor:
        return torch.block_diag(weight, weight)

    def twice(vector: Tensor) -> Tensor:
        return torch.cat([vector, vector])

    tower: Any = encoder.model.vision_model
    with torch.no_grad():
        source = trained.embeddings
        kernel = source.patch_embeddings.projection.weight
        wide = interpolate(kernel, size=(32, 32), mode="bilinear") * (14 / 32) ** 2
        tower.embeddings.patch_embedding.weight.copy_(torch.cat([wide, wide]))
        tower.embeddings.class_embedding.copy_(twice(source.cls_token.flatten()))
        places = source.position_embeddings[0]
        side = round((len(places) - 1) ** 0.5)
        grid = interpolate(places[1:].T.reshape(1, -1, side, side), size=(7, 7), mode="bilinear")[0].flatten(1).T
        places = torch.cat([places[:1], grid])
        tower.embeddings.position_embedding.weight.copy_(torch.cat([places, places], 1))
        tower.pre_layrnorm.weight.fill_(float(places.std()))
        for block, old in zip(tower.encoder.layers, trained.encoder.layer, strict=True):
            attention, first, second = old.attention, old.layer_scale1.lambda1, old.layer_scale2.lambda1
            layers = (
                (block.self_attn.q_proj, attention.q_proj, None),
                (block.self_attn.k_proj, attention.k_proj, None),
                (block.self_attn.v_proj, attention.v_proj, None),
                (block.self_attn.out_proj, attention.o_proj, first),
                (block.mlp.fc1, old.mlp.fc1, None),
                (block.mlp.fc2, old.mlp.fc2, second),
            )
            for new, layer, gain in layers:
                factor = torch.ones(len(layer.weight)) if gain is None else gain
                new.weight.copy_(diagonal(layer.weight * factor[:, None]))
                new.bias.copy_(twice(layer.bias * factor))
            for new, norm in ((block.layer_norm1, old.norm1), (block.layer_norm2, old.norm2)):
                new.weight.copy_(twice(norm.weight))
                new.bias.copy_(twice(norm.bias))
        tower.post_layernorm.weight.copy_(twice(trained.layernorm.weight))
        tower.post_layernorm.bias.copy_(twice(trained.layernorm.bias))
        nn.init.orthogonal_(encoder.model.visual_projection.weight)


def vit_b_32(offline: HFEncoder) -> HFEncoder:
    encoder = build()
    with_trained_statistics(encoder, offline.model.vision_model.backbone)
    return encoder


class Samples:
    """Stamps: some set ranges, others judge."""

    def __init__(self, encoder: HFEncoder):
        records = stamps()
        order = np.random.default_rng(0).permutation(len(records))[: CALIBRATION + JUDGED]
        chosen = [records[int(i)] for i in order]
        parts = [chosen[i : i + BATCH] for i in range(0, len(chosen), BATCH)]
        pixels = [encoder.preprocess([record["image"] for record in part]).numpy() for part in parts]
        self.set_ranges, self.pictures = pixels[: CALIBRATION // BATCH], pixels[CALIBRATION // BATCH :]
        self.labels = [record["label"] for record in chosen[CALIBRATION:]]
        texts = [records[int(i)]["caption"] for i in np.random.default_rng(1).permutation(len(records))[:192]]
        self.words, self.captions = texts[:64], texts[64:]


def backends(encoder: HFEncoder, folder: Path, threads: int) -> dict[str, tuple[Any, Any]]:
    """Name -> (pixels -> rows, captions -> rows), each on `threads` threads."""

    def exported(kind: str, runtime: str) -> tuple[Any, Any]:
        model = ExportedModel.open(folder / kind, runtime=runtime, threads=threads)
        return model.encode_pixels, model.encode_texts

    def in_bfloat16(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def run(given: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return call(given)

        return run

    def eager_texts(given: list[str]) -> np.ndarray:
        return encoder.encode_texts(given).numpy()

    compiled = encoder.clone()
    compiled.model.vision_model = torch.compile(compiled.model.vision_model, dynamic=False)
    found: dict[str, tuple[Any, Any]] = {
        "PyTorch, compiled (pictures only)": (compiled.encode_pixels, None),
        "PyTorch, bfloat16": (in_bfloat16(encoder.encode_pixels), in_bfloat16(eager_texts)),
    }
    for runtime, name in (("onnxruntime", "ONNX Runtime"), ("openvino", "OpenVINO")):
        found[f"{name}, float32"] = exported("float32", runtime)
        found[f"{name}, 8 bits static"] = exported("static", runtime)
        if runtime == "onnxruntime":  # OpenVINO has no integer kernels for ranges that change
            found[f"{name}, 8 bits dynamic"] = exported("dynamic", runtime)
    return found


def write_exports(encoder: HFEncoder, samples: Samples, folder: Path) -> dict[str, list[str]]:
    """Three folders: float32, static and dynamic. Returns the layers that 8 bits left in float32."""
    export(encoder, folder / "float32", patches=False)
    model = ExportedModel.open(folder / "float32")
    rows = sorted(model.token_ids(samples.words), key=len)
    ids = [model.text_feeds(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]
    kept = {}
    kinds: tuple[Activations, ...] = ("static", "dynamic")
    for activations in kinds:
        found = quantise_export(
            folder / "float32", folder / activations, samples.set_ranges, ids, activations=activations
        )
        kept[activations] = [layer for tower in found.values() for layer in tower.kept]
    return kept


def quality(rows: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    return {"cosine": mean_cosine(rows, reference), "lowest": float((rows * reference).sum(1).min())}


def measured(
    name: str, encoder: HFEncoder, samples: Samples, folder: Path, threads: int, rounds: int
) -> tuple[list[Row], dict[str, Any]]:
    """Rows of speed, and what each backend keeps: kind of input -> backend -> cosines (and accuracy, of `offline`)."""
    torch.set_num_threads(threads)
    lines = captions(encoder, 32, 64)

    def eager(given: list[str]) -> np.ndarray:
        return encoder.encode_texts(given).numpy()

    def answers(pictures: Callable[[Any], Any], texts: Callable[[Any], Any]) -> float:
        classes = sorted(set(samples.labels))
        rows = np.concatenate([pictures(part) for part in samples.pictures])
        named = (rows @ texts(classes).T).argmax(1)
        return float(np.mean([classes[i] == label for i, label in zip(named, samples.labels, strict=True)]))

    everything = np.concatenate([encoder.encode_pixels(batch) for batch in samples.pictures])
    rows: list[Row] = []
    kept: dict[str, Any] = {"pictures": {}, "captions": {}}
    if name == "offline":
        kept["pictures"]["PyTorch, eager"] = {"accuracy": answers(encoder.encode_pixels, eager)}
    for backend, (pictures, texts) in backends(encoder, folder, threads).items():
        jobs = [("pictures", pictures, encoder.encode_pixels, samples.pictures[0])]
        if texts is not None:
            jobs.append(("captions", texts, eager, lines))
        for kind, call, base, given in jobs:
            job = f"{name}, {kind}, {threads} thread{'s' * (threads > 1)}"
            rows.append(
                compare(
                    job,
                    backend,
                    lambda c=call, g=given: c(g),
                    lambda b=base, g=given: b(g),
                    rounds=rounds,
                    clock=time.perf_counter,
                    note=f"{len(given)} a call",
                )
            )
        kept["pictures"][backend] = quality(np.concatenate([pictures(part) for part in samples.pictures]), everything)
        if texts is not None:
            kept["captions"][backend] = quality(texts(samples.captions), eager(samples.captions))
            if name == "offline":
                kept["pictures"][backend]["accuracy"] = answers(pictures, texts)
    return rows, kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    warnings.simplefilter("ignore")  # captions longer than a tower reads, and what torch.compile says of itself
    offline = ecliptic.load("offline")
    rows: list[Row] = []
    kept: dict[str, Any] = {}
    size: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, encoder in (("ViT-B/32", vit_b_32(offline)), ("offline", offline)):
            folder, samples = Path(scratch, name.replace("/", "-")), Samples(encoder)
            found = write_exports(encoder, samples, folder)
            size[name] = {
                kind: sum(file.stat().st_size for file in (folder / kind).iterdir())
                for kind in ("float32", "static", "dynamic")
            }
            for threads in given.threads:
                more, quality = measured(name, encoder, samples, folder, threads, given.rounds)
                rows += more
            kept[name] = {**quality, "float32 layers": found}
    settings = {
        "rounds": given.rounds,
        "clock": "wall",
        "ratio": "seconds of eager PyTorch by seconds of the backend",
        "kept": kept,
        "bytes": size,
        "pictures": JUDGED,
        "calibration": CALIBRATION,
    }
    save("backends", rows, settings, ("torch", "transformers", "onnxruntime", "openvino"))


if __name__ == "__main__":
    main()
