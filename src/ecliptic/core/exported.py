"""An exported model, run by ONNX Runtime: the same pictures and captions in, the same rows out, and no torch.

`ecliptic.core.export.export` writes the folder. What it holds: image.onnx and text.onnx, each with its weights in a file beside
it that is mapped into memory rather than read; tokenizer.json; preprocessor_config.json; export.json, the card.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
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

EXPORT_CARD = "export.json"
FORMAT = 1


class ExportError(ValueError):
    """A model cannot be exported, or an exported one not be opened; the message says why and what to do."""


class ExportedModel:
    """An exported encoder. Open one with `ExportedModel.open`; each tower is loaded when it is first used.

    id, name, dim, scale, bias, max_tokens, transform, history: those of the encoder that was exported.
    """

    def __init__(self, folder: Path, card: dict[str, Any], transform: ImagePreprocess, quick: bool, threads: int):
        self.folder = folder
        self.transform = transform
        self.id: str = card["id"]
        self.name: str = card["name"]
        self.dim: int = card["dim"]
        self.scale: float = card["scale"]
        self.bias: float | None = card["bias"]
        self.max_tokens: int = card["text"]["tokens"]
        self.history: tuple[dict[str, Any], ...] = tuple(card["steps"])
        self._text_card: dict[str, Any] = card["text"]
        self._quick, self._threads = quick, threads

    @classmethod
    def open(cls, folder: str | Path, *, quick: bool = False, threads: int | None = None) -> ExportedModel:
        """Open what `export` wrote; raises ExportError.

        quick: ready in a tenth of a second, for a handful of queries: graphs are hardly optimised and weights stay as they
        lie in the mapped file; many pictures then take longer. threads: of each tower (default: OMP_NUM_THREADS, else all
        cores).
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
        if threads is None:
            told = os.environ.get("OMP_NUM_THREADS", "")
            threads = int(told) if told.isdigit() else 0
        return cls(folder, card, ImagePreprocess.from_processor(config), quick, threads)

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
        rows: np.ndarray = self._image.run(None, {"pixels": pixels})[0]
        return rows

    def encode_texts(self, texts: Sequence[str], batch_size: int = 128, overflow: Overflow = "truncate") -> np.ndarray:
        """Captions -> (N, D) float32 unit rows in the order given; `overflow` as for `HFEncoder.encode_texts`."""
        ids = self.token_ids(texts, overflow)
        if overflow == "windows":
            parts, owner = windows(ids, self.max_tokens, self._special)
            return average_windows(encode_ids(parts, batch_size, self.dim, self._run_text), owner, len(texts))
        return encode_ids(ids, batch_size, self.dim, self._run_text)

    def token_ids(self, texts: Sequence[str], overflow: Overflow = "truncate") -> Ids:
        """Captions -> token ids, special ones included, cut to `max_tokens` unless `overflow` is "windows"."""
        if isinstance(texts, str):
            raise TypeError("texts must be a list of strings, not one string")
        ids = [entry.ids for entry in self._words.encode_batch(list(texts))]
        return ids if overflow == "windows" else within_limit(ids, self.max_tokens, self._special, overflow, self.name)

    def _run_text(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        ids, mask = pad(rows, self._text_card["pad"], self._text_card["fill"])
        given = {"ids": ids, "mask": mask.astype(np.int64)} if self._text_card["mask"] else {"ids": ids}
        found: np.ndarray = self._text.run(None, given)[0]
        return found

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
    def _text(self) -> Any:
        return self._session("text.onnx")

    def _session(self, name: str) -> Any:
        ort: Any = _onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors; warnings are about graphs that only we could change
        options.intra_op_num_threads = self._threads
        if self._quick:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            return ort.InferenceSession(str(self.folder / name), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own exceptions share no base class
            raise ExportError(f"{self.folder / name} cannot be opened ({error}): export the model again") from error


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError('exported models run on onnxruntime: pip install "ecliptic[search]"') from error
    return onnxruntime
