"""Exported twins of models that made an index, kept in the cache, so that a search starts without torch.

`ecliptic index` writes one, `ecliptic search` prefers it. A twin has the id of its model, and that id holds a digest of the
weights: a model that changed has another id, and its twin is not mistaken for it.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ecliptic.data.cache import cache_dir

if TYPE_CHECKING:
    from ecliptic.core.encoder import HFEncoder
    from ecliptic.core.exported import ExportedModel


def place(model_id: str) -> Path:
    """Where the twin of a model is kept; hub names hold slashes."""
    return cache_dir() / "exported" / re.sub(r"[^\w.-]+", "_", model_id)


def twin(model_id: str) -> ExportedModel | None:
    """The exported twin, set up for a few queries; None where there is none, or nothing to run it with."""
    folder = place(model_id)
    if not folder.is_dir() or find_spec("onnxruntime") is None:
        return None
    from ecliptic.core.exported import ExportedModel, ExportError

    try:
        found = ExportedModel.open(folder, quick=True)
    except ExportError:  # a cache entry: the model itself is still there
        return None
    return found if found.id == model_id else None


def keep_twin(encoder: HFEncoder) -> Path | None:
    """Export a model into the cache unless it is there; None where the packages for it are missing.

    Raises ExportError where the model cannot be exported, OSError where the cache cannot be written.
    """
    if find_spec("onnx") is None or find_spec("onnxruntime") is None:
        return None
    identity = encoder.id
    if twin(identity) is None:
        from ecliptic.core.export import export

        export(encoder, place(identity), patches=False)
    return place(identity)
