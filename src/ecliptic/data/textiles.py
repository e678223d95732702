"""2,000 simulated textile textures with and without defects, from the PyPI package conformal-clip-data (MIT)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from ecliptic.data.debian import SourceUnavailable
from ecliptic.data.records import Records, decode_image

if TYPE_CHECKING:
    from ecliptic.core.contracts import Record

_CAPTIONS = {
    "nominal": "a grey woven textile without defects",
    "local": "a grey woven textile with a small local defect",
    "global": "a grey woven textile whose weave is changed all over",
}


def textiles() -> Records:
    """1,000 nominal pictures, 500 with a small local defect and 500 changed all over; 250 x 250 pixels, grey as RGB.

    Fields: `id`; `image`; `label`: "nominal", "local" or "global"; `quality`: "good" or "defect"; `caption`, one of three.
    The global change is one of texture statistics and hard to see by eye.
    """
    root = package_data("conformal_clip_data", "conformal-clip-data") / "data" / "textile_images" / "simulated"
    found = [(kind, path) for kind in _CAPTIONS for path in sorted((root / kind).glob("*.jpg"))]
    if not found:
        raise SourceUnavailable(f"{root} holds no pictures: reinstall conformal-clip-data==0.1.4")

    def get(i: int) -> Record:
        kind, path = found[i]
        quality = "good" if kind == "nominal" else "defect"
        return {
            "id": f"textiles/{kind}/{path.stem}",
            "image": str(path),
            "caption": _CAPTIONS[kind],
            "label": kind,
            "quality": quality,
        }

    return Records(len(found), get, load=decode_image, name="textiles")


def package_data(module: str, distribution: str) -> Path:
    """The folder of an installed package, without importing it. SourceUnavailable says what to install."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise SourceUnavailable(f"these pictures come inside {distribution}: pip install 'ecliptic[pictures]'")
    return Path(next(iter(spec.submodule_search_locations)))
