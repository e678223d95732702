"""`ecliptic demo`: the main job on real pictures, written up as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ecliptic.apps.cli._shell import DEFAULT_MODEL, Json, Model, emit, fail, load_model, warn

RESUME = "run the same command again"


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("report.html"),
    work: Annotated[Path, typer.Option("--work", help="Folder for the pictures and the index.")] = Path("demo-output"),
    fetch: Annotated[bool, typer.Option(help="Fetch the Tux Paint stamps (160 MB, once) if they are not here.")] = True,
    shots: Annotated[int, typer.Option(min=1, help="Pictures per class to learn from.")] = 8,
    held_out: Annotated[int, typer.Option(min=10, help="Other pictures to judge on.")] = 150,
    model: Model = DEFAULT_MODEL,
    json: Json = False,
) -> None:
    """Run everything on real pictures and write a report page.

    Indexes and searches pictures by text, names photographs, draws heat maps, and learns from a handful of labelled
    pictures. About three minutes on two cores.
    """
    if out.is_dir() or out.suffix.lower() not in (".html", ".htm"):
        fail(f"--out {out}: name a file that ends in .html")
    from ecliptic.apps.demo import run

    work.mkdir(parents=True, exist_ok=True)
    report = run(out, work, model, load=load_model, say=warn, fetch=fetch, shots=shots, held_out=held_out)
    emit({"report": out.resolve(), "numbers": report.to_json()}, json, str(out.resolve()))
