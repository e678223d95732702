"""`ecliptic compress MODEL --int8 --calibrate FOLDER`: a model made small and fast for a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ecliptic.apps.cli._inputs import open_records
from ecliptic.apps.cli._shell import Json, bad_lines, emit, load_model, note, warn

NEEDS = True


def compress(
    model: Annotated[str, typer.Argument(help="A built-in (offline, tiny), a folder, a weight file, or a hub name.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the compressed model.")],
    int8: Annotated[bool, typer.Option("--int8/--float32", help="8 bits, or only another runtime.")] = True,
    calibrate: Annotated[
        str | None,
        typer.Option(
            "--calibrate", "-c", help="Pictures like those it will see: a folder (of classes), a CSV, a source."
        ),
    ] = None,
    runtime: Annotated[
        str | None, typer.Option(help="onnxruntime or openvino. [openvino if it is installed]", show_default=False)
    ] = None,
    floor: Annotated[float, typer.Option(help="Mean cosine to the original that each tower must keep.")] = 0.99,
    seed: Annotated[int, typer.Option(help="Of the choice of pictures.")] = 0,
    json: Json = False,
) -> None:
    """Put a model into 8 bits, and measure what it gained and lost.

    With --calibrate, ranges are set and the result is judged on your pictures; class folders add zero-shot accuracy before
    and after. Layers that lose too much stay in float32. Every verb takes the folder as --model, but those that train. The
    report lies in it as parity.md and parity.json.
    """
    from ecliptic.apps.compress import compress as squeeze

    records = None if calibrate is None else open_records(calibrate)
    done = squeeze(
        load_model(model), out, int8=int8, calibrate=records, runtime=runtime, floor=floor, seed=seed, progress=note
    )
    if not json:
        for line in bad_lines(list(done.unreadable)):
            warn(line)
    emit(done.to_json(), json, lambda: str(done))
