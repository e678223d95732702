"""An exported model, run by ONNX Runtime or OpenVINO: the same pictures and captions in, the same rows out, and no torch.

`ecliptic.core.export.export` writes the folder. What it holds: image.onnx and text.onnx, each with its weights in a file beside
it that is mapped into memory rather than read; patches.onnx, the image tower with its patches as a second output, over the same
weights; tokenizer.json; preprocessor_config.json; export.json, the card.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from ecliptic.core.inputs import (
    Decode,
    Ids,
    Overflow,
    average_windows,
    encode_ids,
    encode_pictures,
    pad,
    windows,
    within_limit,
)
from ecliptic.core.preprocess import ImagePreprocess

EXPORT_CARD, PATCHES = "export.json", "patches.onnx"
FORMAT = 2  # 1 did not know the size of its pictures
RUNTIMES = ("onnxruntime", "openvino")


class ExportError(ValueError):
    """A model cannot be exported, or an exported one not be opened; the message says why and what to do."""


class ExportedModel:
    """An exported encoder, without torch. Open one with `ExportedModel.open`; each tower is loaded when it is first used.

    id, name, dim, scale, bias, max_tokens, transform, history: those of the encoder that was exported. size: (height, width) of
    its pictures. patch: side of a patch in pixels, or None where patches were left out. runtime: what runs it.
    """

    def __init__(
        self,
        folder: Path,
        card: dict[str, Any],
        transform: ImagePreprocess,
        quick: bool,
        threads: int,
        runtime: str = RUNTIMES[0],
    ):
        self.folder = folder
        self.transform = transform
        self.id: str = card["id"]
        self.name: str = card["name"]
        self.dim: int = card["dim"]
        self.scale: float = card["scale"]
        self.bias: float | None = card["bias"]
        self.max_tokens: int = card["text"]["tokens"]
        self.history: tuple[dict[str, Any], ...] = tuple(card["steps"])
        self.size: tuple[int, int] = tuple(card["image"]["size"])
        self.patch: int | None = card["image"]["patch"]
        self.runtime = runtime
        self._text_card: dict[str, Any] = card["text"]
        self._quick, self._threads = quick, threads

    @classmethod
    def open(
        cls, folder: str | Path, *, quick: bool = False, threads: int | None = None, runtime: str | None = None
    ) -> ExportedModel:
        """Open what `export` or `compress` wrote; raises ExportError.

        quick: ready in a tenth of a second, for a handful of queries: graphs are hardly optimised and weights stay as they
        lie in the mapped file; many pictures then take longer. threads: of each tower (default: OMP_NUM_THREADS, else all
        cores). runtime: "onnxruntime" or "openvino"; both read the same files. Default: what the folder was made for, or
        ONNX Runtime, with a warning, where that is not installed.
        """
        folder = Path(folder)
        if not (folder / EXPORT_CARD).is_file():
            raise ExportError(f"{folder}: no {EXPORT_CARD} in it, so this is not an exported model")
        try:
            card = json.loads((folder / EXPORT_CARD).read_text(encoding="utf-8"))
            config = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ExportError(f"{folder} is damaged ({error}): export the model again") from error
        if card["format"] > FORMAT:
            raise ExportError(f"{folder} was written by a newer version (format {card['format']})")
        if card["format"] < FORMAT:
            raise ExportError(f"{folder} was written by an older version: export the model again")
        if threads is None:
            told = os.environ.get("OMP_NUM_THREADS", "")
            threads = int(told) if told.isdigit() else 0
        return cls(folder, card, ImagePreprocess.from_processor(config), quick, threads, _runtime(runtime, card))

    def logits(self, image: np.ndarray, text: np.ndarray) -> np.ndarray:
        """Unit rows (B, D) and (K, D) -> (B, K): scale * cosine + bias."""
        return self.scale * image @ text.T + (self.bias or 0.0)

    # Pictures and strings to embeddings

    def encode_images(
        self,
        images: Iterable[Any],
        batch_size: int = 32,
        *,
        workers: int = 2,
        decode: Decode | None = None,
        errors: dict[int, Exception] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Pictures, or paths to them, -> (N, D) float32 unit rows; arguments as for `HFEncoder.encode_images`."""
        return encode_pictures(
            images,
            batch_size,
            transform=self.transform,
            dim=self.dim,
            run=self.encode_pixels,
            workers=workers,
            decode=decode,
            errors=errors,
            progress=progress,
        )

    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """(B, 3, H, W) float32, as the transform gives it -> (B, D) float32 unit rows."""
        rows: np.ndarray = self._image.run(["rows"], {"pixels": pixels})[0]
        return rows

    def encode_patches(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B, 3, H, W) -> (B, D) unit rows, and (B, N, D) patches in the joint space, row by row, not of unit length.

        Raises ExportError where the model was exported without them.
        """
        if self.patch is None:
            raise ExportError(f"{self.folder} was exported without patches: export the model again with them")
        rows, patches = self._patches.run(["rows", "patches"], {"pixels": pixels})
        return rows, patches

    def encode_texts(self, texts: Sequence[str], batch_size: int = 128, overflow: Overflow = "truncate") -> np.ndarray:
        """Captions -> (N, D) float32 unit rows in the order given; `overflow` as for `HFEncoder.encode_texts`."""
        ids = self.token_ids(texts, overflow)
        if overflow == "windows":
            parts, owner = windows(ids, self.max_tokens, self._special)
            return average_windows(encode_ids(parts, batch_size, self.dim, self.encode_ids), owner, len(texts))
        return encode_ids(ids, batch_size, self.dim, self.encode_ids)

    def token_ids(self, texts: Sequence[str], overflow: Overflow = "truncate") -> Ids:
        """Captions -> token ids, special ones included, cut to `max_tokens` unless `overflow` is "windows"."""
        if isinstance(texts, str):
            raise TypeError("texts must be a list of strings, not one string")
        ids = [entry.ids for entry in self._words.encode_batch(list(texts))]
        return ids if overflow == "windows" else within_limit(ids, self.max_tokens, self._special, overflow, self.name)

    @property
    def padding(self) -> tuple[int, int]:
        """The token that fills captions up, and the length that they are filled up to; 0 for the longest of a batch."""
        return self._text_card["pad"], self._text_card["fill"]

    def encode_ids(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """B captions as token ids -> (B, D) float32 unit rows, in one batch."""
        found: np.ndarray = self._text.run(["rows"], self.text_feeds(rows))[0]
        return found

    def text_feeds(self, rows: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        """Captions as token ids -> the inputs of text.onnx."""
        ids, mask = pad(rows, *self.padding)
        return {"ids": ids, "mask": mask.astype(np.int64)} if self._text_card["mask"] else {"ids": ids}

    # What is loaded when it is first used

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self._text_card["special"])

    @cached_property
    def _words(self) -> Any:
        from tokenizers import Tokenizer

        words = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        words.no_truncation()  # the limit and its policy are ours
        words.no_padding()
        return words

    @cached_property
    def _image(self) -> Any:
        return self._session("image.onnx")

    @cached_property
    def _patches(self) -> Any:
        return self._session(PATCHES)

    @cached_property
    def _text(self) -> Any:
        return self._session("text.onnx")

    def _session(self, name: str) -> Any:
        open_graph = _open_vino if self.runtime == "openvino" else _onnx_session
        try:
            return open_graph(self.folder / name, self._threads, self._quick)
        except ImportError:
            raise
        except Exception as error:  # the exceptions of neither runtime share a base class
            raise ExportError(f"{self.folder / name} cannot be opened ({error}): export the model again") from error


def _runtime(asked: str | None, card: dict[str, Any]) -> str:
    if asked is not None and asked not in RUNTIMES:
        raise ExportError(f"no runtime {asked!r}: choose {' or '.join(RUNTIMES)}")
    chosen: str = asked or card.get("runtime") or RUNTIMES[0]
    if asked is None and chosen == "openvino" and find_spec("openvino") is None:
        warnings.warn(
            'made for OpenVINO, which is not installed (pip install "ecliptic[openvino]"): ONNX Runtime runs it, '
            "more slowly",
            RuntimeWarning,
            stacklevel=3,
        )
        return RUNTIMES[0]
    return chosen


def _onnx_session(path: Path, threads: int, quick: bool) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError('exported models run on onnxruntime: pip install "ecliptic[search]"') from error
    ort: Any = onnxruntime
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors; warnings are about graphs that only we could change
    options.intra_op_num_threads = threads
    if quick:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class _OpenVino:
    """A graph in OpenVINO, asked as ONNX Runtime's sessions are."""

    def __init__(self, compiled: Any):
        self._request = compiled.create_infer_request()  # one at a time: a request holds its own memory
        self._lock = Lock()

    def run(self, outputs: Sequence[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        with self._lock:
            found = self._request.infer(feeds)
            return [np.array(found[name]) for name in outputs]


def _open_vino(path: Path, threads: int, quick: bool) -> _OpenVino:
    try:
        import openvino
    except ImportError as error:
        raise ImportError('this runtime needs openvino: pip install "ecliptic[openvino]"') from error
    options: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # what is not in int8 stays float32: answers must not depend on the CPU
        **({"INFERENCE_NUM_THREADS": threads} if threads else {}),
    }
    return _OpenVino(openvino.Core().compile_model(str(path), "CPU", options))
