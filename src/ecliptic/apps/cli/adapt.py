"""`ecliptic adapt FOLDER`: learn your classes from a few pictures of each, and see what it gained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ecliptic.apps.cli._inputs import has, open_records
from ecliptic.apps.cli._shell import (
    DEFAULT_MODEL,
    Json,
    Model,
    bad_json,
    bad_lines,
    counting,
    emit,
    fail,
    load_model,
    note,
    warn,
)

NEEDS = True


def adapt(
    source: Annotated[str, typer.Argument(help="A folder per class, a CSV of image and label, or a built-in source.")],
    method: Annotated[str, typer.Option(help="A method of the stage adapt: `ecliptic methods adapt`.")] = "gda",
    shots: Annotated[int, typer.Option(min=1, help="Pictures per class to learn from.")] = 8,
    held_out: Annotated[int, typer.Option(min=1, help="Other pictures to judge on, at most.")] = 400,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the fitted predictor.")] = None,
    name: Annotated[
        list[str] | None, typer.Option("--name", help="Words for a class, as in 'ok=a flawless textile'.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="A setting of the method: alpha=1.0")] = None,
    seed: Annotated[int, typer.Option(help="Which pictures are learnt from.")] = 0,
    html: Annotated[Path | None, typer.Option("--html", help="Also write a page with pictures.")] = None,
    model: Model = DEFAULT_MODEL,
    json: Json = False,
) -> None:
    """Fit a predictor on a few labelled pictures of each class.

    Prints the accuracy of words alone and of the fitted predictor on pictures that it has not seen, and their
    difference, with intervals. The saved folder is for `ecliptic classify --predictor` and `ecliptic evaluate`.
    """
    if out is not None and out.exists() and any(out.iterdir()) and not (out / "predictor.json").exists():
        fail(f"{out} holds other files: choose an empty folder")
    words = {}
    for item in name or []:
        label, equals, meaning = item.partition("=")
        if not equals or not meaning.strip():
            fail(f"--name {item!r}: write label=words")
        words[label.strip()] = meaning.strip()
    records = open_records(source)
    if not has(records, "label"):
        fail(f"{source} has no labels: make one sub-folder per class, or a CSV with columns image and label")
    from ecliptic.apps import adaptation
    from ecliptic.core.encoder import BUILT_IN
    from ecliptic.core.predictor_io import save_predictor

    judge = adaptation.predictor(method, adaptation.parse_settings(set_ or []))
    encoder = load_model(model)
    with counting("judging") as advance:
        done = adaptation.adapt(
            encoder, records, judge, shots=shots, held_out=held_out, words=words, seed=seed, progress=advance
        )
    if not json:
        for line in bad_lines(done.bad):
            warn(line)
    done.report.commands.append(f"ecliptic adapt {source} --method {method} --shots {shots}")
    if out is not None:
        save_predictor(done.judge, out, with_encoder=encoder.name not in BUILT_IN)
        note(f"saved {out}")
    if html is not None:
        note(f"wrote {done.report.html(html)}")
    value = {
        **done.report.to_json(),
        "method": method,
        "classes": done.classes,
        "shots": done.shots,
        "out": out,
        "bad": bad_json(done.bad),
    }
    saved = f"\n\nuse it: ecliptic classify PICTURES --predictor {out}" if out is not None else ""
    emit(value, json, lambda: f"{done.report}{saved}")
