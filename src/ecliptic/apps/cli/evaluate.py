"""`ecliptic evaluate MODEL DATA`: recall for captions, accuracy for labels, each with its interval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ecliptic.apps.cli._inputs import open_records
from ecliptic.apps.cli._shell import Json, emit, fail, load_model, note

NEEDS = True


def evaluate(
    model: Annotated[str, typer.Argument(help="A model as for --model, or a folder that `adapt` saved.")],
    data: Annotated[
        str, typer.Argument(help="stamps, photos ..., a folder per class, or a CSV of image and caption or label.")
    ],
    task: Annotated[str | None, typer.Option(help="retrieval or zero_shot. Default: whatever the data allow.")] = None,
    template: Annotated[
        list[str] | None,
        typer.Option("--template", help="Sentence around a label, or a set: photo, drawing, ensemble, plain."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures the model sees at a time.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    html: Annotated[Path | None, typer.Option("--html", help="Also write a page with pictures.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the numbers as a JSON file.")] = None,
    json: Json = False,
) -> None:
    """Measure a model on pictures with captions or labels.

    Recall@1/5/10 both ways where there are captions, accuracy where there are labels, each with a 95 % interval.
    Pictures that cannot be read are left out and counted.
    """
    if task is not None and (task := task.replace("-", "_")) not in ("retrieval", "zero_shot"):
        fail(f"no task {task!r}: there are retrieval and zero_shot")
    records = open_records(data)
    subject = _subject(model)
    from ecliptic.core.progress import Progress
    from ecliptic.eval import evaluate as measure

    templates: Any = template if template and "{}" in template[0] else (template or ["photo"])[0]
    with Progress("evaluating", len(records), unit="pictures") as bar:
        report = measure(
            subject,
            records,
            task=task,  # type: ignore[arg-type]
            templates=templates,
            batch_size=batch_size,
            seed=seed,
            progress=bar.advance,
        )
    command = f"ecliptic evaluate {model} {data}"
    if command not in report.commands:
        report.commands.append(command)
    if html is not None:
        note(f"wrote {report.html(html)}")
    if out is not None:
        note(f"wrote {report.save(out)}")
    emit(report.to_json(), json, lambda: str(report))


def _subject(model: str) -> Any:
    """An encoder, or a fitted predictor."""
    if (Path(model) / "predictor.json").is_file():
        from ecliptic.core.predictor_io import load_predictor

        return load_predictor(model)
    return load_model(model)
