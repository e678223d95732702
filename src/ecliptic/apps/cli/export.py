"""`ecliptic export MODEL --out FOLDER`: a model as plain ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ecliptic.apps.cli._shell import Json, emit, load_model

NEEDS = True


def export(
    model: Annotated[str, typer.Argument(help="A built-in (offline, tiny), a folder, a weight file, or a hub name.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the exported model.")],
    json: Json = False,
) -> None:
    """Write both towers as ONNX files, to run without torch.

    The tokenizer and the image settings go beside them. The result is compared with the model on sample pictures and
    captions, and refused if any component of an embedding differs by more than 0.0001. Give the folder as --model to
    `index`, `search` and `embed`.
    """
    from ecliptic.core.export import export as write

    encoder = load_model(model)
    parity = write(encoder, out)
    size = sum(file.stat().st_size for file in out.iterdir())
    value = {
        "out": out,
        "model": encoder.id,
        "bytes": size,
        "difference": {"images": parity.images, "texts": parity.texts},
        "samples": {"pictures": parity.pictures, "captions": parity.captions},
    }
    worst = max(parity.images, parity.texts)
    emit(value, json, f"{encoder.id} in {out}, {size / 1e6:,.0f} MB; embeddings within {worst:.0e} of torch's")
